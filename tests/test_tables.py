"""A table on disk: whole columns of numbers, forks, reads past Arrow's 2 GiB, and several batches in one read."""

from __future__ import annotations

import gc
import itertools
import pickle
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lance
import lance.arrow
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support_samplers import EVERY, python, write

from gpuload import ConfigError, LanceDataset, ShuffleSampler
from gpuload.tables import Selection, one_batch
from gpuload.tables.lance import LanceTable
from gpuload.tables.together import read_many, read_together

Store = Callable[..., str]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """100 rows in fragments of 30, 45 and 25; every seventh is deleted. Columns: id, prompt, meta.size, meta.name."""
    return write(tmp_path_factory.mktemp("tables") / "rows.lance", [30, 45, 25], range(0, 100, 7))


# -- whole columns of small values ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pa.int32(), pa.uint64(), pa.float16(), pa.float64(), pa.bool_()], ids=str)
def test_a_small_column_keeps_its_dtype(store: Store, kind: pa.DataType) -> None:
    values = np.array([0, 1, 1, 0, 1]).astype(kind.to_pandas_dtype())
    found = LanceTable(store({"x": pa.array(values)}, max_rows_per_file=2)).small("x")
    assert found.dtype == values.dtype
    assert found.tolist() == values.tolist()


@pytest.mark.parametrize("options", [{}, {"filter": "id % 3 = 0"}, {"samples": 20}, {"filter": "id > 9", "samples": 5}])
@pytest.mark.parametrize(
    ("column", "value"), [("id", lambda i: i), ("meta.size", lambda i: 2 * i), ("id * 2 + 1", lambda i: 2 * i + 1)]
)
def test_a_small_column_has_the_rows_that_are_used(rows: Any, options: Any, column: str, value: Any) -> None:
    table = LanceTable(rows, ["id"], **options)
    ids = table.read(np.array([[0, table.rows]])).column("id").to_pylist()
    assert table.small(column).tolist() == [value(i) for i in ids]


def test_a_small_column_may_be_an_output_column(rows: Any, tmp_path: Path) -> None:
    table = LanceTable(rows, {"id": "0 - id", "weight": "CAST(id AS DOUBLE) / 2"}, filter="id > 90")
    expected = [-i for i in range(92, 100) if i % 7]
    assert table.small("id").tolist() == expected
    assert table.small("weight").tolist() == [-i / 2 for i in expected]
    table.use_cache(str(tmp_path))
    assert table.small("id").tolist() == expected
    assert table.small("meta.size").tolist() == [-2 * i for i in expected]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("prompt", "of numbers.*'prompt'.*string"),
        ("meta", "of numbers.*'meta'.*struct"),
        ("promt", "Did you mean 'prompt'"),
        ("id +", "'id \\+'"),
    ],
)
def test_a_small_column_of_something_else_is_an_error(rows: Any, column: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LanceTable(rows, ["id"]).small(column)


def test_a_null_in_a_small_column_is_an_error_with_its_position(store: Store) -> None:
    path = store({"weight": pa.array([1, 2, 3, None, 5], pa.int64()), "id": range(5)})
    with pytest.raises(ConfigError, match=r"'weight' without nulls.*position 3"):
        LanceTable(path, filter="id > 1").small("weight")
    assert LanceTable(path, filter="id <> 3").small("weight").tolist() == [1, 2, 3, 5]


# -- where columns come from ---------------------------------------------------------------------------------------


def test_outputs_of_one_column_are_recognised(rows: Any) -> None:
    columns = {"global": "meta.name", "local": "meta.name", "prompt": "prompt", "loud": "upper(prompt)"}
    table = LanceTable(rows, columns)
    assert table.origin("global") == table.origin("local") == "meta.name"
    assert table.origin("prompt") == "prompt"
    assert table.origin("loud") == "upper(prompt)"
    assert LanceTable(rows, ["prompt"]).origin("prompt") == "prompt"
    with pytest.raises(ConfigError, match="Did you mean 'local'"):
        table.origin("locla")


# -- numbers in random order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"filter": "id % 3 = 0"}, {"columns": {"id": "id", "twice": "id * 2"}}], ids=str
)
def test_numbers_in_random_order_are_read_once(store: Store, options: Any, takes: list[int]) -> None:
    """Every row once, in both epochs, with far fewer calls of Lance than batches."""
    path = store({"id": range(40_000), "x": np.arange(80_000, dtype=np.float32)[::2]}, max_rows_per_file=4000)
    words = {"columns": ["id", "x"], "device": "cpu", **options}
    dataset = LanceDataset(path, 100, shuffle=True, **words)
    expected = [i for i in range(40_000) if "filter" not in options or i % 3 == 0]
    for _ in range(2):
        batches = list(dataset)
        assert sorted(i for batch in batches for i in batch["id"].tolist()) == expected
        for batch in batches[::50]:
            other = batch["twice"] if "columns" in options else batch["x"]
            assert other.tolist() == [2 * i for i in batch["id"].tolist()]
    assert len(takes) < len(batches) / 2
    assert pickle.loads(pickle.dumps(LanceTable(path, ["id"]))).rows == 40_000


