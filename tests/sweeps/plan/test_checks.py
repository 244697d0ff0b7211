from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aimscale.sweeps.plan.checks import Problem, check, refuse
from aimscale.sweeps.plan.planner import plan
from aimscale.sweeps.plan.sweepfile import SweepError


@pytest.fixture
def problems(tmp_path: Path, write_sweep: Any, write_images: Any) -> Any:
    """What is in the way of two runs whose data are there, with some fields changed; (kind, key) -> problem."""
    for name, seed, number in (("train", 1, 40), ("validation", 2, 10), ("other", 3, 10)):
        write_images(tmp_path / name, number, seed=seed)
    for seed, name in enumerate(("fit", "test", "strange")):
        write_images(tmp_path / name, 12, seed=seed, classes=("a", "c" if name == "strange" else "b"))
    base: dict[str, Any] = {
        "model": {"image_size": 16, "patch_size": 4},
        "data": {"sources": [{"path": "train"}]},
        "optimiser": {"batch_size": 64},
        "validation": {"path": "validation", "centre_crop": 1.0},
        "probes": [{"task": "mine", "train": "fit", "test": "test"}],
    }

    def find(changes: dict[str, Any], **top: Any) -> dict[tuple[str, str], Problem]:
        sweep = write_sweep(sizes=["rung-32"], seeds=[0, 1], base=base | changes, **top)
        runs = plan(sweep)
        found = check(sweep, runs)
        assert not (tmp_path / "root").exists()
        if found:
            with pytest.raises(SweepError) as caught:
                refuse(sweep, runs)
            assert all(problem.why in str(caught.value) for problem in found)
        else:
            refuse(sweep, runs)
        return {(each.kind, each.key): each for each in found}

    return find


@pytest.mark.parametrize(
    ("changes", "top", "kind", "key", "words"),
    [
        ({"data": {"sources": [{"path": "nowhere"}]}}, {}, "data", "data.sources", "/nowhere does not exist"),
        ({"data": {"sources": [{"path": "wds:///no/{0..2}.tar"}]}}, {}, "data", "data.sources", "3 shards"),
        (
            {"data": {"sources": [{"path": "train", "fingerprint": "0" * 16}]}},
            {},
            "data",
            "data.sources",
            "other images",
        ),
        ({}, {"unique_images": [41]}, "counts", "data.unique_images", "40 usable"),
        ({"validation": {"path": "validation", "num_images": 11}}, {}, "counts", "validation.num_images", "10 usable"),
        ({"validation": {"path": "train"}}, {}, "overlap", "validation.path", "40 training images"),
        ({"probes": [{"task": "mine", "train": "fit", "test": "gone"}]}, {}, "data", "probes.mine", "/gone"),
        ({"probes": [{"task": "mine", "train": "fit", "test": "fit"}]}, {}, "probe", "probes.mine", "12 of the 12"),
        ({"probes": [{"task": "mine", "train": "fit", "test": "strange"}]}, {}, "probe", "probes.mine", "no c"),
        ({"probes": [{"task": "mine", "train": "other", "test": "test"}]}, {}, "probe", "probes.mine", "no labels"),
        ({"probes": [{"task": "pets", "train": "fit", "test": "test"}]}, {}, "probe", "probes.pets", "37 classes"),
        ({"schedule": {"warmup_images": 640}}, {}, "schedule", "schedule.warmup_images", "512"),
        ({}, {"cost": {"memory_gb": 0.1}}, "memory", "cost.memory_gb", "does not fit"),
        ({}, {"slurm": {"time_min": 2}}, "time", "slurm.time_min", "120 s"),
        ({"runtime": {"compile": True, "device": "cpu"}}, {}, "setting", "runtime.compile", "CPU"),
        ({"runtime": {"device": "cuda"}}, {}, "setting", "runtime.device", "no GPU"),
        ({"runtime": {"loggers": ["wandb"]}}, {}, "setting", "runtime.loggers", "not installed"),
        ({"model": {"image_size": 16, "patch_size": 4, "channels": 2}}, {}, "setting", "model.channels", "not 2"),
    ],
)
def test_what_would_stop_a_run_is_found_before_it_starts(
    problems: Any, changes: dict[str, Any], top: dict[str, Any], kind: str, key: str, words: str
) -> None:
    found = problems(changes, **top)
    assert list(found) == [(kind, key)]
    assert words in found[kind, key].why
    assert "\n" not in found[kind, key].why
    assert len(found[kind, key].run_ids) == 2


def test_all_is_said_at_once_and_of_the_runs_that_it_concerns(problems: Any) -> None:
    assert problems({}) == {}
    found = problems({"validation": {"path": "validation", "num_images": 10**4}}, unique_images=[None, 50])
    assert {key: len(each.run_ids) for (_, key), each in found.items()} == {
        "validation.num_images": 4,
        "data.unique_images": 2,
    }
