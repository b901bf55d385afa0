"""Datasets on disk and small helpers for the tests of samplers, filters, states, ranks and workers."""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
from PIL import Image as Picture

from gpuload import FullScanSampler, ShardedBatchSampler, ShardedFragmentSampler, ShuffleSampler

# (rank, world_size, seed) → sampler; the ranks of each together yield every row once
SHARDED: dict[str, Callable[[int, int, int], Any]] = {
    "fragment": lambda rank, world, seed: ShardedFragmentSampler(rank, world),
    "fragment-random": lambda rank, world, seed: ShardedFragmentSampler(rank, world, randomize=True, seed=seed),
    "batch": lambda rank, world, seed: ShardedBatchSampler(rank, world),
    "batch-random": lambda rank, world, seed: ShardedBatchSampler(rank, world, randomize=True, seed=seed),
    "shuffle": lambda rank, world, seed: ShuffleSampler(rank, world, seed),
    "shuffle-block": lambda rank, world, seed: ShuffleSampler(rank, world, seed, block_size=5),
}
ELASTIC = [name for name in SHARDED if not name.startswith("fragment")]
RANDOM = [name for name in SHARDED if name not in ("fragment", "batch")]
EVERY = {"full": lambda rank, world, seed: FullScanSampler(), **SHARDED}


def table(ids: Sequence[int] | range) -> pa.Table:
    """Rows that say who they are: `id`, and columns that follow from it."""
    names = [f"row {i}" for i in ids]
    meta = pa.array([{"size": i * 2, "name": f"m{i}"} for i in ids], pa.struct({"size": pa.int32(), "name": pa.utf8()}))
    return pa.table({"id": pa.array(ids, pa.int64()), "prompt": pa.array(names, pa.utf8()), "meta": meta})


def write(path: Path, fragments: Sequence[int], delete: Iterable[int] = ()) -> Any:
    """A Lance dataset with these numbers of rows in its fragments, without the rows whose ids are in `delete`."""
    dataset, start = None, 0
    for rows in fragments:
        part = table(range(start, start + rows))
        dataset = lance.write_dataset(part, str(path), mode="create" if dataset is None else "append")
        start += rows
    gone = list(delete)
    if gone:
        assert dataset is not None
        dataset.delete(f"id IN ({', '.join(map(str, gone))})")
    return lance.dataset(str(path))


def jpeg(number: int, size: tuple[int, int] = (40, 32)) -> bytes:
    """A picture that is like no other: noise from its number."""
    pixels = np.random.default_rng(number).integers(0, 255, (4, 5, 3), np.uint8)
    stream = io.BytesIO()
    Picture.fromarray(pixels).resize(size).save(stream, "JPEG")
    return stream.getvalue()


def write_images(path: Path, rows: int, per_fragment: int = 20) -> Any:
    """`id`, `image`, `prompt`."""
    columns = {
        "id": pa.array(range(rows), pa.int64()),
        "image": pa.array([jpeg(i) for i in range(rows)], pa.binary()),
        "prompt": pa.array([f"row {i} " * (i % 4) for i in range(rows)], pa.utf8()),
    }
    return lance.write_dataset(pa.table(columns), str(path), max_rows_per_file=per_fragment)


def real_ids(batches: Iterable[Any]) -> list[int]:
    """The ids of all rows but the fill-up ones, in order."""
    return [int(i) for batch in batches for i in batch["id"][batch.valid]]


def chain(make: Callable[[int, int], Any], legs: Iterable[tuple[int, int | None]]) -> list[Any]:
    """All batches of an epoch that is interrupted: for each leg (world size, steps) new datasets ``make(rank, world)``
    load the last state and take so many steps, None for the rest; in the order that one rank would have."""
    saved, found = None, list[Any]()
    for world, steps in legs:
        ranks = [make(rank, world) for rank in range(world)]
        for dataset in ranks if saved else []:
            dataset.load_state_dict(json.loads(json.dumps(saved)))
        running = [iter(dataset) for dataset in ranks]
        taken = [list(itertools.islice(batches, steps)) for batches in running]
        assert len({len(batches) for batches in taken}) == 1
        found += [batch for step in zip(*taken, strict=True) for batch in step]
        states = [batches.state_dict() for batches in running]
        saved = states[0]
        assert all(state == saved for state in states)
        for batches in running:
            batches.close()
    return found


def gpuload_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("gpuload")]


def python(program: str, *args: object, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    """Run a program in a fresh interpreter, with the helpers of this folder importable."""
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, args)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
