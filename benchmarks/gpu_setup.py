"""What every case of bench_gpu.py is given: settings enter, photos in memory, a Lance dataset and a folder leave."""

from __future__ import annotations

import io
import itertools
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import data
import numpy as np
import torch

from gpuload import Encoded, Image
from gpuload.images import headers
from gpuload.images.decode import libnvjpeg

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE = Image(224, crop="random", flip=0.5, mean=MEAN, std=STD, dtype=torch.float16)
THREADS = data.CORES
Pass = Callable[[], Iterator[int]]  # rows of each batch, or of several


class Card:
    """nvJPEG as it is called on a GPU; tests give one that stands for it."""

    @property
    def library(self) -> Any:
        return libnvjpeg.library()

    def stream(self, device: torch.device) -> Any:
        return torch.cuda.Stream(device)


class Setup:
    """The photos of one size and how they are taken. What is on disk is made once and found again by its name."""

    def __init__(self, settings: Any, megapixels: float, batch_size: int, card: Any = None) -> None:
        self.settings, self.megapixels, self.batch_size = settings, megapixels, batch_size
        self.device = torch.device(settings.device, 0) if settings.device == "cuda" else torch.device("cpu")
        self.card = card or (Card() if self.device.type == "cuda" else None)
        share = max(1.0, megapixels / 0.2) ** 0.8  # large photos take longer: fewer of them
        self.rows = max(batch_size, int(settings.rows / share) // batch_size * batch_size)
        of = Path(settings.images).name if settings.images else "drawn"
        count = min(max(8, int(256 / share)), self.rows)
        self._work = Path(settings.work)
        self._folder = self._made(
            f"{of}-{megapixels:g}mp-{count}", lambda path: _write_photos(settings, megapixels, count, path)
        )
        self.unique = [path.read_bytes() for path in sorted(self._folder.iterdir())]

    def batches(self, unique: list[bytes] | None = None) -> Iterator[tuple[Encoded, Any]]:
        """Pointers to the bytes of each batch, and their HEADER[B], which were read before."""
        encoded = Encoded.of(unique or self.unique)
        table = headers.read(encoded)
        for start in range(0, self.rows, self.batch_size):
            which = np.arange(start, start + self.batch_size) % len(encoded)
            yield encoded.take(which), table[which]

    @property
    def threads(self) -> int:
        """For a decoder's host threads."""
        return THREADS if self.device.type == "cuda" else 1

    def lance(self) -> str:
        import lance
        import pyarrow as pa

        def write(path: Path) -> None:
            rows = itertools.islice(itertools.cycle(self.unique), self.rows)
            batches = (pa.record_batch({"image": part}) for part in iter(lambda: list(itertools.islice(rows, 64)), []))
            reader = pa.RecordBatchReader.from_batches(pa.schema([("image", pa.binary())]), batches)
            lance.write_dataset(reader, str(path), max_rows_per_file=max(64, self.rows // 10))

        return str(self._made(f"{self._folder.name}-{self.rows}.lance", write))

    def files(self) -> list[str]:
        """As many paths as rows; the photos behind them repeat."""
        paths = sorted(str(path) for path in self._folder.iterdir())
        return list(itertools.islice(itertools.cycle(paths), self.rows))

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _made(self, name: str, write: Callable[[Path], None]) -> Path:
        """What `write` makes, made the first time; never half of it, which a time limit may leave."""
        path = self._work / name
        if not path.exists():
            self._work.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"part-{name}")
            shutil.rmtree(part, ignore_errors=True)
            write(part)
            part.rename(path)
        return path


def _write_photos(settings: Any, megapixels: float, count: int, folder: Path) -> None:
    """JPEG files of about so many pixels, made of the photos of --images or of generated pictures."""
    files = [file for file, _ in data.encoded(settings.images, count)][:count]
    folder.mkdir()
    with ThreadPoolExecutor(THREADS) as pool:
        large = pool.map(lambda file: _enlarged(file, megapixels), files) if megapixels > 0.2 else files
        for i, file in enumerate(large):
            (folder / f"{i:05d}.jpg").write_bytes(file)


def _enlarged(file: bytes, megapixels: float) -> bytes:
    from PIL import Image as pillow

    with pillow.open(io.BytesIO(file)) as image:
        factor = (megapixels * 1e6 / (image.width * image.height)) ** 0.5
        size = (round(image.width * factor), round(image.height * factor))
        out = io.BytesIO()
        image.convert("RGB").resize(size, pillow.Resampling.BICUBIC).save(out, "JPEG", quality=90)
        return out.getvalue()


def on_threads(
    work: Callable[[Encoded, Any], int], setup: Setup, threads: int, unique: list[bytes] | None = None
) -> Pass:
    """`work` on each batch, so many batches at once, a few ahead."""

    def run() -> Iterator[int]:
        with ThreadPoolExecutor(threads) as pool:
            ahead: list[Any] = []
            for batch in setup.batches(unique):
                ahead.append(pool.submit(work, *batch))
                if len(ahead) > 2 * threads:
                    yield ahead.pop(0).result()
            for future in ahead:
                yield future.result()

    return run
