from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from aimscale.harness.run.files import write_json
from aimscale.harness.run.section import ConfigError
from aimscale.sweeps.cli.main import main
from aimscale.sweeps.planning.checks import check
from aimscale.sweeps.planning.costs import cost_cards
from aimscale.sweeps.planning.planner import plan
from aimscale.sweeps.planning.sweepfile import Sweep, SweepError, load_sweep
from aimscale.sweeps.planning.trainer import TemplateError, fill, fill_words
from aimscale.sweeps.state.planned_sweep import to_json

VALUES = {"width": 64, "lr": 0.003, "name": "two words; rm -rf /", "budgets": [100, 200], "run_dir": "/a b/run"}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("--width={width}", "--width=64"),
        ("{width*width // 3}", "1365"),
        ("{lr/10}", "0.0003"),
        ("{budgets}", "100,200"),
        ("{{width}} {run_dir}/out", "{width} /a b/run/out"),
        ("{width / 128}", "0.5"),
    ],
)
def test_a_template_takes_values_and_arithmetic(template: str, expected: str) -> None:
    assert fill(template, VALUES) == expected


@pytest.mark.parametrize("template", ["{height}", "{width", "{__import__('os')}", "{width.real}", "{name * 2}", "{}"])
def test_a_template_evaluates_nothing_else(template: str) -> None:
    with pytest.raises(TemplateError, match=r"cannot be filled in|single brace"):
        fill(template, VALUES)


def test_no_value_makes_two_words_and_no_shell_reads_them() -> None:
    words = fill_words("python 'my train.py' --name={name} $(date) | tee", VALUES)
    assert words == ("python", "my train.py", "--name=two words; rm -rf /", "$(date)", "|", "tee")


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Return a function that writes a sweep of a program with changes of its `trainer` and of the file."""

    def make(trainer: dict[str, Any] | None = None, **changes: Any) -> Sweep:
        section = {"command": "python {run_dir} {width} {lr} {budget} {workers}", "runtime": {"workers": 1}}
        section |= {"sizes": {"w8": {"width": 8}, "w16": {"width": 16}}, "params": "12*width**2", "unit": "tokens"}
        values = {"name": "mine", "trainer": section | (trainer or {}), "sizes": ["w8", "w16"], "budgets": ["1k", "2k"]}
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(values | {"base": {"lr": 0.1}} | changes))
        return load_sweep(tmp_path / "sweep.yaml", tmp_path / "root")

    return make


def test_what_is_trained_names_a_run_and_nothing_else_does(write: Any, tmp_path: Path) -> None:
    ids = [run.run_id for run in plan(write())]
    assert len(set(ids)) == 4
    assert ids[0].startswith("w8_d1000_s0_")
    (tmp_path / "elsewhere").mkdir()
    same = write({"runtime": {"workers": 8}, "directory": "elsewhere", "stop": {"seconds": 9}, "params": None})
    assert [run.run_id for run in plan(same)] == ids
    for other in (write({"version": "2"}), write(base={"lr": 0.2}), write(seeds=[1])):
        assert not {run.run_id for run in plan(other)} & {*ids}
    together = write({"budgets": "together"})
    longer = write({"budgets": "together"}, budgets=["1k", "2k", "4k"])
    assert [run.run_id for run in plan(together)] == [run.run_id for run in plan(longer)]
    assert [run.budgets for run in plan(longer)] == [(1000, 2000, 4000)] * 2


def test_axes_variants_overrides_and_exclusions_set_values(write: Any) -> None:
    sweep = write(
        axes={"lr": [0.1, 0.2]},
        base={},
        exclude=[{"size": "w8", "budget": "2k"}],
        override=[{"when": {"size": "w16", "lr": 0.2}, "set": {"lr": 0.5}}],
        variants={"plain": {}, "wide": {"width": 99}},
    )
    commands = {run.config.program.words[2:] for run in plan(sweep)}
    assert {("8", "0.1", "1000", "1"), ("99", "0.1", "2000", "1"), ("16", "0.5", "1000", "1")} <= commands
    assert len(plan(sweep)) == 2 * 2 * 3
    assert all(run.config.program.setup.keys() <= {"lr", "width"} for run in plan(sweep))


@pytest.mark.parametrize(
    ("trainer", "changes", "sentence"),
    [
        ({"command": "python {heigth}"}, {}, "there is no 'heigth'"),
        ({"command": "python 'x"}, {}, "cannot be split into words"),
        ({"params": "__import__('os')"}, {}, "is no formula"),
        ({"metrics": {"pattern": "loss (?P<loss>.*)"}}, {}, "no group"),
        ({"metrics": {"pattern": "("}}, {}, "no regular expression"),
        ({"sizes": {"../x": {}}}, {"sizes": ["../x"]}, "names folders"),
        ({}, {"sizes": ["w32"]}, "none of trainer.sizes"),
        ({}, {"recipe": "small"}, "leave it out beside `trainer`"),
        ({}, {"base": {"run_dir": "/"}}, "cannot name a value"),
        ({}, {"base": {"lr": {"a": 1}}}, "lr"),
    ],
)
def test_mistakes_of_a_section_are_told(write: Any, trainer: Any, changes: Any, sentence: str) -> None:
    with pytest.raises((SweepError, ConfigError), match=sentence):
        plan(write(trainer, **changes))


def test_a_program_that_is_not_there_is_told_before_it_starts(write: Any) -> None:
    sweep = write({"command": "no-such-program {budget}", "directory": "nowhere"})
    assert [each.key for each in check(sweep, plan(sweep))] == ["trainer.directory"]
    sweep = write({"command": "no-such-program {budget}"})
    assert [each.text for each in check(sweep, plan(sweep))] == ["there is no program 'no-such-program'"]


def test_a_plan_prices_by_formulas_then_by_what_was_measured(write: Any) -> None:
    sweep = write({"params": None})
    (card, *_) = cost_cards(sweep, plan(sweep))
    assert (card.params_total, card.budgets[0].flops, card.wall_s) == (None, None, 3600.0)
    run = plan(sweep)[0]
    run.create(sweep.run_dir(run.run_id))
    write_json(sweep.run_dir(run.run_id) / "program.json", {"N": 500, "D": 1000, "wall_s": 1.0})
    card, other, *_ = cards = cost_cards(sweep, plan(sweep))
    assert (card.params_total, card.budgets[0].flops) == (500, 6.0 * 500 * 1000)
    assert other.params_total == 500, "the other budget of this size"
    row = {"run_id": run.run_id, "images_seen": 1000, "flops_train": 3e6, "device_hours": 1.0}
    from aimscale.harness.run.directory import RunDir

    RunDir(sweep.run_dir(run.run_id)).record_row(row)
    card, *_ = cards = cost_cards(sweep, plan(sweep))
    assert card.wall_s == pytest.approx(3600)
    assert card.rates.num_measured == 1
    json.dumps(to_json(cards), allow_nan=False)


def test_plan_shows_the_command_in_the_words_of_its_unit(write: Any, tmp_path: Path, capsys: Any) -> None:
    write()
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(tmp_path / "sweep.yaml"), "--root", str(tmp_path / "root")])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "python" in said
    assert "3k tokens" in said or "6k tokens" in said
    for word in ("images", "photographs", "recipe", "micro-batch", "too large", "lr "):
        assert word not in said
    assert not (tmp_path / "root").exists()
