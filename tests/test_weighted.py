"""WeightedSampler: rows come as often as their weights say, in an order that neither ranks nor resumes change."""

from __future__ import annotations

import pickle
from typing import Any

import lance
import lance.torch.data
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support_samplers import chain, real_ids, write_images

from gpuload import ConfigError, Image, LanceDataset, ShuffleSampler, StateError, WeightedSampler
from gpuload.order.draws import Draws
from gpuload.order.weighted import Alias

WEIGHTS = st.lists(
    st.one_of(st.just(0.0), st.floats(1e-6, 1e6), st.integers(1, 5).map(float), st.floats(1e-300, 1e300)),
    min_size=1,
    max_size=60,
).filter(any)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """100 rows in fragments of 30; `weight` is 0 for every fifth row, else 1 to 4; some were deleted before."""
    ids = np.arange(110)
    nulls = pa.array([None if i == 3 else 1.0 for i in ids])
    columns = {"id": ids, "weight": (ids % 5).astype(np.float32), "count": ids % 3, "even": ids % 2 == 0}
    table = pa.table({**columns, "nulls": nulls})
    path = str(tmp_path_factory.mktemp("weighted") / "rows.lance")
    lance.write_dataset(table, path, max_rows_per_file=30).delete("id >= 20 AND id < 30")
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weighted") / "images.lance"
    write_images(path, 6)
    return str(path)


def ids_of(rows: Any, sampler: Any, batch_size: int = 16, **options: Any) -> list[int]:
    return real_ids(LanceDataset(rows, batch_size, sampler=sampler, **options))


@settings(deadline=None, max_examples=200)
@given(weights=WEIGHTS)
@example(weights=[2.0, 1.0, 3.0])  # the first that is not below the mean is the mean
def test_the_table_holds_each_weight(weights: list[float]) -> None:
    given_ = np.array(weights)
    table = Alias(given_)
    share = table.keep.copy()
    np.add.at(share, table.other, 1 - table.keep)
    scaled = given_ / given_.max()
    np.testing.assert_allclose(share / len(weights), scaled / scaled.sum(), rtol=1e-9, atol=1e-12)
    assert ((table.keep >= 0) & (table.keep <= 1)).all()
    assert (given_[table.other[table.keep < 1]] > 0).all()
    assert (table.keep[given_ == 0] == 0).all()


def test_rows_come_as_often_as_their_weights_say() -> None:
    weights = np.array([1.0, 2, 3, 0, 4, 10, 0.5, 79.5])
    drawn = Alias(weights).draw(Draws(3, 0, np.arange(200_000)).uniform("any", 4))
    expected = weights * 200_000 / weights.sum()
    counts = np.bincount(drawn, minlength=8)
    seen = weights > 0
    assert counts[3] == 0
    assert ((counts - expected)[seen] ** 2 / expected[seen]).sum() < 24.3  # chi-square, 6 degrees: 0.9995


@pytest.mark.parametrize("weights", ["weight", "count", "even", "weight * 2 + 1", "array", "tensor", "list"])
def test_weights_are_a_column_an_expression_or_an_array(rows: Any, weights: str) -> None:
    ids = np.concatenate([np.arange(20), np.arange(30, 110)])
    values: dict[str, Any] = {
        "weight": ids % 5, "count": ids % 3, "even": ids % 2 == 0, "weight * 2 + 1": ids % 5 * 2 + 1,
    }  # fmt: skip
    of_ids = np.asarray(values.get(weights, ids % 5), np.float64)
    given_: Any = weights
    if weights in ("array", "tensor", "list"):
        given_ = {"array": of_ids, "tensor": torch.from_numpy(of_ids), "list": of_ids.tolist()}[weights]
    drawn = np.array(ids_of(rows, WeightedSampler(given_, rows=5000), columns=["id"], batch_size=512))
    counts = np.bincount(np.searchsorted(ids, drawn), minlength=100)
    expected = of_ids * 5000 / of_ids.sum()
    assert set(drawn.tolist()) == set(ids[of_ids > 0].tolist())
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected + 1)).all()


@settings(deadline=None, max_examples=20)
@given(
    world=st.integers(1, 4), batch=st.integers(1, 40), count=st.one_of(st.none(), st.integers(1, 300)),
    epoch=st.integers(0, 3), seed=st.integers(0, 2**40),
)  # fmt: skip
def test_any_ranks_and_batches_make_the_same_order(
    rows: Any, world: int, batch: int, count: int | None, epoch: int, seed: int
) -> None:
    def order(size: int, ranks: int) -> list[int]:
        found = []
        for rank in range(ranks):
            dataset = LanceDataset(
                rows, size, columns=["id"], sampler=WeightedSampler(rows=count, rank=rank, world_size=ranks, seed=seed)
            )
            dataset.set_epoch(epoch)
            found.append([real_ids([step]) for step in dataset])
            assert len(found[0]) == len(found[-1]) == len(dataset)
        return [i for step in zip(*found, strict=True) for part in step for i in part]

    whole = order(1000, 1)
    assert len(whole) == (100 if count is None else count)
    assert order(batch, world) == whole


