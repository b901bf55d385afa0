"""Planning alone: 1,024 ranks over 10^9 rows. Steps drawn at random are disjoint over ranks and steps, all of one size,
and a step costs the same anywhere in the epoch. Nothing is read; the largest array is one batch.
"""

from __future__ import annotations

import argparse
import statistics
import time
import tracemalloc
from pathlib import Path
from typing import Any

import harness
import numpy as np
import reports
from rich.console import Console
from rich.progress import track
from rich.table import Table

from gpuload import ShardedBatchSampler, ShardedFragmentSampler, ShuffleSampler
from gpuload.tables import expand

SAMPLERS = {
    "batch": lambda rank, world: ShardedBatchSampler(rank, world),
    "batch, randomize": lambda rank, world: ShardedBatchSampler(rank, world, randomize=True),
    "block of 16": lambda rank, world: ShuffleSampler(rank, world, block_size=16),
    "row": lambda rank, world: ShuffleSampler(rank, world),
    "fragment": lambda rank, world: ShardedFragmentSampler(rank, world),
}


def plan_all(make: Any, rows: int, world: int, batch_size: int, steps: int, name: str) -> dict[str, Any]:
    """Every rank's batches of some random steps; raises where two of them share a row or differ in size."""
    fragments = np.full(world * 4, rows // (world * 4), np.int64)
    fragments[: rows % (world * 4)] += 1
    chosen: list[int] = []
    times: list[float] = []
    seen: list[np.ndarray[Any, Any]] = []
    length: set[int] = set()
    tracemalloc.start()
    for rank in track(range(world), name, console=Console(stderr=True), transient=True):
        plan = make(rank, world).plan(rows, fragments, batch_size)
        length.add(len(plan))
        if not chosen:
            chosen = np.random.default_rng(0).integers(0, len(plan), steps).tolist()
        for step in set(chosen):
            started = time.perf_counter()
            ranges = plan.ranges(step)
            times.append(time.perf_counter() - started)
            seen.append(expand(ranges)[: plan.size(step)[1]])
    every = np.concatenate(seen)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    if len(length) != 1:
        raise AssertionError(f"ranks have {length} steps")
    if len(np.unique(every)) != len(every) or every.min() < 0 or every.max() >= rows:
        raise AssertionError("two batches share a row")
    return {
        "steps": length.pop(),
        "rows_checked": len(every),
        "us_per_step": round(statistics.median(times) * 1e6, 1),
        "us_worst_percentile": round(float(np.percentile(times, 99)) * 1e6, 1),
        "peak_mb_all_ranks": round(peak / 2**20, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10**9)
    parser.add_argument("--world", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8, help="random steps planned on every rank")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "plan.json"))
    settings = parser.parse_args()
    numbers = (settings.rows, settings.world, settings.batch_size, settings.steps)
    found = {name: plan_all(make, *numbers, name) for name, make in SAMPLERS.items()}
    table = Table(title=f"{settings.world:,} ranks, {settings.rows:,} rows, batches of {settings.batch_size}")
    for heading in ("order", "steps a rank", "rows checked disjoint", "µs a step", "99 %", "peak MB"):
        table.add_column(heading, justify="left" if heading == "order" else "right")
    for name, figures in found.items():
        table.add_row(name, *(f"{figure:,}" for figure in figures.values()))
    Console(width=110).print(table)
    report = {
        "benchmark": "plan",
        "machine": harness.machine(),
        "settings": vars(settings) | {"out": ""},
        "cases": found,
    }
    Path(settings.out).parent.mkdir(parents=True, exist_ok=True)
    reports.write(Path(settings.out), report)


if __name__ == "__main__":
    main()
