"""Entry point `python -m aimscale.harness.train RUN_DIR`, which launchers start directly, by torchrun or in Slurm.

`python -m aimscale.harness.train --warm` is the server that forks the runs which a worker starts one after the other
(`sweeps.engine.processes`): for a small run, imports would cost more than everything else.
"""

import gc
import json
import os
import sys
import time

import torch

from aimscale.harness.distributed.group import import_deepspeed
from aimscale.harness.run.provenance import git_commit
from aimscale.harness.train.attempt import main


def serve_forks() -> None:
    """Fork a process for each request on the standard input, and return in it alone, as if it had been started cold.

    A request is a line of JSON: `arguments`, `environment` and `log`, the file for the output. The reply is a line with
    the process id, written by the forked process once its parent has ended and the launcher, the nearest subreaper, has
    become its parent. The imports here start no thread (but OpenBLAS, which ends its own before a fork)
    and do not touch CUDA; DeepSpeed, which chooses its device at import, is imported ahead only if torch has no GPU.
    """
    if torch.version.cuda is None and torch.version.hip is None:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import_deepspeed()
    git_commit()  # cached now, since the files may change later
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        between = os.fork()
        if between == 0:
            between = os.getpid()
            if os.fork():
                os._exit(0)
            while os.getppid() == between:
                time.sleep(0.001)
            gc.unfreeze()  # nanobind reports objects that are frozen at exit as leaks
            _become(**json.loads(line))
            return
        if os.waitpid(between, 0)[1]:
            break
    os._exit(0)


def _become(arguments: list[str], environment: dict[str, str], log: str) -> None:
    """Turn this process into the one that a launcher would have started."""
    os.setsid()
    os.write(1, f"{os.getpid()}\n".encode())
    for path, flags, descriptors in ((os.devnull, os.O_RDONLY, [0]), (log, os.O_WRONLY | os.O_APPEND, [1, 2])):
        opened = os.open(path, flags)
        for descriptor in descriptors:
            os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = arguments


if sys.argv[1:] == ["--warm"]:
    serve_forks()
main()
