"""The finding about loss and features: chosen before the data are seen, and over every task."""

import dataclasses
import itertools
import re

import numpy as np
import pandas as pd
import pytest

from aimscale.analysis import correlate
from aimscale.analysis.report.blocks import feature_finding, feature_words
from aimscale.analysis.report.study import Study, correlate_probes
from aimscale.analysis.table.runs import Runs

TELLS = {"better": (-0.8, -0.9, -0.3), "null": (-0.02, -0.44, 0.41), "opposite": (0.4, 0.14, 0.6)}
"""What a coefficient may say -> coefficient, low, high."""


@pytest.fixture(scope="module")
def both() -> list:
    """Pearson's coefficients at equal compute and over all rows."""
    rng = np.random.default_rng(0)
    sizes, flops = np.tile(2.0 ** np.arange(5), 5), np.repeat(10.0 ** np.arange(5), 5)
    loss = rng.normal(1, 0.01, 25) - 0.1 * np.log10(flops)
    frame = pd.DataFrame({"params_total": sizes, "flops_train": flops, "val_loss": loss, "top1": 1 - loss / 2})
    return list(correlate(frame, methods=["pearson"]))


@pytest.mark.parametrize(("equal", "pooled"), itertools.product(TELLS, repeat=2))
def test_equal_compute_leads_whatever_it_and_the_pooled_rows_say(both, equal, pooled):
    """CIFAR's page opened "Lower loss, better features: r = -0.80", where r at equal compute is -0.02."""
    first, _ = (
        dataclasses.replace(c, **dict(zip(("value", "low", "high"), TELLS[name], strict=True)))
        for c, name in zip(both, (equal, pooled), strict=True)
    )
    start = {
        "better": "Lower loss, better features: ",
        "null": "Not known whether lower loss means better features: ",
        "opposite": "Lower loss, LOWER accuracy: ",
    }
    r, low, high = TELLS[equal]
    told = feature_words("knn", {"pets": first})
    assert told == f"{start[equal]}at equal compute r = {r:.2f} [{low:.2f}, {high:.2f}] on pets (k-NN accuracy)"


@pytest.mark.parametrize("says", itertools.product(TELLS, repeat=3))
def test_every_task_is_in_the_count(both, says):
    leading = {
        f"task {i}": dataclasses.replace(both[0], **dict(zip(("value", "low", "high"), TELLS[name], strict=True)))
        for i, name in enumerate(says)
    }
    told = feature_words("linear", leading, 3)
    for name, words in (("better", "better features on {} of 3 tasks"), ("opposite", "LOWER accuracy on {} of 3")):
        num = says.count(name)
        assert (words.format(num) in told) == (num > 0)
    assert told.startswith("Not known") == (set(says) == {"null"})
    assert ("on 0 of 3 tasks" in told) == (set(says) == {"null"})
    assert told == feature_words("linear", dict(reversed(leading.items())), 3), "no task is put first"


def test_rows_without_compute_or_at_chance_tell_nothing(both):
    equal, pooled = (dataclasses.replace(c, value=-0.8, low=-0.9, high=-0.3) for c in both)
    start = "Not known whether lower loss means better features: "
    assert feature_words("knn", {"pets": pooled}).startswith(f"{start}over all rows r = -0.80")
    at_chance = feature_words("knn", {"pets": dataclasses.replace(equal, chance=0.1)})
    assert at_chance.startswith(start)
    assert "all at chance" in at_chance
    assert "higher accuracy" in feature_words("lora", {"pets": equal}), "adapted, so no features"


def rows_of(kinds: dict[str, int], tasks: list[str]) -> pd.DataFrame:
    """Make rows of five sizes by five budgets, the first few of which have a probe of each kind, and baselines."""
    rng, rows = np.random.default_rng(1), []
    for i, (n, c) in enumerate(itertools.product(2.0 ** np.arange(10, 15), 10.0 ** np.arange(9, 14))):
        loss = 3 - 0.1 * np.log10(c) + rng.normal(0, 0.05)
        probes = [
            {"task": task, "kind": kind, "top1": float(np.clip(1 - loss / 3 + rng.normal(0, 0.01), 0, 1)), "n": 500}
            for kind, num in kinds.items()
            for task in tasks
            if i < num
        ]
        rows.append(
            {"run_id": f"r{i}", "size": f"w{n:.0f}", "status": "complete", "params_total": n, "images_seen": c / 6 / n}
            | {"flops_train": c, "val_loss": loss, "probes": probes}
        )
    return pd.DataFrame(rows)


def studied(frame: pd.DataFrame) -> Study:
    """Correlate the probes of rows, without fitting a law."""
    study = Study(paths=(), runs=Runs(frame), main=Runs(frame), usable=Runs(frame))
    correlate_probes(study)
    return study


def test_the_kind_with_most_rows_leads_in_the_order_of_the_tasks():
    """`linear` with 5 of 15 rows led, the paper's rank of kinds before how many runs have one."""
    study = studied(rows_of({"attentive": 6, "knn": 25}, ["zoo", "ants"]))
    assert study.kinds == ["knn", "attentive"]
    finding = feature_finding(study)
    assert "of 2 tasks (k-NN accuracy" in finding.title
    equal, reached, pooled = re.findall(r"zoo.*?ants", finding.caption)
    assert "at equal compute" in equal
    assert "over all rows" in pooled
    assert "%" in reached
    assert finding.caption.index("at equal compute") < finding.caption.index("over all rows")


def test_random_weights_are_the_floor_before_raw_pixels(monkeypatch):
    """k-NN 77 % stood beside raw pixels' 37 %, where random weights of the same network give 60 %."""
    study = studied(rows_of({"knn": 25}, ["pets"]))
    beside = pd.DataFrame(
        {"task": "pets", "kind": "knn", "size": ["raw-pixels", "random-w72"], "top1": [0.37, 0.604], "n": 500}
    )
    monkeypatch.setattr("aimscale.analysis.report.blocks.read_baselines", lambda frame: beside)
    floors = "(random weights of the same network give 60 %, raw pixels give 37 %)"
    assert floors in feature_finding(study).caption
