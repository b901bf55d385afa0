"""Pointers: every stored form of images, in any chunks and slices, without a copy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance.arrow
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making import jpeg

from gpuload import Encoded, LanceDataset
from gpuload.images.encoded import from_arrow

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
LARGE = pa.struct([("path", pa.string()), ("bytes", pa.large_binary())])
KINDS = [pa.binary(), pa.large_binary(), pa.binary_view(), STRUCT, LARGE, lance.arrow.EncodedImageType(pa.binary())]


def stored(values: list[bytes | None], kind: pa.DataType) -> pa.Array:
    """An array of these images; in a struct a null is one of its bytes, every other one of the struct itself."""
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, pa.array(values, kind.storage_type))
    if pa.types.is_struct(kind):
        rows = [None if v is None and i % 2 else {"bytes": v, "path": None} for i, v in enumerate(values)]
        return pa.array(rows, kind)
    return pa.array(values, kind)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.lists(st.one_of(st.none(), st.binary(max_size=9)), max_size=6), max_size=4), st.sampled_from(KINDS),
    st.integers(0, 3), st.integers(0, 3),
)  # fmt: skip
def test_every_value_is_where_it_is_said_to_be(
    chunks: list[list[bytes | None]], kind: pa.DataType, before: int, after: int
) -> None:
    column = pa.chunked_array([stored(values, kind) for values in chunks], kind)
    column = column.slice(before, max(0, len(column) - before - after))
    wanted = [value for values in chunks for value in values][before : before + len(column)]
    encoded, errors, read = from_arrow(column)
    del column  # the pointers keep the memory
    assert (len(encoded), errors, read) == (len(wanted), {}, 0)
    found = [None if (view := encoded.view(i)) is None else bytes(view) for i in range(len(encoded))]
    assert found == wanted
    assert (encoded.at == 0).tolist() == [value is None for value in wanted]
    assert encoded.size.tolist() == [len(value or b"") for value in wanted]


def test_no_byte_is_copied_and_a_view_cannot_be_written_to() -> None:
    array = pa.array([b"abc", b"defg"], pa.binary())
    encoded, _, _ = from_arrow(pa.chunked_array([array]))
    assert int(encoded.at[1]) == array.buffers()[2].address + 3
    view: Any = encoded.view(1)
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1


def test_slices_and_picks_share_the_memory() -> None:
    encoded = Encoded.of([b"a", None, b"", b"bcd"])
    assert [encoded[1:3].view(i) is None for i in range(2)] == [True, False]
    picked = encoded.take(np.array([3, 0, 3]))
    assert [bytes(picked.view(i)) for i in range(3)] == [b"bcd", b"a", b"bcd"]  # type: ignore[arg-type]
    assert repr(encoded) == "Encoded(4 images, 4 bytes, 1 nulls)"
    with pytest.raises(ValueError, match="of one shape"):
        Encoded(np.zeros(2, np.uint64), np.zeros(3, np.int64), None)


def test_images_that_are_only_paths_count_as_read(store: Callable[..., str], tmp_path: Path) -> None:
    """So that readahead_bytes bounds them, too."""
    file = tmp_path / "a.jpg"
    file.write_bytes(jpeg(200, 300))
    rows = [{"bytes": None, "path": str(file)}, {"bytes": jpeg(), "path": None}] * 8
    dataset = LanceDataset(store({"image": pa.array(rows, STRUCT)}), 4, device="cpu")
    for batch in dataset:
        assert batch.valid.all()
    assert dataset.stats()["bytes_read"] > 8 * file.stat().st_size
