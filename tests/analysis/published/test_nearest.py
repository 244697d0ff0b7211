"""One run beside the nearest published model: the right rival and gap, and what is not comparable."""

import math

import pytest
from typer.testing import CliRunner

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.published.beside import nearest_published
from aimscale.analysis.table.read import probe_frame
from aimscale.analysis.table.schema import results_table, write_table
from aimscale.sweeps.cli.main import verb

BUDGETS = (10_000, 40_000, 160_000, 640_000)


def one_run(task="cifar10", kind="attentive", start=0.5, per_doubling=0.02, run="mine"):
    """A run whose accuracy is exactly a line in ln D."""
    rows = []
    for budget in BUDGETS:
        top1 = start + per_doubling * math.log2(budget / BUDGETS[0])
        probe = {"task": task, "kind": kind, "n": 10_000, "top1": top1}
        probe |= {"top1_lo95": top1 - 0.01, "top1_hi95": top1 + 0.01}
        row = {"run_id": run, "size": "w64", "status": "complete", "image_size": 32, "val_loss": 0.4}
        row |= {"params_total": 1e6, "params_trunk": 6e5, "images_seen": budget, "probes": [probe]}
        rows.append(row)
    return rows


def found(rows, run=None):
    return nearest_published(probe_frame(results_table(rows).to_pandas()), run)


def test_lines_name_rival_gap_and_what_differs():
    (nearest,) = found(one_run())
    assert (nearest.published["model"], nearest.published["top1"]) == ("BEiT ViT-L/14", 0.944)
    assert nearest.gap == pytest.approx(0.62 - 0.944)
    assert (nearest.gap_lo95, nearest.gap_hi95) == pytest.approx((0.61 - 0.944, 0.63 - 0.944))
    assert "32 px against 224 px" in nearest.lines[-1]


def test_the_rival_has_the_same_task_and_probe():
    (knn,) = found(one_run("imagenet-1k", "knn", start=0.36))
    assert (knn.published["model"], knn.published["top1"]) == ("MAE ViT-L/16", 0.481)
    assert "best of 90 epochs" in knn.lines[-1]
    with pytest.raises(AnalysisError, match="my-own"):
        found(one_run("my-own"))
    # the last blocks stand beside AIM's last six, never beside its best six
    (last,) = found(one_run("imagenet-1k", start=0.72))
    assert last.published["blocks"] != "best 6"


def test_one_run_must_be_meant():
    rows = one_run() + one_run(run="other")
    with pytest.raises(AnalysisError, match="mine, other"):
        found(rows)
    assert [each.run for each in found(rows, "oth")] == ["other"]


def test_a_task_of_another_name_is_put_beside_a_published_one_and_said_so(tmp_path):
    path = tmp_path / "t.parquet"
    write_table(results_table(one_run(task="cifar10-10k")), path)
    shown = CliRunner().invoke(verb("compare"), [str(path), "--run", "mine", "--task", "cifar10-10k=cifar10"])
    assert shown.exit_code == 0, shown.exception
    lines = shown.output.splitlines()
    assert len(lines) == 3
    assert "BEiT ViT-L/14" in lines[0]
    assert "cifar10-10k" in lines[-1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--run", "mine", "--task", "cifar10-10k=cifar11"], "cifar11"),
        (["--run", "mine", "--task", "cifar10"], "OURS=THEIRS"),
        (["--task", "cifar10-10k=cifar10"], "--run"),
        (["--run", "nobody"], "mine"),
        (["--run", "mine"], "cifar10-10k"),
    ],
)
def test_a_task_that_is_not_named_well_is_refused(tmp_path, more, message):
    path = tmp_path / "t.parquet"
    write_table(results_table(one_run(task="cifar10-10k")), path)
    done = CliRunner().invoke(verb("compare"), [str(path), *more])
    assert isinstance(done.exception, AnalysisError)
    assert message in str(done.exception)
