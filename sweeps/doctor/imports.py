"""The child process of `aimscale doctor`: import what is heavy, look at the cards, decode an image of each format.

It prints the name of each module before importing it, so that its parent knows what took it down, and at the end one
line of JSON.
"""

from __future__ import annotations

import importlib
import io
import json
from typing import Any

FACTS_LINE = "facts: "
IMPORTING_LINE = "importing: "
MODULES = (
    "torch",
    "torchvision",
    "deepspeed",
    "simplejpeg",
    "webdataset",
    "submitit",
    "timm",
    "pyarrow",
    "pandas",
    "scipy.optimize",
)
"""Packages with compiled parts, or that import such."""
FORMATS = ("JPEG", "PNG", "WebP", "GIF", "BMP")


def main() -> None:
    """Print the facts."""
    errors = {}
    for module in MODULES:
        print(f"{IMPORTING_LINE}{module}", flush=True)
        try:
            importlib.import_module(module)
        except Exception as error:  # any: an import may raise whatever its module's code raises
            errors[module] = _one_line(error)
    facts: dict[str, Any] = {"errors": errors}
    if "torch" not in errors:
        facts["torch"] = torch_facts()
        facts["decoders"] = {name: _try_decode(name) for name in FORMATS}
    print(FACTS_LINE + json.dumps(facts), flush=True)


def torch_facts() -> dict[str, Any]:
    """Build and cards of torch; `card_error` when a kernel does not run on the first card."""
    import torch

    cards: list[dict[str, Any]] = []
    card_error, bf16 = None, False
    if torch.cuda.is_available():
        try:
            for i in range(torch.cuda.device_count()):
                properties = torch.cuda.get_device_properties(i)
                cards.append({"name": properties.name, "bytes": properties.total_memory})
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            torch.ones(8, 8, device="cuda").mm(torch.ones(8, 8, device="cuda")).sum().item()
        except RuntimeError as error:
            card_error = _one_line(error)
    version, cuda = str(torch.__version__), torch.version.cuda
    return {"version": version, "cuda": cuda, "cards": cards, "card_error": card_error, "bf16": bf16}


def _try_decode(name: str) -> str | None:
    """Write a small image in one format and decode it as training does; the reason when that fails."""
    try:
        import numpy as np
        from PIL import Image

        from aimscale.harness.data.store.decoding import decode

        file = io.BytesIO()
        Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3)).save(file, format=name)
        shape = tuple(decode(file.getvalue()).shape)
    except Exception as error:
        return _one_line(error)
    return None if shape == (3, 16, 16) else f"its shape is {shape}"


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


if __name__ == "__main__":
    main()
