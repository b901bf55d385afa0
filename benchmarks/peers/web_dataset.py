"""WebDataset: tar shards, one worker a core, decoding with simplejpeg and torch in the workers."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import data
import harness
from task import Task, one_thread


def _shards(settings: Any) -> list[str]:
    def write(path: Path) -> None:
        path.mkdir()
        tars = [tarfile.open(path / f"{i}.tar", "w") for i in range(10)]  # noqa: SIM115
        for i, (image, caption) in enumerate(data.rows(settings)):
            tar = tars[i * len(tars) // settings.rows]
            for name, content in ((f"{i:06d}.jpg", image), (f"{i:06d}.txt", caption.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        for tar in tars:
            tar.close()

    return [str(path) for path in sorted(Path(data.made(settings, "tars", write)).iterdir())]


def web_dataset(settings: Any) -> harness.Job:
    import webdataset
    from torch.utils.data import DataLoader

    shards, task = _shards(settings), Task(settings)

    def job() -> Iterator[int]:
        rows = webdataset.WebDataset(shards, shardshuffle=False, workersplitter=webdataset.split_by_worker)
        made = rows.to_tuple("jpg", "txt").map(lambda row: (row[0], row[1].decode()))
        batches = made.batched(settings.batch_size, collation_fn=task.collate)
        yield from DataLoader(batches, None, num_workers=data.CORES, worker_init_fn=one_thread)

    return job


CASES = {"WebDataset, a worker a core": web_dataset}
