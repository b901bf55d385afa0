"""The compiled geometry of a batch against its NumPy twins, bit for bit: regions of images, rows for the kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gpuload import Image
from gpuload.images import HEADER, PIXELS, VIEW, Ragged, resize, sizes, views
from gpuload.order.draws import Draws

SIDES = st.integers(0, 3000)
SIZE = st.one_of(st.integers(1, 300), st.tuples(st.integers(1, 300), st.integers(1, 300)))
FLIP = st.sampled_from([0.0, 0.3, 1.0])
IMAGES = st.one_of(
    st.builds(Image, st.none(), flip=FLIP),
    st.builds(Image, SIZE, crop=st.just("none"), flip=FLIP),
    st.builds(Image, SIZE, crop_ratio=st.floats(0.1, 1.0), flip=FLIP),
    st.builds(
        Image,
        SIZE,
        crop=st.just("random"),
        flip=FLIP,
        scale=st.sampled_from([(0.08, 1.0), (0.9, 1.0), (1.0, 1.0), (0.001, 0.002)]),
        ratio=st.sampled_from([(3 / 4, 4 / 3), (1.0, 1.0), (0.01, 100.0)]),
    ),
)


@settings(deadline=None, max_examples=300)
@given(IMAGES, st.lists(st.tuples(SIDES, SIDES, st.integers(1, 8)), max_size=12), st.integers(0, 2**63))
def test_compiled_views_are_the_twins(image: Image, images: list[tuple[int, int, int]], seed: int) -> None:
    table = np.zeros(len(images), HEADER)
    for name, column in zip(("height", "width", "orientation"), np.array(images or np.empty((0, 3))).T, strict=True):
        table[name] = column
    draws = Draws(seed, 3, np.arange(len(images)) * 7)
    heights, widths = (np.maximum(side, 1) for side in sizes(table))
    twin = views.of_regions(*views.regions(image, heights, widths, draws))
    np.testing.assert_array_equal(views.views(image, table, draws), twin)


def pixels(data: st.DataObject, n: int) -> NDArray[np.void]:
    """PIXELS[n]: whole images, and windows of them at a scale."""
    table = np.zeros(n, PIXELS)
    for row in table:
        height, width = data.draw(st.integers(1, 500)), data.draw(st.integers(1, 500))
        row["whole_height"], row["whole_width"], row["scale"] = height, width, data.draw(st.sampled_from([1, 0.5, 1]))
        x, y = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
        row["x"], row["y"], row["height"], row["width"] = x, y, height - y, width - x
        row["orientation"], row["channels"] = data.draw(st.integers(1, 8)), data.draw(st.sampled_from([1, 3]))
        row["pitch"], row["offset"] = width * row["channels"], data.draw(st.integers(0, 2**40))
    return table


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_compiled_rows_are_the_twins(data: st.DataObject) -> None:
    n, m = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 9))
    ragged, wanted = Ragged(torch.zeros(8, dtype=torch.uint8), pixels(data, n)), np.zeros(m, VIEW)
    wanted["image"] = data.draw(st.lists(st.integers(0, n - 1), min_size=m, max_size=m))
    wanted["flip"] = data.draw(st.lists(st.booleans(), min_size=m, max_size=m))
    numbers = data.draw(st.lists(st.floats(0, 500), min_size=4 * m, max_size=4 * m))
    wanted["region"] = np.array(numbers).reshape(m, 4)
    image = Image(8)
    np.testing.assert_array_equal(
        resize.rows(ragged, wanted, image, (9, 8)), resize.rows_twin(ragged, wanted, image, (9, 8))
    )


@pytest.mark.parametrize("image", [-1, 2])
@pytest.mark.parametrize("rows", [resize.rows, resize.rows_twin])
def test_views_of_no_image_are_refused(image: int, rows: object) -> None:
    ragged, wanted = Ragged.of([np.zeros((4, 4, 3), np.uint8)] * 2), np.zeros(2, VIEW)
    wanted["image"] = [1, image]
    with pytest.raises(ValueError, match=f"views of 2 images, got one of image {image}"):
        rows(ragged, wanted, Image(8), (8, 8))  # type: ignore[operator]
