"""Decoding no further than the crop needs: the same bytes as a whole decode, and the same errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from making import by_pillow, encode, jpeg, picture

from gpuload import Image
from gpuload.decode import Crop, region
from gpuload.decode.cpu import CpuDecoder
from gpuload.resize import resize_normalize

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


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(_KINDS), st.integers(1, 140), st.integers(1, 140), st.tuples(*[st.floats(0, 1)] * 4),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
)  # fmt: skip
def test_a_window_equals_the_same_place_of_a_whole_decode(
    kind: dict[str, Any], height: int, width: int, place: tuple[float, ...], size: tuple[int, int]
) -> None:
    options = {**kind}
    pixels = picture(height, width, seed=height, mode=options.pop("mode", "RGB"))
    data = encode(pixels, "JPEG", quality=80, **options)
    w, h = max(1e-3, place[2] * width), max(1e-3, place[3] * height)
    box = [place[0] * (width - w), place[1] * (height - h), w, h]
    decoder = CpuDecoder()
    cut = decoder.decode([view(data)], crop=crop(box, size))
    assert decoder.counts()["libjpeg-turbo"] == 1
    got, (x, y) = cut.pixels(0).numpy().copy(), box[:2]
    left, top = round(x - cut.regions[0, 0]), round(y - cut.regions[0, 1])  # type: ignore[attr-defined]
    whole = decoder.decode([view(data)]).pixels(0).numpy()
    want = whole[top : top + got.shape[0], left : left + got.shape[1]]
    inner = (slice(None), slice(1 if left else 0, -1 if left + got.shape[1] < width else None))
    np.testing.assert_array_equal(got[inner], want[inner])
    # and through the resize: the columns that a cut spoils are never looked at
    image, flips = Image(size), np.zeros(1, np.bool_)
    outs = [torch.empty(1, 3, *size) for _ in range(2)]
    cut = decoder.decode([view(data)], crop=crop(box, size))
    resize_normalize(cut, cut.regions, flips, image, outs[0])  # type: ignore[attr-defined]
    resize_normalize(decoder.decode([view(data)]), np.array([box]), flips, image, outs[1])
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=2e-6)  # float32 weights of shifted coordinates


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
    files = [whole, encode(picture(30, 40), "PNG"), encode(picture(30, 40), "JPEG", orientation=6), garbled]
    decoder = CpuDecoder()
    ragged = decoder.decode([view(data) for data in files], crop=crop([[2, 2, 20, 20]] * 4, (10, 10)))
    assert decoder.counts()["libjpeg-turbo"] >= 1
    assert decoder.counts()["pillow"] >= 1
    np.testing.assert_array_equal(ragged.pixels(1).numpy(), by_pillow(files[1]).transpose(1, 2, 0))
    np.testing.assert_array_equal(ragged.pixels(2).numpy(), by_pillow(files[2], orient=False).transpose(1, 2, 0))
    np.testing.assert_array_equal(ragged.regions[1], [2, 2, 20, 20])  # type: ignore[attr-defined]


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