def test_epochs_and_seeds_have_orders_of_their_own(rows: Any) -> None:
    dataset = LanceDataset(rows, 100, sampler=WeightedSampler())
    first, second = real_ids(dataset), real_ids(dataset)
    dataset.set_epoch(0)
    assert first != second
    assert real_ids(dataset) == first != ids_of(rows, WeightedSampler(seed=1))
    assert sorted(first) != sorted(second)  # drawn anew, not only shuffled


@settings(deadline=None, max_examples=15)
@given(legs=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 2)), max_size=3), last=st.integers(1, 4))
def test_a_chain_of_resumes_with_other_worlds_is_one_epoch(
    rows: Any, legs: list[tuple[int, int | None]], last: int
) -> None:
    def make(rank: int, world: int) -> LanceDataset:
        return LanceDataset(rows, 3, columns=["id"], sampler=WeightedSampler(rows=90, rank=rank, world_size=world))

    assert real_ids(chain(make, [*legs, (last, None)])) == ids_of(rows, WeightedSampler(rows=90))


def test_a_row_that_comes_twice_is_cropped_and_flipped_anew(images: str) -> None:
    dataset = LanceDataset(
        images, 8, sampler=WeightedSampler([1, 1, 0, 0, 0, 0], rows=24),
        transforms={"image": Image(16, crop="random", flip=0.5)}, columns=["id", "image"], device="cpu",
    )  # fmt: skip
    batches = list(dataset)
    pixels = torch.cat([batch["image"] for batch in batches])
    assert {int(i) for b in batches for i in b["id"]} == {0, 1}
    assert len({image.numpy().tobytes() for image in pixels}) == 24
    dataset.set_epoch(0)
    assert torch.equal(torch.cat([batch["image"] for batch in dataset]), pixels)
    parts = [
        list(LanceDataset(
            images, 3, sampler=WeightedSampler([1, 1, 0, 0, 0, 0], rows=24, rank=rank, world_size=2), device="cpu",
            transforms={"image": Image(16, crop="random", flip=0.5)}, columns=["id", "image"],
        ))
        for rank in range(2)
    ]  # fmt: skip
    assert torch.equal(torch.cat([b["image"] for step in zip(*parts, strict=True) for b in step]), pixels)


@pytest.mark.parametrize("options", [{"filter": "id % 2 = 1"}, {"samples": 40}], ids=str)
def test_only_rows_that_are_left_come_by_their_weights(rows: Any, options: dict[str, Any]) -> None:
    kept = {i for i in real_ids(LanceDataset(rows, 50, columns=["id"], **options)) if i % 5}
    drawn = ids_of(rows, WeightedSampler(rows=3000), columns=["id"], batch_size=500, **options)
    assert set(drawn) == kept
    ids = np.concatenate([np.arange(20), np.arange(30, 110)])
    stored = ids_of(rows, WeightedSampler(ids % 5, rows=3000), columns=["id"], batch_size=500, **options)
    assert stored == drawn  # an array of all stored rows
    counts = np.bincount(drawn)
    ones, fours = (counts[[i for i in kept if i % 5 == n]].mean() for n in (1, 4))
    assert 3.3 < fours / ones < 4.8


def test_the_weights_column_need_not_be_read_into_batches(rows: Any) -> None:
    assert list(next(iter(LanceDataset(rows, 4, columns=["id"], sampler=WeightedSampler())))) == ["id"]


