"""Columns without pixels or tokens: numbers as owned tensors of one dtype, everything else as Python values."""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Callable
from typing import Any

import lance
import lance.arrow
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from making import jpeg

from gpuload import LanceDataset, RowError
from gpuload.fields.numbers import to_tensor

pytestmark = pytest.mark.filterwarnings("ignore::gpuload.BadRowWarning")  # met on purpose in some tests here

Store = Callable[..., str]
BIG = 2**60 + 1  # no float64

INTEGERS = {
    pa.int8(): torch.int8,
    pa.int16(): torch.int16,
    pa.int32(): torch.int32,
    pa.int64(): torch.int64,
    pa.uint8(): torch.uint8,
    pa.uint16(): torch.uint16,
    pa.uint32(): torch.uint32,
    pa.uint64(): torch.int64,
}
FLOATS = {pa.float16(): torch.float16, pa.float32(): torch.float32, pa.float64(): torch.float64}
NUMBERS = {**INTEGERS, **FLOATS, pa.bool_(): torch.bool}


def numbers(kind: pa.DataType) -> list[Any]:
    """Seven values of a type, its limits among them."""
    if pa.types.is_boolean(kind):
        return [True, False, True, True, False, False, True]
    if pa.types.is_floating(kind):
        return [kind.to_pandas_dtype()(value) for value in (0.0, -1.5, 2.25, 1024.0, float("inf"), -0.0, 0.1)]
    info = np.iinfo(kind.to_pandas_dtype())
    top = min(int(info.max), 2**63 - 1)
    return [0, 1, int(info.min), top, 7, 99, top - 1]


def read(path: str, batch_size: int, **options: Any) -> list[Any]:
    return list(LanceDataset(path, batch_size, device="cpu", **options))


@pytest.mark.parametrize("kind", NUMBERS, ids=str)
def test_numbers_are_exact_tensors_of_their_own_dtype(kind: pa.DataType, store: Store, device: str) -> None:
    values = (
        pa.array(numbers(kind)).cast(kind) if not pa.types.is_float16(kind) else pa.array(np.float16(numbers(kind)))
    )
    path = store({"x": values})
    batches = list(LanceDataset(path, 3, device=device))
    found = torch.cat([batch["x"].cpu() for batch in batches])
    assert {batch["x"].dtype for batch in batches} == {NUMBERS[kind]}
    assert {batch["x"].device.type for batch in batches} == {device}
    assert found.tolist() == values.to_pylist()
    assert not any(batch.nulls for batch in batches)


@pytest.mark.parametrize("kind", NUMBERS, ids=str)
def test_dtype_is_the_same_where_only_some_batches_have_nulls(kind: pa.DataType, store: Store) -> None:
    values = [*numbers(kind)[:4], None, *numbers(kind)[4:6], None, numbers(kind)[6]]
    batches = read(store({"x": pa.array(values, kind)}), 4)  # the first batch has none, the second has two
    assert {batch["x"].dtype for batch in batches} == {NUMBERS[kind]}
    found = [value for batch in batches for value in batch["x"].tolist()]
    if pa.types.is_floating(kind):
        exact = pa.array(values, kind).to_pylist()
        assert [None if value != value else value for value in found] == exact
        assert not any(batch.nulls for batch in batches)
    else:
        assert found == [0 if value is None else value for value in values]
        assert batches[0].nulls == {}
        assert batches[1].nulls["x"].tolist() == [True, False, False, True]
        assert batches[2].nulls == {}


def test_large_integers_beside_nulls_stay_exact(store: Store) -> None:
    (batch,) = read(store({"x": pa.array([BIG, None, -BIG], pa.int64())}), 3)
    assert batch["x"].tolist() == [BIG, 0, -BIG]


