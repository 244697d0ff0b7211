"""What `aimscale data info` says of a data set, from its index alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from aimscale.harness.data.store.index import ShardDataset

_LISTED_CLASSES = 12
_LISTED_BAD = 5


def describe_dataset(dataset: ShardDataset) -> dict[str, Any]:
    """Counts, classes, resolutions (pixels) and sizes (bytes), ready for JSON."""
    ok = dataset.ok
    shorter = np.minimum(dataset.width, dataset.height)[ok]
    longer = np.maximum(dataset.width, dataset.height)[ok]
    labels = dataset.labels
    class_counts: dict[str, int] = {}
    if labels is not None:
        class_counts = dict.fromkeys(dataset.classes or (), 0)
        found, counts = np.unique(labels[labels >= 0], return_counts=True)
        for label, count in zip(found.tolist(), counts.tolist(), strict=True):
            class_counts[dataset.classes[label] if dataset.classes else str(label)] = count
    return {
        "name": dataset.info.name,
        "path": dataset.path,
        "shards_at": dataset.info.shards_at,
        "fingerprint": dataset.fingerprint,
        "num_shards": len(dataset.info.shards),
        "num_samples": len(dataset),
        "num_unique": int(np.unique(dataset.checksum).size),
        "num_bad": dataset.info.num_bad,
        "bad": [dataset.describe(int(i)) for i in np.flatnonzero(~ok)[:_LISTED_BAD]],
        "num_unlabelled": len(dataset) if labels is None else int((labels < 0).sum()),
        "num_classes": dataset.num_classes,
        "class_counts": class_counts,
        "shorter_side_px": _quartiles(shorter),
        "longer_side_px": _quartiles(longer),
        "image_bytes": _quartiles(dataset.size),
        "total_bytes": sum(shard.size for shard in dataset.info.shards),
    }


def _quartiles(values: np.ndarray) -> dict[str, int]:
    if not values.size:
        return {}
    names = ("min", "lower_quartile", "median", "upper_quartile", "max")
    quantiles = np.quantile(values, (0, 0.25, 0.5, 0.75, 1))
    return dict(zip(names, (int(value) for value in quantiles), strict=True))


def format_description(facts: dict[str, Any]) -> str:
    """The same for people."""
    lines = [f"{facts['name']}  ({facts['path']})"]

    def add(name: str, text: str) -> None:
        lines.append(f"  {name:<14} {text}")

    where = f", shards at {facts['shards_at']}" if facts["shards_at"] else ""
    add(
        "images",
        f"{facts['num_samples']:,} ({facts['num_unique']:,} different files), {facts['num_bad']:,} undecodable",
    )
    add("shards", f"{facts['num_shards']:,}, {facts['total_bytes'] / 1e6:,.1f} MB{where}")
    for name, key in (
        ("shorter side", "shorter_side_px"),
        ("longer side", "longer_side_px"),
        ("file size", "image_bytes"),
    ):
        if facts[key]:
            low, lower, middle, upper, high = facts[key].values()
            unit = "bytes" if key == "image_bytes" else "px"
            add(name, f"median {middle:,} {unit}, half within {lower:,}..{upper:,}, all within {low:,}..{high:,}")
    counts = facts["class_counts"]
    if not counts:
        add("classes", "no labels")
    else:
        add("classes", f"{len(counts):,}, with {min(counts.values()):,} to {max(counts.values()):,} images each")
        for name, count in list(counts.items())[:_LISTED_CLASSES]:
            add("", f"{count:>9,}  {name}")
        if len(counts) > _LISTED_CLASSES:
            add("", f"      ...  and {len(counts) - _LISTED_CLASSES:,} more (--json lists all)")
        if facts["num_unlabelled"]:
            add("unlabelled", f"{facts['num_unlabelled']:,}")
    for text in facts["bad"]:
        add("undecodable", text)
    add("fingerprint", facts["fingerprint"])
    return "\n".join(lines)
