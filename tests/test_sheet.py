"""A contact sheet shows what the tensors hold: upright, in their colours, captions and broken rows visible."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from gpuload.errors import ConfigError
from gpuload.tools.sheet import GAP, TILE, contact_sheet

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def quarters(side: int = 64) -> torch.Tensor:
    """u8[3, side, side]: red upper left, green upper right, blue lower left, white lower right."""
    image = torch.zeros(3, side, side, dtype=torch.uint8)
    half = side // 2
    image[0, :half, :half] = 255
    image[1, :half, half:] = 255
    image[2, half:, :half] = 255
    image[:, half:, half:] = 255
    return image


def tile(sheet: Image.Image, column: int = 0, side: int = 64) -> NDArray[np.uint8]:
    left = GAP + column * (side + GAP)
    return np.asarray(sheet)[GAP : GAP + side, left : left + side]


def normalised(image: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return ((image / 255 - mean) / std).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_normalisation_is_undone(dtype: torch.dtype) -> None:
    expected = quarters().permute(1, 2, 0).numpy()
    sheet = contact_sheet(normalised(quarters(), dtype)[None], tile=64, mean=MEAN, std=STD)
    worst = np.abs(tile(sheet).astype(int) - expected).max()
    assert worst <= {torch.float32: 0, torch.float16: 1, torch.bfloat16: 3}[dtype]  # 8 bits of bfloat16, up to 2.64


def test_uint8_and_plain_float_are_shown_as_they_are() -> None:
    expected = quarters().permute(1, 2, 0).numpy()
    sheet = contact_sheet([quarters(), quarters() / 255], tile=64, columns=2)
    assert np.array_equal(tile(sheet, 0), expected)
    assert np.array_equal(tile(sheet, 1), expected)
    last = contact_sheet(quarters()[None].contiguous(memory_format=torch.channels_last), tile=64)
    assert np.array_equal(tile(last), expected)


def test_other_shapes_are_letterboxed_and_keep_their_ratio() -> None:
    wide = torch.full((3, 32, 128), 7, dtype=torch.uint8)
    small = torch.full((1, 10, 20), 7, dtype=torch.uint8)
    sheet = contact_sheet([wide, small], tile=64, columns=2)
    for column, (width, height) in enumerate([(64, 16), (20, 10)]):
        inside = (tile(sheet, column) == 7).all(axis=2)
        rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        assert (len(columns), len(rows)) == (width, height)
        assert rows[0] == (64 - height) // 2
        assert (tile(sheet, column)[~inside] == TILE).all()


def test_an_invalid_row_is_marked_whatever_its_pixels() -> None:
    images = [quarters(), torch.zeros(3, 0, 0, dtype=torch.uint8), quarters()]
    sheet = contact_sheet(images, ["a", "b", "c"], valid=torch.tensor([True, False, True]), tile=64, columns=3)
    assert np.array_equal(tile(sheet, 0), tile(sheet, 2))
    broken = tile(sheet, 1).astype(int)
    assert (broken[..., 0] - broken[..., 1]).mean() > 20  # reddish
    assert not np.array_equal(broken, tile(sheet, 0))


def test_captions_are_drawn_under_their_own_tile() -> None:
    plain = contact_sheet([quarters()] * 2, ["", "x"], tile=64, columns=2)
    below = np.asarray(plain)[GAP + 64 + 4 :]
    assert (below[:, : GAP + 64] == 255).all()
    assert (below[:, GAP + 64 + GAP :] < 128).any()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.none(), st.text(max_size=300)), min_size=1, max_size=5), st.integers(16, 80))
def test_any_text_stays_within_its_column(captions: list[str | None], side: int) -> None:
    sheet = contact_sheet([quarters(16)] * len(captions), captions, tile=side, columns=1)
    margin = np.asarray(sheet)[:, GAP + side + GAP // 2 :]
    assert (margin == 255).all() or side < 32  # one wide letter may be wider than a tiny tile


@pytest.mark.parametrize(
    "text", ["日本語のキャプション" * 9, "x" * 5000, "a\x00b\n\tc", "مرحبا", "🦈", "\ud800", "é"], ids=range(7)
)
def test_no_text_is_too_odd(text: str) -> None:
    contact_sheet([quarters()], [text], tile=64, title=text[:20])


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"\[C, H, W\] with C of 1 or 3, got \(4, 8, 8\)"):
        contact_sheet(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ConfigError, match="one caption and one mark an image, got 1, 2 for 2"):
        contact_sheet([quarters(), quarters()], ["one"])
