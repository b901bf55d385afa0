"""Rows for the benchmarks: the photos of a folder, or generated pictures, repeated; one dataset per storage format."""

from __future__ import annotations

import io
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa

ARGUMENTS: dict[str, Any] = {"images": None, "rows": 3072, "work": str(Path(tempfile.gettempdir()) / "gpuload-bench")}


def encoded(folder: str | None) -> list[tuple[bytes, str]]:
    """(bytes, caption) of each picture: the files of `folder`, or 256 generated JPEGs."""
    if folder:
        files = sorted(path for path in Path(folder).iterdir() if path.is_file())
        return [(path.read_bytes(), path.stem.partition("_")[2].replace("_", " ") or path.stem) for path in files]
    from gpuload.demo import pictures

    found = []
    for picture, caption in pictures(256, 0):
        file = io.BytesIO()
        picture.convert("RGB").save(file, "JPEG", quality=90)
        found.append((file.getvalue(), caption))
    return found


def dataset(settings: Any, version: str = "2.2") -> str:
    """Path of a dataset of ``settings.rows`` rows: image (binary), caption (string), label (int64). Made once."""
    path = (
        Path(settings.work)
        / f"{Path(settings.images).name if settings.images else 'drawn'}-{settings.rows}-{version}.lance"
    )
    if not path.exists():
        Path(settings.work).mkdir(parents=True, exist_ok=True)
        schema = pa.schema([("image", pa.binary()), ("caption", pa.string()), ("label", pa.int64())])
        reader = pa.RecordBatchReader.from_batches(schema, _batches(settings, schema))
        lance.write_dataset(
            reader, str(path), data_storage_version=version, max_rows_per_file=max(1, settings.rows // 10)
        )
    return str(path)


def _batches(settings: Any, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    rows = itertools.islice(itertools.cycle(encoded(settings.images)), settings.rows)
    for start in range(0, settings.rows, 64):
        part = list(itertools.islice(rows, 64))
        label = pa.array(range(start, start + len(part)), pa.int64())
        columns = [pa.array([row[0] for row in part]), pa.array([row[1] for row in part]), label]
        yield pa.record_batch(columns, schema=schema)
