"""How the rate changes with threads, batch size, image size, rows, fragments, and where the bytes come from.

The ratio is to the first case of the same group. `limits` is what `dataset.stats()` names. The object store is a
server on the loopback, on the same cores, that answers 5 ms late, or at once: the difference is what read-ahead does
not hide. Data that only this benchmark needs is made small: --rows scales it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import data
import harness
import object_store

SIDES = {0.05: (194, 258), 0.2: (387, 516), 1.0: (866, 1155), 4.0: (1732, 2309), 12.0: (3000, 4000)}  # megapixels
_FULL = 3072  # rows, for which the sizes below are meant
_PORT = "GPULOAD_BENCH_PORT"


class Epoch:
    """A job: batches of a dataset, at most `most` rows; afterwards `note` says what limited it."""

    def __init__(self, uri: str, most: int, batch_size: int = 64, **keywords: Any) -> None:
        import torch

        from gpuload import Image

        image = Image(224, dtype=torch.uint8, fast=keywords.pop("fast", False))
        keywords = {"columns": ["image"], "transforms": {"image": image}, "device": "cpu", **keywords}
        self.arguments, self.keywords, self.most, self.note = (uri, batch_size), keywords, most, ""
        self.cold, self.about = False, ""  # whether the page cache is to be left alone; what else there is to say

    def __call__(self) -> Iterator[int]:
        from gpuload import LanceDataset

        with LanceDataset(*self.arguments, **self.keywords) as dataset:
            rows = 0
            for batch in dataset:
                yield batch.size
                rows += batch.size
                if rows >= self.most:
                    break
            self.note = dataset.stats()["bottleneck"] + self.about


def scaled(settings: Any, rows: int) -> int:
    return max(8, round(rows * settings.rows / _FULL))


def drawn(settings: Any, rows: int, megapixels: float, fragments: int = 1) -> str:
    """Path of a dataset of generated photos of one size."""
    import io

    import lance
    import numpy as np
    import pyarrow as pa
    from PIL import Image

    def write(path: Path) -> None:
        generator, pictures = np.random.default_rng(0), []
        h, w = SIDES.get(megapixels, (32, 32))
        for _ in range(4 if megapixels > 1 else 16):
            coarse = Image.fromarray(generator.integers(0, 256, (h // 16 + 2, w // 16 + 2, 3), dtype=np.uint8))
            grain = generator.integers(-6, 7, (h, w, 1))
            pixels = np.asarray(coarse.resize((w, h), Image.Resampling.BICUBIC)).astype(np.int16) + grain
            file = io.BytesIO()
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=88)
            pictures.append(file.getvalue())
        schema = pa.schema([("image", pa.binary())])
        source = itertools.islice(itertools.cycle(pictures), rows)

        def batches() -> Iterator[pa.RecordBatch]:
            while part := list(itertools.islice(source, 4096 if megapixels < 0.05 else 16)):
                yield pa.record_batch([pa.array(part, pa.binary())], schema=schema)

        reader = pa.RecordBatchReader.from_batches(schema, batches())
        lance.write_dataset(reader, str(path), max_rows_per_file=-(-rows // fragments))

    return data.made(settings, f"{megapixels}mp-{rows}-in-{fragments}.lance", write)


def threads(number: int) -> harness.Case:
    return lambda settings: Epoch(data.dataset(settings), scaled(settings, 1024), num_threads=number)


def batch(size: int) -> harness.Case:
    return lambda settings: Epoch(data.dataset(settings), scaled(settings, 64 if size == 1 else 1024), size)


def images(megapixels: float, fast: bool = False) -> harness.Case:
    def case(settings: Any) -> harness.Job:
        rows = scaled(settings, min(1024, int(400 / megapixels)))
        return Epoch(drawn(settings, rows, megapixels), rows, 64 if megapixels < 1 else 8, fast=fast)

    return case


def rows(number: int, shuffle: Any) -> harness.Case:
    def case(settings: Any) -> harness.Job:
        return Epoch(drawn(settings, scaled(settings, number), 0.001), scaled(settings, 8192), 256, shuffle=shuffle)

    return case


def fragments(number: int) -> harness.Case:
    def case(settings: Any) -> harness.Job:
        count = min(number, scaled(settings, 2000))
        return Epoch(drawn(settings, scaled(settings, 2000), 0.05, count), scaled(settings, 2000), shuffle="batch")

    return case


def disk(cold: bool) -> harness.Case:
    def case(settings: Any) -> harness.Job:
        uri = data.dataset(settings)
        kept = [evicted(path) for path in Path(uri).rglob("*.lance")] if cold else []
        job = Epoch(uri, settings.rows)
        job.cold = cold
        job.about = f"; {sum(kept)} MiB of the files were still in memory" if cold else ""
        return job

    return case


def evicted(path: Path) -> int:
    """Asks the system to forget a file; MiB of which it did not forget the first byte (tmpfs cannot forget)."""
    descriptor, kept = os.open(path, os.O_RDONLY), 0
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    for at in range(0, os.fstat(descriptor).st_size, 1 << 20):
        with contextlib.suppress(BlockingIOError):  # not in memory
            kept += os.preadv(descriptor, [bytearray(1)], at, os.RWF_NOWAIT)
    os.close(descriptor)
    return kept


def remote(bucket: str = "far", **keywords: Any) -> harness.Case:
    def case(settings: Any) -> harness.Job:
        name = Path(data.dataset(settings)).name
        options = {"storage_options": object_store.options(int(os.environ[_PORT]))}
        return Epoch(f"s3://{bucket}/{name}", settings.rows, dataset_options=options, **keywords)

    return case


CASES: dict[str, harness.Case] = {
    **{f"threads: {n}": threads(n) for n in (1, 2, 4, 8)},
    **{f"batch: {n}": batch(n) for n in (64, 1, 8, 256, 1024)},
    **{f"image: {mp} megapixels": images(mp) for mp in SIDES},
    "image: 12.0 megapixels, fast": images(12.0, fast=True),
    **{f"rows: {n:,}, in order": rows(n, False) for n in (10**3, 10**4, 10**5, 10**6)},
    **{f"rows: {n:,}, shuffle=row": rows(n, "row") for n in (10**4, 10**6)},
    **{f"fragments: {n}": fragments(n) for n in (1, 10, 100, 1000)},
    "source: local disk, warm": disk(cold=False),
    "source: local disk, cold": disk(cold=True),
    "source: object store, no delay": remote("near"),
    "source: object store, 5 ms": remote(),
    "source: object store, 5 ms, shuffle=block": remote(shuffle="block"),
    "source: object store, 5 ms, one batch ahead": remote(batch_readahead=1),
}

if __name__ == "__main__":
    arguments = {**data.ARGUMENTS, "batch_size": 64}
    folder = harness.arguments(arguments).work
    if _PORT in os.environ:  # a run of one case
        harness.main("scaling", CASES, arguments, lambda settings: None)
    else:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with object_store.serving(folder) as port:
            os.environ[_PORT] = str(port)
            harness.main("scaling", CASES, arguments, lambda settings: data.dataset(settings) and None)