@pytest.mark.parametrize(
    ("kind", "wrap"),
    [
        (pa.uint64(), lambda value: value),
        (pa.list_(pa.uint64(), 2), lambda value: [1, value]),
        (pa.list_(pa.list_(pa.uint64(), 1), 2), lambda value: [[value], [2]]),
    ],
    ids=["plain", "list", "nested"],
)
def test_a_number_above_int64_is_an_error_of_its_row(
    kind: pa.DataType, wrap: Callable[[int], Any], store: Store
) -> None:
    top = 2**63 - 1
    values = [wrap(value) for value in (5, top, top + 1, 0, 2**64 - 1)]
    path = store({"x": pa.array([*values, None], kind)})
    with pytest.raises(RowError, match=r"2\^63 - 1.*got 9223372036854775808 - at row 2, column `x`") as caught:
        read(path, 6)
    assert (caught.value.row, caught.value.column) == (2, "x")
    (batch,) = read(path, 6, on_error="mask")
    assert batch.valid.tolist() == [True, True, False, True, False, True]
    assert batch["x"].tolist()[:2] == values[:2]
    assert not batch["x"][[2, 4, 5]].any()
    assert batch.nulls["x"].tolist() == [False] * 5 + [True]
    (batch,) = read(path, 6, on_error="skip")
    assert batch.rows.tolist() == [0, 1, 3, 5]


def test_nulls_are_counted(store: Store) -> None:
    dataset = LanceDataset(store({"x": pa.array([1, None, None], pa.int64())}), 2, device="cpu")
    list(dataset)
    assert dataset.stats()["nulls"] == 2


def test_bfloat16_keeps_its_bits_and_nulls_are_nan(store: Store) -> None:
    values = [1.5, None, -3.25, 1e30, None]
    batches = read(store({"x": lance.arrow.bfloat16_array(values)}), 2)
    assert {batch["x"].dtype for batch in batches} == {torch.bfloat16}
    found = torch.cat([batch["x"] for batch in batches]).float().tolist()
    exact = [None if v is None else torch.tensor(v).bfloat16().item() for v in values]
    assert [None if v != v else v for v in found] == exact
    assert not any(batch.nulls for batch in batches)


LISTS: dict[str, tuple[pa.DataType, list[Any], Any, list[bool] | None]] = {
    # type, values, the tensor as nested lists, rows with a null
    "float": (pa.list_(pa.float32(), 2), [[1, 2], [3, 4], [5, 6]], [[1, 2], [3, 4], [5, 6]], None),
    "int": (pa.list_(pa.int16(), 2), [[1, 2], [3, 4], [5, -6]], [[1, 2], [3, 4], [5, -6]], None),
    "int_null_row": (pa.list_(pa.int64(), 2), [[BIG, 2], None, [5, 6]], [[BIG, 2], [0, 0], [5, 6]], [0, 1, 0]),
    "int_null_inside": (pa.list_(pa.int64(), 2), [[1, None], [BIG, 4], [5, 6]], [[1, 0], [BIG, 4], [5, 6]], [1, 0, 0]),
    "bool": (pa.list_(pa.bool_(), 3), [[1, 0, 1], [0, 0, 1], [1, 1, 0]], [[1, 0, 1], [0, 0, 1], [1, 1, 0]], None),
    "bool_null_row": (pa.list_(pa.bool_(), 2), [[1, 0], None, [1, 1]], [[1, 0], [0, 0], [1, 1]], [0, 1, 0]),
    "nested": (
        pa.list_(pa.list_(pa.int32(), 2), 2),
        [[[1, 2], [3, 4]], [[5, 6], [7, 8]], [[9, 10], [11, 12]]],
        [[[1, 2], [3, 4]], [[5, 6], [7, 8]], [[9, 10], [11, 12]]],
        None,
    ),
}


def booleans(values: Any) -> Any:
    return [booleans(v) for v in values] if isinstance(values, list) else None if values is None else bool(values)


@pytest.mark.parametrize("name", LISTS)
def test_fixed_size_lists_are_tensors(name: str, store: Store) -> None:
    kind, values, expected, null = LISTS[name]
    if "bool" in name:
        values, expected = booleans(values), booleans(expected)
    batches = read(store({"x": pa.array(values, kind)}, max_rows_per_file=2), 2)
    assert torch.cat([batch["x"] for batch in batches]).tolist() == expected
    flags = [flag for batch in batches for flag in batch.nulls.get("x", torch.zeros(batch.size)).tolist()]
    assert flags == (null or [0, 0, 0])


def test_nulls_in_lists_of_floats_are_nan(store: Store) -> None:
    values = pa.array([[1.0, None], None, [3.0, 4.0]], pa.list_(pa.float32(), 2))
    (batch,) = read(store({"x": values}), 3)
    assert batch["x"].isnan().tolist() == [[False, True], [True, True], [False, False]]
    assert batch["x"][~batch["x"].isnan()].tolist() == [1.0, 3.0, 4.0]
    assert batch.nulls == {}


