"""What the tests are made of: pictures, their files in many formats, captions, and Pillow's opinion of them."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from numpy.typing import NDArray

from gpuload import DecodeError, Encoded
from gpuload.images import headers, pillow

_WORDS = ["a", "photo", "of", "the", "red", "fox", "under", "tall", "grass,", "très", "élégant", "山", "und", "Fluß"]


def picture(height: int, width: int, seed: int = 0, mode: str = "RGB") -> PIL.Image.Image:
    """A picture with slopes, some texture and no symmetry."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (4, 5, 4), dtype=np.uint8)
    smooth = PIL.Image.fromarray(coarse).resize((width, height), PIL.Image.Resampling.BICUBIC)
    grain = generator.integers(-12, 13, (height, width, 4))
    pixels = np.clip(np.asarray(smooth).astype(np.int64) + grain, 0, 255).astype(np.uint8)
    found = PIL.Image.fromarray(pixels)  # RGBA
    return found if mode == "RGBA" else found.convert("RGB").convert(mode)


def encode(image: PIL.Image.Image, kind: str, orientation: int = 1, **options: Any) -> bytes:
    """The file, with an EXIF orientation if it is not 1."""
    if orientation != 1:
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(height: int = 24, width: int = 32, seed: int = 0, **options: Any) -> bytes:
    return encode(picture(height, width, seed), "JPEG", **options)


def png(height: int, width: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG file put together by hand, for the kinds that Pillow reads but does not write.

    `colour` is 0 gray, 2 RGB, 4 gray with alpha, 6 RGBA; `rows` holds the samples, big-endian, without filter bytes.
    """
    pitch = len(rows) // height if height else 0
    filtered = b"".join(b"\0" + rows[i * pitch : (i + 1) * pitch] for i in range(height)) if rows else b""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(filtered)), (b"IEND", b""))
    chunks = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def claiming(data: bytes, height: int, width: int) -> bytes:
    """The same baseline JPEG file, its header saying another size."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def without_codes(file: bytes, dropped: set[int]) -> bytes:
    """The file without these Huffman tables: 0 to 3 for DC, 16 to 19 for AC."""
    kept, at = file[:2], 2
    while file[at + 1] != 0xDA:
        end = at + 2 + (file[at + 2] << 8 | file[at + 3])
        if file[at + 1] != 0xC4:
            kept, at = kept + file[at:end], end
            continue
        at += 4
        while at < end:
            size = 17 + sum(file[at + 1 : at + 17])
            if file[at] not in dropped:
                kept += b"\xff\xc4" + (size + 2).to_bytes(2, "big") + file[at : at + size]
            at += size
    return kept + file[at:]


def without(file: bytes, marker: int) -> bytes:
    """A JPEG file without the segments of one kind before its scan."""
    kept, at = file[:2], 2
    while True:
        end = at + 2 + (file[at + 2] << 8 | file[at + 3])
        if file[at + 1] == 0xDA:
            return kept + file[at:]
        kept += b"" if file[at + 1] == marker else file[at:end]
        at = end


def by_pillow(data: bytes, mode: str = "RGB", orient: bool = True) -> NDArray[np.uint8]:
    """u8[C, H, W]: what Pillow makes of a file."""
    with warnings.catch_warnings(), PIL.Image.open(io.BytesIO(data)) as image:
        warnings.simplefilter("ignore")  # "Palette images with Transparency expressed in bytes should be ..."
        turned = PIL.ImageOps.exif_transpose(image) if orient else image
        pixels = np.asarray(turned.convert(mode))
    return np.ascontiguousarray(np.atleast_3d(pixels).transpose(2, 0, 1))


def judged(
    files: list[bytes | None], orient: bool = True, max_pixels: int = 1_000_000
) -> tuple[Encoded, Any, dict[int, DecodeError]]:
    """What a decoder gets of files, None for a null: Encoded, HEADER[N]; and the errors that headers gave away."""
    encoded = Encoded.of(files)
    table = headers.read(encoded)
    errors = headers.judge(encoded, table, max_pixels, {})
    pillow.open_rest(encoded, table, max_pixels, errors)
    table["height"][list(errors)] = 0
    if not orient:
        table["orientation"] = 1
    return encoded, table, errors


def captions(count: int, longest: int = 12) -> list[str]:
    """Captions of 1 to `longest` words, no two alike."""
    generator = np.random.default_rng(count)
    return [f"{i} " + " ".join(generator.choice(_WORDS, generator.integers(0, longest))) for i in range(count)]


def by_row(batches: Any, column: str) -> dict[int, Any]:
    """Row position → its value of `column`, of the rows that count."""
    found: dict[int, Any] = {}
    for batch in batches:
        for row, ok, value in zip(batch.rows.tolist(), batch.valid.tolist(), batch[column], strict=True):
            if ok:
                assert row not in found, f"row {row} came twice"
                found[row] = value.cpu() if isinstance(value, torch.Tensor) else value
    return found


def stop_workers(running: Any) -> None:
    """End the workers of a DataLoader's iterator at once.

    One that is sending a tensor may abort: before Python 3.14 a thread that asks for the GIL while the process ends is
    unwound, here through torch's C++. torch reports that as an error of the worker.
    """
    try:
        running._shutdown_workers()
    except RuntimeError as error:
        if "Aborted" not in str(error):
            raise
