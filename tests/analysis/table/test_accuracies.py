"""Accuracies of a foreign table, by --columns: the same to every verb as probes of ours, and never dropped unsaid."""

import numpy as np
import pandas as pd
import pytest
from commands import answer, say
from typer.testing import CliRunner

from aimscale.analysis.effects.contrasts import contrast
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import link
from aimscale.analysis.table.columns import parse_columns, unnamed
from aimscale.analysis.table.read import read_table
from aimscale.analysis.table.schema import results_table, write_table
from aimscale.analysis.table.select import probe_frame, read_tables, task_level
from aimscale.sweeps.cli.main import load_verb

NAMES = "N=n,D=d,C=6*n*d,L=loss,run_id=run,"
ACCURACIES = NAMES + "dtd:linear=dtd_acc/100,dtd:chance=0.1,dtd:ideal=0,pets:linear=pets,pets:chance=guess"


@pytest.fixture
def theirs(grid) -> pd.DataFrame:
    """The known grid as others write it: two accuracies, one in per cent, one missing in two rows."""
    better = np.exp(-3 * grid["val_loss"])
    out = pd.DataFrame({"run": grid["size"], "n": grid["params_total"].round(), "d": grid["images_seen"].round()})
    out = out.assign(loss=grid["val_loss"], dtd_acc=100 * (0.1 + 0.9 * better), pets=0.02 + 0.6 * better, guess=0.02)
    out.loc[[3, 7], "pets"] = np.nan
    return out


def test_they_are_probes_as_ours_are(theirs, tmp_path):
    theirs.to_csv(tmp_path / "theirs.csv", index=False)
    ours = []
    for row in theirs.to_dict("records"):
        probes = [{"task": "dtd", "kind": "linear", "top1": row["dtd_acc"] / 100, "chance": 0.1, "ideal": 0.0}]
        if np.isfinite(row["pets"]):
            probes.append({"task": "pets", "kind": "linear", "top1": row["pets"], "chance": 0.02})
        scale = {"params_total": int(row["n"]), "images_seen": int(row["d"]), "flops_train": 6 * row["n"] * row["d"]}
        ours.append({"run_id": row["run"], "val_loss": row["loss"], "probes": probes, **scale})
    write_table(results_table(ours), tmp_path / "ours.parquet")
    frames = [
        probe_frame(read_table(tmp_path / "ours.parquet")).frame,
        probe_frame(read_table(tmp_path / "theirs.csv", parse_columns([ACCURACIES]))).frame,
    ]
    names = ["task", "kind", "top1", "chance", "ideal"]
    pd.testing.assert_frame_equal(frames[0][names], frames[1][names])


def test_their_names_and_what_was_left_out_come_along(theirs, tmp_path):
    for name, part in (
        ("a", theirs),
        ("b", theirs.assign(run=theirs["run"] + "b").rename(columns={"d": "images_seen"})),
    ):
        part.to_csv(tmp_path / f"{name}.csv", index=False)
    both = [tmp_path / "a.csv", tmp_path / "b.csv"]
    columns = "N=n,L=loss,run_id=run,dtd:linear=dtd_acc/100"
    found = answer("correlate", *both, "--columns", columns, "--where", "n>2e5")
    first = found["correlations"][0]
    dropped = 2 * int((theirs["n"] <= 2e5).sum())
    assert (first["x"], first["num_points"]) == ("loss", 2 * len(theirs) - dropped)
    assert first["exclusions"] == [{"kind": "where", "subject": "n>2e5", "number": dropped}]
    probed = probe_frame(read_tables(both, parse_columns([columns, "dtd:ideal=0"]), where=["n>2e5"]))
    linked = link(probed, ideal=task_level(probed.frame, "ideal"))  # joins a row of its own
    assert (linked.names["val_loss"], [each.number for each in linked.exclusions]) == ("loss", [dropped])


