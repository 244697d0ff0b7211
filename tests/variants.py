"""Model configurations that cover the choices of each field."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin, get_type_hints

from aimscale.aim.config import ModelConfig, model_config

HINTS = get_type_hints(model_config) | get_type_hints(ModelConfig)
LEFT_OUT = ("released",)
"""A head of 2048 channels."""
VARIANTS: list[dict[str, Any]] = [
    *({name: True} for name, hint in HINTS.items() if hint is bool),
    *(
        {name: value}
        for name, hint in HINTS.items()
        if get_origin(hint) is Literal
        for value in get_args(hint)[1:]
        if value not in LEFT_OUT
    ),
    {"qk_norm": True, "head_kind": "transformer"},
    {"masked": 0.75},
    {"masked": 0.5, "head_kind": "transformer"},
]
"""Each choice but the first of its field, alone, and masked models."""
