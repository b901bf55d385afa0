"""Filters, samples, columns and row ids: which rows and what of them, the same with every sampler."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
from support_samplers import EVERY, SHARDED, real_ids, write

from gpuload import ConfigError, Image, LanceDataset

EVERY_KIND = pytest.mark.parametrize("kind", sorted(EVERY))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """100 rows in fragments of 30, 45 and 25; every seventh is deleted."""
    return write(tmp_path_factory.mktemp("filter") / "rows.lance", [30, 45, 25], range(0, 100, 7))


def stored(dataset: Any, column: str = "id", filter: str | None = None, **options: Any) -> list[Any]:
    found: list[Any] = dataset.to_table(filter=filter, **options)[column].to_pylist()
    return found


# -- filter --------------------------------------------------------------------------------------------------------


@EVERY_KIND
@pytest.mark.parametrize("filter", ["id % 2 = 0", "id = 57", "meta.name = 'm12' OR id > 90", "prompt LIKE '%5'"])
def test_a_filter_leaves_the_matching_rows(rows: Any, kind: str, filter: str) -> None:
    dataset = LanceDataset(rows, 8, columns=["id"], filter=filter, sampler=EVERY[kind](0, 1, 0))
    batches = list(dataset)
    expected = stored(rows, filter=filter)
    assert sorted(real_ids(batches)) == expected
    assert [batch.size for batch in batches] == [8] * (len(expected) // 8) + [len(expected) % 8] * bool(
        len(expected) % 8
    )
    positions = [stored(rows).index(i) for i in real_ids(batches)]
    assert [int(row) for batch in batches for row in batch.rows] == positions  # of the dataset, not of the filter


@EVERY_KIND
def test_the_filtered_column_need_not_be_read(rows: Any, kind: str) -> None:
    dataset = LanceDataset(rows, 8, columns=["prompt"], filter="id < 20", sampler=EVERY[kind](0, 1, 0))
    names = {name for batch in dataset for name in batch["prompt"]}
    assert names == {f"row {i}" for i in stored(rows, filter="id < 20")}


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """400 rows with 20 kB of bytes each, 8 MB in 4 fragments."""
    noise = np.random.default_rng(0)
    images = pa.array([b"\xff\xd8\xff\xe0" + noise.bytes(20_000) for _ in range(400)], pa.binary())
    path = str(tmp_path_factory.mktemp("heavy") / "heavy.lance")
    table = pa.table({"id": pa.array(range(400), pa.int64()), "image": images})
    return lance.write_dataset(table, path, max_rows_per_file=100).uri


def read_bytes(dataset: Any) -> int:
    return int(dataset.io_stats_incremental().read_bytes)


@pytest.mark.filterwarnings("ignore::gpuload.BadRowWarning")
@EVERY_KIND
def test_no_image_is_read_to_resolve_a_filter(heavy: str, kind: str) -> None:
    opened = lance.dataset(heavy)
    read_bytes(opened)
    options = {"filter": "id % 3 = 0", "sampler": EVERY[kind](0, 1, 0)}
    dataset = LanceDataset(opened, 16, columns=["id"], **options)
    assert len(dataset) == 9
    ids_alone = read_bytes(opened)
    assert ids_alone < 100_000  # of 8 MB; the ids alone are 3 kB
    with_images = LanceDataset(opened, 16, transforms={"image": Image(8)}, on_error="mask", **options)
    assert len(with_images) == 9
    assert read_bytes(opened) < ids_alone + 16 * 20_100 + 50_000  # and the first 16, to see that they are images


def test_only_the_rows_of_the_filter_are_read(heavy: str) -> None:
    opened = lance.dataset(heavy)
    dataset = LanceDataset(opened, 4, columns=["id", "image"], filter="id >= 200 AND id < 212", to_tensor_fn=None)
    read_bytes(opened)
    assert sum(batch.num_rows for batch in dataset) == 12
    assert 12 * 20_000 < read_bytes(opened) < 2_000_000  # not the 8 MB of all rows


def test_a_filter_is_resolved_once(rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = LanceDataset(rows, 8, columns=["id"], filter="id % 2 = 0", shuffle=True)
    first = sorted(real_ids(dataset))

    def no_more(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("scanned again")

    monkeypatch.setattr(lance.LanceDataset, "scanner", no_more)
    dataset.set_epoch(1)
    assert sorted(real_ids(dataset)) == first


@EVERY_KIND
@pytest.mark.parametrize("world", [1, 3])
def test_a_filter_that_matches_nothing_is_an_empty_epoch_and_a_warning(rows: Any, kind: str, world: int) -> None:
    for rank in range(world):
        with pytest.warns(UserWarning, match="No row matches filter='id > 1000'"):
            dataset = LanceDataset(rows, 8, columns=["id"], filter="id > 1000", sampler=EVERY[kind](rank, world, 0))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # once is enough
            assert len(dataset) == 0
            assert list(dataset) == []


def test_an_empty_dataset_is_an_empty_epoch_without_a_warning(tmp_path: Path) -> None:
    empty = write(tmp_path / "empty.lance", [5], range(5))
    dataset = LanceDataset(empty, 8)
    assert (len(dataset), list(dataset)) == (0, [])


def test_nulls_do_not_match(tmp_path: Path) -> None:
    table = pa.table({"id": pa.array([0, 1, None, 3, None], pa.int64())})
    nullable = lance.write_dataset(table, str(tmp_path / "nulls.lance"))
    assert real_ids(LanceDataset(nullable, 8, filter="id < 100")) == [0, 1, 3]
    (batch,) = LanceDataset(nullable, 8, filter="id IS NULL")
    assert batch.rows.tolist() == [2, 4]


@pytest.mark.parametrize("filter", ["no_such_column = 1", "id ==== 2", "id +"])
def test_a_filter_that_lance_refuses_is_quoted(rows: Any, filter: str) -> None:
    with pytest.raises(ConfigError, match="Lance refused filter=") as caught:
        LanceDataset(rows, 8, filter=filter)
    assert repr(filter) in str(caught.value)


@pytest.mark.parametrize("stable", [False, True])
def test_positions_are_right_after_deletions_updates_and_compaction(tmp_path: Path, stable: bool) -> None:
    path = str(tmp_path / "moved.lance")
    for start in (0, 20, 40):
        part = pa.table({"id": pa.array(range(start, start + 20), pa.int64())})
        mode = "append" if start else "create"
        dataset = lance.write_dataset(part, path, mode=mode, enable_stable_row_ids=stable)
    dataset.delete("id % 5 = 0")
    dataset.update({"id": "id + 100"}, where="id % 4 = 1")  # these move to a new fragment
    for _ in range(2):
        dataset = lance.dataset(path)
        where = {id: position for position, id in enumerate(stored(dataset))}
        batches = list(LanceDataset(dataset, 7, filter="id % 3 = 0", shuffle=True, with_row_id=True))
        assert sorted(real_ids(batches)) == sorted(stored(dataset, filter="id % 3 = 0"))
        assert all(where[int(i)] == int(r) for batch in batches for i, r in zip(batch["id"], batch.rows, strict=True))
        row_ids = dict(zip(stored(dataset), stored(dataset, "_rowid", with_row_id=True), strict=True))
        assert all(row_ids[int(i)] == int(r) for b in batches for i, r in zip(b["id"], b["_rowid"], strict=True))
        dataset.optimize.compact_files()


# -- samples -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filter", [None, "id % 2 = 0"])
@pytest.mark.parametrize("kind", sorted(SHARDED))
def test_a_sample_is_split_over_the_ranks(rows: Any, kind: str, filter: str | None) -> None:
    def read(seed: int, world: int) -> list[int]:
        ranks = []
        for rank in range(world):
            options = {"columns": ["id"], "filter": filter, "samples": 23, "seed": seed}
            ranks.append(list(LanceDataset(rows, 4, sampler=SHARDED[kind](rank, world, 0), **options)))
        assert len({tuple(batch.size for batch in batches) for batches in ranks}) == 1
        return sorted(i for batches in ranks for i in real_ids(batches))

    drawn = read(0, 3)
    assert len(set(drawn)) == len(drawn) == 23
    assert set(drawn) <= set(stored(rows, filter=filter))
    assert drawn == read(0, 1)
    assert drawn != read(1, 1)


def test_a_sample_is_the_same_in_every_epoch(rows: Any) -> None:
    dataset = LanceDataset(rows, 4, columns=["id"], samples=20, shuffle=True)
    first = real_ids(dataset)
    dataset.set_epoch(1)
    second = real_ids(dataset)
    assert first != second
    assert sorted(first) == sorted(second)


@pytest.mark.parametrize("samples", [0, None, 85, 1000])
def test_a_sample_of_all_rows_is_all_rows(rows: Any, samples: int | None) -> None:
    assert real_ids(LanceDataset(rows, 4, columns=["id"], samples=samples)) == stored(rows)


def test_every_row_is_equally_likely_in_a_sample(rows: Any) -> None:
    counts = dict.fromkeys(stored(rows), 0)
    for seed in range(200):
        for batch in LanceDataset(rows, 100, columns=["id"], samples=17, seed=seed, num_threads=1, to_tensor_fn=None):
            for i in batch["id"].to_pylist():
                counts[i] += 1
    expected = 200 * 17 / len(counts)
    found = sum((count - expected) ** 2 / expected for count in counts.values())
    assert found < 84 + 5 * (2 * 84) ** 0.5


# -- columns -------------------------------------------------------------------------------------------------------


@EVERY_KIND
def test_expressions_get_names_of_their_own(rows: Any, kind: str) -> None:
    columns = {"number": "id", "twice": "id * 2", "shout": "upper(prompt)", "inner": "meta.size", "odd": "id % 2 = 1"}
    batches = list(LanceDataset(rows, 8, columns=columns, sampler=EVERY[kind](0, 1, 0), filter="id > 10"))
    assert {tuple(batch) for batch in batches} == {tuple(columns)}
    seen = [int(i) for batch in batches for i in batch["number"]]
    assert sorted(seen) == stored(rows, filter="id > 10")
    for batch in batches:
        ids = batch["number"]
        assert batch["twice"].tolist() == (2 * ids).tolist() == batch["inner"].tolist()
        assert batch["odd"].tolist() == (ids % 2 == 1).tolist()
        assert batch["shout"] == [f"ROW {i}" for i in ids.tolist()]


@EVERY_KIND
def test_nested_fields_are_columns(rows: Any, kind: str) -> None:
    batches = list(LanceDataset(rows, 8, columns=["id", "meta.name", "meta.size"], sampler=EVERY[kind](0, 1, 0)))
    for batch in batches:
        assert batch["meta.name"] == [f"m{i}" for i in batch["id"].tolist()]
        assert batch["meta.size"].tolist() == (2 * batch["id"]).tolist()


def test_columns_come_in_the_order_asked_for(rows: Any) -> None:
    for columns in (["prompt", "id"], ["id", "meta.name", "prompt"], {"b": "prompt", "a": "id"}):
        assert list(next(iter(LanceDataset(rows, 8, columns=columns)))) == list(columns)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["idd"], "Did you mean 'id'"),
        (["meta.nothing"], "'meta.nothing'"),
        (["id", "id"], "each column once"),
        ([], "at least one column"),
        ("id", "as a list of names"),
        ({"x": "id +"}, "'id \\+' of column 'x'"),
        ({"x": "no_such"}, "'no_such' of column 'x'"),
    ],
)
def test_columns_that_do_not_exist_are_named(rows: Any, columns: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LanceDataset(rows, 8, columns=columns)


# -- row ids -------------------------------------------------------------------------------------------------------


@EVERY_KIND
@pytest.mark.parametrize("options", [{}, {"filter": "id % 2 = 0"}, {"samples": 30}, {"cache": True}], ids=str)
@pytest.mark.parametrize("columns", [["id"], {"id": "id", "twice": "id * 2"}], ids=["names", "expressions"])
def test_row_ids_and_addresses_come_with_every_sampler(rows: Any, kind: str, options: Any, columns: Any) -> None:
    everything = rows.to_table(columns=["id"], with_row_id=True, with_row_address=True).to_pylist()
    known = {row["id"]: (row["_rowid"], row["_rowaddr"]) for row in everything}
    sampler = EVERY[kind](0, 1, 0)
    dataset = LanceDataset(
        rows, 8, columns=columns, sampler=sampler, with_row_id=True, with_row_address=True, **options
    )
    batches = list(dataset)
    assert {tuple(batch) for batch in batches} == {(*columns, "_rowid", "_rowaddr")}
    for batch in batches:
        found = zip(batch["_rowid"].tolist(), batch["_rowaddr"].tolist(), strict=True)
        assert list(found) == [known[i] for i in batch["id"].tolist()]


def test_row_ids_may_be_the_only_columns(rows: Any) -> None:
    (batch,) = LanceDataset(rows, 200, columns=["_rowid", "_rowaddr"])
    assert batch["_rowid"].tolist() == stored(rows, "_rowid", with_row_id=True)
    assert batch["_rowaddr"].tolist() == stored(rows, "_rowaddr", with_row_address=True)