@pytest.mark.parametrize(
    ("columns", "subject"),
    [
        ("dtd:linear=dtd_acc", r"dtd:linear is .* in row 1.*dtd_acc/100"),
        ("dtd:linear=run", "dtd:linear is s100000 in row 1"),
        ("pets:chance=0.1", "pets:KIND.*THEIRS"),
        ("pets:linear=pets,pets:chance=2", "pets:chance is 2.* in row 1"),
        (":linear=pets", "TASK:KIND"),
        ("a:b:c=pets", "TASK:KIND"),
        ("pets:linear=petz", "petz.*pets"),
        ("top1=pets", "TASK:KIND.*top1"),
        ("probes=pets", "probes.*TASK:KIND"),
        ("N", "N=num_params"),
        ("N=petz", "no column petz .*pets"),
    ],
)
def test_what_is_no_accuracy_is_refused(theirs, tmp_path, columns, subject):
    theirs.to_csv(tmp_path / "theirs.csv", index=False)
    with pytest.raises(AnalysisError, match=subject):
        read_table(tmp_path / "theirs.csv", parse_columns([columns]))


def test_what_nobody_named_is_said_once(theirs, tmp_path):
    many = theirs.assign(**{f"top{k}": 1.0 for k in (1, 5)}, grad_acc=4, accum=0.5, **{"acc, b": theirs["pets"]})
    many["top1"] = many["top5"] = many["pets"]
    for i in range(4):
        many[f"task{i}_accuracy"] = many["pets"]
    many.to_csv(tmp_path / "theirs.csv", index=False)
    named = read_table(tmp_path / "theirs.csv", {"N": "n", "D": "d", "C": "6*n*d", "L": "loss"})
    flags = {flag.kind: flag for flag in unnamed(named.frame)}
    found = ["dtd_acc", "top1", "top5", "acc, b", "task0_accuracy"]
    assert flags["accuracies_unnamed"].subject == f"{', '.join(found)} and 3 more"
    assert '"TASK:KIND": "dtd_acc/100"' in str(flags["accuracies_unnamed"])
    result = CliRunner().invoke(load_verb("correlate"), [str(tmp_path / "theirs.csv"), "--columns", ACCURACIES])
    assert "Note" not in result.stderr
    say("report", tmp_path / "theirs.csv", "--columns", "N=n,D=d,L=loss,pets:zero-shot=pets")
    page = (tmp_path / "report.html").read_text()
    assert "Loss against zero-shot accuracy" in page
    assert "frozen" not in page


def test_more_of_a_column_called_accuracy_is_better_and_one_called_probes_can_be_named(theirs, tmp_path):
    both = [theirs.assign(opt="adam"), theirs.assign(opt="muon", pets_acc=0.01)]
    both[0]["pets_acc"] = 0.02 * theirs["pets"]
    table = pd.concat(both).rename(columns={"pets": "probes"})
    table.to_csv(tmp_path / "theirs.csv", index=False)
    frame = read_table(tmp_path / "theirs.csv", {"N": "n", "D": "d", "L": "loss", "pets:linear": "probes"})
    (plain,) = contrast(frame, by="opt", baseline="adam", measures=["pets_acc"]).contrasts
    assert (plain.difference > 0, plain.verdict) == (True, "better")
    assert len(probe_frame(frame)) == 2 * theirs["pets"].notna().sum()


def test_concatenated_tables_keep_each_rows_accuracies() -> None:
    """Labels that both tables use gave every row the accuracies of two, and correlations near zero."""
    rows = [[{"task": "pets", "kind": "knn", "top1": top1}] for top1 in (0.1, 0.2, 0.3)]
    table = pd.DataFrame({"val_loss": [3.0, 2.0, 1.0], "probes": rows})
    both = probe_frame(pd.concat([table, table.assign(val_loss=[6.0, 5.0, 4.0])]))
    assert both[["val_loss", "top1"]].to_numpy().tolist() == [
        [v, t] for v, t in zip([3, 2, 1, 6, 5, 4], [0.1, 0.2, 0.3] * 2, strict=True)
    ]
