from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from aimscale.aim.config import model_config
from aimscale.aim.cost import executed_flops_per_image, flops_per_image
from aimscale.aim.errors import UserError
from aimscale.harness.device import speed
from aimscale.harness.probe.features.tasks import probe_cost
from aimscale.harness.run.config import ProbeSection, build_model_config
from aimscale.harness.run.provenance import cpu_name
from aimscale.sweeps.cli.plan_view import print_plan
from aimscale.sweeps.planning.checks import check
from aimscale.sweeps.planning.costs import cost_cards, model_counts
from aimscale.sweeps.planning.planner import plan
from aimscale.sweeps.planning.recipes import recipe_names
from aimscale.sweeps.planning.run import CostCard
from aimscale.sweeps.planning.sweepfile import SweepError, load_sweep, preset_names
from aimscale.sweeps.state.planned_sweep import PlannedSweep, to_json


def test_axes_multiply_and_one_wsd_run_serves_all_budgets(write_sweep: Any, tmp_path: Path) -> None:
    sweep = write_sweep(
        unique_images=["1k", None],
        seeds=[0, 1],
        axes={"model.head_rule": ["proportional", "none"], "lr_multiplier": [0.5, 1.0]},
    )
    runs = plan(sweep)
    assert len(runs) == 2 * 2 * 2 * 2 * 2
    assert len({run.run_id for run in runs}) == len(runs)
    assert {run.budgets for run in runs} == {(640, 1280)}
    assert {run.config.training.data.unique_images for run in runs} == {1000, None}
    assert {run.config.training.data.sources[0].path for run in runs} == {str(tmp_path / "data/train")}
    same = [run for run in runs if (run.cell["size"], run.cell["model.head_rule"]) == ("rung-32", "none")]
    rates = {run.config.training.optimiser.lr_peak for run in same}
    assert max(rates) == pytest.approx(2 * min(rates))
    assert {run.lr_multiplier for run in runs} == {0.5, 1.0}


def test_variants_are_named_settings_side_by_side(write_sweep: Any) -> None:
    variants: dict[str, Any] = {"base": {}, "causal": {"objective.prefix": "none", "lr_multiplier": 2.0}}
    sweep = write_sweep(
        sizes=["rung-32"],
        seeds=[0, 1],
        variants=variants,
        override=[{"when": {"variant": "causal", "seed": 1}, "set": {"lr_multiplier": 4.0}}],
    )
    runs = {(run.cell["variant"], run.cell["seed"]): run.config.training for run in plan(sweep)}
    assert set(runs) == {("base", 0), ("base", 1), ("causal", 0), ("causal", 1)}
    assert runs["base", 0].objective.prefix == "paired"
    assert runs["causal", 0].objective.prefix == "none"
    rate = runs["base", 0].optimiser.lr_peak
    assert runs["causal", 0].optimiser.lr_peak == pytest.approx(2 * rate)
    assert runs["causal", 1].optimiser.lr_peak == pytest.approx(4 * rate)


def test_a_cosine_budget_is_its_own_run(write_sweep: Any) -> None:
    sweep = write_sweep(budgets=["1k", "2k"], axes={"schedule.kind": ["cosine", "wsd"]})
    budgets = sorted(run.budgets for run in plan(sweep) if run.cell["size"] == "rung-32")
    assert budgets == [(1024,), (1024, 1984), (1984,)]  # rounded to whole batches of 64


def test_exclusions_and_overrides_apply_to_their_cells_alone(write_sweep: Any) -> None:
    sweep = write_sweep(
        seeds=[0, 1],
        exclude=[{"size": "rung-48", "budget": "1280"}, {"size": "rung-32", "seed": 1}],
        override=[{"when": {"size": ["rung-48"], "seed": 1}, "set": {"optimiser.lr_peak": 0.25, "devices": 2}}],
    )
    runs = {(run.cell["size"], run.cell["seed"]): run for run in plan(sweep)}
    assert set(runs) == {("rung-32", 0), ("rung-48", 0), ("rung-48", 1)}
    assert runs["rung-32", 0].budgets == (640, 1280)
    assert runs["rung-48", 0].budgets == (640,)
    assert runs["rung-48", 1].config.training.optimiser.lr_peak == 0.25
    assert [run.devices for run in runs.values()] == [1, 1, 2]
    assert runs["rung-48", 0].config.training.optimiser.lr_peak != 0.25


