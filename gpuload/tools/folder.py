"""What a folder of images holds: its files in order, the classes of its sub-folders, the captions beside them.

Enter: a folder, maybe a table of captions. Leave: one `File` a name, sorted; read, one `Row` an image, in that order.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from gpuload.errors import ConfigError
from gpuload.images import Encoded, headers, pillow, sizes
from gpuload.stages import ordered_map
from gpuload.tools.metadata import TABLES, Metadata, form

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM")  # what is an image here
LARGEST = 1 << 30  # bytes of one file: an Arrow binary array ends at 2 GiB


@dataclass
class Row:
    """One image on its way into the dataset, with the values of further columns; `refused` says why it does not get
    there."""

    path: str
    data: bytes = b""
    caption: str | list[str] | None = None
    label: int | None = None
    height: int | None = None  # pixels, as a person sees it: after its EXIF orientation
    width: int | None = None
    refused: str = ""
    others: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class File:
    """One name in the folder: an image to try, a table of captions, a text of no image, or what is none of them."""

    path: str  # relative to the folder, with "/"
    kind: Literal["image", "table", "text", "odd"]
    text: str | None = None  # path of the caption file beside an image
    why: str = ""


class Folder:
    """A folder after a first look at every name in it.

    Parameters
    ----------
    root : path
    captions : path, optional
        The one table to take captions from; else every ``metadata.csv``, ``.jsonl`` and ``.parquet`` in the folder is
        one.
    labels : bool, optional
        Whether the sub-folders right under `root` are classes; None: if at least two of them hold files.
    without : path, optional
        Left out, for instance a dataset being written into the folder.
    caption_from : str, optional
        The tables' column of captions.

    Attributes
    ----------
    files : int
        Candidates for an image.
    classes : list of str
        Sorted; empty without labels.
    caption : pa.DataType or None
        Of the captions: strings, or lists of them; None where there is no source of captions.
    metadata : Metadata
        From the tables, by path: what is left in it in the end names no file.
    left_out, unused : list of (path, why)
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        captions: str | os.PathLike[str] | None = None,
        labels: bool | None = None,
        without: str | os.PathLike[str] | None = None,
        caption_from: str | None = None,
    ) -> None:
        self.root, self.files = Path(root), 0
        if not self.root.is_dir():
            raise ConfigError(f"Expected a folder of images, got {str(root)!r}, which is not a folder.")
        self.metadata = Metadata(self.root, caption_from)
        self.left_out: list[tuple[str, str]] = []
        self.unused: list[tuple[str, str]] = []
        given = None if captions is None else Path(captions)
        real = os.path.realpath(root)
        self._skip = {os.path.relpath(os.path.realpath(path), real) for path in (given, without) if path is not None}
        tables: list[Path] = []
        classes: dict[str, None] = {}
        texts = False
        for file in self.walk():
            if file.kind == "table":
                tables.append(self.root / file.path)
            elif file.kind == "image":
                self.files, texts = self.files + 1, texts or file.text is not None
                if "/" in file.path:
                    classes[shown(file.path).split("/")[0]] = None
        if not self.files:
            raise ConfigError(f"Expected images in {str(root)!r}, found no file.")
        for table in [given] if given is not None else tables:
            wrong = self.metadata.add(table, required=given is not None)
            if wrong:
                self.left_out.append((os.path.relpath(table, self.root), wrong))
        if caption_from is not None and self.metadata.caption is None:
            raise ConfigError(f"Expected a table with a column {caption_from!r}, found none in {str(root)!r}.")
        self.unused += self.metadata.unused
        self.caption = self.metadata.caption or (pa.string() if texts else None)
        named = "label" in self.metadata.columns
        if labels and named:
            raise ConfigError("Expected labels from the sub-folders or from a table's column 'label', got both.")
        many = labels is None and len(classes) > 1 and not named
        self.classes = sorted(classes) if labels or many else []

    def walk(self, below: str = "", above: tuple[tuple[int, int], ...] = ()) -> Iterator[File]:
        """Every file, sorted by the parts of its path; the names of one folder are in memory at a time."""
        try:
            status = os.stat(self.root / below)
            with os.scandir(self.root / below) as found:
                entries = sorted((e for e in found if not e.name.startswith(".")), key=lambda entry: entry.name)
        except OSError as error:
            yield File(shown(below), "odd", why=f"folder cannot be read: {error.strerror}")
            return
        here = (status.st_dev, status.st_ino)
        if here in above:
            yield File(shown(below), "odd", why="a link to a folder above it")
            return
        texts = {form(_stem(entry.name)): entry.name for entry in entries if _is(entry.name, ".txt")}
        stems = {form(_stem(e.name)) for e in entries if not _is(e.name, ".txt", ".json") and e.name not in TABLES}
        for entry in entries:
            path, stem = (f"{below}/{entry.name}" if below else entry.name), form(_stem(entry.name))
            if path in self._skip or (_is(entry.name, ".json") and stem in stems):
                continue  # a .json beside an image is what some downloaders keep about it
            if entry.is_dir():
                yield from self.walk(path, (*above, here))
            elif not entry.is_file():
                yield File(shown(path), "odd", why="neither a file nor a folder")
            elif entry.name in TABLES:
                yield File(path, "table")
            elif not _is(entry.name, ".txt"):
                text = f"{path[: -len(entry.name)]}{texts[stem]}" if stem in texts else None
                yield File(path, "image", text)
            elif stem not in stems:
                yield File(shown(path), "text", why="a text without an image beside it")


