from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aimscale.sweeps.planning.checks import check, raise_on_problems
from aimscale.sweeps.planning.planner import plan
from aimscale.sweeps.planning.run import Notice
from aimscale.sweeps.planning.sweepfile import SweepError


@pytest.fixture
def problems(tmp_path: Path, write_sweep: Any, write_images: Any) -> Any:
    """Return a function that changes fields of two runs with complete data, and returns key -> problem."""
    for name, seed, number in (("train", 1, 40), ("validation", 2, 10), ("other", 3, 10)):
        write_images(tmp_path / name, number, seed=seed)
    for seed, name in enumerate(("fit", "test", "strange")):
        write_images(tmp_path / name, 12, seed=seed, classes=("a", "c" if name == "strange" else "b"))
    base: dict[str, Any] = {
        "data": {"sources": [{"path": "train"}]},
        "validation": {"path": "validation", "centre_crop": 1.0},
        "probes": [{"task": "mine", "train": "fit", "test": "test"}],
    }

    def find(changes: dict[str, Any], **top: Any) -> dict[str, Notice]:
        sweep = write_sweep(sizes=["rung-32"], seeds=[0, 1], base=base | changes, **top)
        runs = plan(sweep)
        found = check(sweep, runs)
        assert not (tmp_path / "root").exists()
        if found:
            with pytest.raises(SweepError) as caught:
                raise_on_problems(sweep, runs)
            assert all(problem.text in str(caught.value) for problem in found)
        else:
            raise_on_problems(sweep, runs)
        return {each.key: each for each in found}

    return find


@pytest.mark.parametrize(
    ("changes", "top", "key", "words"),
    [
        ({"data": {"sources": [{"path": "nowhere"}]}}, {}, "data.sources", "/nowhere does not exist"),
        ({"data": {"sources": [{"path": "wds:///no/{0..2}.tar"}]}}, {}, "data.sources", "no shard /no/0.tar"),
        ({"data": {"sources": [{"path": "train", "fingerprint": "0" * 16}]}}, {}, "data.sources", "other images"),
        ({}, {"unique_images": [41]}, "data.unique_images", "40 usable"),
        ({"validation": {"path": "validation", "num_images": 11}}, {}, "validation.num_images", "10 usable"),
        ({"validation": {"path": "train"}}, {}, "validation.path", "40 training images"),
        ({"probes": [{"task": "mine", "train": "fit", "test": "gone"}]}, {}, "probes.mine", "/gone"),
        ({"probes": [{"task": "mine", "train": "fit", "test": "fit"}]}, {}, "probes.mine", "12 of the 12"),
        ({"probes": [{"task": "mine", "train": "fit", "test": "strange"}]}, {}, "probes.mine", "no c"),
        ({"probes": [{"task": "mine", "train": "other", "test": "test"}]}, {}, "probes.mine", "no labels"),
        ({"probes": [{"task": "pets", "train": "fit", "test": "test"}]}, {}, "probes.pets", "37 classes"),
        ({"schedule": {"warmup_images": 640}}, {}, "schedule.warmup_images", "512"),
        ({}, {"cost": {"memory_gb": 0.1}}, "cost.memory_gb", "does not fit"),
        ({}, {"slurm": {"time_limit_min": 2}}, "slurm.time_limit_min", "120 s"),
        (
            {"devices": 2},
            {"slurm": {"devices_per_node": 1, "python": "/opt/apptainer exec a.sif python3"}},
            "slurm.python",
            "slurm.srun",
        ),
        ({"runtime": {"compile": True, "device": "cpu"}}, {}, "runtime.compile", "CPU"),
        ({"runtime": {"device": "cuda"}}, {}, "runtime.device", "no GPU"),
        ({"runtime": {"loggers": ["wandb"]}}, {}, "runtime.loggers", "not installed"),
        ({"model": {"image_size": 16, "patch_size": 4, "channels": 2}}, {}, "model.channels", "not 2"),
    ],
)
def test_what_would_stop_a_run_is_found_before_it_starts(
    problems: Any, changes: dict[str, Any], top: dict[str, Any], key: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aimscale.harness.run.config.find_spec", lambda _: None)  # as where W&B is not installed
    found = problems(changes, **top)
    assert list(found) == [key]
    assert words in found[key].text
    assert "\n" not in found[key].text
    assert len(found[key].run_ids) == 2


def test_all_is_said_at_once_and_of_the_runs_that_it_concerns(problems: Any) -> None:
    assert problems({}) == {}
    found = problems({"validation": {"path": "validation", "num_images": 10**4}}, unique_images=[None, 50])
    assert {key: len(each.run_ids) for key, each in found.items()} == {
        "validation.num_images": 4,
        "data.unique_images": 2,
    }