def test_isoflop_pairs_meet_their_compute_around_the_expected_optimum(write_sweep: Any) -> None:
    sizes = ["rung-32", "rung-48", "rung-64", "rung-96", "rung-128", "rung-192"]
    flops = [1e14, 4e14]
    isoflop = {"flops": flops, "sizes_per_budget": 3, "images_per_param": 1.0}
    sweep = write_sweep(sizes=sizes, budgets=[], isoflop=isoflop)
    runs = plan(sweep)
    pairs = [
        (budget.flops, budget.images_seen / card.params_total)
        for card in cost_cards(sweep, runs)
        for budget in card.budgets
    ]
    assert len(pairs) == 6
    for target in flops:
        ratios = [ratio for compute, ratio in pairs if abs(compute / target - 1) < 0.05]
        assert len(ratios) == 3
        assert min(ratios) < 1.0 < max(ratios)


def test_aim_paper_reproduces_published_parameters_and_flops(tmp_path: Path) -> None:
    sweep = load_sweep("aim-paper", tmp_path)
    runs = plan(sweep)
    cards = cost_cards(sweep, runs)
    trunks = {run.cell["size"]: model_counts(build_model_config(run.config.training))[0].trunk for run in runs}
    assert list(trunks.values()) == [679_627_776, 1_208_160_256, 2_718_210_048, 6_442_983_424]
    num_tokens, o, head, n = 256, 588, 2048, 12
    shapes = {"aim-600M": (1536, 24), "aim-1B": (2048, 24), "aim-3B": (3072, 24), "aim-7B": (4096, 32)}
    for card in cards:
        d, depth = shapes[card.run.cell["size"]]
        trunk = 2 * depth * (12 * num_tokens * d**2 + 2 * num_tokens**2 * d)
        forward = 2 * num_tokens * o * d + trunk + 2 * num_tokens * (d * head + 8 * n * head**2 + head * o)
        assert [budget.flops for budget in card.budgets] == [3 * forward * b.images_seen for b in card.budgets]
        assert card.flops_executed < card.budgets[-1].flops  # half of the tokens skip the head
        head_and_patches = 2 * o * d + d * head + n * head**2  # weights beside the trunk, of 6ND too
        for budget in card.budgets:
            per_parameter = budget.flops_6nd / (6 * num_tokens * budget.images_seen)
            assert per_parameter == card.params_total > card.params_trunk + 0.1 * head_and_patches
    assert f"{cards[0].budgets[0].flops:.1e}" == "3.5e+21"
    assert f"{cards[-1].budgets[0].flops:.1e}" == "5.4e+22"
    assert [card.fit.zero_stage for card in cards if card.fit] == [2] * len(cards)


@pytest.mark.parametrize("name", preset_names())
def test_presets_plan_cleanly(name: str, tmp_path: Path) -> None:
    sweep = load_sweep(name, tmp_path)
    runs = plan(sweep)
    cards = to_json(cost_cards(sweep, runs))
    assert json.loads(json.dumps(cards))["totals"]["num_runs"] == len(runs) >= 1
    of_data = ("data.sources", "validation.path", "probes.")
    assert all(problem.key.startswith(of_data) for problem in check(sweep, runs))
    assert not list(tmp_path.iterdir())


