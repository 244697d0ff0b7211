"""One torch thread in every test and in every process that a test starts.

On small tensors, threads that wait for each other make two busy cores ten times slower.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
os.environ.setdefault("DS_ACCELERATOR", "cpu")
