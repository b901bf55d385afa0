"""Raw reading, no decode: rows/s of gpuload's orders against upstream's unshuffled scan and lancedb's stream.

Every byte page of every image is touched, as a decoder would. One storage format a run: --version 2.0, 2.1, 2.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import data
import harness
import pyarrow as pa


def touch(column: Any) -> int:
    """Read one byte of every page of a binary column; rows in it."""
    from gpuload.images.encoded import from_arrow

    chunked = column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column])
    encoded, _, _ = from_arrow(chunked)
    for i in range(len(encoded)):
        view = encoded.view(i)
        if view is not None:
            view[::4096].sum()
    return len(chunked)


def gpuload_order(**keywords: Any) -> harness.Case:
    def case(settings: Any) -> harness.Job:
        from gpuload import LanceDataset

        path, size = data.dataset(settings, settings.version), settings.batch_size
        options: dict[str, Any] = {"columns": ["image"], "to_tensor_fn": None, "batch_readahead": 8, **keywords}
        return lambda: (touch(batch.column("image")) for batch in LanceDataset(path, size, **options))

    return case


def upstream(settings: Any) -> harness.Job:
    from lance.torch.data import LanceDataset

    path, size = data.dataset(settings, settings.version), settings.batch_size
    options: dict[str, Any] = {"columns": ["image"], "to_tensor_fn": None}
    return lambda: (touch(batch.column("image")) for batch in LanceDataset(path, size, **options))


def lancedb_stream(shuffle: bool, **keywords: Any) -> harness.Case:
    def case(settings: Any) -> harness.Job:
        import lancedb
        from lancedb.streaming import StreamingDataset

        folder, _, name = data.dataset(settings, settings.version).rpartition("/")
        options = {"columns": ["image"], "read_batch_size": settings.batch_size, "shuffle": shuffle, **keywords}

        def job() -> Iterator[int]:
            table = lancedb.connect(folder).open_table(name.removesuffix(".lance"))
            for row in StreamingDataset(table, **options):
                memoryview(row["image"])[::4096].tobytes()
                yield 1

        return job

    return case


CASES = {
    "upstream scan": upstream,
    "gpuload in order": gpuload_order(),
    "gpuload shuffle=batch": gpuload_order(shuffle="batch"),
    "gpuload shuffle=block": gpuload_order(shuffle="block"),
    "gpuload shuffle=row": gpuload_order(shuffle="row"),
    "lancedb in order": lancedb_stream(False),
    "lancedb shuffle": lancedb_stream(True),
    "lancedb shuffle clump 16": lancedb_stream(True, shuffle_clump_size=16),
}

if __name__ == "__main__":
    arguments = {**data.ARGUMENTS, "version": "2.2", "batch_size": 128}
    harness.main("read-{version}", CASES, arguments, lambda settings: data.dataset(settings, settings.version) and None)
