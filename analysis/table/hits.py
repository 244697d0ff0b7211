"""Which test images every probe got right: `hits.parquet` beside a results table, a bit per image.

Probes of equal evaluation were scored on the same test images in the same order, so that two models can be compared
image by image. A foreign table has no such file, and is compared by its accuracies alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from aimscale.analysis.table.names import FOLDER
from aimscale.analysis.table.read import beside

HITS_FILE = "hits.parquet"
KEY = ("run_id", "size", "images_seen", "task", "kind", "evaluation")
"""Columns of the file that say whose hits they are; of a baseline as in its own table: `size` names it."""
SCHEMA = pa.schema(
    [(name, pa.int64() if name == "images_seen" else pa.string()) for name in KEY]
    + [("num_test", pa.int64()), ("hits", pa.binary())]
)


class Hits(NamedTuple):
    """What a probe got right."""

    evaluation: str
    """Tells the test images: equal evaluations have the same."""
    num_test: int
    """Test images."""
    bits: bytes
    """`np.packbits` of one bit per image, in the data set's order."""

    @property
    def right(self) -> npt.NDArray[np.int8]:
        """1 per image (num_test,) that it got right, 0 elsewhere."""
        return np.unpackbits(np.frombuffer(self.bits, np.uint8), count=self.num_test).astype(np.int8)


def hits_table(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """The file's content, from rows with the columns of `SCHEMA`."""
    return pa.Table.from_pylist(list(rows), SCHEMA)


def hits_of(probes: pd.DataFrame) -> pd.Series:
    """`Hits` of every row of a `probe_frame` by `read_tables`; None where its table's folder has none of it.

    Raises:
        AnalysisError: a file that cannot be read.
    """
    found = beside(probes, HITS_FILE)
    if not found or not set(KEY) <= set(probes):
        return pd.Series([None] * len(probes), probes.index, object)
    on = [FOLDER, *KEY]
    known = pd.concat(found, ignore_index=True).drop_duplicates(on)
    both = probes[[*on, "n"]].astype({"images_seen": float}).merge(known.astype({"images_seen": float}), "left", on)
    whole = (both["n"] == both["num_test"]).tolist()
    columns = zip(whole, both["evaluation"], both["num_test"], both["hits"], strict=True)
    return pd.Series([Hits(e, int(n), bits) if same else None for same, e, n, bits in columns], probes.index, object)