@pytest.mark.parametrize("permutation", [None, [0, 1], [1, 0]])
def test_fixed_shape_tensors_have_their_logical_shape(permutation: list[int] | None, store: Store) -> None:
    kind = pa.fixed_shape_tensor(pa.int32(), (2, 3), permutation=permutation)
    stored = np.arange(4 * 6, dtype=np.int32).reshape(4, 2, 3)
    column = pa.ExtensionArray.from_storage(kind, pa.array(stored.reshape(4, 6).tolist(), kind.storage_type))
    dataset = LanceDataset(store({"x": column}), 3, device="cpu")
    found = torch.cat([batch["x"] for batch in dataset])
    expected = stored.transpose(0, *[1 + p for p in permutation or [0, 1]])
    np.testing.assert_array_equal(found.numpy(), expected)
    assert f"int32[B, {expected.shape[1]}, {expected.shape[2]}]" in repr(dataset)


def test_permutation_of_three_dimensions_is_that_of_arrows_specification(store: Store) -> None:
    """Logical dimension i is stored dimension permutation[i]. (pyarrow 26 itself returns jumbled values here.)"""
    kind = pa.fixed_shape_tensor(pa.int32(), (2, 3, 4), permutation=[2, 0, 1])
    storage = pa.array(np.arange(24, dtype=np.int32)[None].tolist(), kind.storage_type)
    column = pa.ExtensionArray.from_storage(kind, storage)
    (batch,) = read(store({"x": column}), 1)
    np.testing.assert_array_equal(batch["x"][0].numpy(), np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1))


@pytest.mark.parametrize("name", ["number", "list", "bool", "bfloat16"])
def test_tensors_are_owned_and_writable(name: str, store: Store) -> None:
    """Writing to a batch changes no other batch, no other epoch and no Arrow memory."""
    column = {
        "number": pa.array(range(8), pa.int32()),
        "list": pa.array([[i, i + 1] for i in range(8)], pa.list_(pa.int32(), 2)),
        "bool": pa.array([True] * 8),
        "bfloat16": lance.arrow.bfloat16_array([float(i) for i in range(8)]),
    }[name]
    dataset = LanceDataset(store({"x": column, "y": column}), 4, device="cpu")
    before = [batch["x"].clone() for batch in dataset]
    for batch, expected in zip(dataset, before, strict=True):
        assert torch.equal(batch["x"], expected)
        batch["x"].zero_()
        assert torch.equal(batch["y"], expected)
    for batch, expected in zip(dataset, before, strict=True):
        assert torch.equal(batch["x"], expected)


SLICED = {
    "int": pa.array([1, None, 3, 4, None, 6], pa.int32()),
    "bool": pa.array([True, None, False, True, None, True]),
    "bfloat16": lance.arrow.bfloat16_array([1.0, 2.0, None, 4.0, 5.0, 6.0]),
    "list": pa.array([[1, 2], None, [3, 4], [5, None], [7, 8], [9, 10]], pa.list_(pa.int16(), 2)),
    "nested": pa.array([[[i], [i + 1]] for i in range(6)], pa.list_(pa.list_(pa.int8(), 1), 2)),
}


@pytest.mark.parametrize("name", SLICED)
@pytest.mark.parametrize(("start", "stop"), [(0, 6), (2, 5), (3, 6), (4, 4)])
def test_a_slice_of_an_arrow_column_is_its_own_rows(name: str, start: int, stop: int) -> None:
    """A sampler of the user's own, and rebatching, hand over slices."""
    whole, null = to_tensor(pa.chunked_array([SLICED[name]]))
    part, part_null = to_tensor(pa.chunked_array([SLICED[name].slice(start, stop - start)]))
    assert part.dtype == whole.dtype
    torch.testing.assert_close(part, whole[start:stop], equal_nan=True, atol=0, rtol=0)
    nothing = np.zeros(stop - start, bool)
    np.testing.assert_array_equal(
        nothing if part_null is None else part_null, nothing if null is None else null[start:stop]
    )


def test_converting_leaves_the_arrow_memory_alone() -> None:
    column = pa.chunked_array([pa.array([1, 2, 3], pa.int64())])
    tensor, _ = to_tensor(column)
    tensor += 100
    assert column.to_pylist() == [1, 2, 3]


