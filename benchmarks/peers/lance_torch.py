"""What Lance itself brings for torch: `lance.torch.data.LanceDataset` and `SafeLanceDataset`, decoding with Pillow.

Pillow and `num_workers` are what its documentation shows. Forked workers crash, so they are spawned.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import data
import harness
from task import Task, one_thread


class Convert:
    """The `to_tensor_fn` of the documentation."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self, batch: Any, **_: Any) -> int:
        captions = batch.column("caption").to_pylist() if "caption" in batch.schema.names else []
        return self.task.batch([self.task.image(value) for value in batch.column("image").to_pylist()], captions)


def lance_dataset(workers: int, pillow: bool = True) -> harness.Case:
    def case(settings: Any) -> harness.Job:
        from lance.torch.data import LanceDataset
        from torch.utils.data import DataLoader

        task = Task(settings, pillow)
        path, size = data.dataset(settings), settings.batch_size
        options: dict[str, Any] = {"columns": task.columns, "to_tensor_fn": Convert(task), "batch_readahead": 8}

        def job() -> Iterator[int]:
            if not workers:
                yield from LanceDataset(path, size, **options)
                return
            dataset = LanceDataset(path, size, shard_granularity="batch", **options)
            yield from DataLoader(
                dataset, None, num_workers=workers, multiprocessing_context="spawn", worker_init_fn=one_thread
            )

        return job

    return case


class Rows:
    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self, rows: list[dict[str, Any]]) -> int:
        return self.task.collate([(row["image"], row["caption"]) for row in rows])


def safe_dataset(settings: Any) -> harness.Job:
    from lance.torch.data import SafeLanceDataset, get_safe_loader

    path, collate = data.dataset(settings), Rows(Task(settings, pillow=True))

    def job() -> Iterator[int]:
        options: dict[str, Any] = {"collate_fn": collate, "worker_init_fn": one_thread, "persistent_workers": False}
        yield from get_safe_loader(SafeLanceDataset(path), settings.batch_size, data.CORES, **options)

    return job


CASES = {
    "lance.torch.data": lance_dataset(0),
    "lance.torch.data, a worker a core": lance_dataset(data.CORES),
    "SafeLanceDataset, a worker a core": safe_dataset,
}