# -- identity ------------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_computed_once_and_not_to_open(rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving costs the same at 10 and at 10,000 fragments."""
    looked = [0]
    real = lance.LanceDataset.get_fragments

    def get_fragments(self: Any, *args: Any, **options: Any) -> Any:
        fragments = real(self, *args, **options)
        for fragment in fragments:
            data_files = fragment.data_files
            fragment.data_files = lambda files=data_files: (looked.append(1), files())[1]
        return fragments

    monkeypatch.setattr(lance.LanceDataset, "get_fragments", get_fragments)
    dataset = LanceDataset(rows, 8, columns=["id"])
    len(dataset)
    assert sum(looked) == 0
    first = dataset.state_dict()
    assert sum(looked) == 3
    assert [dataset.state_dict() for _ in range(3)] == [first] * 3
    assert sum(looked) == 3


def test_the_fingerprint_is_of_the_version(tmp_path: Path) -> None:
    opened = write(tmp_path / "a.lance", [5, 5])
    before = LanceTable(opened).fingerprint()
    assert LanceTable(str(tmp_path / "a.lance")).fingerprint() == before
    lance.write_dataset(opened.to_table(), str(tmp_path / "a.lance"), mode="append")
    assert LanceTable(opened).fingerprint() == before
    assert LanceTable(str(tmp_path / "a.lance")).fingerprint() != before


# -- fork ----------------------------------------------------------------------------------------------------------

FORK_AGAIN = """
import os, sys
from gpuload import ForkError, LanceDataset
path = sys.argv[1]
next(iter(LanceDataset(path, 8, columns=["id"])))

def answer(who):
    try:
        LanceDataset(path, 8, columns=["id"]).schema
        print(who, "opened", flush=True)
    except ForkError:
        print(who, "ForkError", flush=True)

def forked(then):
    child = os.fork()
    if not child:
        then()
        os._exit(0)
    os.waitpid(child, 0)

def child():
    forked(grandchild)
    answer("child")
    forked(grandchild)

def grandchild():
    answer("grandchild")
    forked(lambda: answer("its child"))

forked(child)
print(LanceDataset(path, 8, columns=["id"]).schema.names)
"""


def test_a_fork_of_a_fork_knows_that_lance_was_running(rows: Any) -> None:
    done = python(FORK_AGAIN, rows.uri, timeout=60)
    assert done.returncode == 0, done.stderr
    below = ["grandchild ForkError", "its child ForkError"]
    assert done.stdout.splitlines() == [*below, "child ForkError", *below, "['id']"]


# -- past 2 GiB ----------------------------------------------------------------------------------------------------