def test_a_file_starts_from_a_preset_and_is_written_out_whole(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "preset: ablation-masking\nname: mine\nrecipe: small\nsizes: [rung-32]\nbudgets: [1024]\n"
        "base: {model.patch_size: 28, objective: {target: raw}, data: {sources: [{path: here}]}}\n"
    )
    sweep = load_sweep(path, tmp_path)
    runs = plan(sweep)
    models = [build_model_config(run.config.training) for run in runs]
    assert [(model.masked, model.num_masked) for model in models] == [(None, 0), (0.5, 32), (0.75, 48)]
    assert {(model.target, model.patch_size, model.head.width) for model in models} == {("raw", 28, 2048)}
    assert {run.config.training.data.sources[0].path for run in runs} == {str(tmp_path / "here")}
    path.write_text(sweep.text)  # as launching keeps it
    assert "preset" not in sweep.text
    assert [run.run_id for run in plan(load_sweep(path, tmp_path))] == [run.run_id for run in runs]
    path.write_text("preset: ablation-maskin\n")
    with pytest.raises(SweepError, match="ablation-masking"):
        load_sweep(path, tmp_path)


def test_all_frozen_probes_of_imagenet_cost_a_few_percent_of_training() -> None:
    """The share is that of one budget of 128M images, for a task with default settings."""

    def share(size: str, ranks: int, **settings: Any) -> tuple[float, float, float]:
        model = model_config(size, head_rule="released")
        flops = flops_per_image(model)
        task = {"task": "imagenet-1k", "train": "absent", "test": "absent", "kinds": ["linear", "attentive", "knn"]}
        section = ProbeSection.model_validate(task | settings)
        cost = probe_cost(section, model, flops, ranks, 80 * 10**9, lambda path: None)
        executed = executed_flops_per_image(model, model.num_tokens / 2).train * 128e6
        return cost.flops / (flops.train * 128e6), cost.flops / executed, cost.images

    everything = ["linear", "attentive", "efficient", "knn"]
    assert max(share("aim-600M", 8, kinds=everything)[:2]) < 0.03
    assert max(share("aim-7B", 8, kinds=everything)[:2]) < 0.05
    # both splits, five epochs of the part to fit, the held-out images, five epochs of all images, the test split
    assert share("aim-600M", 8)[2] == pytest.approx(1_331_167 + (5 * 0.8 + 0.2 + 5) * 1_281_167 + 50_000)
    assert share("aim-7B", 1)[2] > 2 * share("aim-7B", 8)[2]  # on one card its heads train in four rounds


def test_evaluation_is_priced_on_its_own_devices(write_sweep: Any) -> None:
    base = {"probes": [{"task": "imagenet-1k", "train": "absent", "test": "absent"}]}

    def card(place: Any = None, **fields: Any) -> CostCard:
        sweep = write_sweep(sizes=["rung-32"], devices=32, base=base | fields, slurm={}).with_target(place)
        return cost_cards(sweep, plan(sweep))[0]

    on_node, here, on_one = card(), card("local"), card(evaluation_devices=1)
    assert [each.run.evaluation_devices for each in (on_node, here, on_one)] == [8, 32, 1]
    assert on_node.training_s == on_one.training_s
    assert on_one.evaluation_s == pytest.approx(8 * on_node.evaluation_s, rel=1e-3)
    spent = (on_node.training_s * 32 + on_node.evaluation_s * 8) / 3600
    assert on_node.device_hours == pytest.approx(spent, rel=1e-3)
    assert here.device_hours == pytest.approx(here.wall_s * 32 / 3600)


def test_evaluation_is_counted_in_forward_passes(write_sweep: Any, write_images: Any, tmp_path: Path) -> None:
    for seed, (name, number) in enumerate((("val", 100), ("fit", 60), ("test", 40))):
        write_images(tmp_path / name, number, seed=seed)
    base = {"validation": {"path": "val", "num_images": 50, "num_prefixes": 2}}
    task = {"task": "pets", "train": "fit", "test": "test", "epochs": 10}

    def passes(**probe: Any) -> float:
        sweep = write_sweep(sizes=["rung-32"], base={**base, "probes": [task | probe] if probe else []})
        run = plan(sweep)[0]
        flops = model_counts(build_model_config(run.config.training))[1]
        card = cost_cards(sweep, [run])[0]
        validation = 2 * 50 * 2 * flops.forward  # two budgets, 50 images, two prefixes
        probes = [cost.flops for cost in card.probes]
        assert card.flops_evaluation == pytest.approx(validation + 2 * sum(probes))
        return sum(cost.images for cost in card.probes)

    assert passes() == pytest.approx(0)
    assert passes(kinds=["linear", "knn"]) == pytest.approx(100)  # the backbone runs once
    assert passes(kinds=["linear", "attentive"]) == pytest.approx(100)  # so few tokens are kept
    # ten epochs of the 48 that are not held out, the 12 that are, and ten epochs of all images
    assert passes(kinds=["linear"], augmentation="published") == pytest.approx(100 + 10 * 48 + 12 + 10 * 60)
    # two points on the 48 that are not held out, the better one on all
    lora = 2 * (3 * 10 * 48 + 12) + 3 * 10 * 60 + 40
    assert passes(kinds=["lora"], lrs=[0.1, 0.2]) == pytest.approx(lora)
    assert passes(kinds=["linear"], train="not-made-yet") == pytest.approx(3_680 + 40)  # by the card of Pets
    assert passes(kinds=["linear"], train="not-made-yet", task="mine") == pytest.approx(40)