def test_row_columns_are_tensors(store: Store) -> None:
    path = store({"x": range(6)}, max_rows_per_file=4)
    batches = read(path, 4, with_row_id=True, with_row_address=True)
    table = lance.dataset(path).to_table(with_row_id=True, with_row_address=True)
    for name in ("_rowid", "_rowaddr"):
        assert torch.cat([batch[name] for batch in batches]).tolist() == table[name].to_pylist()


# -- what has no tensor form ---------------------------------------------------------------------------------------

DAY = datetime.date(2024, 2, 29)
MOMENT = datetime.datetime(2024, 2, 29, 12, 30, 1, 250_000)
OTHERS: dict[str, tuple[pa.DataType, list[Any]]] = {
    "string": (pa.string(), ["a", None, "", "Fluß 山"]),
    "large_string": (pa.large_string(), ["a", None, "", "Fluß 山"]),
    "binary": (pa.binary(), [b"a", None, b"", b"\x00\xff"]),
    "large_binary": (pa.large_binary(), [b"a", None, b"", b"\x00\xff"]),
    "fixed_binary": (pa.binary(3), [b"abc", None, b"xyz", b"\x00\x01\x02"]),
    "date32": (pa.date32(), [DAY, None, DAY, DAY]),
    "date64": (pa.date64(), [DAY, None, DAY, DAY]),
    "time32": (pa.time32("ms"), [MOMENT.time(), None, MOMENT.time(), MOMENT.time()]),
    "time64": (pa.time64("us"), [MOMENT.time(), None, MOMENT.time(), MOMENT.time()]),
    "timestamp_s": (pa.timestamp("s"), [MOMENT.replace(microsecond=0), None, MOMENT.replace(microsecond=0), None]),
    "timestamp_us": (pa.timestamp("us"), [MOMENT, None, MOMENT, MOMENT]),
    "timestamp_tz": (pa.timestamp("us", "UTC"), [MOMENT.replace(tzinfo=datetime.timezone.utc), None, None, None]),
    "duration": (pa.duration("us"), [datetime.timedelta(seconds=3), None, datetime.timedelta(0), None]),
    "decimal128": (pa.decimal128(20, 3), [decimal.Decimal("1.250"), None, decimal.Decimal("-7.000"), None]),
    "decimal256": (pa.decimal256(40, 3), [decimal.Decimal("1.250"), None, decimal.Decimal("-7.000"), None]),
    "list_int": (pa.list_(pa.int64()), [[1, 2], None, [], [BIG, None]]),
    "large_list": (pa.large_list(pa.int64()), [[1, 2], None, [], [BIG]]),
    "list_string": (pa.list_(pa.string()), [["a"], None, [], ["b", None]]),
    "list_of_lists": (pa.list_(pa.list_(pa.int8())), [[[1], []], None, [], [[2, 3]]]),
    "list_of_structs": (pa.list_(pa.struct([("a", pa.int8())])), [[{"a": 1}], [], [{"a": None}], []]),
    "struct": (
        pa.struct([("a", pa.int64()), ("b", pa.string())]),
        [{"a": BIG, "b": None}, {"a": 1, "b": "x"}, {"a": None, "b": None}, {"a": 2, "b": ""}],
    ),
    "struct_nested": (
        pa.struct([("a", pa.struct([("b", pa.list_(pa.int8()))]))]),
        [{"a": {"b": [1]}}, {"a": {"b": []}}, {"a": {"b": [2, 3]}}, {"a": {"b": [4]}}],
    ),
    "map": (pa.map_(pa.string(), pa.int64()), [[("a", 1)], None, [], [("b", BIG)]]),
    "dictionary": (pa.dictionary(pa.int8(), pa.string()), ["cat", None, "dog", "cat"]),
    "dictionary_int": (pa.dictionary(pa.int16(), pa.int64()), [BIG, None, 1, BIG]),
    "null": (pa.null(), [None] * 4),
    "fsl_date": (pa.list_(pa.date32(), 1), [[DAY], [DAY], [DAY], [DAY]]),
    "image_uri": (lance.arrow.ImageURIType(), ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]),
    "json": (pa.json_(), ['{"a":1}', "[1]", "null", '"x"']),
    "uuid": (pa.uuid(), [bytes(range(16)), None, bytes(16), bytes(16)]),
    "string_view": (pa.string_view(), ["a", None, "", "a string longer than twelve bytes"]),
    "binary_view": (pa.binary_view(), [b"a", None, b"", b"bytes longer than twelve bytes"]),
    "list_view": (pa.list_view(pa.int64()), [[1], [], [2, 3], [4]]),
    "interval": (pa.month_day_nano_interval(), [(1, 2, 3), None, None, None]),
    "decimal32": (pa.decimal32(5, 2), [decimal.Decimal("1.25"), None, None, None]),
    "decimal64": (pa.decimal64(12, 2), [decimal.Decimal("1.25"), None, None, None]),
    "fsl_half_null": (pa.list_(pa.float16(), 2), [[np.float16(1), None], None, [np.float16(2)] * 2, None]),
    "fsl_of_fsl_bool": (pa.list_(pa.list_(pa.bool_(), 2), 1), [[[True, None]], None, [[True, False]], [None]]),
}
VERSIONS = ("2.0", "2.1", "stable")
REFUSED = {  # by Lance 14.0.2, when it writes
    **dict.fromkeys(["list_view", "interval", "decimal32", "decimal64"], VERSIONS),
    "map": ("2.0", "2.1"),
}
TENSORS = ("fsl_half_null", "fsl_of_fsl_bool")