VALUES: dict[str, tuple[pa.DataType, list[Any], pa.DataType]] = {
    # stored type, values, the type of a batch that is too large for it
    "binary": (pa.binary(), [b"ab", None, b"", b"cdef"], pa.large_binary()),
    "string": (pa.string(), ["é", None, "", "x"], pa.large_string()),
    "large": (pa.large_binary(), [b"ab", None, b"", b"c"], pa.large_binary()),
    "image": (
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        [{"bytes": b"ab", "path": None}, None, {"bytes": None, "path": "x"}, {"bytes": b"", "path": "y"}],
        pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())]),
    ),
    "list": (pa.list_(pa.binary()), [[b"a", None], None, [], [b"bc"]], pa.large_list(pa.large_binary())),
    "pairs": (
        pa.list_(pa.binary(), 2),
        [[b"a", None], None, [b"b", b"c"], [b"", b""]],
        pa.list_(pa.large_binary(), 2),
    ),
    "number": (pa.int64(), [1, None, 3, 4], pa.int64()),
    "vector": (pa.list_(pa.float32(), 2), [[1, 2], None, [3, 4], [5, 6]], pa.list_(pa.float32(), 2)),
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("limit", [0, 2**31 - 1])
def test_one_batch_has_all_rows(name: str, limit: int) -> None:
    kind, values, large = VALUES[name]
    chunks = [pa.array(values, kind), pa.array(values, kind)[1:3], pa.array([], kind)]
    schema = pa.schema([pa.field("x", kind, metadata={"a": "b"}), ("id", pa.int32())], metadata={"c": "d"})
    table = pa.table([pa.chunked_array(chunks), pa.array(range(6), pa.int32())], schema=schema)
    batch = one_batch(table, limit)
    assert batch.to_pylist() == table.to_pylist()
    assert batch.schema.field("x").type == (large if limit == 0 else kind)
    assert batch.schema.field("x").metadata == {b"a": b"b"}
    assert batch.schema.metadata == {b"c": b"d"}
    assert batch.schema.field("id").type == pa.int32()


@given(
    parts=st.lists(st.lists(st.one_of(st.none(), st.binary(max_size=5)), max_size=4), max_size=4),
    limit=st.integers(0, 20),
)
def test_no_limit_changes_the_rows_of_one_batch(parts: list[list[bytes | None]], limit: int) -> None:
    column = pa.chunked_array([pa.array(part, pa.binary()) for part in parts], pa.binary())
    batch = one_batch(pa.table({"x": column}), limit)
    assert batch["x"].to_pylist() == column.to_pylist()


