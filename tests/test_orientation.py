"""Orientation is read one way for every format: wherever it may stand, as Pillow's `exif_transpose` gives it."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.TiffImagePlugin
import pytest
import torch
from making import by_pillow, encode, jpeg, picture
from test_nvimgcodec import DECODERS

from gpuload import Image, LanceDataset

TAG, TURN = 0x0112, 6
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)
INTEGERS = {3: "H", 4: "L", 6: "b", 8: "h", 9: "l", 1: "B", 5: "LL", 11: "f", 12: "d", 16: "Q"}  # TIFF type → struct's
PICTURE = picture(20, 30)


def exif(kind: int, order: str, turn: int = TURN) -> bytes:
    """A TIFF structure with the orientation alone, as a number of one of TIFF's types."""
    value = struct.pack(order + INTEGERS[kind], *([turn, 1] if kind == 5 else [turn]))
    elsewhere = b"" if len(value) <= 4 else value
    place = struct.pack(order + "L", 26) if elsewhere else value.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "LHHHL", 8, 1, TAG, kind, 1)
    return head + place + struct.pack(order + "L", 0) + elsewhere


def png_with(name: bytes, content: bytes, after: bool) -> bytes:
    """A PNG file with one more chunk, before or after its pixels."""
    file = encode(PICTURE, "PNG")
    at = file.index(b"IEND" if after else b"IDAT") - 4
    chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return file[:at] + chunk + file[at:]


def tiff_with(tag: int, kind: int, value: Any, **options: Any) -> bytes:
    info = PIL.TiffImagePlugin.ImageFileDirectory_v2()
    info.tagtype[tag] = kind
    info[tag] = value
    return encode(PICTURE, "TIFF", tiffinfo=info, **options)


def carriers() -> dict[str, bytes]:
    """Name → a file that is turned, if Pillow turns it."""
    found: dict[str, bytes] = {}
    for kind in INTEGERS:
        for order in "<>":
            blob, name = exif(kind, order), f"{INTEGERS[kind]} {order}"
            found[f"jpeg {name}"] = encode(PICTURE, "JPEG", exif=b"Exif\0\0" + blob)
            found[f"png {name}"] = encode(PICTURE, "PNG", exif=blob)
            found[f"webp {name}"] = encode(PICTURE, "WEBP", exif=b"Exif\0\0" + blob)
    found |= {f"avif {turn}": encode(PICTURE, "AVIF", turn) for turn in range(2, 9)}
    profile = b"Exif\0\0" + exif(3, "<")
    text = b"\nexif\n%8d\n%s\n" % (len(profile), profile.hex().encode())
    for after in (False, True):
        found |= {
            f"png eXIf {after}": png_with(b"eXIf", exif(4, ">"), after),
            f"png tEXt {after}": png_with(b"tEXt", b"Raw profile type exif\0" + text, after),
            f"png zTXt {after}": png_with(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text), after),
            f"png iTXt {after}": png_with(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP, after),
        }
    for kind in ("JPEG", "WEBP", "AVIF"):
        found[f"{kind.lower()} xmp"] = encode(PICTURE, kind, xmp=XMP)
    for options in ({}, {"compression": "tiff_lzw"}, {"compression": "jpeg"}, {"big_tiff": True}):
        name = " ".join(map(str, options.values()))
        found |= {f"tiff {name} {kind}": tiff_with(TAG, kind, TURN, **options) for kind in (3, 4, 8, 12)}
        found[f"tiff {name} xmp"] = tiff_with(700, 1, XMP, **options)
    found |= {f"tiff {turn}": tiff_with(TAG, 3, turn) for turn in range(2, 9)}
    return found


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return carriers()


@pytest.mark.parametrize("name", ["cpu", *DECODERS])
def test_every_file_is_turned_as_by_pillow(name: str, files: dict[str, bytes], store: Callable[..., str]) -> None:
    decoder: Any = "cpu" if name == "cpu" else DECODERS[name](torch.device("cpu"), 1_000_000)
    options: dict[str, Any] = {
        "device": "cpu",
        "decoder": decoder,
        "transforms": {"image": Image(None, dtype=torch.uint8)},
    }
    path, turned = store({"image": list(files.values())}), set[str]()
    for batch in LanceDataset(path, 8, **options):
        for row, pixels in zip(batch.rows.tolist(), batch["image"], strict=True):
            kind, file = list(files.items())[row]
            np.testing.assert_array_equal(pixels.numpy(), by_pillow(file), kind)
            turned |= {kind.split()[0]} if pixels.shape == (3, 30, 20) else set()
    assert turned == {"jpeg", "png", "webp", "avif", "tiff"}


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_without_orient_every_format_stays_as_it_is_stored(kind: str, turn: int, store: Callable[..., str]) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    file = tiff_with(TAG, 3, turn) if kind == "TIFF" else encode(PICTURE, kind, turn, **options)
    (batch,) = LanceDataset(
        store({"image": [file]}), 1, device="cpu", transforms={"image": Image(None, dtype=torch.uint8, orient=False)}
    )
    want = by_pillow(jpeg(20, 30) if kind == "JPEG" else encode(PICTURE, "PNG"), orient=False)
    if kind == "JPEG":
        want = by_pillow(file, orient=False)
    np.testing.assert_array_equal(batch["image"][0].numpy(), want)


@pytest.mark.parametrize("turn", range(1, 9))
def test_crops_of_tiff_are_those_of_png(turn: int, store: Callable[..., str]) -> None:
    path = store({"image": [tiff_with(TAG, 3, turn), encode(PICTURE, "PNG", turn)] * 2})
    image = Image((9, 7), crop="none", dtype=torch.uint8)
    (batch,) = LanceDataset(path, 4, device="cpu", transforms={"image": image})
    assert torch.equal(batch["image"][0], batch["image"][1])
