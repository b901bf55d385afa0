"""What a file says of itself: the first bytes enter, the format or the EXIF orientation leaves. Nothing is decoded."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from typing import Any

from PIL import Image as pillow

from gpuload.errors import DecodeError

_SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"\x00\x00\x00\x0cjP  \r\n\x87\n", "JPEG2000"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
    (b"qoif", "QOI"),
)
_ORIENTATION = 0x0112
_SHORT = 3  # TIFF's number of u16
_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}  # type → of one
_MAY_TURN = re.compile(rb"exif|EXIF|eXIf|Exif|adobe|XMP ")  # in PNG and WebP; their metadata may follow the pixels
_TAIL = 4096  # bytes of padding that may follow the end of a JPEG file


def sniff(data: Any) -> str | None:
    """Name of the image format that starts like `data` (16 bytes are enough), None for anything else."""
    head = bytes(data[:16])
    for signature, name in _SIGNATURES:
        if head.startswith(signature):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis", b"mif1", b"heic"):
        return "AVIF"
    if head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace() and len(head) > 2:
        return "PNM"
    return None


def jpeg_orientation(view: Any) -> int:
    """EXIF orientation of a JPEG file, 1 to 8; 1 where there is none or the EXIF data is broken.

    Walks the markers up to the start of the scan: about 2 µs for a file without EXIF, 3 µs with it.
    """
    data = memoryview(view)
    for marker, start, stop in _segments(data):
        if marker == 0xE1 and bytes(data[start : start + 6]) == b"Exif\x00\x00":
            return _orientation(bytes(data[start:stop]))
    return 1


def _segments(data: memoryview) -> Iterator[tuple[int, int, int]]:
    """Marker, start and stop of every segment of a JPEG file, up to the header of its first scan."""
    at, end = 2, len(data)
    while at + 4 <= end and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xD9:  # end of image
            return
        if marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD8:  # fill byte, or a marker without a length
            at += 1 if marker == 0xFF else 2
            continue
        stop = at + 2 + (data[at + 2] << 8 | data[at + 3])
        yield marker, at + 4, stop
        if marker == 0xDA:  # start of scan
            return
        at = stop


def _orientation(segment: bytes) -> int:
    """Of an EXIF segment, with the six bytes that begin it."""
    plain = _plain_orientation(segment[6:])
    if plain is not None:
        return plain
    exif = pillow.Exif()
    try:
        exif.load(segment)
        return valid_orientation(exif.get(_ORIENTATION))
    except Exception:  # broken metadata does not make an image unreadable
        return 1


def _plain_orientation(tiff: bytes) -> int | None:
    """What Pillow reads of a TIFF structure in which all is as it should be, eight times as fast; None to ask Pillow.

    TIFF 6.0, section 2: byte order, 42, offset of the directory; there a count and entries of 12 bytes.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 10:
        return None
    (start,) = struct.unpack_from(order + "L", tiff, 4)
    if start + 2 > len(tiff):
        return None
    (count,) = struct.unpack_from(order + "H", tiff, start)
    entries = tiff[start + 2 : start + 2 + 12 * count]
    if len(entries) < 12 * count:
        return None
    elsewhere = 0  # bytes
    for tag, kind, number, value in struct.iter_unpack(order + "HHLL", entries):
        if tag == _ORIENTATION:
            if (kind, number) != (_SHORT, 1):
                return None
            return valid_orientation(value >> 16 if order == ">" else value & 0xFFFF)
        size = number * _BYTES.get(kind, 0)
        elsewhere += size
        if size > 4 and (value + size > len(tiff) or elsewhere > len(tiff)):
            return None
    return 1


def orientation(view: Any, kind: str | None) -> int:
    """Orientation of a file of any `kind` that `sniff` names, 1 to 8, as Pillow's `getexif` gives it.

    A PNG or WebP file without metadata costs a search, a TIFF file 0.1 ms; only a PNG file with EXIF after its pixels
    is decoded for it.
    """
    if kind == "JPEG":
        return jpeg_orientation(view)
    if kind not in ("PNG", "WEBP", "TIFF") or (kind != "TIFF" and not _MAY_TURN.search(view)):
        return 1
    try:
        with pillow.open(io.BytesIO(view)) as image:
            return valid_orientation(image.getexif().get(_ORIENTATION))
    except Exception:  # broken metadata does not make an image unreadable
        return 1


def ends(view: Any) -> bool:
    """Whether a JPEG file ends with its end marker, padding aside.

    GPU decoders fill up what is missing of a cut file with gray, and who stops below a crop never comes to the cut. An
    end marker further up proves nothing: it may be that of the thumbnail in the EXIF data.
    """
    return bytes(view[-2:]) == b"\xff\xd9" or bytes(view[-_TAIL:]).rstrip(b"\x00\t\n\r ").endswith(b"\xff\xd9")


def has_end(view: Any) -> bool:
    """Whether a JPEG file has an end marker behind the start of its scan, whatever follows (a phone's film, say)."""
    scans = (stop for marker, _, stop in _segments(memoryview(view)) if marker == 0xDA)
    return ends(view) or bytes(view).find(b"\xff\xd9", next(scans, len(view))) >= 0


def expect_bytes(view: Any) -> None:
    """Raise `DecodeError` for a null or an empty value."""
    if view is None or not len(view):
        raise DecodeError(f"Expected an encoded image, got {'a null' if view is None else '0 bytes'}")


def expect_size(height: int, width: int, most: int) -> None:
    """Raise `DecodeError` for an image without pixels, or with more than `most`."""
    if height < 1 or width < 1:
        raise DecodeError(f"Expected an image of at least 1x1 pixels, got {height}x{width}")
    if height * width > most:
        raise DecodeError(f"Expected at most {most} pixels (max_pixels), got {height}x{width} = {height * width}")


def valid_orientation(value: Any) -> int:
    return value if isinstance(value, int) and 1 <= value <= 8 else 1