def test_one_batch_of_extension_types() -> None:
    numbers = lance.arrow.bfloat16_array([1.0, None, 2.0])
    images = lance.arrow.EncodedImageType().wrap_array(pa.array([b"a", None, b"bc"]))
    for array, kind in ((numbers, numbers.type), (images, pa.large_binary())):
        table = pa.table({"x": pa.chunked_array([array, array])})
        assert one_batch(table)["x"].equals(pa.concat_arrays([array, array]))
        assert one_batch(table, 0).schema.field("x").type == kind
        assert one_batch(table, 0).num_rows == 6
        assert one_batch(table.slice(0, 0)).num_rows == 0


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lance with offsets that overflow above three rows; the numbers of rows that it was asked for."""
    asked: list[int] = []
    real = lance.LanceDataset.take

    def take(self: Any, indices: Any, *args: Any, **options: Any) -> pa.Table:
        asked.append(len(indices))
        if len(indices) > 3:
            raise OSError("LanceError(Arrow): Offset overflow error: 2147483648, /home/lance/take.rs:617:22")
        return real(self, indices, *args, **options)

    monkeypatch.setattr(lance.LanceDataset, "take", take)
    return asked


@pytest.mark.parametrize("columns", [["id", "prompt"], {"id": "id", "prompt": "upper(prompt)"}], ids=["plain", "sql"])
@pytest.mark.parametrize("options", [{}, {"filter": "id % 2 = 0"}], ids=str)
def test_a_read_that_overflows_is_done_in_parts(rows: Any, columns: Any, options: Any, narrow: list[int]) -> None:
    table = LanceTable(rows, columns, **options)
    index = np.array([30, 3, 12, 3, 25, 8, 9, 40, 1, 0, 22])
    found = table.read(np.stack([index, index + 1], 1))
    ids = rows.to_table(["id"], filter=options.get("filter"))["id"].to_pylist()
    assert found["id"].to_pylist() == [ids[i] for i in index]
    assert [text.lower() for text in found["prompt"].to_pylist()] == [f"row {ids[i]}" for i in index]
    asked = len(narrow)
    table.read(np.stack([index, index + 1], 1))
    assert max(narrow[asked:]) <= 3  # it is known by now what is too much


def test_one_row_that_overflows_is_lances_error(rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def take(*args: Any, **options: Any) -> Any:
        raise OSError("LanceError(Arrow): Offset overflow error: 2147483648")

    monkeypatch.setattr(lance.LanceDataset, "take", take)
    with pytest.raises(OSError, match="Offset overflow"):
        LanceTable(rows, ["id"]).read(np.array([[5, 6], [3, 4]]))


def huge(folder: Path, kind: str) -> tuple[str, list[bytes]]:
    """33 rows of 64 MiB and a bit, 2 GiB and 33 kB together; a path and the first bytes of each."""
    starts = [b"%04d" % i for i in range(33)]
    noise = np.random.default_rng(0).bytes(1 << 20)

    def batches() -> Any:
        for start in starts:
            image = start + noise * 64 + bytes(1000)
            value = {"bytes": image, "path": "x"} if kind == "struct" else image
            stored = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if kind == "struct" else pa.binary()
            yield pa.record_batch({"image": pa.array([value], stored)})

    schema = next(batches()).schema
    lance.write_dataset(pa.RecordBatchReader.from_batches(schema, batches()), str(folder / f"{kind}.lance"))
    return str(folder / f"{kind}.lance"), starts


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("kind", "shuffle"), [("binary", False), ("struct", True)])
def test_batches_of_more_than_2_gib(tmp_path: Path, kind: str, shuffle: bool) -> None:
    """Needs 8 GB of memory and 4 GB of disk."""
    path, starts = huge(tmp_path, kind)
    given = dict(enumerate(starts))
    (batch,) = LanceDataset(path, 64, shuffle=shuffle, to_tensor_fn=None, cache=str(tmp_path) if shuffle else None)
    large = [batch]
    if not shuffle:
        large += ShuffleSampler()(lance.dataset(path), batch_size=64)
    for batch in large:
        column = batch["image"].field("bytes") if kind == "struct" else batch["image"]
        assert column.type == pa.large_binary()
        assert {column[i].as_buffer()[:4].to_pybytes() for i in range(len(column))} == set(given.values())
        assert batch.num_rows == 33


# -- several batches in one read -----------------------------------------------------------------------------------


def ids(rows: Selection) -> list[int]:
    found: list[int] = rows.column("id").to_pylist()
    assert len(found) == rows.size
    return found


some_ranges = st.lists(
    st.tuples(st.integers(0, 84), st.integers(0, 60)).map(lambda r: (r[0], min(r[0] + r[1], 85))),
    min_size=1,
    max_size=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(batches=st.lists(some_ranges, min_size=1, max_size=4), filtered=st.booleans())
def test_a_read_of_many_batches_has_the_rows_of_each(rows: Any, batches: Any, filtered: bool) -> None:
    table = LanceTable(rows, ["id", "prompt"], filter="id <> 5" if filtered else None)
    batches = [np.minimum(np.array(batch), table.rows) for batch in batches]
    found, index = read_many(table, batches)
    everything = found["id"].to_pylist()
    assert everything == sorted(set(everything))
    for ranges, where in zip(batches, index, strict=True):
        assert where.dtype == np.int64
        assert ids(Selection(found, where)) == table.read(ranges)["id"].to_pylist()


@pytest.fixture
def takes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each call of Lance's `take`."""
    asked: list[int] = []
    real = lance.LanceDataset.take

    def take(self: Any, indices: Any, *args: Any, **options: Any) -> pa.Table:
        asked.append(len(indices))
        return real(self, indices, *args, **options)

    monkeypatch.setattr(lance.LanceDataset, "take", take)
    return asked


