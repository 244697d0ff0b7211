"""One torch thread in every test and in every process that a test starts, and no traces in the user's home.

On small tensors, threads that wait for each other make two busy cores ten times slower.
"""

import atexit
import os
import shutil
import tempfile

import hypothesis

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["AIMSCALE_CACHE"] = _cache = tempfile.mkdtemp(prefix="aimscale-cache-")
_owner = os.getpid()
hypothesis.settings.register_profile("same", derandomize=True)  # a failure is the doing of a change, not of chance
hypothesis.settings.load_profile("same")
atexit.register(lambda: shutil.rmtree(_cache, ignore_errors=True) if os.getpid() == _owner else None)
