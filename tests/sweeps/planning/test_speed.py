"""Times of runs are measured here once, price the runs of their shape, and bound the grid of `init`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aimscale.harness.device import speed as clocks
from aimscale.harness.device.speed import Clock, remember, remembered, shape_digest
from aimscale.sweeps.planning import speed
from aimscale.sweeps.planning.costs import cost_cards
from aimscale.sweeps.planning.planner import plan
from aimscale.sweeps.planning.speed import measure_here
from aimscale.sweeps.planning.suggestion import Request, suggest
from aimscale.sweeps.planning.sweepfile import Sweep, load_sweep

TIMES = {"start_s": 5.0, "step_s": 0.25, "budget_s": 2.0, "evaluation_start_s": 3.0}
CLOCK = Clock(**TIMES, validation_s=0.01, feature_s=0.02, pair_s=1e-6)
PROBED = {"probes": [{"task": "pets", "train": "fit", "test": "test", "kinds": ["knn"]}]}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIMSCALE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def packed(write_sweep: Any, write_images: Any, tmp_path: Path) -> Any:
    """Return `write_sweep` for data that are there."""
    for seed, name in enumerate(("train", "validation", "fit", "test")):
        write_images(tmp_path / name, 40, seed=seed, classes=("ant", "bee"))
    base = {"data": {"sources": [{"path": "train"}]}, "validation": {"path": "validation", "every_images": None}}

    def write(**changes: Any) -> Sweep:
        more = changes.pop("base", {})
        return write_sweep(base=base | PROBED | more, budgets=[6400, 12_800], **changes)  # type: ignore[no-any-return]

    return write


def test_measured_times_replace_the_assumed_ones(packed: Any) -> None:
    sweep = packed(sizes=["rung-32"])
    (run,) = plan(sweep)
    (assumed,) = cost_cards(sweep, [run])
    remember(run.config, CLOCK)
    (card,) = cost_cards(sweep, [run])
    assert card.start_s == 8
    assert card.training_s == pytest.approx(card.steps * 0.25 + 2 * 2.0)  # type: ignore[operator]
    probe = card.probes[0]
    assert (probe.images, probe.pairs) == (80, pytest.approx(3 * 36 * 4 + 2 * 40 * 40, rel=0.5))
    validated = 40 * run.config.evaluation.validation.num_prefixes
    assert card.evaluation_s == pytest.approx(2 * (validated * 0.01 + 80 * 0.02 + probe.pairs * 1e-6))
    assert card.wall_s == card.start_s + card.training_s + card.evaluation_s
    assert card.device_hours == pytest.approx(card.wall_s / 3600)
    assert cost_cards(sweep, [run], takes_measured=False)[0].wall_s == assumed.wall_s
    for cost in ({"mfu": 0.4}, {"peak_tflops": 0.1}, {"device": "CPU core"}):
        stated = packed(sizes=["rung-32"], cost=cost)
        assert cost_cards(stated, plan(stated))[0].rates.clock is None, "the file says the speed"
    assert cost_cards(packed(sizes=["rung-32"], slurm={}), [run])[0].rates.clock is None


def test_a_shape_is_what_times_depend_on(packed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def digest(**changes: Any) -> str:
        return shape_digest(plan(packed(**{"sizes": ["rung-32"], **changes}))[0].config)

    same = digest()
    assert digest(seeds=[7]) == same
    assert digest(base={"lr_multiplier": 2}) == same
    assert digest(sizes=["rung-48"]) != same
    assert digest(base={"optimiser": {"batch_size": 32}}) != same
    assert digest(base={"probes": []}) != same
    monkeypatch.setattr(clocks, "_where", lambda: {"cpu": "another"})
    assert digest() != same


def test_runs_here_are_measured_once(packed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real programs train, save, validate and probe for a moment; every part of the time is known afterwards."""
    sweep, told = packed(sizes=["rung-24", "rung-32"], seeds=[0, 1]), list[str]()
    assert measure_here(sweep, plan(sweep), 1, tell=told.append)
    assert told == ["measuring 2 shapes of runs on 1 cores, a second of each"]
    for card in cost_cards(sweep, plan(sweep)):
        clock = card.rates.clock
        assert clock is not None
        assert clock.is_measured
        assert min(vars(clock).values()) > 0
        assert clock.start_s > clock.evaluation_start_s, "it imports DeepSpeed, too"
    assert measure_here(sweep, plan(sweep), 1, tell=told.append)
    assert len(told) == 1
    monkeypatch.setattr(speed, "_measure", lambda configs, number: told.append(f"{len(configs)}"))
    measure_here(sweep, plan(sweep), 1, again=True, tell=lambda _: None)
    assert told[1:] == ["2"]
    gone = packed(sizes=["rung-48"], base={"data": {"sources": [{"path": "elsewhere"}]}})
    assert not measure_here(gone, plan(gone), 1, tell=told.append)
    assert len(told) == 2, "nothing is measured before the data are there"


def test_large_sizes_are_scaled_from_small_ones(packed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = packed(sizes=["rung-32", "aim-600M"])
    small, large = plan(sweep)
    monkeypatch.setattr(speed, "_measure", lambda configs, _: [remember(each, CLOCK) for each in configs])
    assert measure_here(sweep, [small, large], 2, tell=lambda _: None)
    scaled = remembered(large.config)
    assert remembered(small.config) == CLOCK
    assert scaled is not None
    assert not scaled.is_measured
    factor = speed._step_flops(large.config) / speed._step_flops(small.config)
    assert scaled.step_s == pytest.approx(0.25 * factor)
    assert scaled.start_s == CLOCK.start_s


@pytest.mark.parametrize("slower", [1.5, 4.0])
def test_init_aims_at_measured_hours(
    write_images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slower: float
) -> None:
    """Runs take so many times what their FLOPs do at the assumed speed; the grid takes the hours all the same."""
    for seed, name in enumerate(("train", "validation", "test")):
        write_images(tmp_path / "shards" / name, 40, seed=seed, classes=("ant", "bee"))
    monkeypatch.setattr("aimscale.sweeps.planning.suggestion.MAX_PASSES", 10**9)
    hours, measured = 2.0, list[Sweep]()

    def measure(sweep: Sweep) -> bool:
        measured.append(sweep)
        for card in cost_cards(sweep, plan(sweep), takes_measured=False):
            step_s = slower * card.training_s / card.steps  # type: ignore[operator]
            zero = dict.fromkeys(
                ("start_s", "budget_s", "evaluation_start_s", "validation_s", "feature_s", "pair_s"), 0.0
            )
            remember(card.run.config, Clock(**zero, step_s=step_s))
        return True

    path = tmp_path / "s.yaml"
    request = Request(path=path, data=tmp_path / "shards", hours=hours, devices=2, gpu=None, is_gpu=False)
    path.write_text(suggest(request, measure))
    sweep = load_sweep(path, tmp_path)
    planned = sum(card.device_hours for card in cost_cards(sweep, plan(sweep))) / 2
    assert 0.6 * hours < planned <= 1.05 * hours
    assert 1 < len(measured) <= 3


def test_the_clock_of_another_run_is_no_clock(packed: Any) -> None:
    (run,) = plan(packed(sizes=["rung-32"]))
    remember(run.config, replace(CLOCK, step_s=1.0))
    (path,) = (Path(clocks.cache_folder()) / "clock").glob("*.json")
    path.write_text('{"step_s": "a"}')
    assert remembered(run.config) is None, "a damaged file is measured again"