def plan(sampler: Any, table: LanceTable, batch_size: int = 8) -> list[Any]:
    found = sampler.plan(table.rows, table.fragments, batch_size)
    return [found.ranges(step) for step in range(len(found))]


@pytest.mark.parametrize("kind", sorted(EVERY))
@pytest.mark.parametrize("at_once", [1, 4])
def test_batches_read_together_are_the_same(rows: Any, kind: str, at_once: int) -> None:
    table = LanceTable(rows, ["id"])
    batches = plan(EVERY[kind](0, 1, 3), table)
    together = [ids(read()) for read in read_together(table, batches, at_once)]
    assert together == [table.read(ranges)["id"].to_pylist() for ranges in batches]


def test_scattered_batches_share_a_read_and_runs_do_not(rows: Any, takes: list[int]) -> None:
    table = LanceTable(rows, ["id"])
    for read in read_together(table, plan(ShuffleSampler(seed=1), table), 4):  # 11 batches, the last of 5 rows
        read()
    assert takes == [8, 32, 32, 13]
    takes.clear()
    for read in read_together(table, plan(ShuffleSampler(seed=1, block_size=4), table, 16), 4):
        read()
    assert takes == []  # each a scan of its own


def begun(table: LanceTable, batches: list[Any]) -> Iterator[Callable[[], Selection]]:
    """Reads in fours: the first batch, which has been read, says how large they are."""
    reads = read_together(table, batches, 4)
    next(reads)()
    return reads


def test_batches_are_alone_until_their_size_is_known(rows: Any, takes: list[int]) -> None:
    table = LanceTable(rows, ["id"])
    for read in list(read_together(table, plan(ShuffleSampler(seed=1), table), 4)):
        read()
    assert takes == [8] * 10 + [5]


def test_a_read_of_several_holds_a_number_of_bytes(rows: Any, takes: list[int]) -> None:
    table = LanceTable(rows, ["id"])
    batches = plan(ShuffleSampler(seed=1), table)
    for read in read_together(table, batches, 4, most_bytes=2 * 8 * 8):  # two batches of 8 rows of 8 bytes
        read()
    assert takes == [8] + [16] * 4 + [13]


def test_one_thread_reads_for_all(rows: Any, takes: list[int]) -> None:
    table = LanceTable(rows, ["id"])
    batches = plan(ShuffleSampler(seed=1), table)
    reads = list(itertools.islice(begun(table, batches), 4))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda read: ids(read()), reads))
    assert found == [table.read(ranges)["id"].to_pylist() for ranges in batches[1:5]]
    assert takes[:2] == [8, 32]


def test_a_shared_read_is_kept_no_longer_than_its_batches(rows: Any) -> None:
    table = LanceTable(rows, ["id"])
    reads = list(itertools.islice(begun(table, plan(ShuffleSampler(seed=1), table)), 4))
    kept = weakref.ref(reads[0]().table)
    assert kept() is not None
    for read in reads[1:]:
        read()
    gc.collect()
    assert kept() is None  # although the functions are still there


def test_an_error_stays_with_its_batch(rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table = LanceTable(rows, ["id"])
    batches = plan(ShuffleSampler(seed=1), table)
    broken = int(table.positions(batches[3])[0])  # in the group of batches 1 to 4
    real = lance.LanceDataset.take

    def take(self: Any, indices: Any, *args: Any, **options: Any) -> pa.Table:
        if broken in indices:
            raise OSError(f"row {broken} cannot be read")
        return real(self, indices, *args, **options)

    monkeypatch.setattr(lance.LanceDataset, "take", take)
    for k, read in enumerate(read_together(table, batches, 4)):
        if k == 3:
            with pytest.raises(OSError, match=f"row {broken} cannot be read"):
                read()
        else:
            assert ids(read())