def read_ahead(root: Path, files: Iterator[File], num_threads: int) -> Iterator[Row]:
    """Every file read, in order, four for each thread under way."""
    read = partial(_read, root)
    with closing(ordered_map(read, files, threads=num_threads, ahead=4 * num_threads, name="ingest")) as rows:
        yield from rows


def _read(root: Path, file: File) -> Row:
    """One file's bytes, its header checked, and the text beside it."""
    row = Row(shown(file.path))
    try:
        if os.path.getsize(root / file.path) > LARGEST:
            row.refused = f"larger than {LARGEST >> 20} MiB"
            return row
        row.data = (root / file.path).read_bytes()
        if file.text is not None:
            row.caption = (root / file.text).read_text("utf-8-sig", "replace").strip() or None
    except OSError as error:
        row.refused = f"cannot be read: {error.strerror}"
    else:
        row.refused = why_no_image(row.data)
        row.height, row.width = (None, None) if row.refused else size_of(row.data)
    return row


def size_of(data: bytes) -> tuple[int, int]:
    """Height and width of an image in pixels, after its EXIF orientation, as its header says."""
    encoded = Encoded.of([data])
    found = headers.read(encoded)
    pillow.open_rest(encoded, found, sys.maxsize, {})
    for image in encoded.opened.values():
        image.close()
    height, width = sizes(found)
    return int(height[0]), int(width[0])


def why_no_image(data: bytes) -> str:
    """Why a file is no whole image, "" if it is one.

    JPEG and PNG files are taken by their headers and their ends, of the others the pixels are decoded: most have no
    mark by which a file that was cut could be told.
    """
    if not data:
        return "empty file"
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            kind = "JPEG" if image.format == "MPO" else image.format
            marked = kind in ("JPEG", "PNG")
            image.verify()
        if marked and not headers.read(Encoded.of([data]))["end"][0]:
            return f"cut {kind} file: {len(data)} bytes without its end marker"
        if not marked:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                image.load()
    except UnidentifiedImageError:
        return f"not an image: {len(data)} bytes starting {data[:8].hex()}"
    except Exception as error:  # a format's parser may raise anything on hostile bytes
        return f"broken image: {error}"
    return "" if width and height else f"an image of {width}x{height} pixels"


def _is(name: str, *endings: str) -> bool:
    return name.lower().endswith(endings)


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def shown(path: str) -> str:
    """A path that can be stored: names on disk are bytes, and need not be UTF-8."""
    return os.fsencode(path).decode("utf-8", "replace")
