"""What `aimscale data info` says of a data set, from its index alone."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
import numpy.typing as npt

from aimscale.harness.data.store.columns import Column
from aimscale.harness.data.store.index import ShardDataset

_LISTED_CLASSES = 12
_LISTED_BAD = 5
_QUARTILES = ("min", "lower_quartile", "median", "upper_quartile", "max")
_MAX_COUNTED = 1 << 25  # checksums that are sorted in memory to count the different ones


def describe_dataset(dataset: ShardDataset) -> dict[str, Any]:
    """Counts, classes, resolutions (pixels) and sizes (bytes), ready for JSON; walks over the index in blocks."""
    index, info = dataset.index, dataset.info
    shorter, longer, sizes = _Histogram(), _Histogram(), _Histogram()
    for _, rows in index.samples.blocks():
        good = rows[rows["width"] > 0]
        shorter.add(np.minimum(good["width"], good["height"]))
        longer.add(np.maximum(good["width"], good["height"]))
        sizes.add(rows["size"])
    labels = _Histogram()
    for _, block in index.label.blocks() if index.label is not None else ():
        labels.add(block[block >= 0])
    class_counts = dict.fromkeys(dataset.classes or (), 0)
    for label, count in labels.counts().items():
        class_counts[dataset.classes[label] if dataset.classes else str(label)] = count
    num_unique, is_exact = _count_different(index.checksum)
    return {
        "name": info.name,
        "path": dataset.path,
        "shards_at": info.shards_at,
        "fingerprint": dataset.fingerprint,
        "num_shards": info.num_shards,
        "num_samples": len(dataset),
        "num_unique": num_unique,
        "num_unique_is_exact": is_exact,
        "num_bad": info.num_bad,
        "bad": [dataset.describe(int(i)) for i in index.bad[:_LISTED_BAD]],
        "num_unlabelled": len(dataset) - labels.total,
        "num_classes": len(dataset.classes or class_counts),
        "class_counts": class_counts,
        "shorter_side_px": shorter.quartiles(),
        "longer_side_px": longer.quartiles(),
        "image_bytes": sizes.quartiles(),
        "total_bytes": info.total_bytes,
    }


class _Histogram:
    """How often whole numbers occur; exact, in memory that grows with the number of different ones."""

    def __init__(self) -> None:
        self._counts: collections.Counter[int] = collections.Counter()

    def add(self, values: npt.NDArray[np.integer]) -> None:
        found, counts = np.unique(values, return_counts=True)
        self._counts.update(dict(zip(found.tolist(), counts.tolist(), strict=True)))

    @property
    def total(self) -> int:
        return self._counts.total()

    def counts(self) -> dict[int, int]:
        return dict(sorted(self._counts.items()))

    def quartiles(self) -> dict[str, int]:
        """Of numpy's linear kind, cut to whole numbers."""
        if not self._counts:
            return {}
        values, ends = np.array(list(self.counts())), np.cumsum(list(self.counts().values()))
        found = {}
        for name, share in zip(_QUARTILES, (0, 0.25, 0.5, 0.75, 1), strict=True):
            low, rest = divmod(share * (self.total - 1), 1)
            here, following = (
                values[np.searchsorted(ends, min(low + step, self.total - 1), side="right")] for step in (0, 1)
            )
            found[name] = int(here + rest * (following - here))
        return found


def _count_different(checksums: Column) -> tuple[int, bool]:
    """(number of different checksums, whether it is exact); of very many, a slice by value is counted and scaled."""
    share = -(-len(checksums) // _MAX_COUNTED)
    kept = [block[block % np.uint64(share) == 0] for _, block in checksums.blocks()]
    number = int(np.unique(np.concatenate(kept)).size) if kept else 0
    return min(number * share, len(checksums)), share == 1


def format_description(facts: dict[str, Any]) -> str:
    """The same for people."""
    lines = [f"{facts['name']}  ({facts['path']})"]

    def add(name: str, text: str) -> None:
        lines.append(f"  {name:<14} {text}")

    about = "" if facts["num_unique_is_exact"] else "about "
    where = f", shards at {facts['shards_at']}" if facts["shards_at"] else ""
    add(
        "images",
        f"{facts['num_samples']:,} ({about}{facts['num_unique']:,} different files), {facts['num_bad']:,} undecodable",
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
