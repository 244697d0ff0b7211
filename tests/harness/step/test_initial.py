"""Runs that start from weights: the same bits on any ranks and at any stage, one read of the file, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainers import stop_after, train_alone_in, weights

from aimscale.aim.errors import UserError
from aimscale.aim.model import AIM
from aimscale.aim.weights import BACKBONE
from aimscale.harness.data.stream.stream import Batch
from aimscale.harness.device.execution import EngineOptions
from aimscale.harness.distributed.group import Group
from aimscale.harness.run.config import RunConfig, build_model_config
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.init import InitSection, sha256_of
from aimscale.harness.step.checkpoint import save_weights
from aimscale.harness.step.engine import Engine
from aimscale.harness.step.initial import check_source, find_initial, read_initial

Ranks = Callable[..., list[Any]]
Config = Callable[..., RunConfig]
MODEL = {"size": "w32-d2", "image_size": 16, "patch_size": 4}


def write_source(path: Path, config: RunConfig, *, seed: int = 9, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Write weights as others do, without metadata, and return `init` of a run."""
    model = AIM(build_model_config(config.training))
    model.init_weights(seed)
    save_file({name: tensor.to(dtype) for name, tensor in model.state_dict().items()}, path)
    return {"weights": str(path), "digest": sha256_of(path)}


def engine_of(group: Group, config: RunConfig, stage: int, precision: str) -> Engine:
    training, init = config.training, config.training.init
    assert init is not None
    optimiser = training.optimiser.model_copy(update={"precision": precision})
    options = EngineOptions(zero_stage=stage, freezes_backbone=init.freeze_images > 0)
    engine = Engine(build_model_config(training), optimiser, options, group, seed=training.seed)
    engine.set_weights(read_initial(training, init, group).get)
    return engine


def train(engine: Engine, group: Group, start: int, stop: int, *, is_frozen: bool = False) -> list[float]:
    """Losses of steps start..stop-1, on images that depend on the step alone."""
    losses = []
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(8, 3, 16, 16, generator=generator)
        mine = torch.arange(8).tensor_split(group.world_size)[group.rank]
        batch = Batch(images=images[mine], prefix_lengths=torch.full((len(mine),), 4), positions=mine)
        outcome = engine.step([batch], num_targets=8 * 12, lr=1e-2, is_frozen=is_frozen)
        losses.append(group.sum_tensor(outcome.loss_sum.clone()).item() / 96)
    return losses


def start_all(group: Group, folder: Path, cases: list[tuple[str, int, str]], configs: dict[str, RunConfig]) -> None:
    for name, stage, precision in cases:
        engine = engine_of(group, configs[name], stage, precision)
        save_weights(folder / f"{name}-{group.world_size}-{stage}-{precision}.safetensors", engine, group)


