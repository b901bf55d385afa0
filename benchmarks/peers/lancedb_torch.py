"""LanceDB's loaders: `StreamingDataset`, which transforms in threads, and `Permutation` in a DataLoader."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import data
import harness
from task import Task, one_thread


def _open(path: str) -> Any:
    import lancedb

    folder, _, name = path.rpartition("/")
    return lancedb.connect(folder).open_table(name.removesuffix(".lance"))


def streaming(settings: Any) -> harness.Job:
    from lancedb.streaming import StreamingDataset

    path, task = data.dataset(settings), Task(settings)

    def transform(batch: Any) -> list[Any]:
        one_thread()
        rows = batch.to_pylist()
        return [(task.image(row["image"]), row.get("caption", "")) for row in rows]

    def job() -> Iterator[int]:
        options: dict[str, Any] = {"columns": task.columns, "transform": transform, "shuffle": False}
        rows = iter(StreamingDataset(_open(path), read_batch_size=16, transform_parallelism=data.CORES, **options))
        while part := list(itertools.islice(rows, settings.batch_size)):
            yield task.batch([row[0] for row in part], [row[1] for row in part])

    return job


class Convert:
    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self, batch: Any) -> int:
        captions = batch.column("caption").to_pylist() if "caption" in batch.schema.names else []
        return self.task.batch([self.task.image(value) for value in batch.column("image").to_pylist()], captions)


def permutation(settings: Any) -> harness.Job:
    from lancedb.permutation import Permutation
    from torch.utils.data import DataLoader

    path, task = data.dataset(settings), Task(settings)

    def job() -> Iterator[int]:
        rows = Permutation.identity(_open(path)).select_columns(task.columns).with_transform(Convert(task))
        yield from DataLoader(
            rows, settings.batch_size, collate_fn=_as_it_is, num_workers=data.CORES, worker_init_fn=one_thread,
            multiprocessing_context="spawn",
        )  # fmt: skip

    return job


def _as_it_is(batch: int) -> int:
    return batch


CASES = {
    "lancedb StreamingDataset": streaming,
    "lancedb Permutation, a worker a core": permutation,
}
