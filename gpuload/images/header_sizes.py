"""The size of every image of a column: one pass over headers, or what an earlier pass left, enters; sizes leave.

The pass reads the whole column once. What it finds is kept in a file of the user's cache folder under the identity of
the rows (`GPULOAD_CACHE_DIR`, else `gpuload` in XDG's cache folder): never in the dataset, which may be read-only.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpuload.images import encoded, headers, pillow, sizes
from gpuload.stages import ordered_map
from gpuload.tables import Table
from gpuload.tables.lance import LanceTable

Sizes = tuple[NDArray[np.int64], NDArray[np.int64]]  # heights, widths

_ROWS = 256  # of a read: as many photos as a batch has
_THREADS = 4  # reads under way
_KEPT_ROWS = 1 << 16  # of a read from the file


def header_sizes(table: LanceTable, max_pixels: int, shown: bool) -> Iterator[Sizes]:
    """Heights and widths of the images of all rows, in order and in parts: i64[n] each, as a person sees them (after
    orientation); 0 where there is no image.

    Parameters
    ----------
    table : LanceTable
        With one column, of encoded images.
    max_pixels : int
        Larger ones count as none.
    shown : bool
        Whether the pass has a progress bar on stderr.
    """
    kept = cache_folder() / f"sizes-{identity(table)}.npy"
    found = _load(kept, table.rows)
    if found is None:
        yield from _keep(_pass(table, max_pixels, shown), kept, table.rows)
        return
    for lo in range(0, table.rows, _KEPT_ROWS):
        part = found[lo : lo + _KEPT_ROWS].astype(np.int64)
        yield part[:, 0], part[:, 1]


def cache_folder() -> Path:
    """Where sizes, and what an interrupted `verify` has found, are kept."""
    given = os.environ.get("GPULOAD_CACHE_DIR")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpuload"


def identity(table: Table) -> str:
    """Names the rows of a table and its first column, wherever they are stored."""
    digest = hashlib.sha256(f"{table.fingerprint()}\n{table.origin(table.schema.names[0])}\n{table.rows}".encode())
    if table.rows != table.stored:
        for lo in range(0, table.rows, _KEPT_ROWS):
            digest.update(table.positions(np.array([[lo, min(lo + _KEPT_ROWS, table.rows)]])).astype("<i8").data)
    return digest.hexdigest()[:32]


def _pass(table: LanceTable, max_pixels: int, shown: bool) -> Iterator[Sizes]:
    def read(lo: int) -> Sizes:
        rows = table.read(np.array([[lo, min(lo + _ROWS, table.rows)]]))
        images, errors, _ = encoded.from_arrow(rows.column(0))
        found_headers = headers.read(images)
        headers.judge(images, found_headers, max_pixels, errors)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow thinks of a header is said when the image is decoded
            pillow.open_rest(images, found_headers, max_pixels, errors)
        for image in images.opened.values():
            image.close()
        found_headers["height"][list(errors)] = found_headers["width"][list(errors)] = 0
        height, width = sizes(found_headers)
        return height.astype(np.int64), width.astype(np.int64)

    from gpuload.progress import rows_bar  # with the first pass: few programs make one

    parts = ordered_map(read, range(0, table.rows, _ROWS), threads=_THREADS, ahead=2 * _THREADS, name="sizes")
    try:
        with rows_bar("image sizes", table.rows, shown) as show:
            done = 0
            for part in parts:
                yield part
                done += len(part[0])
                show(done, done)
    finally:
        parts.close()


def _load(path: Path, rows: int) -> NDArray[np.int32] | None:
    """What an earlier pass left, i32[rows, 2]; None without it."""
    try:
        found: NDArray[np.int32] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == (rows, 2) and found.dtype == np.int32 else None


def _keep(parts: Iterator[Sizes], path: Path, rows: int) -> Iterator[Sizes]:
    """The same parts, written to `path` once they were all taken; whoever reads it sees all or nothing."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    kept = True

    def write(data: bytes, mode: str = "ab") -> bool:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(unfinished, mode) as file:
                file.write(data)
        except OSError as error:
            where = str(path.parent)
            warnings.warn(f"The sizes of images cannot be kept in {where!r}: {error.strerror}.", stacklevel=2)
            return False
        return True

    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<i4", "fortran_order": False, "shape": (rows, 2)})
    try:
        kept = write(head.getvalue(), "wb")
        for height, width in parts:
            kept = kept and write(np.stack([height, width], axis=1).astype("<i4").tobytes())
            yield height, width
        if kept:
            os.replace(unfinished, path)
    finally:
        with suppress(OSError):
            unfinished.unlink()
