"""The cases of bench_gpu.py: photos and how they are taken enter, a pass that yields the rows of each batch leaves."""

from __future__ import annotations

import io
import itertools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import data
import numpy as np
import torch

from gpuload import Encoded, Image, LanceDataset, Ragged
from gpuload.images import PIXELS, headers, lay_out, put_whole, views
from gpuload.images.decode.nvimgcodec import NvImageCodecDecoder
from gpuload.images.resize import resize_normalize
from gpuload.order.draws import Draws

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE = Image(224, crop="random", flip=0.5, mean=MEAN, std=STD, dtype=torch.float16)
THREADS = data.CORES
Pass = Callable[[], Iterator[int]]  # rows of each batch


class Setup:
    """The photos of one size and how they are taken: bytes in memory, a Lance dataset, a folder."""

    def __init__(self, settings: Any, megapixels: float, batch_size: int) -> None:
        self.settings, self.megapixels, self.batch_size = settings, megapixels, batch_size
        self.device = torch.device(settings.device, 0) if settings.device == "cuda" else torch.device("cpu")
        share = max(1.0, megapixels / 0.2) ** 0.8  # large photos take longer: fewer of them
        self.rows = max(batch_size, int(settings.rows / share) // batch_size * batch_size)
        self.unique = scaled(settings, megapixels, max(8, int(256 / share)))
        self.name = f"{settings.work}/gpu-{megapixels:g}mp-{self.rows}"

    def batches(self) -> Iterator[tuple[Encoded, Any]]:
        """Pointers to the bytes, and their headers, HEADER[N], which were read before."""
        encoded = Encoded.of(self.unique)
        table = headers.read(encoded)
        for start in range(0, self.rows // self.batch_size * self.batch_size, self.batch_size):
            which = np.arange(start, start + self.batch_size) % len(encoded)
            yield encoded.take(which), table[which]

    @property
    def threads(self) -> int:
        """For a decoder's host threads."""
        return THREADS if self.device.type == "cuda" else 1

    def lance(self) -> str:
        import lance
        import pyarrow as pa

        path = f"{self.name}.lance"
        if not os.path.exists(path):
            rows = itertools.islice(itertools.cycle(self.unique), self.rows)
            batches = (pa.record_batch({"image": part}) for part in iter(lambda: list(itertools.islice(rows, 64)), []))
            reader = pa.RecordBatchReader.from_batches(pa.schema([("image", pa.binary())]), batches)
            lance.write_dataset(reader, path, max_rows_per_file=max(64, self.rows // 10))
        return path

    def files(self) -> list[str]:
        """As many paths as rows; the photos behind them repeat."""
        folder = Path(f"{self.name}-files")
        if not folder.exists():
            folder.mkdir(parents=True)
            for i, file in enumerate(self.unique):
                (folder / f"{i:05d}.jpg").write_bytes(file)
        paths = sorted(str(path) for path in folder.iterdir())
        return list(itertools.islice(itertools.cycle(paths), self.rows))

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def scaled(settings: Any, megapixels: float, count: int) -> list[bytes]:
    """JPEG files of about so many pixels, made of the photos of --images or of generated pictures."""
    files = [file for file, _ in data.encoded(settings.images)][:count]
    if megapixels <= 0.2:
        return files
    from PIL import Image as pillow

    def enlarge(file: bytes) -> bytes:
        with pillow.open(io.BytesIO(file)) as image:
            factor = (megapixels * 1e6 / (image.width * image.height)) ** 0.5
            size = (round(image.width * factor), round(image.height * factor))
            out = io.BytesIO()
            image.convert("RGB").resize(size, pillow.Resampling.BICUBIC).save(out, "JPEG", quality=90)
            return out.getvalue()

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(enlarge, files))


# -- the cases: Setup → Pass ----------------------------------------------------------------------------------------


def on_threads(work: Callable[[Encoded, Any], int], setup: Setup, threads: int) -> Pass:
    """`work` on each batch, so many batches at once, a few ahead."""

    def run() -> Iterator[int]:
        with ThreadPoolExecutor(threads) as pool:
            ahead: list[Any] = []
            for batch in setup.batches():
                ahead.append(pool.submit(work, *batch))
                if len(ahead) > 2 * threads:
                    yield ahead.pop(0).result()
            for future in ahead:
                yield future.result()

    return run


def decode_only(calls: int = 2, load: float | None = None) -> Callable[[Setup], Pass]:
    """(a) nvImageCodec into an arena, whole images, from bytes in memory; nothing reads the pixels."""

    def case(setup: Setup) -> Pass:
        options = {} if load is None else {"hardware_load": load}
        decoder = NvImageCodecDecoder(setup.device, 10**9, setup.threads, calls=calls, **options)

        def work(encoded: Encoded, table: Any) -> int:
            with decoder.decode(encoded, table, None) as ragged:
                return int((ragged.table["height"] > 0).sum())

        return on_threads(work, setup, calls if setup.device.type == "cuda" else 2)

    return case


def decode_and_kernel(setup: Setup) -> Pass:
    """(b) the same, and the kernel; no reading, no pipeline."""
    decoder = NvImageCodecDecoder(setup.device, 10**9, setup.threads, calls=2)
    draws = Draws(0, 0, np.arange(setup.batch_size))

    def work(encoded: Encoded, table: Any) -> int:
        with decoder.decode(encoded, table, None) as ragged:
            out = torch.empty((len(encoded), *(IMAGE.shape or ())), dtype=IMAGE.dtype, device=setup.device)
            resize_normalize(ragged, views.views(IMAGE, table, draws), IMAGE, out)
        return len(encoded)

    return on_threads(work, setup, 2)


def gpuload_epoch(decoder: Any, **options: Any) -> Callable[[Setup], Pass]:
    """(c) from a Lance dataset."""

    def case(setup: Setup) -> Pass:
        chosen = {"columns": ["image"], "transforms": {"image": IMAGE}, "device": str(setup.device), **options}
        dataset = LanceDataset(setup.lance(), setup.batch_size, decoder=decoder, **chosen)
        return lambda: (batch.size for batch in dataset)

    return case


class Blank:
    """Stands for nvImageCodec: makes all its objects, and decodes nothing but the first call, in which a decoder of a
    GPU is tested. Whatever is in the arena is taken for pixels."""

    def __init__(self) -> None:
        from nvidia import nvimgcodec

        self.real = nvimgcodec

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def Decoder(self, **options: Any) -> BlankDecoder:
        return BlankDecoder(self.real.Decoder(**options))


class BlankDecoder:
    def __init__(self, real: Any) -> None:
        self.real = real

    def decode(self, streams: list[Any], images: list[Any], **how: Any) -> list[Any]:
        if self.real is not None:
            real, self.real = self.real, None
            found: list[Any] = real.decode(streams, images=images, **how)
            return found
        return images


def all_but_decoding(setup: Setup) -> Pass:
    """What reading, Python, copies and the kernel allow: (c) with a decoder that takes no time."""
    decoder = NvImageCodecDecoder(setup.device, 10**9, setup.threads, calls=2, package=Blank())
    return gpuload_epoch(decoder)(setup)


def dali_pipeline(load: float) -> Callable[[Setup], Pass]:
    """(d) DALI's own: file reader, decode on mixed, random-resized crop, crop_mirror_normalize."""

    def case(setup: Setup) -> Pass:
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline

        cuda = setup.device.type == "cuda"
        pipe = Pipeline(setup.batch_size, THREADS, setup.device.index if cuda else None, prefetch_queue_depth=3)
        with pipe:
            files, _ = fn.readers.file(files=setup.files(), read_ahead=True, name="files")
            hardware = {"hw_decoder_load": load, "preallocate_width_hint": 4096} if cuda else {}
            images = fn.decoders.image(files, device="mixed" if cuda else "cpu", output_type=types.RGB, **hardware)
            images = fn.random_resized_crop(images, size=224, random_area=(0.08, 1.0), antialias=True)
            mean, std = [255 * m for m in MEAN], [255 * s for s in STD]
            flip = fn.random.coin_flip()
            options = {"dtype": types.FLOAT16, "output_layout": "CHW", "mean": mean, "std": std}
            pipe.set_outputs(fn.crop_mirror_normalize(images, mirror=flip, **options))
        pipe.build()

        def run() -> Iterator[int]:
            for _ in range(setup.rows // setup.batch_size):
                (out,) = pipe.run()
                yield len(out)

        return run

    return case


def torchvision_loop(setup: Setup) -> Pass:
    """(e) decode_jpeg of whole batches on two threads, then an antialiased resize an image."""
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
    """(f) upstream's dataset as its documentation decodes, Pillow, in spawned workers, and a pinned copy."""
    from lance.torch.data import LanceDataset as Upstream
    from torch.utils.data import DataLoader

    workers = min(14, max(1, THREADS - 2))
    dataset = Upstream(setup.lance(), setup.batch_size, columns=["image"], to_tensor_fn=by_pillow)
    options = {"multiprocessing_context": "spawn", "pin_memory": True, "persistent_workers": True}
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


def training(fed: bool) -> Callable[[Setup], Pass]:
    """(g) ResNet-50 in bfloat16, forward, backward and step; on synthetic images of the device, or fed by gpuload."""

    def case(setup: Setup) -> Pass:
        from torchvision.models import resnet50

        cuda = setup.device.type == "cuda"
        model = resnet50().to(setup.device, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        labels = torch.zeros(setup.batch_size, dtype=torch.int64, device=setup.device)
        shape = (setup.batch_size, 3, 224, 224)
        layout = {"dtype": torch.bfloat16, "channels_last": True}
        image = Image(224, crop="random", flip=0.5, mean=MEAN, std=STD, **layout)
        options: dict[str, Any] = {"columns": ["image"], "transforms": {"image": image}, "device": str(setup.device)}
        dataset = LanceDataset(setup.lance(), setup.batch_size, drop_last=True, **options) if fed else None
        blank = torch.randn(shape, device=setup.device).bfloat16().contiguous(memory_format=torch.channels_last)

        def step(images: torch.Tensor) -> None:
            with torch.autocast(setup.device.type, torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(model(images), labels[: len(images)])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        def run() -> Iterator[int]:
            steps = range(setup.rows // setup.batch_size)
            for images in (batch["image"] for batch in dataset) if dataset is not None else (blank for _ in steps):
                step(images)
                yield len(images)
                if cuda:  # as a loop that looks at its loss now and then; also keeps the queue of steps short
                    torch.cuda.current_stream().synchronize()

        return run

    return case


def kernel_bandwidth(setup: Setup) -> dict[str, float]:
    """The kernel alone on images of this size: GB/s of the pixels it has to read and write, beside a copy's GB/s."""
    height = int((setup.megapixels * 1e6 / 1.5) ** 0.5)
    width = height * 3 // 2
    most = 2 << 30 if setup.device.type == "cuda" else 64 << 20  # bytes; well beyond any cache
    count = max(1, most // (width * 3 * height))
    table = np.zeros(count, PIXELS)
    put_whole(table, height, width, 3, 1)
    size = lay_out(table, range(count))
    arena = torch.randint(0, 256, (size,), dtype=torch.uint8, device=setup.device)
    whole = Image(224, crop="none", mean=MEAN, std=STD, dtype=torch.float16)
    ragged, out = Ragged(arena, table), torch.empty((count, 3, 224, 224), dtype=torch.float16, device=setup.device)
    wanted = views.views(whole, table, Draws(0, 0, np.arange(count)))
    beside = torch.empty_like(arena)
    jobs = {
        "kernel": (
            lambda: resize_normalize(ragged, wanted, whole, out),
            height * width * 3 * count + out.nbytes,
        ),
        "copy": (lambda: beside.copy_(arena), 2 * arena.nbytes),
    }
    found = {}
    for name, (job, moved) in jobs.items():
        job()
        setup.synchronize()
        started, repeats = time.perf_counter(), 0
        while repeats < 3 or (time.perf_counter() - started < 0.2 and repeats < 1000):
            job()
            repeats += 1
        setup.synchronize()
        found[f"{name}_gb_s"] = round(moved * repeats / (time.perf_counter() - started) / 1e9, 1)
    return found


CASES: dict[str, Callable[[Setup], Pass]] = {
    "limit: decode": decode_only(),
    "limit: decode, one call": decode_only(calls=1),
    "limit: decode and kernel": decode_and_kernel,
    "limit: all but decoding": all_but_decoding,
    "gpuload nvimgcodec": gpuload_epoch("nvimgcodec"),
    "gpuload nvimgcodec shuffle=row": gpuload_epoch("nvimgcodec", shuffle="row"),
    "gpuload nvimgcodec:parity": gpuload_epoch("nvimgcodec:parity"),
    "gpuload dali": gpuload_epoch("dali"),
    "gpuload cpu": gpuload_epoch("cpu"),
    "dali pipeline 0.65": dali_pipeline(0.65),
    "dali pipeline 0.9": dali_pipeline(0.9),
    "torchvision decode_jpeg": torchvision_loop,
    "lance.torch.data, workers": lance_workers,
    "training: synthetic": training(False),
    "training: fed": training(True),
}
SWEEP = {f"limit: engine {load:g}": decode_only(load=load) for load in (0.0, 0.12, 0.3, 0.5, 0.8, 1.0)}
