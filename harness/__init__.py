"""One run: data, DeepSpeed engine, training, checkpoints, validation, probes, metrics."""

import os

# MKL's own allocator, which reads this at its first product, may spin for ever in a process that was forked from one
# with threads, as loader processes are.
os.environ.setdefault("MKL_DISABLE_FAST_MM", "1")
