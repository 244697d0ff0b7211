"""The child process of `aimscale doctor`: import what is heavy, and look at the cards.

It prints the name of each module before importing it, so that its parent knows what took it down, and at the end one
line of JSON.
"""

from __future__ import annotations

import importlib
import json
from typing import Any

FACTS_LINE = "facts: "
IMPORTING_LINE = "importing: "
MODULES = (
    "torch", "torchvision", "deepspeed", "simplejpeg", "webdataset", "submitit", "timm", "pyarrow", "pandas",
    "scipy.optimize",
)  # fmt: skip
"""Packages with compiled parts, or that import such."""


def main() -> None:
    """Print the facts."""
    errors = {}
    for module in MODULES:
        print(f"{IMPORTING_LINE}{module}", flush=True)
        try:
            importlib.import_module(module)
        except Exception as error:  # any: an import may raise whatever its module's code raises
            errors[module] = _one_line(error)
    facts = {"errors": errors} | ({} if "torch" in errors else {"torch": torch_facts()})
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


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


if __name__ == "__main__":
    main()
