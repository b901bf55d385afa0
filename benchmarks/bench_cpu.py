"""Decoded batches on the CPU: shorter side 256 antialiased, centre crop 224, uint8 NCHW, from a Lance dataset.

The first case is the limit that the ratios refer to: a bare loop over the same bytes in memory on the same number of
threads, simplejpeg and torch's uint8 antialiased interpolate, no loader at all.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import data
import harness


def bare_loop(settings: Any) -> harness.Job:
    import numpy as np
    import simplejpeg
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(1)
    threads = len(os.sched_getaffinity(0))
    pictures = data.encoded(settings.images)
    encoded = [pictures[i % len(pictures)][0] for i in range(settings.rows)]

    def one(out: Any, i: int, data: bytes) -> None:
        pixels = torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB")).permute(2, 0, 1)[None]
        h, w = pixels.shape[2:]
        size = (256, int(256 * w / h)) if h <= w else (int(256 * h / w), 256)
        scaled = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)[0]
        y, x = (size[0] - 224) // 2, (size[1] - 224) // 2
        out[i] = scaled[:, y : y + 224, x : x + 224]

    def job() -> int:
        rows = 0
        with ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1)) as pool:
            for start in range(0, len(encoded), settings.batch_size):
                batch = encoded[start : start + settings.batch_size]
                out = torch.empty(len(batch), 3, 224, 224, dtype=torch.uint8)
                list(pool.map(lambda item, out=out: one(out, *item), enumerate(batch)))
                rows += len(np.asarray(out))
        return rows

    return job


def gpuload_epoch(**keywords: Any) -> harness.Case:
    def case(settings: Any) -> harness.Job:
        import torch

        from gpuload import Image, LanceDataset

        path = data.dataset(settings, settings.version)
        options: dict[str, Any] = {
            "columns": ["image"],
            "transforms": {"image": Image(224, dtype=torch.uint8)},
            "device": "cpu",
            **keywords,
        }
        return lambda: sum(batch.size for batch in LanceDataset(path, settings.batch_size, **options))

    return case


def lance_torch(settings: Any) -> harness.Job:
    """Upstream's dataset as its documentation decodes: Pillow, in the training process."""
    import io

    import numpy as np
    import torch
    from lance.torch.data import LanceDataset
    from PIL import Image

    def decode(data: bytes) -> Any:
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        w, h = picture.size
        picture = picture.resize((256 * w // h, 256) if h <= w else (256, 256 * h // w), Image.Resampling.BILINEAR)
        x, y = (picture.width - 224) // 2, (picture.height - 224) // 2
        return torch.from_numpy(np.array(picture.crop((x, y, x + 224, y + 224)))).permute(2, 0, 1)

    def convert(batch: Any, **_: Any) -> Any:
        return torch.stack([decode(value) for value in batch.column("image").to_pylist()])

    path = data.dataset(settings, settings.version)
    options: dict[str, Any] = {"columns": ["image"], "to_tensor_fn": convert}
    return lambda: sum(len(batch) for batch in LanceDataset(path, settings.batch_size, **options))


CASES = {
    "bare loop (the limit)": bare_loop,
    "gpuload in order": gpuload_epoch(),
    "gpuload shuffle=batch": gpuload_epoch(shuffle="batch"),
    "gpuload shuffle=block": gpuload_epoch(shuffle="block"),
    "gpuload shuffle=row": gpuload_epoch(shuffle="row"),
    "lance.torch.data, Pillow": lance_torch,
}

if __name__ == "__main__":
    arguments = {**data.ARGUMENTS, "version": "2.2", "batch_size": 64}
    harness.main("cpu", CASES, arguments, lambda settings: data.dataset(settings, settings.version) and None)