@pytest.mark.parametrize(("number", "is_warned"), [(999, True), (1_000, False)])
def test_fewer_than_a_thousand_validation_images_are_warned_of(
    number: int, is_warned: bool, write_sweep: Any, write_images: Any, tmp_path: Path
) -> None:
    write_images(tmp_path / "val", number, side=4)
    sweep = write_sweep(sizes=["rung-32"], base={"validation": {"path": "val"}})
    (card,) = cost_cards(sweep, plan(sweep))
    assert ("validation.path" in [each.key for each in card.cautions]) == is_warned


def test_points_during_training_are_counted_and_a_large_share_is_named(
    write_sweep: Any, write_images: Any, tmp_path: Path
) -> None:
    for seed, name in enumerate(("val", "fit", "test")):
        write_images(tmp_path / name, 40, seed=seed)

    def card(every: Any) -> CostCard:
        base = {"validation": {"path": "val", "num_prefixes": 2, "every_images": every}}
        slow = {"mfu": 0.01}  # the loader limits nothing
        sweep = write_sweep(sizes=["rung-32"], base=base, budgets=[1280, 128_000], cost=slow)
        return cost_cards(sweep, plan(sweep))[0]

    none, auto = card(None), card("auto")
    assert (none.points, none.flops_during, none.share_during) == (0, 0, 0)
    trunk = 0.8 * 128_000 * none.rates.flops_per_image
    assert 0.029 * trunk < auto.flops_during <= 0.03 * trunk
    assert auto.flops_evaluation - none.flops_evaluation == pytest.approx(auto.flops_during)
    assert auto.wall_s == pytest.approx(none.wall_s / (1 - auto.share_during))
    assert "validation.path" in [each.key for each in auto.cautions], "40 images are few"
    often = card(64)
    assert often.points == 1600
    caution = [each.key for each in often.cautions if f"{100 * often.share_during:.0f} %" in each.text]
    assert caution == ["validation.every_images"]


def test_many_epochs_are_shouted(write_sweep: Any) -> None:
    def said(unique: int) -> str:
        sweep = write_sweep(sizes=["rung-32"], unique_images=[unique])
        cards, console = cost_cards(sweep, plan(sweep)), Console(width=200, file=io.StringIO())
        print_plan(PlannedSweep(sweep), console)
        assert sum("pochs of" in each.text.lower() for each in cards[0].cautions) == 1
        return console.file.getvalue()  # type: ignore[attr-defined]

    assert "12.8 epochs of 100 images" in said(100)
    assert "64 EPOCHS of 20 images" in said(20)


def test_no_caution_asks_for_smaller_budgets_that_another_warns_of(write_sweep: Any) -> None:
    def cautions(unique: int, budget: int) -> list[str]:
        sweep = write_sweep(sizes=["rung-32"], unique_images=[unique], budgets=[budget])
        return [each.text for each in cost_cards(sweep, plan(sweep))[0].cautions]

    few, _plateau = cautions(20, 1280)
    assert few.endswith("take more images: smaller budgets would lie on the first plateau")
    (enough,) = cautions(10_000, 1_000_000)
    assert enough.endswith("take more images or smaller budgets")