def test_class_balance_is_one_line(rows: Any) -> None:
    labels = LanceDataset(rows, 100, columns=["even"], filter="id > 3")
    label = torch.cat([batch["even"] for batch in labels]).long()
    sampler = WeightedSampler(1 / torch.bincount(label)[label], rows=2000)
    drawn = np.array(ids_of(rows, sampler, columns=["id"], filter="id > 3", batch_size=500))
    assert 850 < (drawn % 2 == 0).sum() < 1150


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")  # Lance's own conversion
def test_lances_own_loader_takes_it(rows: Any) -> None:
    loader = lance.torch.data.LanceDataset(rows, 16, columns=["id"], sampler=WeightedSampler(rows=50))
    assert [int(i) for batch in loader for i in batch] == ids_of(rows, WeightedSampler(rows=50))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, -2.0, 3.0], r"at least 0 and finite, got -2.0 for row 1"),
        ([1.0, float("nan")], r"got nan for row 1"),
        ([float("inf"), 1.0], r"got inf for row 0"),
        ([0.0, 0.0], "at least one above 0, got 2 times 0"),
        ([[1.0], [2.0]], r"shape \[rows\], got \[2, 1\]"),
        (["a", "b"], "an array of numbers"),
        (None, "array of numbers|shape"),
    ],
)
def test_weights_by_which_nothing_can_be_drawn_are_refused(weights: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WeightedSampler(weights)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("weight - 1", "at least 0 and finite, got -1.0 for row 0"),
        ("weight * 0", "at least one above 0, got 100 times 0"),
        ("no_such", "no_such"),
        ("arrow_cast(weight, 'Utf8')", "column of numbers"),
        ("nulls", "without nulls, got 1, first at position 3"),
        ("weight / 0.0", "finite"),
    ],
)
def test_a_column_by_which_nothing_can_be_drawn_is_refused(rows: Any, column: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        next(iter(LanceDataset(rows, 4, sampler=WeightedSampler(column))))


def test_another_number_of_weights_than_rows_is_refused(rows: Any) -> None:
    with pytest.raises(ConfigError, match="weight for each of 100 rows, got 99"):
        len(LanceDataset(rows, 4, sampler=WeightedSampler(np.ones(99))))
    with pytest.raises(ConfigError, match="weight for each of 8 rows, or of the 100 that are stored, got 9"):
        len(LanceDataset(rows, 4, filter="id < 8", sampler=WeightedSampler(np.ones(9))))


@pytest.mark.parametrize("count", [0, -1, 1.5, "all"])
def test_rows_is_a_count(count: Any) -> None:
    with pytest.raises(ConfigError, match="rows as an int of at least 1"):
        WeightedSampler(rows=count)


@pytest.mark.filterwarnings("ignore:No row matches")
def test_a_filter_that_leaves_no_row(rows: Any) -> None:
    assert ids_of(rows, WeightedSampler(), filter="id < 0") == []
    with pytest.raises(ConfigError, match="draw 5 from, got an empty dataset"):
        ids_of(rows, WeightedSampler(rows=5), filter="id < 0")


@pytest.mark.parametrize(
    ("other", "field"),
    [
        (WeightedSampler("count"), "weights"),
        (WeightedSampler(np.ones(100)), "weights"),
        (WeightedSampler(rows=7), "sampler_rows"),
        (WeightedSampler(seed=1), "sampler_seed"),
        (ShuffleSampler(), "sampler"),
    ],
    ids=repr,
)
def test_a_state_of_other_weights_is_refused(rows: Any, other: Any, field: str) -> None:
    saved = LanceDataset(rows, 8, sampler=WeightedSampler()).state_dict()
    with pytest.raises(StateError) as caught:
        LanceDataset(rows, 8, sampler=other).load_state_dict(saved)
    assert caught.value.field == field


def test_an_array_that_changes_afterwards_changes_nothing(rows: Any) -> None:
    weights = np.ones(100)
    sampler = WeightedSampler(weights)
    before = ids_of(rows, sampler)
    weights[:] = 0
    weights[3] = 1
    assert ids_of(rows, sampler) == before


def test_its_words_say_what_it_is() -> None:
    assert repr(WeightedSampler(seed=3)) == "WeightedSampler('weight', rank=0, world_size=1, seed=3)"
    assert repr(WeightedSampler([1, 2], rows=9)) == "WeightedSampler(f64[2], rows=9, rank=0, world_size=1, seed=0)"


def test_without_a_table_only_an_array_has_an_order() -> None:
    fragments = np.array([3])
    assert len(WeightedSampler([1, 2, 3]).plan(3, fragments, 2)) == 2
    with pytest.raises(ConfigError, match="column 'weight'"):
        WeightedSampler().plan(3, fragments, 2)
    with pytest.raises(ConfigError, match="each of 4 rows, got 3"):
        WeightedSampler([1, 2, 3]).plan(4, np.array([4]), 2)


def test_a_copy_in_another_process_draws_the_same(rows: Any) -> None:
    dataset = LanceDataset(rows, 16, columns=["id"], sampler=WeightedSampler(np.arange(100.0), rows=64))
    alone = real_ids(dataset)
    dataset.set_epoch(0)
    assert real_ids(pickle.loads(pickle.dumps(dataset))) == alone  # as a DataLoader's workers get it
