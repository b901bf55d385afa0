"""Decoded batches on the CPU, by gpuload and by every peer: rows/s, time to the first batch, peak memory.

--task pixels: shorter side 256 antialiased, centre crop 224, uint8. captions: and 77 token ids. training:
random-resized crop, flip, normalised float32. The first case is the limit that the ratios refer to: a bare loop over
the same bytes in memory on the same number of threads, simplejpeg and torch's uint8 antialiased interpolate, no
loader at all.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import data
import harness

PEERS = (
    "lance_torch", "lancedb_torch", "dali_cpu", "spdl_threads", "web_dataset", "mosaic", "huggingface", "grain_threads",
)  # fmt: skip


def bare_loop(settings: Any) -> harness.Job:
    import torch
    from task import Task, one_thread

    one_thread()
    rows, task = list(data.rows(settings)), Task(settings)
    dtype = torch.float32 if settings.task == "training" else torch.uint8

    def one(out: Any, i: int, encoded: bytes) -> None:
        out[i] = task.image(encoded)

    def job() -> Iterator[int]:
        with ThreadPoolExecutor(data.CORES, initializer=one_thread) as pool:
            for start in range(0, len(rows), settings.batch_size):
                part = rows[start : start + settings.batch_size]
                out = torch.empty(len(part), 3, 224, 224, dtype=dtype)
                list(pool.map(lambda i, out=out, part=part: one(out, i, part[i][0]), range(len(part))))
                if settings.task == "captions":
                    task.ids([row[1] for row in part])
                yield len(out)

    return job


def by_hand(settings: Any) -> harness.Job:
    """Open the dataset, take the first rows, decode them: what time to the first batch is compared with."""
    import lance
    import torch
    from task import Task, one_thread

    one_thread()
    path, task = data.dataset(settings), Task(settings)

    def job() -> Iterator[int]:
        table = lance.dataset(path).take(list(range(settings.batch_size)), columns=task.columns)
        with ThreadPoolExecutor(data.CORES, initializer=one_thread) as pool:
            images = torch.stack(list(pool.map(task.image, table.column("image").to_pylist())))
        if settings.task == "captions":
            task.ids(table.column("caption").to_pylist())
        yield len(images)

    return job


def gpuload_epoch(**keywords: Any) -> harness.Case:
    def case(settings: Any) -> harness.Job:
        import torch
        from task import LENGTH, MEAN, STD

        from gpuload import Image, LanceDataset, Text

        image = Image(224, dtype=torch.uint8)
        if settings.task == "training":
            image = Image(224, crop="random", flip=0.5, mean=MEAN, std=STD)
        transforms: dict[str, Any] = {"image": image}
        if settings.task == "captions":
            transforms["caption"] = Text(data.tokenizer(settings), max_length=LENGTH, padding="max_length")
        path, size = data.dataset(settings), settings.batch_size
        options: dict[str, Any] = {"columns": list(transforms), "transforms": transforms, "device": "cpu", **keywords}
        return lambda: (batch.size for batch in LanceDataset(path, size, **options))

    return case


CASES = {
    "bare loop (the limit)": bare_loop,
    "gpuload": gpuload_epoch(),
    "gpuload, shuffle=block": gpuload_epoch(shuffle="block"),
    "gpuload, shuffle=row": gpuload_epoch(shuffle="row"),
    "one batch by hand": by_hand,
}
for _peer in PEERS:  # none of them imports its package here
    CASES.update(importlib.import_module(f"peers.{_peer}").CASES)


def _prepare(settings: Any) -> None:
    data.dataset(settings)
    data.tokenizer(settings)


if __name__ == "__main__":
    harness.main("cpu-{task}", CASES, {**data.ARGUMENTS, "task": "pixels", "batch_size": 64}, _prepare)
