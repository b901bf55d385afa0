"""Other loaders on a GPU, on the same photos: DALI's own pipeline, torchvision, lance.torch.data."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from gpu_setup import MEAN, STD, THREADS, Pass, Setup, on_threads

from gpuload import Encoded
from gpuload.images import headers

_DALI_THREADS, _DALI_AHEAD = 16, 6  # batches that are under way at once


def dali_pipeline(load: float, region: bool = True) -> Callable[[Setup], Pass]:
    """DALI's own: file reader, decode on mixed with this share for the JPEG engine, resize, crop_mirror_normalize.

    With `region` it decodes no more than the crop (`image_random_crop`), else whole images, and crops as it resizes.
    """

    def case(setup: Setup) -> Pass:
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline

        cuda = setup.device.type == "cuda"
        threads = min(_DALI_THREADS, THREADS) if cuda else THREADS
        device_id = setup.device.index if cuda else None
        pipe = Pipeline(setup.batch_size, threads, device_id, prefetch_queue_depth=_DALI_AHEAD if cuda else 2)
        hardware: dict[str, Any] = {"device": "mixed" if cuda else "cpu", "output_type": types.RGB}
        if cuda:
            table = headers.read(Encoded.of(setup.unique))
            hints = {f"preallocate_{name}_hint": int(table[name].max()) for name in ("width", "height")}
            hardware |= {"hw_decoder_load": load, **hints}
        with pipe:
            ahead = {"read_ahead": True, "prefetch_queue_depth": 2}
            files, _ = fn.readers.file(files=setup.files(), name="files", **ahead)
            if region:
                images = fn.decoders.image_random_crop(files, random_area=(0.08, 1.0), **hardware)
                images = fn.resize(images, size=(224, 224), antialias=True)
            else:
                images = fn.decoders.image(files, **hardware)
                images = fn.random_resized_crop(images, size=224, random_area=(0.08, 1.0), antialias=True)
            mean, std = [255 * m for m in MEAN], [255 * s for s in STD]
            options = {"dtype": types.FLOAT16, "output_layout": "CHW", "mean": mean, "std": std}
            pipe.set_outputs(fn.crop_mirror_normalize(images, mirror=fn.random.coin_flip(), **options))
        pipe.build()

        def run() -> Iterator[int]:
            for _ in range(setup.rows // setup.batch_size):
                (out,) = pipe.run()
                yield len(out)

        return run

    return case


def torchvision_loop(setup: Setup) -> Pass:
    """decode_jpeg of whole batches on two threads, then an antialiased resize an image."""
    from torchvision.io import decode_jpeg
    from torchvision.transforms.v2.functional import resize

    mean, std = (torch.tensor(v, device=setup.device).view(3, 1, 1) * 255 for v in (MEAN, STD))

    def work(batch: Encoded, _: Any) -> int:
        stream = torch.cuda.Stream(setup.device) if setup.device.type == "cuda" else None
        with torch.cuda.stream(stream):
            encoded = [torch.from_numpy(np.array(batch.view(i))) for i in range(len(batch))]
            images = decode_jpeg(encoded, mode="RGB", device=setup.device)
            out = torch.stack([resize(image, [224, 224], antialias=True) for image in images])
            out = ((out - mean) / std).half()
            if stream is not None:
                stream.synchronize()
        return len(out)

    return on_threads(work, setup, 2)


def lance_workers(setup: Setup) -> Pass:
    """Upstream's dataset as its documentation decodes, Pillow, in spawned workers, and a pinned copy."""
    from lance.torch.data import LanceDataset as Upstream
    from torch.utils.data import DataLoader

    workers = min(14, max(1, THREADS - 2))
    dataset = Upstream(setup.lance(), setup.batch_size, columns=["image"], to_tensor_fn=by_pillow)
    options: dict[str, Any] = {"multiprocessing_context": "spawn", "persistent_workers": True}
    options["pin_memory"] = setup.device.type == "cuda"
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, **options)  # they start in the unmeasured pass

    def run() -> Iterator[int]:
        for batch in loader:
            yield len(batch.to(setup.device, non_blocking=True))

    return run


def by_pillow(batch: Any, **_: Any) -> torch.Tensor:
    """In a worker: RecordBatch → f16[B, 3, 224, 224]."""
    from PIL import Image as pillow

    torch.set_num_threads(1)
    made = []
    for value in batch.column("image").to_pylist():
        with pillow.open(io.BytesIO(value)) as image:
            pixels = np.asarray(image.convert("RGB").resize((224, 224), pillow.Resampling.BILINEAR))
        made.append(torch.from_numpy((pixels / np.float32(255) - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1))
    return torch.stack(made).half()
