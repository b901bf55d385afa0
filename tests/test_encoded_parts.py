"""`Encoded` in parts: slices, selections, and who keeps the memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from making import encode, jpeg, judged, picture

from gpuload import Encoded

VALUES = st.lists(st.one_of(st.none(), st.binary(max_size=9)), max_size=9)


def values(encoded: Encoded) -> list[bytes | None]:
    found = [encoded.view(i) for i in range(len(encoded))]
    return [None if view is None else view.tobytes() for view in found]


@given(VALUES, st.slices(9).filter(lambda part: part.step in (None, 1)))
def test_a_slice_is_that_of_the_list(files: list[bytes | None], part: slice) -> None:
    encoded = Encoded.of(files)
    assert values(encoded) == files
    assert values(encoded[part]) == files[part]
    assert encoded[part].size.tolist() == [len(file or b"") for file in files[part]]


@given(VALUES, st.data())
def test_a_selection_is_that_of_the_list(files: list[bytes | None], data: st.DataObject) -> None:
    index = data.draw(st.lists(st.integers(0, len(files) - 1), max_size=12)) if files else []
    taken = Encoded.of(files).take(np.array(index, np.int64))
    assert values(taken) == [files[i] for i in index]
    assert values(taken[1:]) == [files[i] for i in index][1:], "and may be cut again"


def test_a_null_has_no_address_and_an_empty_value_has_one() -> None:
    encoded = Encoded.of([None, b"", b"x"])
    assert (encoded.at != 0).tolist() == [False, True, True]
    assert encoded.view(0) is None
    assert encoded.view(1) is not None
    assert repr(encoded) == "Encoded(3 images, 1 bytes, 1 nulls)"


def test_what_pillow_opened_goes_along() -> None:
    encoded, headers, _ = judged([jpeg(), encode(picture(9, 8), "GIF"), jpeg(), encode(picture(7, 6), "BMP")])
    assert headers["height"].tolist() == [24, 9, 24, 7]
    assert {i: image.format for i, image in encoded.opened.items()} == {1: "GIF", 3: "BMP"}
    assert {i: image.format for i, image in encoded[2:4].opened.items()} == {1: "BMP"}
    taken = encoded.take(np.array([3, 0, 1]))
    assert {i: image.format for i, image in taken.opened.items()} == {0: "BMP", 2: "GIF"}


class Bytes(bytearray):
    """That can be watched."""


@pytest.mark.parametrize("of", [lambda encoded: encoded[:1], lambda encoded: encoded.take(np.array([0]))])
def test_memory_stays_as_long_as_a_part_or_a_view_of_it(of: Callable[[Encoded], Encoded]) -> None:
    owner = Bytes(b"pixels")
    gone = weakref.ref(owner)
    encoded = Encoded.of([owner])
    del owner
    part = of(encoded)
    del encoded
    view = part.view(0)
    del part
    gc.collect()
    assert gone() is not None
    assert view is not None
    assert view.tobytes() == b"pixels"
    assert not view.flags.writeable
    del view
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("at", [np.zeros(3, np.uint64), np.zeros((2, 2), np.uint64)])
def test_addresses_and_sizes_belong_together(at: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"Expected at and size of one shape \[N\]"):
        Encoded(at, np.zeros(at.shape[:1] if at.ndim == 2 else 2, np.int64), None)
