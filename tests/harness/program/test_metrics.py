from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aimscale.harness.program.metrics import FileReader, Measurements, ProgramError, probe_entries
from aimscale.harness.run.program import MetricsSection, ProgramSection


def measured(**changes: Any) -> Measurements:
    fields = {
        "run_id": "r",
        "size": "s",
        "seed": 0,
        "directory": ".",
        "words": ("x",),
        "budgets": (100,),
        "together": False,
    }
    return Measurements(program=ProgramSection(**(fields | changes)))


def lines(*values: Any) -> list[bytes]:
    return [each if isinstance(each, bytes) else json.dumps(each).encode() for each in values]


def test_half_lines_points_at_zero_and_words_count_for_nothing(tmp_path: Path) -> None:
    path, found = tmp_path / "metrics.jsonl", measured()
    reader = FileReader(path)
    assert reader.read() == []
    path.write_bytes(b'{"D": 0, "val_loss": 9}\nepoch 1\n{"D": 50, "val_loss": 2}\n{"D": 100, "val')
    assert [line["D"] for line in found.read(reader.read())] == [50]
    assert found.num_skipped == 2
    with path.open("ab") as file:
        file.write(b'_loss": 1.5}\n{"D": 40}\n')
    assert [line["D"] for line in found.read(reader.read())] == [100, 40]
    assert (found.furthest, found.last) == (100, 40), "a program that went back is still as far as it was"
    path.write_bytes(b'{"D": 7}\n')
    assert [line["D"] for line in found.read(reader.read())] == [7], "a file that was written anew"


def test_the_output_of_a_program_is_read_by_a_pattern() -> None:
    pattern = r"step (?P<step>\d+): train loss (?P<loss>[\d.]+|nan), val loss (?P<val_loss>[\d.]+|nan)"
    found = measured(metrics=MetricsSection(pattern=pattern, D="step*batch"), values={"batch": 10})
    output = [
        b"number of parameters: 3",
        b"step 5: train loss 2.5, val loss 2.25",
        b"step 6: train loss 1, val loss nan",
    ]
    assert [line["D"] for line in found.read(output)] == [50, 60]
    assert found.measured is not None
    assert found.measured["val_loss"] == 2.25
    assert found.not_finite_at == 60


def test_a_run_has_one_number_of_parameters() -> None:
    found = measured()
    assert len(list(found.read(lines({"D": 1, "N": 10}, {"D": 2, "N": 10.0})))) == 2
    with pytest.raises(ProgramError, match="N is 11 at D = 3 and was 10"):
        list(found.read(lines({"D": 3, "N": 11})))


def test_the_row_of_a_budget_is_the_last_loss_near_it_or_what_a_line_says() -> None:
    apart = measured()
    list(apart.read(lines({"D": 98, "val_loss": 2.0})))
    assert apart.row_at_end(100) is None
    assert "at 98 samples, and not within 1 % of its budget of 100" in apart.missing_row_reason(100)
    list(apart.read(lines({"D": 99, "val_loss": 1.0})))
    assert apart.row_at_end(100) == {"D": 99, "val_loss": 1.0}
    together = measured(together=True, budgets=(100, 200))
    list(together.read(lines({"D": 100, "val_loss": 2.0, "budget": 100}, {"D": 200, "val_loss": 1.0})))
    assert together.row_at_end(100) is not None
    assert together.row_at_end(200) is None
    assert '"budget": 200' in together.missing_row_reason(200)


def test_accuracies_become_probes() -> None:
    (entry,) = probe_entries({"digits:linear": {"top1": 0.5, "n": 10}})
    assert entry == {"task": "digits", "kind": "linear", "top1": 0.5, "n": 10}
    with pytest.raises(ProgramError, match="give a share between 0 and 1"):
        probe_entries({"digits:linear": 50})
