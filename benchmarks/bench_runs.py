"""Scattered runs of neighbouring rows, read by Lance's `take` and by its `take_scan`: where one passes the other.

The ratio is to `take`, by the length of a run; the run from which `gpuload.tables.lance` scans is chosen by it.
Nothing is decoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import data
import harness
import numpy as np
from bench_read import touch

LENGTHS = (1, 2, 4, 8, 16, 64)


def runs(length: int, scan: bool) -> harness.Case:
    """Batches made of runs of `length` rows in a random order; the last incomplete one is left out."""

    def case(settings: Any) -> harness.Job:
        from gpuload.tables.lance import LanceTable, scan_runs, take_rows

        table, read = LanceTable(data.dataset(settings, settings.version)), scan_runs if scan else take_rows
        starts = np.random.default_rng(0).permutation(table.rows // length) * length
        many = max(1, settings.batch_size // length)

        def job() -> Iterator[int]:
            for k in range(0, len(starts) - many + 1, many):
                first = starts[k : k + many]
                ranges = np.stack([first, first + length], axis=1)
                yield touch(read(table.lance, ["image"], ranges).column("image"))

        return job

    return case


CASES = {
    f"{length} rows a run: {name}": runs(length, scan)
    for length in LENGTHS
    for name, scan in (("take", False), ("take_scan", True))
}

if __name__ == "__main__":
    arguments = {**data.ARGUMENTS, "version": "2.2", "batch_size": 128}
    harness.main("runs-{version}", CASES, arguments, lambda settings: data.dataset(settings, settings.version) and None)