def test_a_run_is_priced_at_its_precision_on_the_device_that_is_meant(
    write_sweep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def card(**fields: Any) -> Any:
        sweep = write_sweep(sizes=["rung-128"], **fields)
        return cost_cards(sweep, plan(sweep))[0]

    def peak(card: Any) -> float:
        return float(card.device.flops_per_s(card.precision))

    bf16 = {"optimiser": {"batch_size": 64, "precision": "bf16"}}
    single, half = card(slurm={}), card(slurm={}, base=bf16)
    assert (single.device.name, peak(single), peak(half)) == ("H100", 494.75e12, 989.5e12)
    assert peak(card(slurm={"gpus": "a100"}, base=bf16)) == 312e12
    given = card(cost={"device": "A100", "peak_tflops": 100, "mfu": 0.4})
    assert (given.device.name, peak(given), given.rates.mfu) == ("A100", 1e14, 0.4)
    monkeypatch.setattr(speed, "gpus_here", lambda: [("NVIDIA H200", 141 * 10**9)])
    assert (peak(card()), card().device.memory_bytes) == (494.75e12, 141 * 10**9)
    monkeypatch.setattr(speed, "gpus_here", lambda: [])
    here = card()
    assert (here.device.name, here.device.is_gpu, peak(here)) == (cpu_name(), False, 0.1e12)
    assert here.training_s == pytest.approx(here.flops_executed / 0.04e12)
    monkeypatch.setattr(speed, "gpus_here", lambda: [("NVIDIA GeForce GTX 9", 8 * 10**9)])
    assert (peak(card()), "set cost.peak_tflops" in card().device.why) == (1e14, True)
    node = card(slurm={"gpus": False, "cpus_per_task": 4})
    assert (node.device.name, node.device.memory_bytes) == ("CPU", 16 * 10**9), "not this machine's"


@pytest.mark.parametrize(
    ("name", "tflops", "memory_gb"),
    [
        *(("a100", 312, 42), ("a100_80gb", 312, 85), ("nvidia_a100-sxm4-80gb", 312, 85), ("a100l", 312, 85)),
        *(("h100", 989.5, 85), ("nvidia_h100_80gb_hbm3", 989.5, 85), ("h200", 989.5, 150), ("h100_nvl", 835.5, 99)),
        *(("mi300x", 1307.4, 205), ("rtx_6000_ada", 364.25, 51), ("l40s", 362.05, 48), ("a6000", 154.8, 51)),
    ],
)
def test_gpus_that_slurm_names_have_their_own_peak_and_memory(
    write_sweep: Any, name: str, tflops: float, memory_gb: float
) -> None:
    base = {"optimiser": {"batch_size": 64, "precision": "bf16"}}
    for fields in ({"slurm": {"gpus": name}}, {"cost": {"device": name}}):
        sweep = write_sweep(sizes=["rung-128"], base=base, **fields)
        device = cost_cards(sweep, plan(sweep))[0].device
        assert (device.flops_per_s("bf16"), device.memory_bytes) == (tflops * 1e12, memory_gb * 1e9)


@pytest.mark.parametrize("name", ["v100", "a10g", "a100_3g.20gb", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "TPU v9"])
def test_an_unknown_gpu_is_asked_for_its_peak_and_memory(write_sweep: Any, name: str) -> None:
    def card(**cost: Any) -> CostCard:
        sweep = write_sweep(sizes=["rung-128"], slurm={"gpus": name}, cost=cost)
        return cost_cards(sweep, plan(sweep))[0]

    for cost in ({}, {"peak_tflops": 100}, {"device": name, "memory_gb": 32}):
        with pytest.raises(SweepError, match=rf"'{re.escape(name)}'; give cost\.peak_tflops and cost\.memory_gb$"):
            card(**cost)
    given = card(peak_tflops=100, memory_gb=32)
    assert (given.device.flops_per_s("bf16"), given.device.memory_bytes) == (1e14, 32e9)


def test_a_sweep_for_slurm_is_planned_for_slurms_gpus(write_sweep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The login node has no GPU and little memory."""
    monkeypatch.setattr(speed, "gpus_here", lambda: [])
    monkeypatch.setattr(speed, "free_host_bytes", lambda: 10**9)

    def problems(place: Any = None, **fields: Any) -> dict[str, str]:
        sweep = write_sweep(sizes=["aim-3B"], devices=8, base={"runtime": {"device": "cuda"}}, **fields).with_target(
            place
        )
        return {problem.key: problem.text for problem in check(sweep, plan(sweep))}

    here, there = problems(), problems(slurm={})
    assert {"runtime.device", "cost.memory_gb"} <= here.keys()
    assert not {"runtime.device", "cost.memory_gb"} & there.keys()
    assert problems("local", slurm={"time_limit_min": 1}) == here
    assert "slurm.time_limit_min" in problems("slurm", slurm={"time_limit_min": 1})
    with pytest.raises(SweepError, match=r"slurm: \{\}"):
        write_sweep().with_target("slurm")
    assert "slurm.gpus asks for no GPU" in problems(slurm={"gpus": False})["runtime.device"]


def test_a_run_takes_as_long_as_its_flops_or_its_loader(write_sweep: Any) -> None:
    def card(workers: int | str, size: str = "rung-32", cost: dict[str, Any] | None = None, **slurm: Any) -> CostCard:
        base = {"runtime": {"num_workers": workers}}
        sweep = write_sweep(sizes=[size], base=base, slurm=slurm, cost=cost or {})
        return cost_cards(sweep, plan(sweep))[0]

    none, two, eight, bound = card(0), card(2), card(8), card(8, cpus_per_task=2)
    assert two.limit == "loader"
    assert "runtime.num_workers" in [each.key for each in two.cautions]
    assert two.training_s == pytest.approx(two.images_executed / two.rates.loaded_per_s)
    assert two.training_s == pytest.approx(4 * eight.training_s) == pytest.approx(bound.training_s)
    assert none.training_s == pytest.approx(2 * two.training_s)
    assert card("auto", cpus_per_task=9).training_s == pytest.approx(eight.training_s), "all cores but the trainer's"
    large = card(8, size="rung-1024")
    assert large.limit == "compute"
    assert "runtime.num_workers" not in [each.key for each in large.cautions]
    assert large.training_s == pytest.approx(large.flops_executed / (large.rates.mfu * 494.75e12))
    measured = card(8, size="rung-1024", cost={"mfu": 0.1})
    assert measured.training_s == pytest.approx(large.training_s * large.rates.mfu / 0.1)
    assert 0.1 < large.rates.mfu < 0.5, "by a roofline, in TF32"
    assert card(8, size="rung-64").rates.mfu < large.rates.mfu / 3, "small sizes wait for launches and memory"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sizs": ["rung-32"]}, "did you mean 'sizes'"),
        ({"sizes": ["rung-40"]}, "'rung-32' or 'rung-48'?"),
        ({"base": {"probes": [{"task": "x", "train": "a", "test": "b", "kinds": ["lineer"]}]}}, "'linear'?"),
        ({"sizes": ["rung-32", "rung-32"]}, "sizes"),
        ({"budgets": ["4 thousand"]}, "budgets.0"),
        ({"budgets": [True]}, "budgets.0"),
        ({"base": {"probes": [{"task": "../x", "train": "a", "test": "b"}]}}, "probes.0.task"),
        ({"budgets": []}, "isoflop"),
        ({"exclude": [{"sise": "rung-32"}]}, "'size'"),
        ({"exclude": [{"budget": True}]}, "budget True"),
        ({"override": [{"when": {"seed": [0, 1]}, "set": {}}]}, "seed 1"),
        ({"exclude": [{"size": ["rung-32", "rung-48"]}]}, "sweep.yaml"),
        ({"axes": {"model.size": ["rung-32"]}}, "sizes"),
        ({"sizes": ["w16-d999999999"]}, "depth 999999999"),
        ({"seeds": list(range(1000)), "unique_images": list(range(1, 1001))}, "4,000,000 cells"),
        ({"seeds": list(range(20_000))}, "80,000 cells"),
        ({"cost": {"peak_tflops": 1e-320}}, "cost.peak_tflops"),
        ({"cost": {"memory_gb": 1e308}}, "cost.memory_gb"),
        ({"axes": {"variant": ["a", "b"]}}, "axis 'variant' is written as `variants`"),
        ({"axes": {"runtime.num_workers": [0, 1]}}, "num_workers': 1"),
        ({"variants": {"one": {}, "same": {}}}, "'variant': 'same'"),
        ({"override": [{"when": {"seed": 0}, "set": {"devices": "two"}}]}, "devices"),
        ({"base": {"model": {"image_size": 30, "patch_size": 4}}}, "patches of 4"),
        ({"base": {"seed": 1}}, "seed is written as `seeds`"),
        ({"override": [{"when": {}, "set": {"data.unique_images": 100}}]}, "is written as `unique_images`"),
        ({"variants": {"a": {"model": {"size": "rung-64"}}}}, "model.size is written as `sizes`"),
        ({"base": {"optimiser": {"lr_peak": True}}}, "lr_peak: must be a number, not true"),
        ({"slurm": {"max_jobs": True}}, "slurm.max_jobs: must be a number, not true"),
        ({"description": "\ud800"}, "no valid YAML"),
    ],
)
def test_bad_sweeps_are_refused_in_one_sentence(write_sweep: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        plan(write_sweep(**changes))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", recipe_names())
def test_no_recipe_makes_other_runs_of_a_larger_budget(write_sweep: Any, name: str) -> None:
    def names(*budgets: int) -> list[str]:
        sweep = write_sweep(recipe=name, budgets=list(budgets), base={"schedule": {"kind": "wsd"}})
        return [run.run_id for run in plan(sweep)]

    assert names(64_000, 128_000) == names(64_000) == names(64_000, 10**7)
    assert names(4_000, 64_000) != names(64_000)


@pytest.mark.parametrize(
    ("sizes", "budgets", "lost"),
    [
        (["rung-32", "rung-48", "rung-64"], [640, 1280], {"E", "B", "beta", "a", "b"}),
        (["rung-32", "rung-48"], [640, 1280, 2560], {"E", "A", "alpha", "a", "b"}),
        (["rung-32", "rung-48", "rung-64"], [640, 1280, 2560], set()),
        (["rung-32"], [640], set()),
    ],
)
def test_a_plan_says_what_its_grid_cannot_identify(write_sweep: Any, sizes: list, budgets: list, lost: set) -> None:
    sweep = write_sweep(sizes=sizes, budgets=budgets)
    cards = cost_cards(sweep, plan(sweep))
    assert set(to_json(cards)["not_identified"]) == lost
    console = Console(width=200, file=io.StringIO())
    print_plan(PlannedSweep(sweep), console)
    said = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert sum(line.split()[:2] == ["warn", "fit"] for line in said) == bool(lost)


def test_a_published_name_with_other_parameters_is_told(write_sweep: Any) -> None:
    """A page's sweep of aim-7B planned 10.3 billion parameters, in 2 months more, without a word."""

    def told(size: str, rule: str) -> list[str]:
        model = {"image_size": 224, "patch_size": 14, "head_rule": rule}
        sweep = write_sweep(sizes=[size], base={"model": model})
        return [each.text for each in cost_cards(sweep, plan(sweep))[0].cautions if each.key == "model.head_rule"]

    (text,) = told("aim-7B", "proportional")
    assert "10.3B" in text
    assert "6.86B" in text
    assert told("aim-7B", "released") == told("aim-600M", "proportional") == told("rung-32", "proportional") == []


def test_an_option_of_sbatch_among_the_fields_is_told_where_it_goes(write_sweep: Any) -> None:
    with pytest.raises(UserError, match=r"extra: \{qos: high\}"):
        write_sweep(slurm={"qos": "high"})
    with pytest.raises(UserError, match="partition"):
        write_sweep(slurm={"partitions": "gpu"})
