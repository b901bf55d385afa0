"""Filters: bilinear, bicubic and nearest are Pillow's for the same region, whatever the implementation and the path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from making import by_pillow, encode, picture

from gpuload import HEADER, Image, LanceDataset, Ragged
from gpuload.errors import ConfigError
from gpuload.images import views
from gpuload.images.resize import resize_normalize, resize_twin

LEVELS = {
    "bilinear": 1.01,
    "bicubic": 1.01,
    "nearest": 0.01,
}  # of 255; Pillow rounds its result, and bilinear's first pass
HALF = 0.13  # more of them: a half's last place at 1
FILTERS = sorted(LEVELS)
sides, orientations = st.integers(1, 90), st.integers(1, 8)


def upright(pixels: np.ndarray, orientation: int) -> PIL.Image.Image:
    found = PIL.Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    found.getexif()[0x0112] = orientation
    return PIL.ImageOps.exif_transpose(found)


def hard(seed: int, *shape: int) -> np.ndarray:
    """Black and white: what a cubic overshoots at."""
    return np.random.default_rng(seed).integers(0, 2, shape, dtype=np.uint8) * 255


def by_pillows_filter(image: PIL.Image.Image, name: str, size: tuple[int, int], box: Any) -> np.ndarray:
    found = np.asarray(image.resize(size[::-1], PIL.Image.Resampling[name.upper()], box=box), np.float64)
    return found.reshape(*size, -1).transpose(2, 0, 1)


@pytest.mark.parametrize("resize", [resize_normalize, resize_twin], ids=["chosen", "twin"])
@pytest.mark.parametrize("name", FILTERS)
@settings(max_examples=60, deadline=None)
@given(
    st.tuples(sides, sides, st.sampled_from([1, 3])), st.tuples(sides, sides), orientations,
    st.tuples(*[st.floats(0, 1)] * 4), st.sampled_from([torch.float32, torch.float16, torch.uint8]), st.booleans(),
)  # fmt: skip
def test_is_pillows(
    resize: Any, name: str, shape: Any, size: Any, orientation: int, place: Any, dtype: Any, whole: bool
):
    pixels = hard(sum(shape), *shape)
    seen = upright(pixels, orientation)
    w, h = (seen.width, seen.height) if whole else (max(0.5, seen.width * place[2]), max(0.5, seen.height * place[3]))
    x, y = (seen.width - w) * place[0], (seen.height - h) * place[1]
    image = Image(size, dtype=dtype, mode="RGB" if shape[2] == 3 else "L", interpolation=name)
    ragged, out = Ragged.of([pixels]), torch.empty((1, *image.shape), dtype=dtype)
    ragged.table["orientation"] = orientation
    resize(ragged, views.of_regions(np.array([[x, y, w, h]]), np.zeros(1, bool)), image, out)
    levels = out[0].double().numpy() * (1 if dtype == torch.uint8 else 255)
    box = (x, y, min(x + w, seen.width), min(y + h, seen.height))
    expected = by_pillows_filter(seen, name, size, box)
    assert np.abs(levels - expected).max() <= LEVELS[name] + HALF * (dtype == torch.float16)


@pytest.mark.parametrize("name", ["bicubic", "nearest"])
def test_colours_become_luma_before_the_filter(name: str) -> None:
    pixels = hard(1, 70, 33, 3)
    image = Image((20, 41), mode="L", interpolation=name)
    for resize in (resize_normalize, resize_twin):
        out = torch.empty(1, 1, 20, 41)
        resize(Ragged.of([pixels]), views.of_regions(np.array([[0.0, 0, 33, 70]]), np.zeros(1, bool)), image, out)
        expected = by_pillows_filter(PIL.Image.fromarray(pixels).convert("L"), name, (20, 41), None)
        assert np.abs(out[0].numpy() * 255 - expected).max() <= LEVELS[name]


@pytest.mark.parametrize("name", FILTERS)
def test_a_dataset_is_pillows(name: str, store: Callable[..., str], device: str) -> None:
    """Plain JPEG in one native call a slice, gray, PNG; centre crops of windows that end within the images."""
    files = [encode(picture(91 + 7 * i, 160 - 9 * i, i), "JPEG", 1 + i, quality=95) for i in range(8)]
    files += [encode(picture(80, 120, 9, "L"), "JPEG"), encode(picture(130, 77, 10), "PNG")]
    image = Image((33, 45), crop_ratio=0.6, dtype=torch.uint8, interpolation=name)
    path = store({"image": files})
    (batch,) = LanceDataset(path, len(files), transforms={"image": image}, device=device)
    for got, file in zip(batch["image"].cpu(), files, strict=True):
        seen = by_pillow(file)
        _, height, width = seen.shape
        w = min(width, height * 45 / 33) * 0.6
        h = min(height, width * 33 / 45) * 0.6
        box = ((width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2)
        expected = by_pillows_filter(PIL.Image.fromarray(seen.transpose(1, 2, 0)), name, (33, 45), box)
        difference = np.abs(got.double().numpy() - expected)
        if device == "cpu":
            assert difference.max() <= LEVELS[name]
        else:
            assert difference.mean() <= 4  # its decoder may repeat chroma and round its inverse DCT in another way


@pytest.mark.parametrize("name", FILTERS)
def test_what_is_decoded_smaller_is_near_what_is_not(name: str, store: Callable[..., str]) -> None:
    """`fast`: windows are as wide as the filter needs at the smaller scale, so only the DCT's own scaling differs."""
    files = [encode(picture(400, 500, i).resize((1000, 800)), "JPEG", 1 + i, quality=95) for i in range(8)]
    path, made = store({"image": files}), []
    for fast in (False, True):
        image = Image((32, 40), crop_ratio=0.7, interpolation=name, fast=fast)
        (batch,) = LanceDataset(path, 8, transforms={"image": image}, device="cpu")
        made.append(batch["image"])
    error = (made[0] - made[1]).pow(2).mean(dim=(1, 2, 3))
    assert (error < 10 ** -(2.4 if name == "nearest" else 3.2)).all(), error  # PSNR 24 and 32 dB


