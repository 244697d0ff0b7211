"""One torch thread in every test and in every process that a test starts, and no traces in the user's home.

On small tensors, threads that wait for each other make two busy cores ten times slower.
"""

import atexit
import gc
import multiprocessing.forkserver
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.pop("COLUMNS", None)  # parallel test processes are told 80, what a user pipes is told nothing
os.environ["MKL_DISABLE_FAST_MM"] = "1"  # tests fork from processes with threads; that allocator may then spin for ever
os.environ["AIMSCALE_CACHE"] = _cache = tempfile.mkdtemp(prefix="aimscale-cache-")
_owner = os.getpid()
# What a shell without job control starts in the background ignores Ctrl-C, and so would all that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
hypothesis.settings.register_profile("same", derandomize=True)  # a failure is the doing of a change, not of chance
hypothesis.settings.load_profile("same")
# A test's fork cannot ask its parent's server for processes; it starts its own.
os.register_at_fork(after_in_child=multiprocessing.forkserver._forkserver.__init__)  # type: ignore[misc]
atexit.register(lambda: shutil.rmtree(_cache, ignore_errors=True) if os.getpid() == _owner else None)


@pytest.fixture(scope="session")
def write_images() -> Callable[..., str]:
    """Return a function that packs PNGs of noise; classes alternate, the first is redder and the second bluer."""
    import numpy as np
    from pictures import saved
    from PIL import Image

    from aimscale.harness.data.store.pack import PackedImage, write_dataset

    def write(folder: Path, number: int, *, seed: int = 0, classes: tuple[str, ...] = (), side: int = 16) -> str:
        rng = np.random.default_rng(seed)
        images = []
        for i in range(number):
            pixels = rng.integers(0, 120, (side, side, 3), dtype=np.uint8)
            if classes:
                pixels[:, :, 2 * (i % 2)] += 100
            images.append(PackedImage(f"{i:04d}", "png", saved(Image.fromarray(pixels)), i % 2 if classes else None))
        write_dataset(folder, images, classes=classes or None)
        return str(folder)

    return write


@pytest.fixture
def evaluations(
    write_images: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[list[float]]]:
    """Validation loss and the accuracy of every kind of probe of one model, for each group and share of memory."""
    from aimscale.aim.model import AIM
    from aimscale.aim.weights import write_weights
    from aimscale.harness.data.store.index import open_dataset
    from aimscale.harness.probe.run import load_budget, probe_run
    from aimscale.harness.run.config import build_model_config, run_config
    from aimscale.harness.run.directory import RunDir
    from aimscale.harness.validation import HeldOut, validate

    def evaluate(places: list[tuple[Any, float]], *, num_images: int, epochs: int) -> list[list[float]]:
        fit, test = (
            write_images(tmp_path / name, num_images, seed=seed, classes=("a", "b"))
            for seed, name in enumerate(("fit", "test"))
        )
        kinds = ["linear", "attentive", "efficient", "knn", "lora"]
        probe = {"task": "redder", "train": fit, "test": test, "kinds": kinds, "epochs": epochs, "lrs": [1e-2]}
        fields = {
            "model": {"size": "w64-d2", "image_size": 16, "patch_size": 4},
            "data": {"sources": [{"path": fit}]},
            "optimiser": {"batch_size": 16},
            "budgets": [64],
            "validation": {"path": test, "num_prefixes": 2},
            "probes": [probe | {"batch_size": 20, "precision": "fp32"}],
        }
        config = run_config(fields, "the test")
        found = []
        for number, (group, share) in enumerate(places):
            monkeypatch.setattr("aimscale.harness.probe.features.extraction.CACHE_SHARE", share)
            run = RunDir.create(tmp_path / f"run-{number}", config)
            write_weights(AIM(build_model_config(config.training)).state_dict(), run.model_file(64))
            model, section = load_budget(run, config, 64, group.device), config.evaluation.validation
            images = HeldOut(open_dataset(test), section, config.training.model, group, max_bad_fraction=0.0)
            loss = validate(model, images, group).loss
            ((_, entries),) = probe_run(run.path, group=group)
            assert [entry["kind"] for entry in entries] == kinds
            found.append([loss, *(entry["top1"] for entry in entries)])
        return found

    return evaluate


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Call a test that is marked `fork` in a fork of this process.

    A backward pass of tensors that say they are on a GPU starts threads of PyTorch; no later fork of the
    process could train then (https://github.com/pytorch/pytorch/wiki/Autograd-and-Fork).
    """
    if pyfuncitem.get_closest_marker("fork") is None:
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    child = multiprocessing.get_context("fork").Process(target=pyfuncitem.obj, kwargs=arguments)
    gc.collect()  # as `run_in_processes` does: what a fork collects may wait for threads of this process
    child.start()
    child.join()
    assert child.exitcode == 0, "the test failed in its fork, see its output"
    return True