def test_a_start_has_the_same_bits_at_every_stage_on_any_ranks(
    tmp_path: Path, tiny_config: Config, in_group: Ranks
) -> None:
    drawn, configs, expected = AIM(build_model_config(tiny_config(model=MODEL).training)), {}, {}
    drawn.init_weights(0)
    for dtype in (torch.float32, torch.bfloat16):
        init = write_source(tmp_path / f"{dtype}.safetensors"[6:], tiny_config(model=MODEL), dtype=dtype)
        values = {name: each.float() for name, each in load_file(init["weights"]).items()}
        for parts in ("all", "backbone"):
            name = f"{parts}-{dtype}"
            configs[name] = tiny_config(model=MODEL, init={**init, "parts": parts})
            is_taken = {each: parts == "all" or each.startswith(BACKBONE) for each in values}
            expected[name] = {n: each if is_taken[n] else drawn.state_dict()[n] for n, each in values.items()}
    (out := tmp_path / "out").mkdir()
    stages = [(0, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
    cases = [("backbone-torch.bfloat16", *each) for each in stages]
    cases += [(name, 3, "bf16") for name in configs if name != cases[0][0]]
    for world_size in (1, 2):
        in_group(start_all, out, cases, configs, world_size=world_size)
    found = list(out.iterdir())
    assert len(found) == len(cases) * 2
    for path in found:
        started, exact = load_file(path), expected["-".join(path.stem.split("-")[:2])]
        assert started.keys() == exact.keys()
        assert all(torch.equal(started[name], exact[name]) for name in exact), path.name


def go_on(group: Group, folder: Path, config: RunConfig, stage: int) -> list[list[float]]:
    """Losses after three steps: of the engine that took them, and of one that starts from its weights."""
    engine = Engine(
        build_model_config(config.training), config.training.optimiser, EngineOptions(zero_stage=stage), group
    )
    train(engine, group, 0, 3)
    save_weights(path := folder / f"{stage}.safetensors", engine, group)
    init = InitSection(weights=str(path), parts="all")
    warm = config.model_copy(update={"training": config.training.model_copy(update={"init": init, "seed": 4})})
    return [train(each, group, 3, 5) for each in (engine, engine_of(group, warm, stage, "fp32"))]


@pytest.mark.parametrize("stage", [0, 3])
def test_a_start_from_all_of_a_run_continues_its_loss(
    tmp_path: Path, tiny_config: Config, in_group: Ranks, stage: int
) -> None:
    ((went_on, warm), _) = in_group(go_on, tmp_path, tiny_config(model=MODEL), stage, world_size=2)
    assert warm[0] == went_on[0], "bit by bit, before the first update"
    assert warm[1] != went_on[1], "moments begin anew"


def freeze(group: Group, folder: Path, config: RunConfig, stages: list[int]) -> None:
    for stage in stages:
        engine = engine_of(group, config, stage, "fp32")
        for name, is_frozen in (("frozen", True), ("free", False)):
            train(engine, group, 0, 1, is_frozen=is_frozen)
            save_weights(folder / f"{stage}-{name}.safetensors", engine, group)


def test_a_frozen_backbone_keeps_every_bit_until_it_is_freed(
    tmp_path: Path, tiny_config: Config, in_group: Ranks
) -> None:
    init = write_source(tmp_path / "source.safetensors", tiny_config(model=MODEL)) | {"freeze_images": 8}
    in_group(freeze, tmp_path, tiny_config(model=MODEL, init=init), [0, 2, 3], world_size=2)
    source = load_file(tmp_path / "source.safetensors")
    for stage in (0, 2, 3):
        frozen, free = (load_file(tmp_path / f"{stage}-{name}.safetensors") for name in ("frozen", "free"))
        for name in source:
            moved = [not torch.equal(each[name], source[name]) for each in (frozen, free)]
            assert moved == [not name.startswith(BACKBONE), True], (stage, name)


def test_a_resumed_run_never_reads_the_file_again(tmp_path: Path, tiny_config: Config, in_processes: Any) -> None:
    init, source = write_source(tmp_path / "source.safetensors", tiny_config()), tmp_path / "source.safetensors"
    config = tiny_config(budgets=[64], init=init | {"freeze_images": 16})
    whole, stopped, late = (RunDir.create(tmp_path / name, config) for name in ("whole", "stopped", "late"))
    assert in_processes(train_alone_in, whole.path) == [0]
    assert in_processes(stop_after, stopped.path, 24) == [75]
    source.unlink()
    assert in_processes(train_alone_in, stopped.path) == [0]
    assert weights(stopped, 64) == weights(whole, 64)
    assert in_processes(train_alone_in, late.path) == [2], "what has not begun needs it"
    assert "no weight file" in str(late.read_status().reason)
    row = whole.read_rows()[0]
    assert (row["init"], row["init_images_seen"]) == ("source, frozen for 16", None)


def test_an_exchanged_or_damaged_file_is_told_before_the_first_step(
    tmp_path: Path, tiny_config: Config, in_processes: Any
) -> None:
    path = tmp_path / "source.safetensors"
    config = tiny_config(init=write_source(path, tiny_config()))
    write_source(path, tiny_config(), seed=10)
    run = RunDir.create(tmp_path / "run", config)
    assert in_processes(train_alone_in, run.path) == [2]
    assert "exchanged or damaged" in str(run.read_status().reason)
    assert not run.metrics.exists()
    training, init = config.training, config.training.init
    assert init is not None
    state = load_file(path)
    state["trunk.post_trunk_norm.weight"][0] = torch.nan
    save_file(state, path)
    with pytest.raises(UserError, match="not finite"):
        check_source(training, init.model_copy(update={"digest": sha256_of(path)}))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        check_source(training, init.model_copy(update={"digest": sha256_of(path)}))


@pytest.mark.parametrize(
    ("model", "parts", "words"),
    [
        ({"parametrisation": "mup"}, "backbone", "muP"),
        ({"qk_norm": True}, "backbone", "no norms of queries and keys"),
        ({"size": "w48-d2"}, "backbone", "has the shape .32"),
        ({"size": "w32-d3"}, "backbone", "lacks trunk.blocks.2"),
        ({"size": "w32-d1"}, "backbone", "which this model does not have"),
        ({"patch_size": 8}, "backbone", "has the shape .32, 3, 4, 4"),
        ({"head_rule": "none"}, "all", "holds pixel_head"),
    ],
)
def test_another_model_is_refused(
    tmp_path: Path, tiny_config: Config, model: dict[str, Any], parts: str, words: str
) -> None:
    init = write_source(tmp_path / "source.safetensors", tiny_config(model=MODEL)) | {"parts": parts}
    training = tiny_config(model=MODEL | model, init=init).training
    with pytest.raises(UserError, match=words):
        find_initial(training, training.init)  # type: ignore[arg-type]


def test_a_head_is_taken_for_its_own_target_and_heads_from_files_that_have_one(
    tmp_path: Path, tiny_config: Config, in_processes: Any
) -> None:
    run = RunDir.create(tmp_path / "run", tiny_config(budgets=[16], schedule={"warmup_images": 8}))
    assert in_processes(train_alone_in, run.path) == [0]
    init = {"weights": str(run.model_file(16)), "parts": "all"}
    training = tiny_config(init=init, objective={"target": "raw"}).training
    with pytest.raises(UserError, match="predicts normalised pixels"):
        find_initial(training, training.init)  # type: ignore[arg-type]
    released = {n: each for n, each in load_file(run.model_file(16)).items() if n.startswith(BACKBONE)}
    save_file(released, tmp_path / "released.safetensors")
    training = tiny_config(init=init | {"weights": str(tmp_path / "released.safetensors")}).training
    with pytest.raises(UserError, match="no pixel head, as released files"):
        find_initial(training, training.init)  # type: ignore[arg-type]
    backbone = training.init.model_copy(update={"parts": "backbone"})  # type: ignore[union-attr]
    assert find_initial(training, backbone).keys() == released.keys()
