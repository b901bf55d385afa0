"""`split=(lo, hi)`: train and validation of one dataset, disjoint and complete, whatever else is asked for."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import lance
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support_samplers import EVERY, SHARDED, real_ids, table, write

from gpuload import ConfigError, LanceDataset, StateError

EVERY_KIND = pytest.mark.parametrize("kind", sorted(EVERY))
TRAIN, REST = (0.0, 0.8), (0.8, 1.0)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """200 rows in fragments of 60, 90 and 50."""
    return write(tmp_path_factory.mktemp("split") / "rows.lance", [60, 90, 50])


def ids(dataset: Any, split: Any, **options: Any) -> list[int]:
    return real_ids(LanceDataset(dataset, 8, columns=["id"], split=split, **options))


@EVERY_KIND
def test_train_and_validation_are_disjoint_and_complete(rows: Any, kind: str) -> None:
    train, rest = (ids(rows, split, sampler=EVERY[kind](0, 1, 0)) for split in (TRAIN, REST))
    assert sorted(train + rest) == list(range(200))
    assert 20 < len(rest) < 60


@pytest.mark.filterwarnings("ignore:No row matches split")  # of a narrow one
@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=4))
def test_splits_that_meet_have_each_row_once(rows: Any, inner: list[float]) -> None:
    ends = sorted({0.0, 1.0, *inner})
    parts = [ids(rows, pair) for pair in itertools.pairwise(ends)]
    assert sorted(i for part in parts for i in part) == list(range(200))


def test_a_larger_split_holds_the_smaller_one(rows: Any) -> None:
    assert set(ids(rows, (0, 0.3))) < set(ids(rows, (0, 0.5))) < set(ids(rows, [0, 1])) == set(range(200))


def test_every_part_of_the_dataset_is_in_each_split(rows: Any) -> None:
    found = ids(rows, (0.0, 0.5))
    for start in range(0, 200, 50):
        assert 10 < sum(start <= i < start + 50 for i in found) < 40


@pytest.mark.parametrize("options", [{"seed": 7}, {"shuffle": True, "seed": 3}, {"shuffle": "block"}])
def test_no_seed_and_no_order_moves_a_row(rows: Any, options: dict[str, Any]) -> None:
    dataset = LanceDataset(rows, 8, columns=["id"], split=REST, **options)
    assert [sorted(real_ids(dataset)) for _ in range(2)] == [sorted(ids(rows, REST))] * 2


def test_rows_that_are_appended_move_no_other(tmp_path: Path) -> None:
    before = write(tmp_path / "rows.lance", [60])
    held = ids(before, REST)
    after = lance.write_dataset(table(range(60, 150)), str(tmp_path / "rows.lance"), mode="append")
    assert [i for i in ids(after, REST) if i < 60] == held
    assert sorted(ids(after, REST) + ids(after, TRAIN)) == list(range(150))


def test_a_filter_and_a_sample_choose_among_the_rows_of_the_split(rows: Any) -> None:
    held = ids(rows, REST)
    assert ids(rows, REST, filter="id % 2 = 0") == [i for i in held if i % 2 == 0]
    sample = ids(rows, REST, samples=10, seed=4)
    assert len(sample) == 10
    assert set(sample) < set(held)


def test_positions_of_rows_that_are_left_after_deletions(tmp_path: Path) -> None:
    dataset = write(tmp_path / "rows.lance", [60, 40], delete=range(0, 100, 7))
    kept = [i for i in range(100) if i % 7]
    batches = list(LanceDataset(dataset, 8, columns=["id"], split=REST))
    assert real_ids(batches) == [kept[row] for batch in batches for row in batch.rows.tolist()]
    assert sorted(ids(dataset, TRAIN) + ids(dataset, REST)) == kept


@pytest.mark.parametrize("kind", sorted(SHARDED))
def test_ranks_divide_a_split(rows: Any, kind: str) -> None:
    found = [ids(rows, TRAIN, sampler=SHARDED[kind](rank, 3, 0)) for rank in range(3)]
    assert sorted(i for rank in found for i in rank) == sorted(ids(rows, TRAIN))


def test_cached_rows_are_those_of_the_split(rows: Any, tmp_path: Path) -> None:
    assert ids(rows, REST, cache=str(tmp_path)) == ids(rows, REST)


def test_len_and_the_saved_place_are_those_of_the_split(rows: Any) -> None:
    dataset = LanceDataset(rows, 8, columns=["id"], split=REST, shuffle=True)
    batches = iter(dataset)
    first = real_ids([next(batches)])
    state = json.loads(json.dumps(dataset.state_dict()))
    again = LanceDataset(rows, 8, columns=["id"], split=[0.8, 1], shuffle=True)
    again.load_state_dict(state)
    rest = list(again)
    assert len(rest) == len(dataset) - 1
    assert sorted(first + real_ids(rest)) == sorted(ids(rows, REST))
    assert dataset.split == again.split == (0.8, 1.0)


@pytest.mark.parametrize(("saved", "here"), [(TRAIN, REST), (TRAIN, None), (None, REST)])
def test_the_state_of_another_split_is_refused(rows: Any, saved: Any, here: Any) -> None:
    state = LanceDataset(rows, 8, split=saved).state_dict()
    with pytest.raises(StateError, match=r"Expected split=.* as in the saved state, got split=") as caught:
        LanceDataset(rows, 8, split=here).load_state_dict(json.loads(json.dumps(state)))
    assert caught.value.field == "split"


def test_without_a_split_a_state_has_the_keys_it_always_had(rows: Any) -> None:
    state = LanceDataset(rows, 8).state_dict()
    assert "split" not in state
    LanceDataset(rows, 8).load_state_dict(state)


@pytest.mark.parametrize(
    "split", [0.9, (0.5,), (0.1, 0.2, 0.3), (0.5, 0.5), (0.9, 0.1), (-0.1, 0.5), (0.5, 1.1), (float("nan"), 1), "ab",
              ("0", "1"), (False, True), (0, None), {0.0: 1, 0.5: 2}],
)  # fmt: skip
def test_what_is_no_split_is_refused(rows: Any, split: Any) -> None:
    with pytest.raises(ConfigError, match=r"Expected split(=| as )\(lo, hi\)"):
        LanceDataset(rows, 8, split=split)


def test_an_empty_split_says_so(rows: Any) -> None:
    with pytest.warns(UserWarning, match=r"No row matches filter='id < 5', split=\(0.0, 1e-09\)"):
        assert ids(rows, (0, 1e-9), filter="id < 5") == []


def test_a_sampler_that_reads_by_itself_cannot_be_split(rows: Any) -> None:
    class Mine(lance.sampler.Sampler):
        def __call__(self, ds: Any, *args: Any, **options: Any) -> Any:
            yield from ds.to_batches()

    with pytest.raises(ConfigError, match=r"Expected split beside a gpuload sampler, got split=\(0.8, 1.0\)"):
        LanceDataset(rows, 8, split=REST, sampler=Mine())
