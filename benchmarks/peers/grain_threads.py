"""Grain: files, decoded with simplejpeg and torch on its reading threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import data
import harness
from task import Task, one_thread


class Files:
    def __init__(self, folder: str, rows: int) -> None:
        self.folder, self.rows = folder, rows
        with open(f"{folder}/captions.txt") as file:
            self.captions = file.read().split("\n")

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, i: int) -> tuple[bytes, str]:
        with open(f"{self.folder}/{i:06d}.jpg", "rb") as file:
            return file.read(), self.captions[i]


def grain(settings: Any) -> harness.Job:
    import grain

    files, task = Files(data.files(settings), settings.rows), Task(settings)

    def decode(row: tuple[bytes, str]) -> tuple[Any, str]:
        one_thread()
        return task.image(row[0]), row[1]

    def job() -> Iterator[int]:
        options = grain.ReadOptions(num_threads=data.CORES, prefetch_buffer_size=2 * settings.batch_size)
        rows = grain.MapDataset.source(files).map(decode).to_iter_dataset(options)
        batches = rows.batch(settings.batch_size, batch_fn=lambda rows: list(rows))
        for batch in batches:
            yield task.batch([row[0] for row in batch], [row[1] for row in batch])

    return job


CASES = {"Grain": grain}
