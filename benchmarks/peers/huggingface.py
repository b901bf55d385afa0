"""Hugging Face datasets: an Arrow dataset on disk, one worker a core, decoding with simplejpeg and torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import data
import harness
from task import Task, one_thread


def hf_datasets(settings: Any) -> harness.Job:
    from datasets import Dataset, load_from_disk
    from torch.utils.data import DataLoader

    def write(path: Path) -> None:
        rows = list(data.rows(settings))
        columns = {"image": [row[0] for row in rows], "caption": [row[1] for row in rows]}
        Dataset.from_dict(columns).save_to_disk(str(path))

    folder, task = data.made(settings, "hf", write), Task(settings)

    def collate(rows: list[dict[str, Any]]) -> int:
        return task.collate([(row["image"], row["caption"]) for row in rows])

    def job() -> Iterator[int]:
        yield from DataLoader(
            load_from_disk(folder), settings.batch_size, collate_fn=collate, num_workers=data.CORES,
            worker_init_fn=one_thread,
        )  # fmt: skip

    return job


CASES = {"Hugging Face datasets, a worker a core": hf_datasets}