@pytest.mark.parametrize("name", FILTERS)
@settings(max_examples=60, deadline=None)
@given(st.tuples(sides, sides), st.tuples(sides, sides), orientations, st.tuples(*[st.floats(0, 1)] * 4))
def test_a_window_is_as_wide_as_the_filter(name: str, shape: Any, size: Any, orientation: int, place: Any) -> None:
    """From its window alone an image becomes what it becomes from the whole."""
    whole, image = Ragged.of([hard(sum(shape), *shape, 3)]), Image(size, interpolation=name)
    headers = np.zeros(1, HEADER)
    headers["height"], headers["width"], headers["orientation"] = *shape, orientation
    whole.table["orientation"] = orientation
    tall, wide = shape if orientation < 5 else shape[::-1]
    w, h = max(0.1, wide * place[2]), max(0.1, tall * place[3])
    looks = views.of_regions(np.array([[(wide - w) * place[0], (tall - h) * place[1], w, h]]), np.zeros(1, bool))
    ((x, y, width, height),) = views.windows(looks, headers, size, radius=image.radius)
    assert (views.windows_twin(looks, headers, size, radius=image.radius) == (x, y, width, height)).all()
    cut = Ragged(whole.arena, whole.table.copy())
    cut.table["offset"] += y * cut.table["pitch"] + 3 * x
    cut.table["x"], cut.table["y"], cut.table["width"], cut.table["height"] = x, y, width, height
    outs = [torch.empty(1, 3, *size) for _ in range(2)]
    for ragged, out in zip((whole, cut), outs, strict=True):
        resize_normalize(ragged, looks, image, out)
    assert (outs[0] - outs[1]).abs().max() <= 2e-5  # float32 weights of shifted coordinates


def test_other_names_are_refused() -> None:
    with pytest.raises(ConfigError, match=r'Expected Image\(interpolation="bilinear"\|"bicubic"\|"nearest"\), got'):
        Image(8, interpolation="lanczos")  # type: ignore[arg-type]
