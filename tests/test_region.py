"""Decoding no further than the crop needs: the same bytes as a whole decode, and the same errors."""

from __future__ import annotations

import ctypes
import io
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from making import by_pillow, encode, jpeg, picture

from gpuload import Image
from gpuload.images.decode import IMAGE_ROW, Crop, Ragged, region
from gpuload.images.decode.cpu import CpuDecoder
from gpuload.images.resize import resize_normalize

pytestmark = pytest.mark.skipif(region.library() is None, reason="needs the compiled reader and Pillow's own libjpeg")
_KINDS: list[dict[str, Any]] = [
    {"subsampling": 0},
    {"subsampling": 1},
    {"subsampling": 2},
    {"progressive": True, "subsampling": 2},
    {"optimize": True, "restart_marker_blocks": 3, "subsampling": 2},
    {"mode": "L"},
    {"keep_rgb": True},
]


def view(data: bytes) -> Any:
    return np.frombuffer(data, np.uint8)


def crop(regions: Any, size: tuple[int, int], fast: bool = False) -> Crop:
    box = np.asarray(regions, np.float64).reshape(-1, 4)
    return Crop(lambda h, w: (box.copy(), np.zeros(len(box), np.bool_)), size, fast)


def by_pillow_whole(data: bytes, orientation: int = 1) -> Ragged:
    """The whole image by Pillow, as a decoder would lend it."""
    with PIL.Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(image)
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    table = np.zeros(1, IMAGE_ROW)
    height, width, channels = pixels.shape
    table[0] = (0, width * channels, height, width, channels, orientation)
    return Ragged(torch.from_numpy(pixels.reshape(-1).copy()), table)


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(_KINDS), st.integers(1, 140), st.integers(1, 140), st.tuples(*[st.floats(0, 1)] * 4),
    st.tuples(st.integers(1, 40), st.integers(1, 40)), st.integers(1, 8),
)  # fmt: skip
def test_a_window_equals_the_same_place_of_a_whole_decode(
    kind: dict[str, Any], height: int, width: int, place: tuple[float, ...], size: tuple[int, int], orientation: int
) -> None:
    options = {**kind}
    pixels = picture(height, width, seed=height, mode=options.pop("mode", "RGB"))
    data = encode(pixels, "JPEG", orientation, quality=80, **options)
    whole = by_pillow_whole(data, orientation)
    (tall,), (wide,) = whole.sizes()
    w, h = max(1e-3, place[2] * wide), max(1e-3, place[3] * tall)
    box = [place[0] * (wide - w), place[1] * (tall - h), w, h]
    decoder = CpuDecoder()
    cut = decoder.decode([view(data)], crop=crop(box, size))
    assert decoder.counts()["libjpeg-turbo"] == 1
    assert cut.regions is not None
    if orientation == 1:
        got = cut.pixels(0).numpy()
        left, top = round(box[0] - cut.regions[0, 0]), round(box[1] - cut.regions[0, 1])
        want = whole.pixels(0).numpy()[top : top + got.shape[0], left : left + got.shape[1]]
        inner = (slice(None), slice(1 if left else 0, -1 if left + got.shape[1] < width else None))
        np.testing.assert_array_equal(got[inner], want[inner])
    # and through the resize: the columns that a cut spoils are never looked at
    image, flips = Image(size), np.zeros(1, np.bool_)
    outs = [torch.empty(1, 3, *size) for _ in range(2)]
    resize_normalize(cut, cut.regions, flips, image, outs[0])
    resize_normalize(whole, np.array([box]), flips, image, outs[1])
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=2e-6)  # float32 weights of shifted coordinates


@pytest.mark.parametrize("kind", _KINDS)
def test_without_a_crop_the_whole_is_pillows(kind: dict[str, Any]) -> None:
    options = {**kind}
    data = encode(picture(61, 83, mode=options.pop("mode", "RGB")), "JPEG", 6, **options)
    decoder = CpuDecoder()
    ragged = decoder.decode([view(data)])
    assert decoder.counts()["libjpeg-turbo"] == 1
    assert ragged.table["orientation"][0] == 6
    np.testing.assert_array_equal(ragged.pixels(0).numpy(), by_pillow_whole(data).pixels(0).numpy())


