"""What files say of themselves: `Encoded` enters, `HEADER[N]` leaves; `judge` names those that cannot be decoded.

Nothing is decoded. One native call reads a batch (`kernels/headers.cpp`, without the GIL); where there was no compiler
at installation, its plain Python twin reads the same table. What neither can tell is marked `ask`: Pillow knows.
"""

from __future__ import annotations

import re
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuload import kernels  # type: ignore[attr-defined, unused-ignore]  # mypy cannot follow package-dir
from gpuload.errors import DecodeError
from gpuload.images import GRAY, HEADER, KINDS, OTHER, RGB, YCBCR, Encoded

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


def read(encoded: Encoded) -> NDArray[np.void]:
    """HEADER[N] of N images.

    Nulls and empty values are rows of zeros with orientation 1. `ask` is set where Pillow has to tell: the orientation
    of a JPEG or PNG file whose size is there, or, where height is 0, everything but `kind` and `end`.
    """
    library = kernels.tables_library()
    return read_twin(encoded) if library is None else read_native(library, encoded)


def read_native(library: Any, encoded: Encoded) -> NDArray[np.void]:
    """`read` by a library that `kernels.load_tables` loaded: 0.3 µs an image, other threads run meanwhile."""
    headers = np.empty(len(encoded), HEADER)
    kernels.run_headers(library, encoded.at, encoded.size, headers)
    return headers


def read_twin(encoded: Encoded) -> NDArray[np.void]:
    """`read` in Python: the same table, for every input; 60 µs an image."""
    headers = np.zeros(len(encoded), HEADER)
    headers["orientation"] = 1
    for i in np.flatnonzero((encoded.at != 0) & (encoded.size > 0)).tolist():
        view = memoryview(encoded.view(i))  # type: ignore[arg-type]
        kind = sniff(view)
        found = _jpeg(view) if kind == "JPEG" else _png(view) if kind == "PNG" else {"ask": 1}
        headers["kind"][i] = KINDS.index(kind or "")
        for name, value in found.items():
            headers[name][i] = value
    return headers


def judge(
    encoded: Encoded, headers: NDArray[np.void], max_pixels: int, errors: dict[int, DecodeError]
) -> dict[int, DecodeError]:
    """Add to `errors`, by index, what needs no decoding: nulls, empty values, no pixels, more than `max_pixels`.

    What Pillow still has to tell the size of (height 0 and `ask`) is left alone, and so is who is in `errors` already.
    """
    library = kernels.tables_library()
    if library is not None and not kernels.run_wrong(library, encoded.at, encoded.size, headers, max_pixels):
        return errors
    height, width = headers["height"].astype(np.int64), headers["width"].astype(np.int64)
    nothing = (encoded.at == 0) | (encoded.size < 1)
    flat = ((height < 1) | (width < 1)) & (headers["ask"] == 0)
    for i in np.flatnonzero(nothing | flat | (height * width > max_pixels)).tolist():
        if i in errors:
            continue
        size = f"{height[i]}x{width[i]}"
        if nothing[i]:
            cause = f"Expected an encoded image, got {'0 bytes' if encoded.at[i] else 'a null'}"
        elif flat[i]:
            cause = f"Expected an image of at least 1x1 pixels, got {size}"
        else:
            pixels = height[i] * width[i]
            cause = f"Expected at most {max_pixels} pixels (max_pixels), got {size} = {pixels}"
        errors[i] = DecodeError(cause)
    return errors


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


# The twin: the rules of kernels/headers.cpp, one function for one function. Reasons are written there.

_Found = dict[str, Any]  # members of HEADER
_WITHOUT = 255
_PADDING = 4094
_ASK = -1
_TIFF_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_MARKER = re.compile(rb"\xff([^\xff])", re.DOTALL)
_XMP = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_END = re.compile(rb"\xff\xd9")


def _without_padding(file: memoryview) -> int:
    tail = bytes(file[max(0, len(file) - _PADDING) :])
    return len(file) - len(tail) + len(tail.rstrip(b"\x00\t\n\r "))


def _ends(file: memoryview, start: int) -> bool:
    last = _without_padding(file) - 2
    return last >= start and bytes(file[last : last + 2]) == b"\xff\xd9"


class _Refused(Exception):
    """libjpeg would give the file up."""


