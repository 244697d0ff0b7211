"""First weights of a run that does not draw them (`init`): what fits, and values of which each rank reads its part."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from aimscale.aim.config import model_config
from aimscale.aim.weights import BACKBONE, PROBE, WeightsError, check_shapes, check_tensors, model_shapes, read_weights
from aimscale.harness.distributed.group import Group, write_timeout_s
from aimscale.harness.run.config import TrainingConfig, build_model_config
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.init import InitSection, read_about, sha256_of
from aimscale.harness.run.schedule import check_weights


def find_initial(training: TrainingConfig, init: InitSection, *, with_values: bool = True) -> dict[str, Tensor]:
    """Map the tensors that a run starts from into memory; values are not read.

    Args:
        with_values: whether values are needed; else shapes are read, for which no host is too small.

    Raises:
        WeightsError: they are of another model, or of a kind of model that cannot start so.
    """
    model, about, where = build_model_config(training), read_about(init.file), init.file
    theirs = model_config(**about["model"], target=about["target"]) if about else model
    if "mup" in (model.parametrisation, theirs.parametrisation):
        raise WeightsError(
            f"{where}: muP scales attention and rates for weights that it draws; train this run as standard"
        )
    if theirs.num_heads != model.num_heads:
        raise WeightsError(f"{where} is of {theirs.num_heads} attention heads, and {model.name} has {model.num_heads}")
    wanted = model_shapes(model)
    state = {name: tensor for name, tensor in _tensors(where, with_values).items() if not name.startswith(PROBE)}
    if init.parts == "backbone":
        wanted = {name: shape for name, shape in wanted.items() if name.startswith(BACKBONE)}
        state = {name: tensor for name, tensor in state.items() if name.startswith(BACKBONE)}
    elif not any(name.startswith("pixel_head.") for name in state):
        raise WeightsError(f"{where} has no pixel head, as released files; use init.parts: backbone")
    elif theirs.target != model.target:
        raise WeightsError(
            f"{where} has a head that predicts {theirs.target} pixels, and this run's predicts {model.target} ones; "
            "use init.parts: backbone"
        )
    if model.qk_norm and not any(".q_norm." in name for name in state):
        raise WeightsError(f"{where} has no norms of queries and keys, as released files; leave out model.qk_norm")
    check_shapes(state, wanted, where)
    return state


def _tensors(path: Path, with_values: bool) -> dict[str, Tensor]:
    if path.suffix == ".safetensors" and not with_values:
        with contextlib.suppress(SafetensorError, OSError), safe_open(path, "numpy") as file:  # maps no private memory
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)
            return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return read_weights(path)


def check_source(training: TrainingConfig, init: InitSection) -> None:
    """Compare the weights with what the run was planned with, and read all their values once.

    Raises:
        WeightsError: they are missing, damaged, or were exchanged.
    """
    if not init.file.is_file():
        raise WeightsError(f"there is no weight file {init.file}, from which this run starts")
    if init.run is not None:
        run_dir = init.file.parents[2]
        check_weights(RunDir(run_dir), int(init.file.parent.name))
    elif init.digest is not None and (digest := sha256_of(init.file)) != init.digest:
        raise WeightsError(
            f"{init.file} was exchanged or damaged: its SHA-256 begins with {digest[:8]}, and that of the file which "
            f"this run was planned with by {init.digest[:8]}; restore it, or plan the sweep anew"
        )
    state = find_initial(training, init)
    check_tensors(state, {name: tuple(tensor.shape) for name, tensor in state.items()}, init.file)


def read_initial(training: TrainingConfig, init: InitSection, group: Group) -> dict[str, Tensor]:
    """Check the weights on the first rank, and map them into memory on all; these call this together."""
    path = init.file
    num_bytes = path.stat().st_size if path.is_file() else 0
    with group.collective_timeout(write_timeout_s(num_bytes)):
        group.broadcast_from_rank0(lambda: check_source(training, init))
    return group.run_on_all_ranks(lambda: find_initial(training, init))
