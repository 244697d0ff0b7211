"""Checkpoints of the authors' trainer (ml-l3m) under the names of the released models, plus `pixel_head.*`.

Its modules hold query, key and value apart (`attn.q_proj`, ...), the pixel head as `head.decoder_*`, and fixed
positions, which are computed here instead of read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

NORM_EPS = 1e-5
"""Of every LayerNorm that its configuration trains."""

_HEAD = {
    "decoder_projection.": "proj_in.",
    "decoder_blocks.": "blocks.",
    "decoder_norm.": "norm.",
    "decoder_pred.": "proj_out.",
}
_WRAPPERS = ("module.", "_orig_mod.", "model.")
_POSITIONS = ("pos_embed", "decoder_pos_embed")


def is_of_trainer(state: Mapping[str, Tensor]) -> bool:
    """Whether these are names of the trainer."""
    return any(name.endswith("attn.q_proj.weight") for name in state)


def to_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under released names; q, k and v of a block are joined when a block is complete.

    Names that are neither a backbone's nor a pixel head's are kept as they are, for the caller to refuse.
    """
    plain = {_without_wrappers(name): tensor for name, tensor in state.items()}
    out: dict[str, Tensor] = {}
    for name, tensor in plain.items():
        if name.rpartition(".")[2] in _POSITIONS:
            continue
        if found := re.fullmatch(r"(trunk\.blocks\.\d+\.attn\.)([qkv])_proj\.weight", name):
            parts = [plain.get(f"{found[1]}{part}_proj.weight") for part in "qkv"]
            if found[2] == "q" and all(part is not None for part in parts):
                out[f"{found[1]}qkv.weight"] = torch.cat([part for part in parts if part is not None])
            continue
        name = re.sub(r"^preprocessor\.(?:[\w.]+\.)?patchifier\.", "preprocessor.patchifier.", name)
        for theirs, ours in _HEAD.items():
            if name.startswith(f"head.{theirs}"):
                name = f"pixel_head.{ours}{name.removeprefix(f'head.{theirs}')}"
        out[name] = tensor
    return out


def _without_wrappers(name: str) -> str:
    """The name without what compilation and data parallelism put before it or between its parts."""
    name = (
        name.replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "")
    )
    while name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    return name