def _expect(condition: object) -> None:
    if not condition:
        raise _Refused


def _jpeg(file: memoryview) -> _Found:
    found: _Found = {"process": _WITHOUT}
    try:
        at = _markers(file, found)
    except _Refused:
        return {"process": _WITHOUT, "ask": 1, "end": 2 if _ends(file, 0) else 0}
    ids, exif, xmp = found.pop("ids"), found.pop("exif", None), found.pop("xmp", b"")
    found["colour"] = _colour(found, ids)
    found["channels"] = 1 if found["colour"] == GRAY else 3
    orientation = None if exif is None else _orientation(exif)
    found["ask"] = orientation == _ASK or (orientation is None and _turns(xmp))
    found["orientation"] = 1 if orientation in (None, _ASK) else orientation
    found["end"] = 2 if _ends(file, at) else int(_END.search(file, at) is not None)
    return found


def _markers(file: memoryview, found: _Found) -> int:
    """Up to the first scan; where its data begin."""
    at = 2
    while marked := _next_marker(file, at):
        marker, at = marked
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:
            continue
        _expect(at + 2 <= len(file))
        length = (file[at] << 8 | file[at + 1]) - 2
        stop = at + 2 + max(length, 0)
        _expect(stop <= len(file))
        segment = bytes(file[at + 2 : stop])
        at = stop
        if 0xE0 <= marker <= 0xEF:
            _application(marker & 15, segment, found)
        elif marker not in (0xDC, 0xFE):
            _expect(length >= 0)
            if marker == 0xDA:
                _scan(segment, found)
                return at
            _table(marker, segment, found)
    raise _Refused


def _next_marker(file: memoryview, at: int) -> tuple[int, int] | None:
    if at + 2 <= len(file) and file[at] == 0xFF and 0 < file[at + 1] < 0xFF:  # as it should be
        return file[at + 1], at + 2
    while match := _MARKER.search(file, at):
        at = match.end()
        if match[1] != b"\0":
            return match[1][0], at
    return None


def _table(marker: int, segment: bytes, found: _Found) -> None:
    if marker == 0xC4:
        _huffman(segment, found)
    elif marker == 0xCC:
        _conditioning(segment)
    elif marker == 0xDB:
        _quantisation(segment, found)
    elif marker == 0xDD:
        _expect(len(segment) == 2)
        found["restart"] = int.from_bytes(segment, "big")
    else:
        _expect(0xC0 <= marker <= 0xCF and marker != 0xC8)
        _frame(marker & 15, segment, found)


def _frame(process: int, segment: bytes, found: _Found) -> None:
    _expect(found["process"] == _WITHOUT and len(segment) >= 6 and len(segment) == 6 + 3 * segment[5])
    precision, height, width, components = struct.unpack_from(">BHHB", segment)
    _expect(height and width and 1 <= components <= 10)
    parts = list(struct.iter_unpack("3B", segment[6:]))
    _expect(all(1 <= n <= 4 for _, both, _ in parts for n in (both >> 4, both & 15)))
    rows = [(id_, both >> 4, both & 15, table) for id_, both, table in parts[:4]]
    rows += [(0, 0, 0, 0)] * (4 - len(rows))
    found.update(zip(("id", "h", "v", "table"), zip(*rows, strict=True), strict=True))
    found.update(process=process, precision=precision, height=height, width=width, components=components)
    found["ids"] = [id_ for id_, _, _ in parts]


def _scan(segment: bytes, found: _Found) -> None:
    _expect(found["process"] != _WITHOUT and segment)
    n, ids = segment[0], found["ids"][:4]
    _expect(1 <= n <= 4 and len(segment) == 4 + 2 * n)
    chosen: list[int] = []
    for wanted in segment[1 : 1 + 2 * n : 2]:
        fitting = [c for c, id_ in enumerate(ids) if id_ == wanted and c >= len(chosen)]
        _expect(fitting and fitting[0] not in chosen)
        chosen.append(fitting[0])
    found["scan"] = n


def _huffman(segment: bytes, found: _Found) -> None:
    while len(segment) > 16:
        count, index = sum(segment[1:17]), segment[0] & ~0x10
        _expect(count <= 256 and 17 + count <= len(segment) and index <= 3)
        name = "ac" if segment[0] & 0x10 else "dc"
        found[name] = found.get(name, 0) | 1 << index
        segment = segment[17 + count :]
    _expect(not segment)


