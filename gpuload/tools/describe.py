"""What a Lance dataset holds, in words, and which of its columns to look at.

Enter: a `LanceTable`. Leave: pairs of a name and a text. A few image headers are read, never all rows.
"""

from __future__ import annotations

import io
import json
import shlex
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from gpuload.errors import ConfigError
from gpuload.fields import Column, is_text
from gpuload.fields.choose import resolve
from gpuload.tables.lance import LanceTable

SAMPLE = 64  # rows whose image headers are looked at, drawn at random


def facts(source: LanceTable) -> list[tuple[str, str]]:
    """Rows, fragments, versions, storage format and bytes."""
    lance = source.lance
    fragments, versions = lance.get_fragments(), lance.versions()
    found = [("rows", f"{source.rows:,}")]
    deleted = sum(fragment.num_deletions for fragment in fragments)
    found += [("deleted rows", f"{deleted:,}")] if deleted else []
    spans = f" of {span(source.fragments.tolist())} rows" if fragments else ""
    found.append(("fragments", f"{len(fragments):,}{spans}"))
    when = next((f", written {v['timestamp']:%Y-%m-%d %H:%M}" for v in versions if v["version"] == lance.version), "")
    found.append(("version", f"{lance.version}{when}; {len(versions):,} kept"))
    found.append(("storage format", str(lance.data_storage_version)))
    sizes = [file.file_size_bytes or 0 for fragment in fragments for file in fragment.data_files()]
    found.append(("data", f"{size(sum(sizes))} in {len(sizes):,} file{'s' * (len(sizes) != 1)} of this version"))
    if Path(source.uri).is_dir():
        everything = sum(path.stat().st_size for path in Path(source.uri).rglob("*") if path.is_file())
        found.append(("on disk", f"{size(everything)} with all versions and indices"))
    return found


def image_sample(source: LanceTable, name: str) -> list[tuple[str, str]]:
    """Formats, modes, sizes and bytes of the images of some rows, from their headers."""
    draw = np.random.default_rng(0)
    rows = np.sort(draw.choice(source.rows, min(SAMPLE, source.rows), replace=False, shuffle=False))
    column = source.read(np.stack([rows, rows + 1], axis=1)).column(name)
    formats, modes = Counter[str](), Counter[str]()
    widths, heights, lengths = list[int](), list[int](), list[int]()
    for value in column.to_pylist():
        data = value.get("bytes") if isinstance(value, dict) else value
        if not data:
            formats["null or empty"] += 1
            continue
        lengths.append(len(data))
        try:
            with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as image:
                formats[image.format or "?"] += 1
                modes[image.mode] += 1
                widths.append(image.width)
                heights.append(image.height)
        except UnidentifiedImageError:
            formats["no image"] += 1
        except Exception:  # a format's parser may raise anything on hostile bytes
            formats["broken"] += 1
    found = [("rows looked at", f"{len(rows):,}"), ("formats", _counts(formats))]
    if widths:
        found += [("modes", _counts(modes)), ("width", f"{span(widths)} pixels"), ("height", f"{span(heights)} pixels")]
    if lengths:
        found.append(("bytes", f"{span(lengths)}, mean {sum(lengths) / len(lengths):,.0f}"))
    return found


def open_table(uri: str) -> LanceTable:
    """The dataset, or why it is none: a folder of pictures is not yet one.

    Raises
    ------
    ConfigError
    """
    path = Path(uri)
    if path.is_dir() and not (path / "_versions").is_dir() and any(path.iterdir()):
        target = f"{path.resolve().name}.lance"
        raise ConfigError(
            f"Expected a Lance dataset, got {uri!r}, which is a folder of other files. To make one of its pictures: "
            f"gpuload ingest {shlex.quote(uri)} {shlex.quote(target)}"
        )
    return LanceTable(uri)


def role(column: Column) -> str:
    """What a column is, in a word for people."""
    return "strings" if column.form == "list[str]" else column.role


def columns(source: LanceTable) -> list[Column]:
    """Every column with the role it has without any transform."""
    return resolve(source.schema, {}, source.values)


def form(source: LanceTable, column: Column) -> str:
    """What the column is in a batch; the names of its classes if it has any."""
    names = class_names(source, column.name)
    shown = f"{', '.join(names[:4])}{', …' if len(names) > 4 else ''}"
    return f"{column.form}; {len(names):,} classes: {shown}" if names else column.form


def class_names(source: LanceTable, name: str) -> list[str]:
    """What the numbers of a Hugging Face ClassLabel column mean; empty if it is none."""
    try:
        feature = json.loads((source.schema.metadata or {})[b"huggingface"])["info"]["features"][name]
        return [str(label) for label in feature["names"]] if feature["_type"] == "ClassLabel" else []
    except (KeyError, TypeError, ValueError):
        return []


def image_column(source: LanceTable, name: str | None = None) -> str:
    """The column of images with this name, or the first."""
    found = columns(source)
    for column in found:
        if column.role == "image" and name in (None, column.name):
            return column.name
    wanted = "a column of images" if name is None else f"{name!r} as a column of images"
    raise ConfigError(f"Expected {wanted} in {source.uri!r}, found {[f'{c.name} ({c.role})' for c in found]}.")


def caption_column(source: LanceTable, name: str | None = None) -> str | None:
    """The column of captions with this name, or the first of texts or of class names; a path only for want of them.

    Raises
    ------
    ConfigError
        The column holds no text.
    """
    found = columns(source)
    texts = [column.name for column in found if is_text(column.type)]
    lists = [column.name for column in found if pa.types.is_list(column.type) and is_text(column.type.value_type)]
    classes = [column.name for column in found if class_names(source, column.name)]
    known = list(dict.fromkeys([*(each for each in texts if each != "path"), *lists, *classes, *texts]))
    if name is not None and name not in known:
        raise ConfigError(f"Expected captions from a column of texts or class names, {known}, got {name!r}.")
    return name if name is not None else next(iter(known), None)


def size(count: float) -> str:
    """Bytes for a person: 12.3 MB, in powers of 1000."""
    if count < 1000:
        return f"{count:,.0f} bytes"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 1000:
            return f"{count:,.1f} {unit}"
    return f"{count / 1000:,.1f} TB"


def span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counter.most_common())