def column_of(kind: pa.DataType, values: list[Any]) -> pa.Array:
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, pa.array(values, kind.storage_type))
    return pa.array(values, kind)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", OTHERS)
def test_nothing_that_lance_can_store_raises_on_sight(name: str, version: str, store: Store) -> None:
    column = column_of(*OTHERS[name])
    table = pa.table({"x": column, "number": range(4)})
    try:
        path = store(table, data_storage_version=version, max_rows_per_file=3)
    except OSError:
        assert version in REFUSED[name]
        return
    batches = read(path, 3)
    assert [batch.size for batch in batches] == [3, 1]
    assert [n for batch in batches for n in batch["number"].tolist()] == [0, 1, 2, 3]
    if name in TENSORS:
        assert len({batch["x"].dtype for batch in batches}) == 1
    else:
        stored = lance.dataset(path).to_table()["x"].to_pylist()
        assert [value for batch in batches for value in batch["x"]] == stored


@pytest.mark.filterwarnings("ignore::gpuload.BadRowWarning")
@pytest.mark.parametrize("kind", NUMBERS, ids=str)
def test_every_dtype_survives_a_skipped_row(kind: pa.DataType, store: Store) -> None:
    values = (
        [None if v is None else np.float16(v) for v in numbers(kind)] if pa.types.is_float16(kind) else numbers(kind)
    )
    column = pa.array([None, *values[1:]], kind)
    images = [jpeg(), None, *[jpeg(seed=i) for i in range(5)]]
    (batch,) = read(store({"x": column, "image": images}), 7, on_error="skip")
    assert batch.size == 6
    assert batch["x"].dtype == NUMBERS[kind]
    assert batch["x"].tolist()[1:] == column.to_pylist()[2:]
    if not pa.types.is_floating(kind):
        assert batch.nulls["x"].tolist() == [True, *[False] * 5]


KINDS = st.sampled_from([*INTEGERS, pa.bool_(), pa.list_(pa.int16(), 3), pa.list_(pa.bool_(), 2)])


@given(st.data(), KINDS, st.integers(1, 40), st.integers(1, 15), st.integers(1, 15), st.sampled_from(["2.0", "stable"]))
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_values_and_nulls_are_right_wherever_batches_and_fragments_end(
    store: Store, data: Any, kind: pa.DataType, rows: int, batch_size: int, fragment: int, version: str
) -> None:
    inner = kind.value_type if pa.types.is_fixed_size_list(kind) else kind
    one = st.booleans() if pa.types.is_boolean(inner) else st.integers(0, 100)
    one = st.none() | one
    if inner is not kind:
        one = st.none() | st.lists(one, min_size=kind.list_size, max_size=kind.list_size)
    values = data.draw(st.lists(one, min_size=rows, max_size=rows))
    path = store({"x": pa.array(values, kind)}, max_rows_per_file=fragment, data_storage_version=version)
    flat = [v if isinstance(v, list) else [v] * (kind.list_size if inner is not kind else 1) for v in values]
    found = [value for batch in read(path, batch_size) for value in batch["x"].tolist()]
    flags = [f for b in read(path, batch_size) for f in b.nulls.get("x", torch.zeros(b.size, dtype=bool)).tolist()]
    zeros = [[0 if v is None else v for v in row] for row in flat]
    assert found == (zeros if inner is not kind else [row[0] for row in zeros])
    assert flags == [None in row for row in flat]
