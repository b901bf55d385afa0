"""Raw reading over fragments and row size: rows/s in order and in both random orders, nothing decoded.

The ratio is to reading in order of the smallest rows in one fragment. --rows is how many of them there are; larger ones
are fewer, so that no table passes 256 MiB.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import data
import harness

SIZES = {"8 B": 0, "1 KB": 1000, "100 KB": 100_000}  # bytes of the binary column beside a number, none for 0
FRAGMENTS = (1, 10, 100, 1000, 10_000)
_MOST = 256 << 20


def written(settings: Any, size: int, fragments: int) -> str:
    """Path of a dataset of `id` and, unless `size` is 0, `data`."""
    import lance
    import numpy as np
    import pyarrow as pa

    rows = max(fragments, min(settings.rows, _MOST // max(size, 8)))
    noise = np.random.default_rng(0).bytes(size + 997)

    def write(path: Path) -> None:
        schema = pa.schema([("id", pa.int64()), *([("data", pa.binary())] if size else [])])

        def batches() -> Iterator[pa.RecordBatch]:
            for start in range(0, rows, 1024):
                ids = range(start, min(start + 1024, rows))
                columns = [pa.array(ids, pa.int64())]
                columns += [pa.array([noise[i % 997 : i % 997 + size] for i in ids], pa.binary())] if size else []
                yield pa.record_batch(columns, schema=schema)

        reader = pa.RecordBatchReader.from_batches(schema, batches())
        lance.write_dataset(reader, str(path), max_rows_per_file=-(-rows // fragments))

    return data.made(settings, f"{size}b-{rows}-in-{fragments}.lance", write)


def case(size: int, fragments: int, shuffle: Any) -> harness.Case:
    def make(settings: Any) -> harness.Job:
        from gpuload import LanceDataset

        path = written(settings, size, min(fragments, settings.rows))
        words: dict[str, Any] = {"to_tensor_fn": None, "shuffle": shuffle, "batch_readahead": 8}
        return lambda: (len(batch) for batch in LanceDataset(path, settings.batch_size, **words))

    return make


CASES = {
    f"{size}, {fragments:,} fragments: {order}": case(SIZES[size], fragments, shuffle)
    for size in SIZES
    for fragments in FRAGMENTS
    for order, shuffle in (("in order", False), ("shuffle=block", "block"), ("shuffle=row", "row"))
}

if __name__ == "__main__":
    arguments = {**data.ARGUMENTS, "rows": 200_000, "batch_size": 128}
    harness.main("fragments", CASES, arguments, lambda settings: None)
