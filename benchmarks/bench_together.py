"""Batches read one by one and several in one read (`gpuload.tables.together`): wall and CPU time a batch, no decode.

The ratio is to in order, read one by one; image, caption and label are read, and every page of the images is touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import data
import harness
from bench_read import touch


def alone(sampler: Any) -> harness.Case:
    """Each batch by `read`: its rows in order, which a copy of scattered ones gives."""

    def case(settings: Any) -> harness.Job:
        from gpuload.tables.lance import LanceTable

        table = LanceTable(data.dataset(settings, settings.version))
        plan = sampler().plan(table.rows, table.fragments, settings.batch_size)
        return lambda: (touch(table.read(plan.ranges(step)).column("image")) for step in range(len(plan)))

    return case


def together(sampler: Any, at_once: int) -> harness.Case:
    """Each batch by `read_together`: rows as they are stored, and an index."""

    def case(settings: Any) -> harness.Job:
        from gpuload.tables.lance import LanceTable
        from gpuload.tables.together import read_together

        table = LanceTable(data.dataset(settings, settings.version))
        plan = sampler().plan(table.rows, table.fragments, settings.batch_size)

        def job() -> Iterator[int]:
            touched = None
            for read in read_together(table, (plan.ranges(step) for step in range(len(plan))), at_once):
                rows = read()
                if rows.table is not touched:  # once, as each image is decoded once
                    touch(rows.table.column("image"))
                touched = rows.table
                yield rows.size

        return job

    return case


def shuffled(block: int = 1) -> Any:
    def sampler() -> Any:
        from gpuload import ShuffleSampler

        return ShuffleSampler(seed=0, block_size=block)

    return sampler


def in_order() -> Any:
    from gpuload import FullScanSampler

    return FullScanSampler()


CASES = {
    "in order, alone": alone(in_order),
    "in order, in pieces": together(in_order, 4),
    "blocks of 16, alone": alone(shuffled(16)),
    "blocks of 16, as stored": together(shuffled(16), 4),
    "rows, alone": alone(shuffled()),
    **{f"rows, {many} together": together(shuffled(), many) for many in (1, 2, 4, 8)},
}

if __name__ == "__main__":
    arguments = {**data.ARGUMENTS, "rows": 12288, "version": "2.2", "batch_size": 128}
    harness.main(
        "together-{version}-{batch_size}",
        CASES,
        arguments,
        lambda settings: data.dataset(settings, settings.version) and None,
    )
