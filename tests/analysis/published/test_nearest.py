"""One run beside the nearest published model: the right rival, gap and reach, and what is not comparable."""

import math

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.published.board import published_results
from aimscale.analysis.published.nearest import nearest_published
from aimscale.analysis.published.published import BY_KEY, PUBLISHED_SIZES
from aimscale.analysis.table.results import probe_frame
from aimscale.analysis.table.schema import results_table, write_table
from aimscale.sweeps.cli.main import verb

BUDGETS = (10_000, 40_000, 160_000, 640_000)


def one_run(task="cifar10", kind="attentive", start=0.5, per_doubling=0.02, run="mine"):
    """A run whose accuracy is exactly a line in ln D."""
    rows = []
    for budget in BUDGETS:
        top1 = start + per_doubling * math.log2(budget / BUDGETS[0])
        probe = {
            "task": task,
            "kind": kind,
            "n": 10_000,
            "top1": top1,
            "top1_lo95": top1 - 0.01,
            "top1_hi95": top1 + 0.01,
        }
        row = {"run_id": run, "size": "w64", "status": "complete", "image_size": 32, "val_loss": 0.4}
        row |= {"params_total": 1e6, "params_trunk": 6e5, "images_seen": budget, "probes": [probe]}
        rows.append(row)
    return rows


def found(rows, run=None):
    return nearest_published(probe_frame(results_table(rows).to_pandas()), run)


def test_five_lines_name_rival_gap_reach_and_what_differs():
    (nearest,) = found(one_run())
    assert (nearest.published.model, nearest.published.top1) == ("BEiT ViT-L/14", 0.944)
    assert nearest.gap == pytest.approx(0.62 - 0.944)
    assert (nearest.gap_lo95, nearest.gap_hi95) == pytest.approx((0.61 - 0.944, 0.63 - 0.944))
    assert len(nearest.lines) == 5
    # 32.4 points at 2 points a doubling are 16.2 doublings of the largest budget
    beyond = 2 ** (32.4 / 2)
    said = float(nearest.lines[3].split("images, so ")[1].split(" times")[0].removesuffix("k")) * 1e3
    assert said == pytest.approx(beyond, rel=0.02)
    # 32.4 points by the slope of AIM's own sizes: beyond a million times
    slope = np.polyfit(
        np.log([size.params_trunk for size in PUBLISHED_SIZES]),
        [BY_KEY[size.key].accuracy("cifar10") for size in PUBLISHED_SIZES], 1,
    )[0]  # fmt: skip
    assert 0.324 / slope > math.log(1e6)
    assert "no number of trunk parameters" in nearest.lines[2]
    assert "32 px against 224 px" in nearest.lines[4]


def test_the_rival_has_the_same_task_and_probe():
    (knn,) = found(one_run("imagenet-1k", "knn", start=0.36))
    assert (knn.published.model, knn.published.top1) == ("MAE ViT-L/16", 0.481)
    assert "best of 90 epochs" in knn.lines[4]
    assert "size: not estimated" in knn.lines[2]
    with pytest.raises(AnalysisError, match=r"has my-own \(attentive\), and published are"):
        found(one_run("my-own"))
    # the last blocks stand beside AIM's last six, never beside its best six
    (last,) = found(one_run("imagenet-1k", start=0.72))
    assert last.published.blocks != "best 6"


def test_a_run_with_two_budgets_says_that_no_slope_is_known():
    (nearest,) = found(one_run()[:2])
    assert "data: not estimated" in nearest.lines[2]


def test_one_run_must_be_meant():
    rows = one_run() + one_run(run="other")
    with pytest.raises(AnalysisError, match="2 of 2 fit"):
        found(rows)
    assert [each.run for each in found(rows, "oth")] == ["other"]


def test_the_board_is_whole_and_dated():
    entries = pd.DataFrame([vars(each) for each in published_results()])
    board = entries[entries["source"].str.contains("2026")]
    assert board.groupby("kind").size().to_dict() == {"efficient": 37, "knn": 37, "linear": 37}
    wide = board.drop_duplicates(["model", "image_size", "kind"]).set_index(["model", "image_size", "kind"])["top1"]
    for model, values in {
        "DINOv3 ViT-7B/16": (0.842, 0.880, 0.884), "AIMv2 ViT-L/14": (0.760, 0.847, 0.859),
        "CAPI ViT-L/14": (0.729, 0.819, 0.830), "MAE ViT-L/16": (0.481, 0.760, 0.795),
    }.items():  # fmt: skip
        assert tuple(wide[model, 224, kind] for kind in ("knn", "linear", "efficient")) == values
    assert entries["top1"].between(0, 1).all()
    assert (entries[entries["task"] == "imagenet-1k"]["kind"] == "attentive").sum() == 11 + 12


def test_the_command_prints_five_lines_a_task(tmp_path):
    write_table(results_table(one_run()), tmp_path / "results.parquet")
    shown = CliRunner().invoke(verb("compare"), [str(tmp_path), "--run", "mine"])
    assert shown.exit_code == 0
    assert len(shown.output.strip().splitlines()) == 5
    refused = CliRunner().invoke(verb("compare"), [str(tmp_path), "--run", "nobody"])
    assert isinstance(refused.exception, AnalysisError)


def test_a_task_of_another_name_is_put_beside_a_published_one_and_said_so(tmp_path):
    path = tmp_path / "t.parquet"
    write_table(results_table(one_run(task="cifar10-10k")), path)
    alone = CliRunner().invoke(verb("compare"), [str(path), "--run", "mine"])
    assert alone.exit_code != 0
    assert "cifar10-10k (attentive)" in str(alone.exception)
    assert "--task OURS=THEIRS" in str(alone.exception)
    shown = CliRunner().invoke(verb("compare"), [str(path), "--run", "mine", "--task", "cifar10-10k=cifar10"])
    assert shown.exit_code == 0, shown.exception
    lines = shown.output.splitlines()
    assert len(lines) == 5
    assert "BEiT ViT-L/14" in lines[0]
    assert "our task is cifar10-10k, put beside cifar10 as asked" in lines[4]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--run", "mine", "--task", "cifar10-10k=cifar11"], "no published task is called cifar11"),
        (["--run", "mine", "--task", "cifar10"], "OURS=THEIRS"),
        (["--task", "cifar10-10k=cifar10"], "goes with --run"),
    ],
)
def test_a_task_that_is_not_named_well_is_refused(tmp_path, more, message):
    path = tmp_path / "t.parquet"
    write_table(results_table(one_run(task="cifar10-10k")), path)
    done = CliRunner().invoke(verb("compare"), [str(path), *more])
    assert done.exit_code != 0
    assert message in str(done.exception)
