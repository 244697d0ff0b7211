"""The child process of `aimscale doctor`: import what is heavy, and look at the cards.

It prints the name of each module before importing it, so that its parent knows which one took it down, and what torch
knows as one line of JSON.
"""

from __future__ import annotations

import importlib
import json
from typing import Any

FACTS_LINE = "torch: "
IMPORTING_LINE = "importing: "
MODULES = (
    "torchvision", "deepspeed", "simplejpeg", "webdataset", "submitit", "timm", "pyarrow", "pandas", "scipy.optimize",
)  # fmt: skip
"""Packages with compiled parts, or that import such, besides torch."""


def main() -> None:
    """Print the facts."""
    print(f"{IMPORTING_LINE}torch", flush=True)
    print(FACTS_LINE + json.dumps(torch_facts()), flush=True)
    for module in MODULES:
        print(f"{IMPORTING_LINE}{module}", flush=True)
        importlib.import_module(module)


def torch_facts() -> dict[str, Any]:
    """Build and cards of torch; `card_error` when a kernel does not run on the first card."""
    import torch

    cards: list[dict[str, Any]] = []
    card_error, bf16 = None, False
    if torch.cuda.is_available():
        try:
            found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
            cards = [{"name": card.name, "bytes": card.total_memory} for card in found]
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            torch.ones(8, 8, device="cuda").mm(torch.ones(8, 8, device="cuda")).sum().item()
        except RuntimeError as error:
            card_error = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    version, cuda = str(torch.__version__), torch.version.cuda
    return {"version": version, "cuda": cuda, "cards": cards, "card_error": card_error, "bf16": bf16}


if __name__ == "__main__":
    main()
