"""What files say of themselves: the native reader, its Python twin, libjpeg and Pillow agree, whatever the bytes."""

from __future__ import annotations

import ctypes
import io
import mmap
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import simplejpeg
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from making import by_pillow, encode, picture, png
from PIL.PngImagePlugin import PngInfo

from gpuload import kernels
from gpuload.errors import DecodeError
from gpuload.images import GRAY, HEADER, KINDS, OTHER, RGB, YCBCR, Encoded
from gpuload.images.headers import judge, read, read_native, read_twin, sniff

PICTURE = picture(24, 32)
SIX = struct.pack("<HHLHH", 0x0112, 3, 1, 6, 0)  # the entry of a directory that says orientation 6
XMP = b"http://ns.adobe.com/xap/1.0/\0"
EOI = b"\xff\xd9"


# --- files, whole and by the segment ---


def segment(marker: int, content: bytes = b"") -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def frame(
    *parts: tuple[int, int, int, int], process: int = 0, size: tuple[int, int] = (24, 32), bits: int = 8
) -> bytes:
    """SOFn of components (id, h, v, quantisation table)."""
    content = struct.pack(">BHHB", bits, *size, len(parts))
    return segment(0xC0 + process, content + b"".join(bytes([i, h << 4 | v, table]) for i, h, v, table in parts))


def scan(*ids: int) -> bytes:
    return segment(0xDA, bytes([len(ids)]) + b"".join(bytes([i, 0x11]) for i in ids) + b"\0\x3f\0")


def exif(*entries: bytes, order: str = "<") -> bytes:
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "LH", 8, len(entries))
    return segment(0xE1, b"Exif\0\0" + head + b"".join(entries) + bytes(4))


def jpeg(*parts: bytes, data: bytes = b"\x12\x34" + EOI) -> bytes:
    return b"\xff\xd8" + b"".join(parts) + data


DQT = segment(0xDB, bytes([0]) + bytes(range(1, 65)))
DHT = segment(0xC4, bytes([0]) + bytes([1] + [0] * 15) + b"\0" + bytes([0x10]) + bytes([1] + [0] * 15) + b"\0")
JFIF = segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0")
GRAY_FRAME, COLOUR_FRAME = frame((1, 1, 1, 0)), frame((1, 2, 2, 0), (2, 1, 1, 1), (3, 1, 1, 1))
PLAIN = jpeg(JFIF, DQT, COLOUR_FRAME, DHT, scan(1, 2, 3))


def adobe(transform: int) -> bytes:
    return segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([transform]))


def film() -> bytes:
    """Two images in one file, as phones write them."""
    file = io.BytesIO()
    PICTURE.save(file, "MPO", save_all=True, append_images=[PICTURE])
    return file.getvalue()


def xmp(orientation: int) -> bytes:
    text = f'<rdf:Description tiff:Orientation="{orientation}"/>'.encode()
    return segment(0xE1, XMP + text)


