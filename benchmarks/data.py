"""Rows for the benchmarks: the photos of a folder, or generated pictures, repeated, in the format of each loader.

Everything is made once, under the folder `work`, and found again by its name.
"""

from __future__ import annotations

import io
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa

ARGUMENTS: dict[str, Any] = {"images": None, "rows": 3072, "work": str(Path(tempfile.gettempdir()) / "gpuload-bench")}
CORES = len(os.sched_getaffinity(0))
_used: set[str] = set()  # paths that were asked for in this process


def encoded(folder: str | None, count: int = 256) -> list[tuple[bytes, str]]:
    """(bytes, caption) of each picture: the files of `folder`, or so many generated JPEGs."""
    if folder:
        files = sorted(path for path in Path(folder).iterdir() if path.is_file())
        return [(path.read_bytes(), path.stem.partition("_")[2].replace("_", " ") or path.stem) for path in files]
    from gpuload.tools.demo import pictures

    found = []
    for picture, caption in pictures(count, 0):
        file = io.BytesIO()
        picture.convert("RGB").save(file, "JPEG", quality=90)
        found.append((file.getvalue(), caption))
    return found


def rows(settings: Any) -> Iterator[tuple[bytes, str]]:
    """``settings.rows`` rows."""
    return itertools.islice(itertools.cycle(encoded(settings.images)), settings.rows)


def dataset(settings: Any, version: str = "2.2") -> str:
    """Path of a Lance dataset: image (binary), caption (string), label (int64), in ten fragments."""

    def write(path: Path) -> None:
        schema = pa.schema([("image", pa.binary()), ("caption", pa.string()), ("label", pa.int64())])
        reader = pa.RecordBatchReader.from_batches(schema, _batches(settings, schema))
        size = max(1, settings.rows // 10)
        lance.write_dataset(reader, str(path), data_storage_version=version, max_rows_per_file=size)

    return made(settings, f"{version}.lance", write)


def _batches(settings: Any, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    source, start = rows(settings), 0
    while part := list(itertools.islice(source, 64)):
        label = pa.array(range(start, start + len(part)), pa.int64())
        columns = [pa.array([row[0] for row in part]), pa.array([row[1] for row in part]), label]
        yield pa.record_batch(columns, schema=schema)
        start += len(part)


def files(settings: Any) -> str:
    """A folder of JPEG files 000000.jpg, ... and captions.txt, a line a file."""

    def write(path: Path) -> None:
        path.mkdir()
        captions = []
        for i, (image, caption) in enumerate(rows(settings)):
            (path / f"{i:06d}.jpg").write_bytes(image)
            captions.append(caption.replace("\n", " "))
        (path / "captions.txt").write_text("\n".join(captions))

    return made(settings, "files", write)


def tokenizer(settings: Any) -> str:
    """A tokenizer.json: byte-pair encoding, trained on the captions."""

    def write(path: Path) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        found = Tokenizer(models.BPE())
        found.pre_tokenizer = pre_tokenizers.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=2048, special_tokens=["[PAD]"], show_progress=False)
        found.train_from_iterator([caption for _, caption in encoded(settings.images)], trainer)
        found.save(str(path))

    return made(settings, "tokenizer.json", write)


def made(settings: Any, name: str, write: Callable[[Path], None]) -> str:
    """Path of what `write` makes, made the first time; never half of it."""
    what = Path(settings.images).name if settings.images else "drawn"
    path = Path(settings.work) / f"{what}-{settings.rows}-{name}"
    if not path.exists():
        Path(settings.work).mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"part-{path.name}")
        if part.is_dir():
            shutil.rmtree(part)
        write(part)
        part.rename(path)
    _used.add(str(path))
    return str(path)


def warm() -> None:
    """Reads what this process has asked for once, so that no case pays for what the system forgot meanwhile."""
    buffer = bytearray(1 << 20)
    for path in map(Path, _used):
        for file in path.rglob("*") if path.is_dir() else [path]:
            if file.is_file():
                with open(file, "rb", buffering=0) as opened:
                    while opened.readinto(buffer):
                        pass
