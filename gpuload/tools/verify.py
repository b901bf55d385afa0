"""`gpuload verify`: a dataset enters, every image is decoded on all cores; what cannot be decoded leaves as a table.

rows ─▶ threads: read 64 rows, judge their headers, decode in slices ─▶ bad images, in order ─▶ report, new version
        (one a core; pixels stay in the thread's arena)                 └▶ notes for the next run
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import lance
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gpuload.device import threads_here
from gpuload.errors import ConfigError
from gpuload.images import Encoded, encoded, headers, pillow
from gpuload.images.decode.cpu import CpuDecoder
from gpuload.images.decode.host import MAX_PIXELS
from gpuload.images.encoded import is_encoded
from gpuload.images.header_sizes import cache_folder
from gpuload.progress import checked_bar
from gpuload.stages import ordered_map
from gpuload.tables.lance import LanceTable
from gpuload.tools.describe import columns, image_column

_ROWS = 64  # of a read: enough for Lance to read ahead in, few enough for a bar that moves
_SLICE_ROWS, _SLICE_BYTES = 8, 1 << 20  # images and encoded bytes decoded in one call: what bounds a thread's arena
_SCHEMA = pa.schema([("row", pa.int64()), ("column", pa.string()), ("reason", pa.string()), ("decoder", pa.string())])


@dataclass(frozen=True)
class BadImage:
    """An image that cannot be decoded: its row's position in the dataset, its column, why, and who found out: "header"
    without decoding, else the decoder."""

    row: int
    column: str
    reason: str
    decoder: str


@dataclass
class Verified:
    """What became of the images.

    Attributes
    ----------
    dataset : str
    version : int
        Which was read.
    columns : list of str
        Of images.
    rows, images : int
        Which were looked at, in this run and in the one that it goes on from.
    bad : list of BadImage
        In the order of the rows.
    begun_at : int
        The row at which this run went on; 0 for a run from the beginning.
    fixed_version : int or None
        Without the bad rows, where that was asked for and there are any.
    seconds : float
    """

    dataset: str
    version: int
    columns: list[str]
    rows: int
    images: int
    bad: list[BadImage] = field(default_factory=list)
    begun_at: int = 0
    fixed_version: int | None = None
    seconds: float = 0.0

    @property
    def bad_rows(self) -> list[int]:
        """Positions of the rows with a bad image, each once."""
        return sorted({image.row for image in self.bad})

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "bad_rows": self.bad_rows}


def verify(
    uri: str,
    *,
    images: list[str] | None = None,
    num_threads: int | None = None,
    max_pixels: int = MAX_PIXELS,
    fix: bool = False,
    restart: bool = False,
    progress: bool = True,
) -> Verified:
    """Decode every image of every image column as for training, on the CPU, and keep none of the pixels.

    A run that is interrupted leaves notes in the user's cache folder, and the next one on the same version goes on from
    them.

    Parameters
    ----------
    uri : str
    images : list of str, optional
        Columns of images, whatever they hold; by default all that are found to be some.
    num_threads : int, optional
        One a core by default.
    max_pixels : int
        Images with more are bad.
    fix : bool
        Write a new version of the dataset without the rows that have a bad image.
    restart : bool
        Begin again, whatever an interrupted run has left.
    progress : bool
        A bar on stderr.

    Raises
    ------
    ConfigError
        No such dataset, or no column of images.
    """
    began, everything = time.perf_counter(), LanceTable(uri)
    known = [column.name for column in columns(everything) if column.role == "image"]
    names = list(dict.fromkeys(images or known))
    wanted: list[str | None] = [*names] or [None]
    files = {field.name for field in everything.schema if is_encoded(field.type)}  # images, if the user says so
    for name in wanted:
        if name not in (files if images else known):
            image_column(everything, name)  # says what there is instead
    source = LanceTable(uri, names)
    done = Verified(source.uri, source.version, names, source.rows, source.rows * len(names))
    threads = num_threads or threads_here()
    decoder = CpuDecoder(max_pixels)

    def look(lo: int) -> list[BadImage]:
        return _bad(source, names, lo, min(lo + _ROWS, source.rows), decoder, max_pixels)

    with ExitStack() as stack:
        notes = stack.enter_context(closing(Notes(source, max_pixels, restart)))
        done.bad, done.begun_at = notes.bad, notes.row
        advance = stack.enter_context(checked_bar(source.rows, done.begun_at, progress))
        starts = range(done.begun_at, source.rows, _ROWS)
        found = ordered_map(look, starts, threads=threads, ahead=2 * threads, name="verify")
        stack.enter_context(closing(found))
        for lo, bad in zip(starts, found, strict=True):
            done.bad += bad
            hi = min(lo + _ROWS, source.rows)
            notes.add(hi, bad)
            advance(hi - lo, len(done.bad))
        notes.finish()
    if fix and done.bad:
        done.fixed_version = _without(source, done.bad_rows)
    done.seconds = time.perf_counter() - began
    return done


def write_report(bad: list[BadImage], out: Path) -> None:
    """The bad images as JSON lines, or as a new Lance dataset where `out` ends in ``.lance``.

    Raises
    ------
    ConfigError
        It cannot be written.
    """
    try:
        if out.suffix == ".lance":
            lance.write_dataset(pa.Table.from_pylist([asdict(image) for image in bad], schema=_SCHEMA), str(out))
        else:
            lines = [json.dumps(asdict(image), ensure_ascii=False) + "\n" for image in bad]
            out.write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"Expected a place for the report, got {str(out)!r}: {error}.") from error


def check_report(out: Path) -> None:
    """Raise `ConfigError` where `write_report` could not write, before hours of decoding."""
    if out.suffix not in (".jsonl", ".lance"):
        raise ConfigError(f"Expected a report as .jsonl or .lance, got {str(out)!r}.")
    if out.suffix == ".lance" and out.exists():
        raise ConfigError(f"Expected a new place for the report, got {str(out)!r}, which exists.")
    if not out.parent.is_dir():
        raise ConfigError(f"Expected a folder for the report, got {str(out.parent)!r}, which is none.")


class Notes:
    """What an interrupted run has found, in the user's cache folder: bad images, and up to which row.

    Attributes
    ----------
    row : int
        The first that was not looked at.
    bad : list of BadImage
        Of the rows before it.
    """

    def __init__(self, source: LanceTable, max_pixels: int, restart: bool) -> None:
        what = [source.uri, source.fingerprint(), source.schema.names, max_pixels]
        name = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:24]
        self._path = cache_folder() / "verify" / f"{name}.jsonl"
        self.row, self.bad = (0, []) if restart else self._read(source.rows)
        self._file: IO[str] | None = None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "w" if not self.row else "a", encoding="utf-8")  # noqa: SIM115 - see close
        except OSError:  # a home that cannot be written: the run is one that cannot go on later, and no worse
            self._file = None

    def add(self, row: int, bad: list[BadImage]) -> None:
        """All rows before `row` were looked at; these were found since the last call."""
        if self._file is not None:
            lines = [json.dumps(asdict(image)) for image in bad] + [json.dumps({"done": row})]
            self._file.write("\n".join(lines) + "\n")
            self._file.flush()

    def finish(self) -> None:
        """Nothing is left to go on with."""
        self.close()
        with suppress(OSError):
            self._path.unlink()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def _read(self, rows: int) -> tuple[int, list[BadImage]]:
        row, bad, held = 0, list[BadImage](), list[BadImage]()
        try:
            for line in self._path.read_text("utf-8").splitlines():
                note = json.loads(line)
                if "done" in note:
                    row, bad, held = int(note["done"]), bad + held, []
                else:
                    held.append(BadImage(**note))
        except (OSError, ValueError, TypeError):  # there are none, or the last line was cut
            pass
        return (row, bad) if row <= rows else (0, [])


def _bad(
    source: LanceTable, names: list[str], lo: int, hi: int, decoder: CpuDecoder, max_pixels: int
) -> list[BadImage]:
    """The images of these rows that cannot be decoded."""
    table, found = source.read(np.array([[lo, hi]])), list[BadImage]()
    for name in names:
        files, errors, _ = encoded.from_arrow(table.column(name))
        heads = headers.read(files)
        headers.judge(files, heads, max_pixels, errors)
        pillow.open_rest(files, heads, max_pixels, errors)
        heads["height"][list(errors)] = 0
        found += [BadImage(lo + i, name, error.cause, "header") for i, error in errors.items()]
        for first, last in _slices(files):
            with decoder.decode(files[first:last], heads[first:last]) as ragged:
                broken = ragged.errors.items()
            found += [BadImage(lo + first + i, name, error.cause, decoder.name) for i, error in broken]
    return sorted(found, key=lambda image: image.row)


def _slices(files: Encoded) -> Iterator[tuple[int, int]]:
    lo, size = 0, 0
    for i, bytes_ in enumerate(files.size.tolist()):
        size += bytes_
        if i + 1 - lo == _SLICE_ROWS or size >= _SLICE_BYTES:
            yield lo, i + 1
            lo, size = i + 1, 0
    if lo < len(files):
        yield lo, len(files)


def _without(source: LanceTable, rows: list[int]) -> int:
    """A new version of the dataset without these rows; its number."""
    ids = LanceTable(source.lance, ["_rowid"]).small("_rowid")[_index(rows)]
    source.lance.delete(f"_rowid IN ({', '.join(map(str, ids.tolist()))})")
    return int(source.lance.version)


def _index(rows: list[int]) -> NDArray[np.int64]:
    return np.asarray(rows, np.int64)