def _quantisation(segment: bytes, found: _Found) -> None:
    at = 0
    while at < len(segment):
        index = segment[at] & 15
        _expect(index <= 3)
        found["quantisation"] = found.get("quantisation", 0) | 1 << index
        at += 129 if segment[at] >> 4 else 65
    _expect(at == len(segment))


def _conditioning(segment: bytes) -> None:
    _expect(len(segment) % 2 == 0)
    for index, value in zip(segment[::2], segment[1::2], strict=True):
        _expect(index <= 31 and (index >= 16 or value & 15 <= value >> 4))


def _application(number: int, segment: bytes, found: _Found) -> None:
    if number == 0 and len(segment) >= 14 and segment.startswith(b"JFIF\0"):
        found["jfif"] = 1
    elif number == 14 and len(segment) >= 12 and segment.startswith(b"Adobe"):
        found["adobe"] = min(segment[11], 254) + 1
    elif number == 1 and segment.startswith(b"Exif\0\0"):
        found.setdefault("exif", segment[6:])
    elif number == 1 and segment.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
        found["xmp"] = segment[29:]


def _colour(found: _Found, ids: list[int]) -> int:
    if len(ids) != 3:
        return GRAY if len(ids) == 1 else OTHER
    if "jfif" in found:
        return YCBCR
    if "adobe" in found:
        return RGB if found["adobe"] == 1 else YCBCR
    return RGB if bytes(ids) == b"RGB" or found["process"] in (3, 11) else YCBCR


def _orientation(tiff: bytes) -> int | None:
    """1 to 8, None without the tag, _ASK for what is not plain."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 10:
        return _ASK
    (start,) = struct.unpack_from(order + "L", tiff, 4)
    if start + 2 > len(tiff):
        return _ASK
    (count,) = struct.unpack_from(order + "H", tiff, start)
    entries = tiff[start + 2 : start + 2 + 12 * count]
    if len(entries) < 12 * count:
        return _ASK
    found, elsewhere = None, 0
    for tag, kind, number, value in struct.iter_unpack(order + "HHLL", entries):
        if tag == 0x0112:
            given = value >> 16 if order == ">" else value & 0xFFFF
            valid = given if 1 <= given <= 8 else 1
            if (kind, number) != (3, 1) or found not in (None, valid):
                return _ASK
            found = valid
        elif found is None:
            size = number * _TIFF_BYTES.get(kind, 0)
            elsewhere += size
            if size > 4 and (value + size > len(tiff) or elsewhere > len(tiff)):
                return _ASK
    return found


def _turns(xmp: bytes) -> bool:
    match = _XMP.search(xmp)
    return match is not None and match[1] in b"2345678"


def _png(file: memoryview) -> _Found:
    frame: _Found | None = None
    found: _Found = {"ask": 0}
    at = 8
    while at + 12 <= len(file):
        length, name = int.from_bytes(file[at : at + 4], "big"), bytes(file[at + 4 : at + 8])
        if length > len(file) - 12 - at or not re.fullmatch(rb"\w{4}", name):
            break
        content = file[at + 8 : at + 8 + length]
        if name == b"IHDR":
            frame = _png_frame(content) if at == 8 else None
        if _may_turn(name, content):
            found["ask"] = 1
        at += 12 + length
        if name == b"IEND":
            found["end"] = 2 if _without_padding(file) <= at else 1
            break
    return {**found, "ask": 1} if frame is None else {**found, **frame}


def _png_frame(content: memoryview) -> _Found | None:
    if len(content) < 13:
        return None
    width, height, depth, kind = struct.unpack_from(">LLBB", content)
    if depth not in _PNG_DEPTHS.get(kind, ()) or not (0 < width < 2**31 and 0 < height < 2**31):
        return None
    gray = kind == 0 or (kind == 4 and depth == 8)
    return {"height": height, "width": width, "precision": depth, "channels": 1 if gray else 3}


def _may_turn(name: bytes, content: memoryview) -> bool:
    if name in (b"tEXt", b"zTXt", b"iTXt"):
        keyword = bytes(content).split(b"\0", 1)[0]
        return b"exif" in keyword or b"xmp" in keyword
    return name == b"eXIf"
