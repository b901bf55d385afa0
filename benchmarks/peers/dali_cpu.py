"""NVIDIA DALI on the CPU: its own file reader, and the bytes of a Lance dataset through `external_source`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import data
import harness
from task import MEAN, STD, Task


def _pixels(fn: Any, types: Any, encoded: Any, task: Task) -> Any:
    if task.name == "training":
        images = fn.decoders.image_random_crop(encoded, device="cpu", random_area=(0.08, 1), num_attempts=10)
        images = fn.resize(images, size=(224, 224), interp_type=types.INTERP_LINEAR, antialias=True)
        mean, std = [255 * m for m in MEAN], [255 * s for s in STD]
        flip = fn.random.coin_flip(dtype=types.INT32)
        return fn.crop_mirror_normalize(images, mirror=flip, mean=mean, std=std, dtype=types.FLOAT, output_layout="CHW")
    images = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
    images = fn.resize(images, resize_shorter=256, interp_type=types.INTERP_LINEAR, antialias=True)
    return fn.crop_mirror_normalize(images, crop=(224, 224), dtype=types.UINT8, output_layout="CHW", mean=0, std=1)


def _run(pipe: Any, rows: int, size: int, task: Task, captions: Any) -> Iterator[int]:
    import numpy as np

    pipe.build()
    for start in range(0, rows, size):
        batch = np.stack([np.asarray(image) for image in pipe.run()[0]])[: rows - start]
        if task.name == "captions":
            task.ids(captions(start, len(batch)))
        yield len(batch)


def files(settings: Any) -> harness.Job:
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    folder, task, size = data.files(settings), Task(settings), settings.batch_size
    names = [f"{folder}/{i:06d}.jpg" for i in range(settings.rows)]
    with open(f"{folder}/captions.txt") as file:
        texts = file.read().split("\n")

    def job() -> Iterator[int]:
        pipe = Pipeline(size, data.CORES, device_id=None, seed=1, prefetch_queue_depth=2)
        with pipe:
            encoded, _ = fn.readers.file(files=names, name="reader", pad_last_batch=True)
            pipe.set_outputs(_pixels(fn, types, encoded, task))
        yield from _run(pipe, settings.rows, size, task, lambda start, n: texts[start : start + n])

    return job


def from_lance(settings: Any) -> harness.Job:
    import lance
    import numpy as np
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    path, task, size = data.dataset(settings), Task(settings), settings.batch_size
    seen: list[list[str]] = []

    def read() -> Iterator[list[Any]]:
        for batch in lance.dataset(path).to_batches(columns=task.columns, batch_size=size, strict_batch_size=True):
            if "caption" in task.columns:
                seen.append(batch.column("caption").to_pylist())
            column = batch.column("image")
            offsets = np.frombuffer(column.buffers()[1], np.int32)[column.offset :][: len(column) + 1]
            content = np.frombuffer(column.buffers()[2], np.uint8)
            views = [content[a:b] for a, b in itertools.pairwise(offsets)]
            yield views + [views[-1]] * (size - len(views))

    def job() -> Iterator[int]:
        pipe = Pipeline(size, data.CORES, device_id=None, seed=1, prefetch_queue_depth=2)
        with pipe:
            encoded = fn.external_source(source=read(), dtype=types.UINT8, ndim=1, no_copy=True)
            pipe.set_outputs(_pixels(fn, types, encoded, task))
        yield from _run(pipe, settings.rows, size, task, lambda start, n: seen.pop(0)[:n])

    return job


CASES = {"DALI on the CPU, files": files, "DALI on the CPU, from Lance": from_lance}