def real_files() -> list[bytes]:
    options: list[dict[str, Any]] = [
        {"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True}, {"keep_rgb": True},
        {"optimize": True, "restart_marker_blocks": 2}, {"orientation": 6}, {"orientation": 8, "progressive": True},
    ]  # fmt: skip
    files = [encode(PICTURE, "JPEG", **given) for given in options]
    files += [encode(PICTURE.convert(mode), "JPEG") for mode in ("L", "CMYK")]
    files += [film(), jpeg(xmp(6), DQT, COLOUR_FRAME, DHT, scan(1, 2, 3)), encode(PICTURE, "PNG", 6)]
    files += [encode(PICTURE.convert(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")]
    text = PngInfo()
    text.add_text("Comment", "exif")
    text.add_text("Raw profile type exif", "\n\n\n00", zip=True)
    files.append(encode(PICTURE, "PNG", pnginfo=text))
    return files + [encode(PICTURE, kind) for kind in ("GIF", "BMP", "TIFF", "WEBP", "AVIF", "PPM")]


FILES = real_files()


# --- both readers ---


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, built from the source as it is now."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    assert compiler, "Expected a C++ compiler to test kernels/headers.cpp with, got none. Do: apt install g++"
    target = tmp_path_factory.mktemp("headers") / "headers.so"
    sources = [str(Path(kernels.__file__).parent / name) for name in ("headers.cpp", "order.cpp", "views.cpp")]
    command = [compiler, *kernels.flags.CXX, "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-o", str(target)]
    built = subprocess.run([*command, *sources], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return target


@pytest.fixture(scope="session")
def library(path: Path) -> ctypes.CDLL:
    return kernels.load_tables(path)


@pytest.fixture(scope="session", params=["native", "twin"])
def headers_of(request: pytest.FixtureRequest, library: ctypes.CDLL) -> Any:
    """Files → HEADER[N], by the one reader and by the other."""
    if request.param == "twin":
        return lambda *files: read_twin(Encoded.of(files))
    return lambda *files: read_native(library, Encoded.of(files))


def test_the_table_has_the_members_of_the_struct() -> None:
    assert HEADER.itemsize == 44
    assert HEADER.names is not None
    source = (Path(kernels.__file__).parent / "headers.cpp").read_text()
    declared = re.sub("//.*", "", source.split("struct Header {")[1].split("};")[0])
    names = re.findall(r"(\w+)(?:\[4\])?[,;]", declared)
    assert names == list(HEADER.names)


def test_nulls_and_empty_values_are_zeros(headers_of: Any) -> None:
    headers = headers_of(None, b"", PLAIN)
    nothing = np.zeros(1, HEADER)
    nothing["orientation"] = 1
    assert headers[0] == nothing[0]
    assert headers[1] == nothing[0]
    assert headers["height"].tolist() == [0, 0, 24]
    assert len(headers_of()) == 0


SIGNATURES = {
    "JPEG": [b"\xff\xd8\xff"], "PNG": [b"\x89PNG\r\n\x1a\n"], "GIF": [b"GIF87a", b"GIF89a"], "BMP": [b"BM"],
    "TIFF": [b"II*\0", b"MM\0*"], "JPEG2000": [b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"], "QOI": [b"qoif"],
    "WEBP": [b"RIFF1234WEBP"], "AVIF": [b"1234ftyp" + brand for brand in (b"avif", b"avis", b"mif1", b"heic")],
    "PNM": [b"P1\n", b"P2 ", b"P3\t", b"P4\r", b"P5\x0b", b"P6\x0c"],
    "": [b"", b"\xff\xd8", b"\x89PNG", b"GIF", b"B", b"RIFF1234WAVE", b"1234ftypmp42", b"P5", b"P7\n", b"P5a", b"P0 "],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [b"", bytes(40)], ids=["short", "long"])
def test_kinds_are_told_by_their_first_bytes(headers_of: Any, kind: str, more: bytes) -> None:
    files = [start + more for start in SIGNATURES[kind]]
    headers = headers_of(*files)
    assert [KINDS[k] for k in headers["kind"]] == [kind] * len(files) == [sniff(file) or "" for file in files]
    assert not headers["height"].any()
    assert (headers["orientation"] == 1).all()
    assert (headers["ask"] == [bool(file) for file in files]).all()


# --- JPEG ---


@pytest.mark.parametrize("luma", [(1, 1), (2, 1), (2, 2), (1, 2), (4, 1), (1, 4), (4, 2), (2, 4), (4, 4)])
def test_components_are_as_the_frame_says(headers_of: Any, luma: tuple[int, int]) -> None:
    wide, tall = luma
    parts = frame((1, wide, tall, 0), (7, 1, 1, 1), (9, 1, 1, 2), size=(300, 70))
    (h,) = headers_of(jpeg(DQT, parts, DHT, scan(1, 7, 9)))
    assert (h["height"], h["width"], h["components"], h["scan"], h["precision"]) == (300, 70, 3, 3, 8)
    assert (h["id"].tolist(), h["table"].tolist()) == ([1, 7, 9, 0], [0, 1, 2, 0])
    assert (h["h"].tolist(), h["v"].tolist()) == ([wide, 1, 1, 0], [tall, 1, 1, 0])
    assert (h["ask"], h["end"], h["orientation"], h["channels"], h["colour"]) == (0, 2, 1, 3, YCBCR)


@pytest.mark.parametrize(
    ("bits", "process"), [(8, 0), (8, 1), (12, 1), (8, 2), (12, 2), (16, 3), (8, 5), (8, 9), (8, 10), (8, 11), (8, 15)]
)
def test_the_process_is_the_number_of_the_frames_marker(headers_of: Any, bits: int, process: int) -> None:
    (h,) = headers_of(jpeg(DQT, frame((1, 1, 1, 0), process=process, bits=bits), DHT, scan(1)))
    assert (h["process"], h["precision"], h["height"], h["colour"], h["channels"]) == (process, bits, 24, GRAY, 1)


def test_the_first_scan_alone_is_counted(headers_of: Any) -> None:
    (h,) = headers_of(jpeg(DQT, COLOUR_FRAME, DHT, scan(2), data=b"\1\2" + scan(1, 3) + b"\1" + EOI))
    assert (h["components"], h["scan"]) == (3, 1)


def test_tables_are_those_defined_before_the_first_scan(headers_of: Any) -> None:
    table = bytes([1] + [0] * 15) + b"\0"
    two = segment(0xC4, b"\2" + table + b"\x13" + table)
    wide = segment(0xDB, b"\x11" + bytes(128) + b"\3" + bytes(64))
    later = segment(0xC4, b"\1" + table) + segment(0xDB, b"\2" + bytes(64)) + segment(0xDD, b"\0\1")
    frames = (GRAY_FRAME, two, wide, segment(0xDD, b"\1\2"), scan(1))
    headers = headers_of(jpeg(*frames, data=later + EOI), jpeg(GRAY_FRAME, scan(1)), PLAIN)
    assert headers["dc"].tolist() == [0b100, 0, 1]
    assert headers["ac"].tolist() == [0b1000, 0, 1]
    assert headers["quantisation"].tolist() == [0b1010, 0, 1]
    assert headers["restart"].tolist() == [0x102, 0, 0]


THREE, NAMED, ODD = (1, 2, 3), tuple(b"RGB"), (0, 1, 2)


@pytest.mark.parametrize(
    ("marks", "ids", "process", "colour"),
    [
        ((JFIF,), NAMED, 0, YCBCR),
        ((JFIF, adobe(0)), THREE, 0, YCBCR),
        ((adobe(0),), THREE, 0, RGB),
        ((adobe(1),), NAMED, 0, YCBCR),
        ((adobe(2),), THREE, 0, YCBCR),
        ((adobe(1), adobe(0)), THREE, 0, RGB),
        ((), THREE, 0, YCBCR),
        ((), NAMED, 0, RGB),
        ((), ODD, 0, YCBCR),
        ((), THREE, 3, RGB),
        ((segment(0xE0, b"JFIF\0\1\1"), segment(0xEE, b"Adobe\0\0\0")), NAMED, 0, RGB),  # both too short to count
        ((JFIF,), (1,), 0, GRAY),
        ((adobe(0),), (1, 2, 3, 4), 0, OTHER),
        ((adobe(2),), (1, 2, 3, 4), 0, OTHER),
        ((), (1, 2), 0, OTHER),
    ],
)
def test_colours_are_libjpegs_choice(headers_of: Any, marks: Any, ids: Any, process: int, colour: int) -> None:
    parts = frame(*[(i, 1, 1, 0) for i in ids], process=process)
    (h,) = headers_of(jpeg(*marks, DQT, parts, DHT, scan(*ids)))
    assert (h["colour"], h["channels"]) == (colour, 1 if colour == GRAY else 3)
    assert h["jfif"] == (JFIF in marks)
    assert h["adobe"] == (marks[-1][-1] + 1 if marks and marks[-1][4:9] == b"Adobe" and len(marks[-1]) == 16 else 0)
    assert libjpegs(jpeg(*marks, DQT, parts, DHT, scan(*ids))) in (None, (24, 32, colour))


def libjpegs(file: bytes) -> tuple[int, int, int] | None:
    """Height, width and colour by libjpeg, None for what it refuses, warns of, or TurboJPEG does not know."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(file)
    except ValueError:
        return None
    return height, width, {"Gray": GRAY, "YCbCr": YCBCR, "RGB": RGB}.get(space, OTHER)


PASSED_OVER = {
    "fill bytes": b"\xff\xff\xff", "garbage": b"\0\1garbage\xff\0more", "temporary": b"\xff\x01",
    "restart": b"\xff\xd3", "comment": segment(0xFE, b"\xff\xc0"), "lines": segment(0xDC, b"\0\1"),
    "no content": b"\xff\xe5\0\0" + b"\xff\xfe\0\1", "conditioning": segment(0xCC, b"\0\x10\x1f\xff"),
    "application": segment(0xEF, b"x" * 300),
}  # fmt: skip
REFUSED = {
    "second frame": COLOUR_FRAME, "second start": b"\xff\xd8", "end": EOI, "reserved": segment(2), "JPG": segment(0xC8),
    "no content": b"\xff\xdb\0\0", "short table": segment(0xDB, bytes(64)), "long table": segment(0xDB, bytes(66)),
    "fifth table": segment(0xDB, b"\4" + bytes(64)), "fifth code": segment(0xC4, b"\4" + bytes(16)),
    "many codes": segment(0xC4, b"\0\xff\2" + bytes(14) + bytes(257)),
    "lost codes": segment(0xC4, b"\0\5" + bytes(15)), "rest of codes": segment(0xC4, b"\0" + bytes(16) + b"\0"),
    "interval": segment(0xDD, b"\0"), "conditioning": segment(0xCC, b"\0\1"), "half": segment(0xCC, b"\0"),
    "beyond": b"\xff\xe0\xff\xff", "hierarchical": segment(0xDE),
}  # fmt: skip
REAL = encode(PICTURE, "JPEG", quality=50)
BEFORE_SCAN = REAL.index(b"\xff\xda")


@pytest.mark.parametrize("name", PASSED_OVER)
def test_what_libjpeg_passes_over_changes_nothing(headers_of: Any, name: str) -> None:
    file = REAL[:BEFORE_SCAN] + PASSED_OVER[name] + REAL[BEFORE_SCAN:]
    decode = simplejpeg.decode_jpeg if name == "temporary" else by_pillow  # which refuses to open that one
    np.testing.assert_array_equal(decode(file), decode(REAL))
    plain, other, first = headers_of(REAL, file, b"\xff\xd8" + PASSED_OVER[name] + REAL[2:])
    assert other == plain
    if name == "garbage":  # then it has no signature
        assert first["kind"] == 0
    else:
        assert first == plain


@pytest.mark.parametrize("name", REFUSED)
def test_where_libjpeg_gives_up_pillow_is_asked(headers_of: Any, name: str) -> None:
    file = REAL[:BEFORE_SCAN] + REFUSED[name] + REAL[BEFORE_SCAN:]
    with pytest.raises((OSError, SyntaxError)), PIL.Image.open(io.BytesIO(file)) as image:
        image.load()
    expect_refused(headers_of(file))


@pytest.mark.parametrize(
    "parts",
    [
        (frame((1, 1, 1, 0), size=(0, 32)), scan(1)),  # its height would follow the scan
        (frame((1, 1, 1, 0), size=(24, 0)), scan(1)),
        (frame(), scan(1)),
        (frame((1, 0, 1, 0)), scan(1)),
        (frame((1, 1, 5, 0)), scan(1)),
        (frame(*[(1, 1, 1, 0)] * 11), scan(1)),
        (segment(0xC0, COLOUR_FRAME[4:-1]), scan(1)),
        (scan(1), GRAY_FRAME),
        (GRAY_FRAME, scan(2)),
        (COLOUR_FRAME, scan(1, 1)),
        (COLOUR_FRAME, scan(2, 1, 3)),  # libjpeg looks ids up in a way that wants them in order
        (COLOUR_FRAME, scan()),
        (frame(*[(i, 1, 1, 0) for i in range(5)]), scan(0, 1, 2, 3, 4)),
        (GRAY_FRAME, scan(1)[:-1]),
        (GRAY_FRAME, DHT),
        (),
    ],
)
def test_a_frame_or_scan_that_cannot_be_is_left_to_pillow(headers_of: Any, parts: Any) -> None:
    expect_refused(headers_of(jpeg(DQT, *parts, data=b"")))


def expect_refused(headers: Any, end: int | None = None) -> None:
    expected = np.zeros(1, HEADER)
    expected["kind"], expected["orientation"], expected["process"], expected["ask"] = 1, 1, 255, 1
    expected["end"] = headers["end"] if end is None else end
    assert headers[0] == expected[0]


@pytest.mark.parametrize(
    ("after", "end"),
    [
        (EOI, 2), (EOI + bytes(4094), 2), (EOI + bytes(4095), 1), (EOI + b"\r\n\t ", 2), (EOI + b"film", 1), (b"", 0),
        (EOI + b"film" + EOI, 2), (b"\xff", 0), (bytes(9000), 0), (b"film" * 3000, 0), (b"\xff\xff\xd9film", 1),
    ],
)  # fmt: skip
def test_the_end_marker_is_the_files_not_that_of_its_thumbnail(headers_of: Any, after: bytes, end: int) -> None:
    thumbnail = segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + encode(PICTURE, "JPEG"))
    (h,) = headers_of(jpeg(thumbnail, DQT, GRAY_FRAME, DHT, scan(1), data=b"\1\2\3" + after))
    assert (h["end"], h["height"]) == (end, 24)


@pytest.mark.parametrize(("after", "end"), [(b"", 0), (EOI, 2), (EOI + b"\n", 2), (EOI + b"film", 0)])
def test_the_end_of_a_broken_file_is_its_last_bytes(headers_of: Any, after: bytes, end: int) -> None:
    expect_refused(headers_of(b"\xff\xd8\xff\xe0" + b"\2\0" + b"broken" + after), end)


def test_a_film_of_two_images_is_its_first(headers_of: Any) -> None:
    (h,) = headers_of(film())
    assert (h["height"], h["width"], h["end"], h["ask"], h["kind"]) == (24, 32, 2, 0, 1)


# --- orientation ---


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("value", range(12))
def test_the_orientation_is_that_of_the_exif_data(headers_of: Any, order: str, value: int) -> None:
    maker = struct.pack(order + "HHLL", 0x010F, 2, 4, 0)
    entry = struct.pack(order + "HHLHH", 0x0112, 3, 1, value, 0)
    (h,) = headers_of(jpeg(exif(maker, entry, order=order), DQT, GRAY_FRAME, DHT, scan(1)))
    assert (h["orientation"], h["ask"]) == (value if 1 <= value <= 8 else 1, 0)


LONG = struct.pack("<HHLL", 0x0112, 4, 1, 6)
TWO = struct.pack("<HHLHH", 0x0112, 3, 2, 6, 0)
LOST = struct.pack("<HHLL", 0x010F, 2, 5, 0xFFFF)


@pytest.mark.parametrize(
    "parts",
    [
        (exif(LONG),),
        (exif(TWO),),
        (exif(SIX, SIX[:8] + b"\3\0\0\0"),),
        (exif(LOST, SIX),),
        (exif()[:-6],),
        (segment(0xE1, b"Exif\0\0"),),
        (segment(0xE1, b"Exif\0\0Exif\0\0II*\0\x08\0\0\0\1\0" + SIX + bytes(4)),),
        (segment(0xE1, b"Exif\0\0II+\0" + bytes(40)),),
        (segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff\0\0"),),
        (xmp(6),),
        (exif(), xmp(6)),
        (segment(0xE1, XMP + b'tiff:Orientation= tiff:Orientation>3 tiff:Orientation="1'),),
    ],
)
def test_what_is_unusual_is_left_to_pillow(headers_of: Any, parts: Any) -> None:
    fixed = [part[:2] + struct.pack(">H", len(part) - 2) + part[4:] for part in parts]
    (h,) = headers_of(jpeg(*fixed, DQT, GRAY_FRAME, DHT, scan(1)))
    assert (h["orientation"], h["ask"], h["height"]) == (1, 1, 24)


@pytest.mark.parametrize(
    ("parts", "orientation"),
    [
        ((exif(SIX, LOST),), 6),
        ((exif(SIX), exif()), 6),  # the second goes on where the first ends
        ((exif(), exif(SIX)), 1),
        ((exif(SIX, SIX), exif()), 6),
        ((exif(SIX), xmp(3)), 6),
        ((xmp(1),), 1),
        ((xmp(9),), 1),
        ((xmp(3), xmp(6)[:-5]), 1),  # the last counts, and it breaks off
        ((segment(0xE1, XMP + b"tiff:Orientation"), exif()), 1),
        ((segment(0xE1, XMP + b'tiff:Orientation="1tiff:Orientation>6'),), 1),
        ((), 1),
    ],
)
def test_what_is_plain_is_read_and_pillow_agrees(headers_of: Any, parts: Any, orientation: int) -> None:
    fixed = [part[:2] + struct.pack(">H", len(part) - 2) + part[4:] for part in parts]
    file = jpeg(*fixed, DQT, GRAY_FRAME, DHT, scan(1))
    (h,) = headers_of(file)
    assert (h["orientation"], h["ask"]) == (orientation, 0)
    assert pillows(file) == (24, 32, orientation)


def pillows(file: bytes) -> tuple[int, int, int] | None:
    """Height, width and EXIF orientation by Pillow, None for a file that it refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with PIL.Image.open(io.BytesIO(file)) as image:
                size = image.height, image.width
                try:
                    found = image.getexif().get(0x0112)
                except Exception:  # broken metadata does not make an image unreadable
                    found = 1
        except Exception:  # plugins raise nearly anything
            return None
    return *size, found if isinstance(found, int) and 1 <= found <= 8 else 1


# --- PNG ---


def chunk(name: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">L", len(content)) + name + content + bytes(4)


PNG = encode(PICTURE.convert("L"), "PNG")
HEAD, TAIL = PNG[:33], PNG[33:]


@pytest.mark.parametrize(("depth", "colour"), [(d, c) for d in (1, 2, 4, 8, 16, 3) for c in range(7)])
def test_a_png_file_says_size_depth_and_channels(headers_of: Any, depth: int, colour: int) -> None:
    per_pixel = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 1)
    file = png(3, 8, depth, colour, bytes(3 * depth * per_pixel))
    (h,) = headers_of(file)
    if h["ask"]:
        assert depth == 3 or colour in (1, 5) or (depth < 8 and colour in (2, 4, 6)) or (depth, colour) == (16, 3)
        assert (h["height"], h["width"], h["channels"], h["precision"], h["end"]) == (0, 0, 0, 0, 2)
        return
    assert (h["height"], h["width"], h["precision"], h["end"], h["kind"]) == (3, 8, depth, 2, 2)
    with PIL.Image.open(io.BytesIO(file)) as image:
        assert h["channels"] == (1 if image.mode in ("1", "L", "LA", "I;16") else 3)


@pytest.mark.parametrize(
    ("file", "ask", "end"),
    [
        (PNG, 0, 2),
        (PNG + b"\0\n", 0, 2),
        (PNG + b"more", 0, 1),
        (PNG[:-1], 0, 0),
        (PNG[:-12], 0, 0),
        (HEAD, 0, 0),
        (HEAD + chunk(b"eXIf") + TAIL, 1, 2),
        (PNG[:-12] + chunk(b"eXIf") + PNG[-12:], 1, 2),
        (PNG + chunk(b"eXIf"), 0, 1),  # which nobody reads
        (HEAD + chunk(b"tEXt", b"Raw profile type exif\0x") + TAIL, 1, 2),
        (HEAD + chunk(b"zTXt", b"exif") + TAIL, 1, 2),
        (HEAD + chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0x") + TAIL, 1, 2),
        (HEAD + chunk(b"tEXt", b"Comment\0exif") + TAIL, 0, 2),
        (HEAD + chunk(b"prVt", b"exif") + TAIL, 0, 2),
        (HEAD + chunk(b"te-t", b"exif") + TAIL, 0, 0),
        (HEAD + struct.pack(">L", 2**32 - 1) + b"tEXt" + TAIL, 0, 0),
    ],
)
def test_the_chunks_of_a_png_file_are_walked_to_its_end(headers_of: Any, file: bytes, ask: int, end: int) -> None:
    (h,) = headers_of(file)
    assert (h["height"], h["width"], h["ask"], h["end"], h["orientation"]) == (24, 32, ask, end, 1)


@pytest.mark.parametrize(
    "file",
    [
        PNG[:8],
        PNG[:32],
        PNG[:8] + chunk(b"CgBI", bytes(4)) + PNG[8:],
        HEAD + HEAD[8:] + TAIL,
        PNG[:8] + chunk(b"IHDR", HEAD[16:28]) + TAIL,
        PNG[:16] + b"\x80\0\0\0" + PNG[20:],
        PNG[:16] + bytes(4) + PNG[20:],
        PNG[:20] + bytes(4) + PNG[24:],
    ],
)
def test_a_png_file_without_a_head_is_left_to_pillow(headers_of: Any, file: bytes) -> None:
    (h,) = headers_of(file)
    assert (h["kind"], h["height"], h["width"], h["channels"], h["precision"], h["ask"]) == (2, 0, 0, 0, 0, 1)


# --- whatever the bytes ---

MARKERS = [0, 1, 2, 3, 8, 17, 0x41, 0xC0, 0xC2, 0xC4, 0xCC, 0xD0, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD, 0xE0, 0xE1, 0xEE, 0xFF]


def pieces(file: bytes) -> list[bytes]:
    """The segments of a JPEG file, the start marker before and all after the first scan's head in one behind."""
    at, found = 2, [file[:2]]
    while file[at + 1] != 0xDA:
        stop = at + 2 + int.from_bytes(file[at + 2 : at + 4], "big")
        found.append(file[at:stop])
        at = stop
    return [*found, file[at:]]


JPEGS = [file for file in FILES if file.startswith(b"\xff\xd8")]
SEGMENTS = [piece for file in JPEGS for piece in pieces(file)[1:-1]]
SEGMENTS += [
    *PASSED_OVER.values(),
    *REFUSED.values(),
    adobe(0),
    adobe(1),
    adobe(255),
    xmp(6),
    exif(LONG),
    exif(LOST, SIX),
]


@st.composite
def broken(draw: st.DrawFn) -> bytes:
    """A real file, some of it moved, exchanged, doubled, cut off or lengthened."""
    if draw(st.booleans()):
        parts = pieces(draw(st.sampled_from(JPEGS)))
        for at in draw(st.lists(st.integers(1, len(parts) - 2), max_size=3)):
            new = draw(st.one_of(st.just(b""), st.sampled_from(SEGMENTS)))
            parts[at] = new if draw(st.booleans()) else new + parts[at]
        whole = bytearray(b"".join(parts))
    else:
        whole = bytearray(draw(st.sampled_from(FILES)))
    near = st.integers(0, min(len(whole), draw(st.sampled_from([40, 300, 100_000]))) - 1)
    bytes_ = st.one_of(st.sampled_from(MARKERS), st.integers(0, 255))
    for at, byte in draw(st.lists(st.tuples(near, bytes_), max_size=4)):
        whole[at] = byte
    if draw(st.booleans()):
        del whole[draw(st.integers(0, len(whole))) :]
    more = [b"", b"", b"\0\n", EOI, EOI + bytes(4094), b"film", PLAIN]
    return bytes(whole) + draw(st.sampled_from(more))


MANY = settings(
    deadline=None, max_examples=250, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@MANY
@given(st.lists(broken(), min_size=8, max_size=8))
def test_both_readers_say_the_same_of_any_file(library: ctypes.CDLL, files: list[bytes]) -> None:
    encoded = Encoded.of(files)
    native, twin = read_native(library, encoded), read_twin(encoded)
    for mine, other, file in zip(native, twin, files, strict=True):
        assert mine == other, file
    assert native.tobytes() == twin.tobytes()


@MANY
@given(st.lists(broken(), min_size=4, max_size=4))
@example([jpeg(exif(SIX, SIX[:8] + b"\3\0\0\0"), DQT, GRAY_FRAME, DHT, scan(1))])
def test_what_a_header_says_pillow_and_libjpeg_say_too(library: ctypes.CDLL, files: list[bytes]) -> None:
    for file, h in zip(files, read_native(library, Encoded.of(files)), strict=True):
        if h["kind"] not in (1, 2):
            continue
        found = pillows(file)
        if found and h["height"]:
            assert found[:2] == (h["height"], h["width"])
        if found and not h["ask"]:
            assert found[2] == h["orientation"]
        if h["kind"] == 1:
            expect_libjpeg(file, h)


def expect_libjpeg(file: bytes, h: Any) -> None:
    found = libjpegs(file)
    if found and h["height"]:
        assert found == (h["height"], h["width"], h["colour"])
    elif found:  # cut within the head of its scan, the rest of which libjpeg makes up
        (longer,) = read_twin(Encoded.of([file + EOI * 8]))
        assert found == (longer["height"], longer["width"], longer["colour"])


@st.composite
def metadata(draw: st.DrawFn) -> bytes:
    """An EXIF segment of entries that are mostly as they should be, some bytes of it exchanged, or its end cut off."""
    order = draw(st.sampled_from("<>"))
    tags = st.sampled_from([0x010F, 0x0112, 0x0112, 0x0132, 0x8769, 0xC4A5])
    kinds, numbers = st.sampled_from([3, 3, 3, 1, 2, 4, 5, 7, 8, 9, 12, 99]), st.integers(0, 5)
    entries = []
    for tag, kind, number in draw(st.lists(st.tuples(tags, kinds, st.one_of(st.just(1), numbers)), max_size=5)):
        value = draw(st.integers(0, 9))
        inline = struct.pack(order + "HH", value, 0) if kind == 3 else struct.pack(order + "L", value)
        entries.append(struct.pack(order + "HHL", tag, kind, number) + inline)
    whole = bytearray(exif(*entries, order=order)[4:] + bytes(draw(st.integers(0, 40))))
    for at, byte in draw(st.lists(st.tuples(st.integers(6, len(whole) - 1), st.integers(0, 255)), max_size=3)):
        whole[at] = byte
    return bytes(whole[: draw(st.one_of(st.just(len(whole)), st.integers(6, len(whole))))])


@MANY
@given(st.lists(metadata(), min_size=1, max_size=2))
def test_the_orientation_is_pillows_whatever_the_exif_data(library: ctypes.CDLL, parts: list[bytes]) -> None:
    file = jpeg(*[segment(0xE1, part) for part in parts], DQT, GRAY_FRAME, DHT, scan(1))
    encoded = Encoded.of([file])
    native, twin = read_native(library, encoded), read_twin(encoded)
    assert native.tobytes() == twin.tobytes()
    found = pillows(file)
    if found and not native["ask"][0]:
        assert found == (24, 32, native["orientation"][0])


GUARDED = """
import ctypes, mmap, sys
library, libc = ctypes.CDLL(sys.argv[1]), ctypes.CDLL(None, use_errno=True)
room = mmap.PAGESIZE * 8
memory = mmap.mmap(-1, 2 * mmap.PAGESIZE + room)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
for page in (start, start + mmap.PAGESIZE + room):
    assert libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0, ctypes.get_errno()
low, high = start + mmap.PAGESIZE, start + mmap.PAGESIZE + room
out, read = ctypes.create_string_buffer(44), 0
for path in sys.argv[2:]:
    whole = open(path, "rb").read()
    for size in range(1, min(len(whole), room) + 1):
        for at in (low, high - size):
            ctypes.memmove(at, whole, size)
            library.gpuload_headers(
                ctypes.byref(ctypes.c_uint64(at)), ctypes.byref(ctypes.c_int64(size)), ctypes.c_int64(1), out)
            read += 1
print(read)
"""


def test_nothing_outside_a_file_is_read(path: Path, tmp_path: Path) -> None:
    """Each length of each file, with memory that cannot be read right before it, and right behind it."""
    names = []
    for i, file in enumerate([*FILES, jpeg(exif(SIX)), PLAIN + bytes(5000), b"\xff\xd8\xff" + bytes(5000), TAIL]):
        names.append(tmp_path / str(i))
        names[-1].write_bytes(file)
    command = [sys.executable, "-c", GUARDED, str(path), *map(str, names)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 2 * sum(min(name.stat().st_size, 8 * mmap.PAGESIZE) for name in names)


@pytest.mark.parametrize("place", ["low - 1", "high"])
def test_the_memory_around_it_cannot_be_read(path: Path, place: str) -> None:
    """Or the test above would prove nothing."""
    done = subprocess.run([sys.executable, "-c", GUARDED + f"ctypes.string_at({place}, 1)", str(path)], timeout=60)
    assert done.returncode == -signal.SIGSEGV


# --- the package ---


def test_both_ways_give_the_installations_table(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = Encoded.of([None, b"", *FILES])
    with_it = read(encoded)
    monkeypatch.setattr(kernels, "tables_library", lambda: None)
    assert with_it.tobytes() == read(encoded).tobytes() == read_native(library, encoded).tobytes()


def test_slices_and_selections_are_read_where_they_lie(library: ctypes.CDLL) -> None:
    encoded = Encoded.of([PLAIN, None, PNG, b"BM", PLAIN])
    whole = read_native(library, encoded)
    assert read_native(library, encoded[1:4]).tobytes() == whole[1:4].tobytes()
    assert read_native(library, encoded.take(np.array([4, 2]))).tobytes() == whole[[4, 2]].tobytes()
    backwards = Encoded(encoded.at[::-1], encoded.size[::-1], encoded.owner)
    assert read_native(library, backwards).tobytes() == whole[::-1].tobytes()


def test_other_threads_run_meanwhile(library: ctypes.CDLL) -> None:
    many = Encoded.of([PLAIN]).take(np.zeros(300_000, np.int64))  # 30 ms
    turns, stop = [0], threading.Event()

    def turn() -> None:
        while not stop.is_set():
            turns[0] += 1
            time.sleep(0)  # gives the GIL to who wants it

    thread = threading.Thread(target=turn)
    before = sys.getswitchinterval()
    sys.setswitchinterval(60)  # or the thread would get it while Python runs here
    try:
        thread.start()
        seen = turns[0]
        read_native(library, many)
        assert turns[0] > seen
    finally:
        stop.set()
        sys.setswitchinterval(before)
        thread.join()


def test_headers_are_judged_with_the_words_of_always() -> None:
    encoded = Encoded.of([None, b"", PLAIN, PNG, b"BM", PLAIN, PLAIN])
    headers = read(encoded)
    headers["height"][5:] = 0, 100
    earlier = DecodeError("Expected what came first")
    errors = {3: earlier}
    assert judge(encoded, headers, 24 * 32, errors) is errors
    assert {i: error.cause for i, error in errors.items()} == {
        0: "Expected an encoded image, got a null",
        1: "Expected an encoded image, got 0 bytes",
        3: "Expected what came first",
        5: "Expected an image of at least 1x1 pixels, got 0x32",
        6: "Expected at most 768 pixels (max_pixels), got 100x32 = 3200",
    }
    assert sorted(judge(encoded, headers, 24 * 32 - 1, {})) == [0, 1, 2, 3, 5, 6]


def test_a_size_beyond_all_bounds_is_judged_too() -> None:
    encoded = Encoded.of([PNG])
    headers = read(encoded)
    headers["height"] = headers["width"] = 2**31 - 1
    assert f"= {(2**31 - 1) ** 2}" in judge(encoded, headers, 10**9, {})[0].cause