def test_turning_regions_and_back_is_nothing() -> None:
    generator, orientations = np.random.default_rng(0), np.arange(1, 9, dtype=np.int32)
    regions, sizes = generator.uniform(0, 50, (8, 4)), np.full(8, 100)
    there = region.turned(regions, orientations, sizes, sizes + 20)
    np.testing.assert_allclose(region.turned(there, orientations, sizes, sizes + 20, back=True), regions)


def read(data: bytes, window: tuple[int, int, int, int], channels: int, eighths: int, theirs: bool) -> tuple[Any, Any]:
    """The part and its pixels, the coefficients decoded by libjpeg or by our own reader."""
    parts, source = np.zeros(1, region.PART), view(data)
    out = np.zeros((window[2] + region.BLOCK) * window[3] * channels, np.uint8)
    parts["data"], parts["size"] = source.ctypes.data, len(source)
    parts["out"], parts["room"] = out.ctypes.data, len(out)
    for name, value in zip("xywh", window, strict=True):
        parts[name] = value
    parts["channels"], parts["eighths"], parts["theirs"] = channels, eighths, theirs
    region.read(parts)
    return parts[0], out


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_a_damaged_file_is_decoded_as_by_libjpeg_or_left_to_it(data: st.DataObject) -> None:
    draw = data.draw
    kind = {"quality": draw(st.sampled_from([5, 75, 100])), **draw(st.sampled_from(_KINDS))}
    height, width = draw(st.integers(1, 60)), draw(st.integers(1, 60))
    gray = kind.pop("mode", "RGB") == "L"
    file = bytearray(encode(picture(height, width, seed=width, mode="L" if gray else "RGB"), "JPEG", **kind))
    start = file.find(b"\xff\xda")
    for _ in range(draw(st.integers(0, 3))):
        at, new = draw(st.integers(start, len(file) - 1)), draw(st.binary(max_size=3))
        file[at : at + draw(st.integers(0, 20))] = new
        if len(file) <= start:
            break
    eighths = draw(st.sampled_from([8, 8, 4, 1]))
    h, w = (-(size * eighths // -8) for size in (height, width))
    x, y = draw(st.integers(0, w - 1)), draw(st.integers(0, h - 1))
    window = (x, y, draw(st.integers(1, w - x)), draw(st.integers(1, h - y)))
    ours, got = read(bytes(file), window, 1 if gray else 3, eighths, theirs=False)
    part, want = read(bytes(file), window, 1 if gray else 3, eighths, theirs=True)
    if ours["status"] == 0:
        assert part["status"] == 0
        np.testing.assert_array_equal(got, want)


def test_our_own_reader_decodes_every_baseline_file_of_one_scan() -> None:
    for kind in _KINDS:
        options = {**kind}
        pixels = picture(50, 70, mode=options.pop("mode", "RGB"))
        part, _ = read(encode(pixels, "JPEG", **options), (3, 5, 40, 30), 3 if pixels.mode == "RGB" else 1, 8, False)
        assert (part["status"], part["theirs"]) == (0, "progressive" in kind)


def test_a_library_that_our_reader_does_not_fit_decodes_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    real = region.library()

    class Other:
        """Another layout: what our reader makes is wrong."""

        def gpuload_jpeg_read(self, address: int, count: int) -> None:
            real.gpuload_jpeg_read(address, count)  # type: ignore[union-attr]
            parts = np.ctypeslib.as_array((ctypes.c_uint8 * (count * region.PART.itemsize)).from_address(address))
            for part in parts.view(region.PART):
                if not part["theirs"]:
                    (ctypes.c_uint8 * 1).from_address(int(part["out"]))[0] ^= 1

    monkeypatch.setattr(region, "library", Other)
    region.own_coefficients.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="does not fit Pillow's libjpeg"):
            part, _ = read(jpeg(), (0, 0, 32, 24), 3, 8, theirs=False)
        assert (part["status"], part["theirs"]) == (0, 1)
    finally:
        region.own_coefficients.cache_clear()


def without(file: bytes, marker: int) -> bytes:
    """The file without the segments of one kind."""
    kept, at = file[:2], 2
    while True:
        end = at + 2 + (file[at + 2] << 8 | file[at + 3])
        if file[at + 1] == 0xDA:
            return kept + file[at:]
        kept += b"" if file[at + 1] == marker else file[at:end]
        at = end


@pytest.mark.parametrize(("marker", "tables"), [(0xC4, "Huffman"), (0xDB, "quantization")])
def test_a_file_without_tables_does_not_get_those_of_the_file_before(marker: int, tables: str) -> None:
    whole = encode(picture(40, 40), "JPEG", quality=60, optimize=True)
    broken = without(whole, marker)
    decoder = CpuDecoder()
    together = decoder.decode([view(whole), view(broken)], crop=crop([[0, 0, 40, 40]] * 2, (8, 8)))
    alone = CpuDecoder().decode([view(broken)])
    assert together.errors.keys() == {i + 1 for i in alone.errors}, f"what is decoded with no {tables} tables"
    if not alone.errors:
        np.testing.assert_array_equal(together.pixels(1).numpy(), alone.pixels(0).numpy())


def test_less_is_decoded_than_the_whole() -> None:
    ragged = CpuDecoder().decode([view(jpeg(400, 600))], crop=crop([300, 200, 50, 40], (25, 20)))
    assert ragged.table["height"][0] <= 40 + 2 * (2 + 3)
    assert ragged.table["width"][0] <= 50 + 32 + 2 * (2 + 3)


def test_a_file_cut_below_the_crop_is_still_an_error_and_others_are_unharmed() -> None:
    whole = jpeg(64, 64)
    decoder = CpuDecoder()
    box = [[0, 0, 16, 8]] * 4
    views = [view(whole), view(whole[: len(whole) * 3 // 4]), None, view(whole)]
    ragged = decoder.decode(views, crop=crop(box, (8, 8)))
    assert sorted(ragged.errors) == [1, 2]
    assert decoder.counts() == {"libjpeg-turbo": 2, "simplejpeg": 0, "pillow": 0, "failed": 2}


def test_what_libjpeg_warns_about_and_what_is_no_jpeg_is_decoded_whole() -> None:
    whole = jpeg(64, 64, seed=3)
    garbled = whole[:200] + b"\xff\x00\xff" + whole[203:]
    files = [whole, encode(picture(30, 40), "PNG"), whole, garbled]
    decoder = CpuDecoder()
    ragged = decoder.decode([view(data) for data in files], crop=crop([[2, 2, 20, 20]] * 4, (10, 10)))
    assert decoder.counts()["libjpeg-turbo"] >= 1
    assert decoder.counts()["pillow"] >= 1
    np.testing.assert_array_equal(ragged.pixels(1).numpy(), by_pillow(files[1]).transpose(1, 2, 0))
    assert list(ragged.errors) == [3], "Pillow has the last word, and it refuses"
    np.testing.assert_array_equal(ragged.regions[1], [2, 2, 20, 20])  # type: ignore[index]


def test_fast_halves_large_images_and_stays_near() -> None:
    smooth = encode(picture(800, 1000).resize((250, 200)).resize((1000, 800)), "JPEG", quality=90)
    image, flips = Image(64, dtype=torch.uint8), np.zeros(1, np.bool_)
    outs = []
    for fast in (False, True):
        regions, _ = image.regions(np.array([800]), np.array([1000]), 0, 0, np.array([0]))
        ragged = CpuDecoder().decode([view(smooth)], crop=crop(regions, (64, 64), fast))
        out = torch.empty(1, 3, 64, 64, dtype=torch.uint8)
        resize_normalize(ragged, ragged.regions, flips, image, out)  # type: ignore[attr-defined]
        outs.append(out.float())
        assert ragged.table["height"][0] < (800 if not fast else 120)
    assert 10 * torch.log10(255**2 / (outs[0] - outs[1]).square().mean()) > 30  # dB
