"""Samplers: the ranks together yield every row once, in equal batches, whatever the rows, fragments and ranks."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lance.sampler
import lance.torch.data
import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed
from hypothesis import given, settings
from hypothesis import strategies as st
from support_samplers import ELASTIC, EVERY, RANDOM, SHARDED, real_ids, write

from gpuload import (
    ConfigError,
    FullScanSampler,
    LanceDataset,
    ShardedBatchSampler,
    ShardedFragmentSampler,
    ShuffleSampler,
)
from gpuload.order import Rows, coalesce, expand
from gpuload.order.cut import FixedSize
from gpuload.order.orders import InTurn
from gpuload.order.samplers import PlanSampler

KINDS = st.sampled_from(sorted(SHARDED))
FRAGMENTS = st.lists(st.integers(0, 40), max_size=8)  # empty ones, none at all
BATCH = st.integers(1, 50)
WORLD = st.integers(1, 12)  # often more ranks than fragments
EPOCH = st.integers(0, 3)


def plans(kind: str, fragments: list[int], batch: int, world: int, epoch: int = 0, **more: Any) -> list[FixedSize]:
    """The plan of every rank."""
    found = []
    for rank in range(world):
        sampler = SHARDED[kind](rank, world, 9)
        sampler.set_epoch(epoch)
        found.append(sampler.plan(sum(fragments), np.array(fragments, np.int64), batch, **more))
    return found


def rows_of(plan: FixedSize, step: int) -> list[int]:
    """The rows of one batch without fill-up rows."""
    return expand(plan.ranges(step))[: plan.size(step)[1]].tolist()


# -- plans: properties that hold for all of them -------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(kind=KINDS, fragments=FRAGMENTS, batch=BATCH, world=WORLD, epoch=EPOCH)
def test_ranks_together_have_each_row_once_in_equal_batches(
    kind: str, fragments: list[int], batch: int, world: int, epoch: int
) -> None:
    ranks = plans(kind, fragments, batch, world, epoch)
    assert len({len(plan) for plan in ranks}) == 1
    seen: list[int] = []
    for step in range(len(ranks[0])):
        sizes = {plan.size(step)[0] for plan in ranks}
        assert len(sizes) == 1
        assert sizes == {batch} if step + 1 < len(ranks[0]) else sizes <= set(range(1, batch + 1))
        for plan in ranks:
            index = expand(plan.ranges(step))
            assert len(index) == plan.size(step)[0]
            assert set(index.tolist()) <= set(range(sum(fragments)))  # fill-up rows exist too
            seen += rows_of(plan, step)
    assert sorted(seen) == list(range(sum(fragments)))


@settings(deadline=None, max_examples=100)
@given(kind=KINDS, fragments=FRAGMENTS, batch=st.integers(1, 12), world=st.integers(1, 5), epoch=EPOCH)
def test_drop_last_drops_the_tail_and_nothing_else(
    kind: str, fragments: list[int], batch: int, world: int, epoch: int
) -> None:
    whole, dropped = (plans(kind, fragments, batch, world, epoch, drop_last=drop) for drop in (False, True))
    full = [step for step in range(len(whole[0])) if all(plan.size(step) == (batch, batch) for plan in whole)]
    for a, b in zip(whole, dropped, strict=True):
        assert len(b) == len(full)
        assert [b.size(step) for step in full] == [(batch, batch)] * len(full)
        assert [b.ranges(step).tolist() for step in full] == [a.ranges(step).tolist() for step in full]


@settings(deadline=None, max_examples=100)
@given(kind=KINDS, fragments=FRAGMENTS, batch=BATCH, world=st.integers(1, 4), data=st.data())
def test_a_batch_is_the_same_whenever_it_is_asked_for(
    kind: str, fragments: list[int], batch: int, world: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, world - 1))
    one = plans(kind, fragments, batch, world)[rank]
    in_turn = [one.ranges(step).tolist() for step in range(len(one))]
    sampler = SHARDED[kind](rank, world, 9)
    shape = {"rows": sum(fragments), "fragments": np.array(fragments, np.int64), "batch_size": batch}
    for step in data.draw(st.permutations(range(len(one)))):
        assert sampler.ranges(step, **shape).tolist() == in_turn[step]


@settings(deadline=None, max_examples=100)
@given(kind=st.sampled_from(ELASTIC), rows=st.integers(0, 300), batch=st.integers(1, 40), world=WORLD, epoch=EPOCH)
def test_the_order_is_the_same_for_every_world_size(kind: str, rows: int, batch: int, world: int, epoch: int) -> None:
    (alone,) = plans(kind, [rows], batch, 1, epoch)
    for rank, plan in enumerate(plans(kind, [rows], batch, world, epoch)):
        for step in range(len(plan)):
            k = step * world + rank
            assert rows_of(plan, step) == (rows_of(alone, k) if k < len(alone) else [])


@settings(deadline=None, max_examples=100)
@given(kind=KINDS, fragments=FRAGMENTS, batch=st.integers(1, 12), world=st.integers(1, 5), data=st.data())
def test_a_plan_that_starts_later_is_the_rest_of_the_plan(
    kind: str, fragments: list[int], batch: int, world: int, data: st.DataObject
) -> None:
    drop = data.draw(st.booleans())
    whole = plans(kind, fragments, batch, world, drop_last=drop)
    k = data.draw(st.integers(0, len(whole[0])))
    used = k * batch * (1 if kind.startswith("fragment") else world)
    for a, b in zip(whole, plans(kind, fragments, batch, world, drop_last=drop, start=used), strict=True):
        assert len(b) == len(a) - k
        assert [b.size(step) for step in range(len(b))] == [a.size(step + k) for step in range(len(b))]
        assert [b.ranges(step).tolist() for step in range(len(b))] == [a.ranges(k + s).tolist() for s in range(len(b))]


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), max_size=60))
def test_ranges_list_the_positions_they_were_made_of(positions: list[int]) -> None:
    ranges = coalesce(np.array(positions, np.int64))
    assert expand(ranges).tolist() == positions
    assert all(a[1] != b[0] for a, b in zip(ranges.tolist(), ranges.tolist()[1:], strict=False))  # as few as possible


@pytest.mark.parametrize("kind", sorted(SHARDED))
def test_a_step_outside_of_the_epoch_is_an_index_error(kind: str) -> None:
    (plan,) = plans(kind, [30], 8, 1)
    for step in (-1, 4):
        with pytest.raises(IndexError, match=f"step from 0 to 3, got {step}"):
            plan.ranges(step)


@pytest.mark.parametrize("kind", sorted(SHARDED))
def test_a_thousand_ranks_share_a_billion_rows(kind: str) -> None:
    fragments = np.full(2048, 10**9 // 2048, np.int64)
    rows, world, size = int(fragments.sum()), 1024, 256
    ranks = []
    for rank in (0, 1, 511, 1023):
        sampler = SHARDED[kind](rank, world, 1)
        ranks.append(sampler.plan(rows, fragments, size))
    assert len({len(plan) for plan in ranks}) == 1
    for step in (0, len(ranks[0]) // 2, len(ranks[0]) - 2):
        index = np.concatenate([expand(plan.ranges(step)) for plan in ranks])
        assert len(np.unique(index)) == 4 * size


# -- what each order is --------------------------------------------------------------------------------------------


def test_the_fragment_sampler_reads_every_nth_fragment_in_order() -> None:
    plan = plans("fragment", [3, 4, 5, 0, 6], 100, 2)
    assert rows_of(plan[0], 0) == [0, 1, 2, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17]
    assert rows_of(plan[1], 0) == [3, 4, 5, 6]


def test_the_randomized_fragment_sampler_keeps_each_fragment_whole() -> None:
    fragments = [3, 4, 5, 2, 6]
    (plan,) = plans("fragment-random", fragments, 100, 1)
    rows = rows_of(plan, 0)
    starts = np.cumsum([0, *fragments[:-1]]).tolist()
    whole = sorted(
        (list(range(s, s + n)) for s, n in zip(starts, fragments, strict=True)), key=lambda f: rows.index(f[0])
    )
    assert rows == [row for fragment in whole for row in fragment]
    assert rows != list(range(20))


def test_the_batch_sampler_deals_batches_in_turn() -> None:
    plan = plans("batch", [50], 10, 2)
    assert [rows_of(plan[1], step) for step in range(3)] == [[*range(10, 20)], [*range(30, 40)], []]


def test_the_randomized_batch_sampler_shuffles_whole_batches_and_keeps_the_short_one_last() -> None:
    (plan,) = plans("batch-random", [96], 10, 1)
    batches = [rows_of(plan, step) for step in range(len(plan))]
    assert all(b[0] % 10 == 0 and b == list(range(b[0], b[0] + len(b))) for b in batches)
    assert batches[-1] == list(range(90, 96))
    assert batches != sorted(batches)


@settings(deadline=None)
@given(rows=st.integers(1, 200), block=st.integers(1, 30), seed=st.integers(0, 100))
def test_blocks_stay_together(rows: int, block: int, seed: int) -> None:
    plan = ShuffleSampler(seed=seed, block_size=block).plan(rows, np.array([rows]), rows)
    order = rows_of(plan, 0)
    for first in range(0, rows, block):
        whole = list(range(first, min(first + block, rows)))
        at = order.index(first)
        assert order[at : at + len(whole)] == whole


@pytest.mark.parametrize("kind", RANDOM)
def test_each_epoch_has_an_order_of_its_own_and_always_the_same(kind: str) -> None:
    fragments = [20] * 30
    epochs = [
        [r for s in range(len(p)) for r in rows_of(p, s)] for e in (0, 1, 2) for p in plans(kind, fragments, 6, 1, e)
    ]
    assert len({tuple(rows) for rows in epochs}) == 3
    again = [[r for s in range(len(p)) for r in rows_of(p, s)] for p in plans(kind, fragments, 6, 1, 1)]
    assert again == epochs[1:2]
    other_seed = SHARDED[kind](0, 1, 10).plan(600, np.array(fragments), 600)
    assert rows_of(other_seed, 0) != epochs[0]


# -- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(SHARDED))
@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, 0), (True, 2), (0.0, 1)])
def test_an_impossible_rank_is_refused(kind: str, rank: Any, world: int) -> None:
    with pytest.raises(ConfigError, match="rank"):
        SHARDED[kind](rank, world, 0)


@pytest.mark.parametrize("block", [0, -3, 1.5])
def test_an_impossible_block_is_refused(block: Any) -> None:
    with pytest.raises(ConfigError, match="block_size"):
        ShuffleSampler(block_size=block)


@pytest.mark.parametrize("kind", sorted(EVERY))
def test_a_batch_of_no_rows_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match="batch_size of at least 1, got 0"):
        EVERY[kind](0, 1, 0).plan(10, np.array([10]), 0)


@pytest.mark.parametrize("cls", [ShardedFragmentSampler, ShardedBatchSampler, ShuffleSampler])
def test_from_torch_takes_the_rank_of_the_process_group(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 5)
    sampler = cls.from_torch(seed=4)
    assert (type(sampler), sampler.rank, sampler.world_size) == (cls, 3, 5)
    if cls is ShuffleSampler:
        assert (
            repr(cls.from_torch(seed=4, block_size=8)) == "ShuffleSampler(rank=3, world_size=5, seed=4, block_size=8)"
        )
    else:
        assert (
            repr(cls.from_torch(randomize=True, seed=4))
            == f"{cls.__name__}(rank=3, world_size=5, randomize=True, seed=4)"
        )


# -- real datasets -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """103 rows left of 120 in fragments of 7 to 40 rows, one of them gone but for a row."""
    gone = [0, 1, 2, 20, 21, 22, 23, 24, 25, 57, 60, 63, 66, 69, 72, 75, 119]
    return write(tmp_path_factory.mktemp("samplers") / "uneven.lance", [13, 7, 40, 25, 35], gone)


def ids_of(dataset: Any, filter: str | None = None) -> list[int]:
    found: list[int] = dataset.to_table(columns=["id"], filter=filter).column(0).to_pylist()
    return found


FILTERS = st.sampled_from([None, "id % 3 = 0", "id >= 13 AND id < 20", "meta.size < 60", "id > 1000"])


@pytest.mark.filterwarnings("ignore:.*fewer fragments than there are ranks")
@pytest.mark.filterwarnings("ignore:No row matches")
@settings(deadline=None, max_examples=60)
@given(
    kind=KINDS, filter=FILTERS, batch=st.integers(1, 40), world=st.integers(1, 8), epoch=EPOCH, drop_last=st.booleans()
)
def test_ranks_read_each_row_once_from_disk(
    uneven: Any, kind: str, filter: str | None, batch: int, world: int, epoch: int, drop_last: bool
) -> None:
    expected = ids_of(uneven, filter)
    where = {id: position for position, id in enumerate(ids_of(uneven))}
    ranks = []
    for rank in range(world):
        sampler = SHARDED[kind](rank, world, 2)
        options = {"columns": ["id"], "filter": filter, "sampler": sampler, "drop_last": drop_last, "device": "cpu"}
        dataset = LanceDataset(uneven, batch, **options, num_threads=1)
        dataset.set_epoch(epoch)
        steps = len(dataset)
        ranks.append(list(dataset))
        assert len(ranks[-1]) == steps
        for step, found in enumerate(ranks[-1]):
            assert (found.epoch, found.step) == (epoch, step)
            assert [where[int(i)] for i in found["id"]] == found.rows.tolist()
    assert len({tuple(found.size for found in batches) for batches in ranks}) == 1
    assert all(found.size == batch for batches in ranks for found in (batches if drop_last else batches[:-1]))
    seen = [i for batches in ranks for i in real_ids(batches)]
    assert len(set(seen)) == len(seen)
    if drop_last:
        assert all(found.valid.all() for batches in ranks for found in batches)
        assert set(seen) <= set(expected)
        if not kind.startswith("fragment"):
            assert len(seen) == len(expected) // (batch * world) * batch * world
    else:
        assert sorted(seen) == expected


@pytest.mark.filterwarnings("ignore:.*fewer fragments than there are ranks")
@settings(deadline=None, max_examples=20)
@given(
    fragments=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    kind=KINDS,
    batch=st.integers(1, 9),
    world=st.integers(1, 6),
    data=st.data(),
)
def test_rows_that_were_deleted_are_never_read(
    tmp_path_factory: pytest.TempPathFactory,
    fragments: list[int],
    kind: str,
    batch: int,
    world: int,
    data: st.DataObject,
) -> None:
    gone = data.draw(st.sets(st.integers(0, sum(fragments) - 1)))  # whole fragments too, maybe all of them
    filter = data.draw(st.sampled_from([None, "id % 2 = 0"]))
    stored = write(tmp_path_factory.mktemp("deleted") / "d.lance", fragments, gone)
    left = [i for i in range(sum(fragments)) if i not in gone and (filter is None or i % 2 == 0)]
    if filter is not None and not left:
        return  # warns: see test_filter.py
    seen: list[int] = []
    for rank in range(world):
        sampler = SHARDED[kind](rank, world, 0)
        seen += real_ids(LanceDataset(stored, batch, columns=["id"], filter=filter, sampler=sampler, num_threads=1))
    assert sorted(seen) == left


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_scan_is_every_row_in_order_on_every_rank(
    uneven: Any, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    dataset = LanceDataset(uneven, 30, columns=["id"], sampler=FullScanSampler())
    batches = list(dataset)
    assert [batch.size for batch in batches] == [30, 30, 30, 13]
    assert real_ids(batches) == ids_of(uneven)


def test_without_keywords_the_order_is_that_of_the_dataset(uneven: Any) -> None:
    assert real_ids(LanceDataset(uneven, 16, columns=["id"])) == ids_of(uneven)


@pytest.mark.parametrize(
    ("words", "sampler"),
    [
        ({"shuffle": True}, "ShuffleSampler(rank=1, world_size=2, seed=7)"),
        ({"shuffle": "row"}, "ShuffleSampler(rank=1, world_size=2, seed=7)"),
        ({"shuffle": "block"}, "ShuffleSampler(rank=1, world_size=2, seed=7, block_size=16)"),
        ({"shuffle": "batch"}, "ShardedBatchSampler(rank=1, world_size=2, randomize=True, seed=7)"),
        ({}, "ShardedBatchSampler(rank=1, world_size=2)"),
        ({"shard_granularity": "batch"}, "ShardedBatchSampler(rank=1, world_size=2)"),
        ({"shard_granularity": "fragment"}, "ShardedFragmentSampler(rank=1, world_size=2)"),
        (
            {"shard_granularity": "fragment", "shuffle": "batch"},
            "ShardedFragmentSampler(rank=1, world_size=2, randomize=True, seed=7)",
        ),
    ],
)
def test_the_short_words_name_a_sampler(uneven: Any, words: dict[str, Any], sampler: str) -> None:
    dataset = LanceDataset(uneven, 16, columns=["id"], rank=1, world_size=2, seed=7, **words)
    assert repr(dataset.sampler) == sampler


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"shuffle": "rows"}, "got 'rows'"),
        ({"shard_granularity": "row"}, "got 'row'"),
        ({"shuffle": True, "sampler": FullScanSampler()}, "shuffle or sampler, got both"),
        ({"shuffle": "row", "shard_granularity": "fragment"}, 'shard_granularity="fragment"'),
        ({"sampler": 3}, "lance.sampler.Sampler, got int"),
    ],
)
def test_words_that_contradict_each_other_are_refused(uneven: Any, words: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LanceDataset(uneven, 16, columns=["id"], **words)


@pytest.mark.parametrize("kind", RANDOM)
@pytest.mark.parametrize("by", ["dataset", "sampler"])
def test_set_epoch_changes_what_is_read(uneven: Any, kind: str, by: str) -> None:
    sampler = SHARDED[kind](0, 1, 0)
    dataset = LanceDataset(uneven, 16, columns=["id"], sampler=sampler)
    orders = []
    for epoch in (0, 1, 0):
        (dataset if by == "dataset" else sampler).set_epoch(epoch)
        batches = list(dataset)
        assert {batch.epoch for batch in batches} == {epoch}
        orders.append(real_ids(batches))
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[1]) == ids_of(uneven)


def test_set_epoch_works_without_a_sampler(uneven: Any) -> None:
    dataset = LanceDataset(uneven, 16, columns=["id"], shuffle=True)
    first, second = real_ids(dataset), real_ids(dataset)
    dataset.set_epoch(0)
    assert first == real_ids(dataset) != second
    dataset.set_epoch(1)
    assert second == real_ids(dataset)


@pytest.mark.parametrize("kind", sorted(EVERY))
def test_the_global_generators_are_left_alone(uneven: Any, kind: str) -> None:
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002 - the global one
    torch.manual_seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    options = {"samples": 50, "filter": "id > 3"}
    list(LanceDataset(uneven, 16, columns=["id"], sampler=EVERY[kind](0, 1, 3), **options))
    list(EVERY[kind](0, 1, 3)(uneven, batch_size=16, columns=["id"]))
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    assert before == after


# -- an order and a cut of one's own -------------------------------------------------------------------------------


class Backward(PlanSampler):
    """An order: the last row first."""

    def order(self, rows: int, fragments: Any, batch_size: int) -> Any:
        return LastFirst(rows)


@dataclass(frozen=True)
class LastFirst:
    rows: int

    def __len__(self) -> int:
        return self.rows

    def __call__(self, lo: int, hi: int) -> Any:
        return coalesce(self.rows - 1 - np.arange(lo, hi))


class ThreeAndFive(PlanSampler):
    """A cut: batches of 3 and 5 rows in turn, the last ones left out."""

    def cut(self, table: Any, batch_size: int, *, drop_last: bool = False, start: int = 0) -> Any:
        return Alternating(InTurn(table.rows), start)


@dataclass(frozen=True)
class Alternating:
    order: Any
    start: int

    def __len__(self) -> int:
        steps = (len(self.order) - self.start) // 8 * 2
        return steps if self.start % 8 == 0 else steps + 1

    def __call__(self, step: int) -> Rows:
        lo, hi = self.used(step), self.used(step + 1)
        return Rows(step, None, expand(self.order(lo, hi)), hi - lo)

    def used(self, steps: int) -> int:
        done = self.start // 8 * 2 + (self.start % 8 > 0) + steps
        return done // 2 * 8 + done % 2 * 3


def test_an_order_of_ones_own_has_ranks_states_and_exact_batches(uneven: Any) -> None:
    expected = ids_of(uneven)[::-1]
    seen = []
    for rank in range(2):
        dataset = LanceDataset(uneven, 16, columns=["id"], sampler=Backward(rank, 2))
        batches = list(dataset)
        assert [batch.size for batch in batches] == [16, 16, 16, 7]
        seen += real_ids(batches)
        other = LanceDataset(uneven, 16, columns=["id"], sampler=Backward(rank, 2))
        other.load_state_dict({**dataset.state_dict(), "step": 3, "taken": 3})
        assert real_ids(other) == real_ids(batches[3:])
    assert sorted(seen, reverse=True) == expected
    assert real_ids(LanceDataset(uneven, 16, columns=["id"], sampler=Backward())) == expected


def test_a_cut_of_ones_own_has_states_and_an_end(uneven: Any) -> None:
    def fresh() -> LanceDataset:
        return LanceDataset(uneven, 16, columns=["id"], sampler=ThreeAndFive())

    dataset = fresh()
    batches = list(dataset)
    assert [batch.size for batch in batches] == [3, 5] * 12
    assert real_ids(batches) == ids_of(uneven)[:96]
    assert {batch.epoch for batch in dataset} == {1}
    found, dataset = [], fresh()
    for steps in (3, 4, 17):
        for _, batch in zip(range(steps), dataset, strict=False):
            found.append(batch)
        state, dataset = dataset.state_dict(), fresh()
        dataset.load_state_dict(state)
    assert [(batch.step, real_ids([batch])) for batch in found] == [(i, real_ids([b])) for i, b in enumerate(batches)]


# -- in Lance's own loader -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [FullScanSampler, ShardedFragmentSampler, ShardedBatchSampler, ShuffleSampler])
def test_every_sampler_is_one_of_lances(cls: type) -> None:
    assert issubclass(cls, lance.sampler.Sampler)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")  # Lance's tensors alias Arrow memory
@pytest.mark.parametrize("filter", [None, "id % 3 = 0"])
@pytest.mark.parametrize("kind", sorted(SHARDED))
def test_lances_own_loader_reads_with_our_samplers(uneven: Any, kind: str, filter: str | None) -> None:
    seen: list[int] = []
    for rank in range(3):
        sampler = SHARDED[kind](rank, 3, 1)
        loader = lance.torch.data.LanceDataset(uneven, 10, columns=["id"], filter=filter, sampler=sampler)
        seen += [int(i) for batch in loader for i in batch]
    assert sorted(seen) == ids_of(uneven, filter)


@pytest.mark.parametrize("kind", sorted(EVERY))
def test_lances_own_loader_gets_the_order_and_the_columns_it_asks_for(uneven: Any, kind: str) -> None:
    options = {"columns": {"prompt": "id * 2", "id": "id"}, "with_row_id": True}  # it knows no new names
    loader = lance.torch.data.LanceDataset(uneven, 10, sampler=EVERY[kind](0, 1, 1), to_tensor_fn=None, **options)
    batches = list(loader)
    assert [batch.num_rows for batch in batches] == [10] * 10 + [3]
    assert {tuple(batch.schema.names) for batch in batches} == {("prompt", "id", "_rowid")}
    ours = LanceDataset(uneven, 10, columns=["id"], sampler=EVERY[kind](0, 1, 1))
    assert [i for batch in batches for i in batch["id"].to_pylist()] == real_ids(ours)
    assert all(batch["prompt"].to_pylist() == [2 * i for i in batch["id"].to_pylist()] for batch in batches)


def test_a_sampler_in_lances_loader_leaves_fill_up_rows_out(uneven: Any) -> None:
    sizes = [[b.num_rows for b in ShardedBatchSampler(r, 4)(uneven, batch_size=30, columns=["id"])] for r in range(4)]
    assert sizes == [[30], [30], [30], [13]]


# -- Lance's samplers and a user's own in ours ---------------------------------------------------------------------

STOCK = {
    "full": lambda rank, world: lance.sampler.FullScanSampler(),
    "fragment": lambda rank, world: lance.sampler.ShardedFragmentSampler(rank, world, randomize=True, seed=3),
    "batch": lambda rank, world: lance.sampler.ShardedBatchSampler(rank, world, randomize=True, seed=3),
}


@pytest.mark.parametrize("filter", [None, "id % 3 = 0"])
@pytest.mark.parametrize("kind", sorted(STOCK))
def test_lances_stock_samplers_become_exact_here(uneven: Any, kind: str, filter: str | None) -> None:
    world = 1 if kind == "full" else 3
    datasets = [
        LanceDataset(uneven, 10, columns=["id"], filter=filter, sampler=STOCK[kind](rank, world))
        for rank in range(world)
    ]
    steps = len(datasets[0])
    found = [list(dataset) for dataset in datasets]
    assert sorted(i for batches in found for i in real_ids(batches)) == ids_of(uneven, filter)
    assert len({tuple(batch.size for batch in batches) for batches in found}) == 1
    assert steps == len(found[0])
    assert datasets[0].state_dict()["step"] == len(found[0])


@pytest.mark.parametrize("kind", ["fragment", "batch"])
def test_set_epoch_of_a_stock_sampler_changes_the_order(uneven: Any, kind: str) -> None:
    sampler = STOCK[kind](0, 1)
    dataset = LanceDataset(uneven, 10, columns=["id"], sampler=sampler)
    first = real_ids(dataset)
    sampler.set_epoch(1)
    second = real_ids(dataset)
    dataset.set_epoch(0)
    assert first == real_ids(dataset) != second


class Backwards(lance.sampler.Sampler):
    """A user's own: the last rows first, in batches of odd sizes."""

    def __call__(self, ds: Any, *args: Any, columns: Any = None, filter: Any = None, **kw: Any) -> Iterator[Any]:
        rows = ds.to_table(columns=columns, filter=filter, with_row_id=kw.get("with_row_id", False))
        at = len(rows)
        for size in [1, 17, 0, 30, 5, 40, 29, 90]:
            low = max(0, at - size)
            part = rows.take(pa.array(range(at - 1, low - 1, -1), pa.int64()))
            yield from part.combine_chunks().to_batches() or [pa.RecordBatch.from_pylist([], rows.schema)]
            at = low


class EvenFragments(lance.sampler.FragmentSampler):
    """A user's own of Lance's other base class."""

    def iter_fragments(self, dataset: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        yield from dataset.get_fragments()[::-2]


def test_a_users_sampler_is_cut_into_exact_batches(uneven: Any) -> None:
    batches = list(LanceDataset(uneven, 16, columns=["id"], sampler=Backwards()))
    assert [batch.size for batch in batches] == [16] * 6 + [7]
    assert real_ids(batches) == ids_of(uneven)[::-1]
    assert [batch.step for batch in batches] == list(range(7))


def test_a_users_sampler_gets_filter_columns_and_row_ids(uneven: Any) -> None:
    options = {"columns": {"twice": "id * 2", "id": "id"}, "filter": "id % 3 = 0", "with_row_id": True}
    batches = list(LanceDataset(uneven, 16, sampler=Backwards(), **options))
    assert real_ids(batches) == ids_of(uneven, "id % 3 = 0")[::-1]
    assert all((batch["twice"] == 2 * batch["id"]).all() for batch in batches)
    table = uneven.to_table(columns=["id"], with_row_id=True)
    row_ids = dict(zip(table["id"].to_pylist(), table["_rowid"].to_pylist(), strict=True))
    assert [int(i) for b in batches for i in b["_rowid"]] == [row_ids[i] for i in real_ids(batches)]


def test_a_users_sampler_gives_the_row_ids_that_columns_ask_for(uneven: Any) -> None:
    expected = [int(i) for batch in LanceDataset(uneven, 16, with_row_id=True) for i in batch["_rowid"]]
    batches = list(LanceDataset(uneven, 16, columns=["_rowid", "id"], sampler=Backwards()))
    assert sorted(int(i) for batch in batches for i in batch["_rowid"]) == sorted(expected)


def test_a_users_fragment_sampler_reads_its_fragments(uneven: Any) -> None:
    seen = real_ids(LanceDataset(uneven, 16, columns=["id"], sampler=EvenFragments()))
    expected = [f.to_table(columns=["id"])["id"].to_pylist() for f in uneven.get_fragments()[::-2]]
    assert sorted(seen) == sorted(i for ids in expected for i in ids)


def test_nobody_can_foresee_a_users_order(uneven: Any) -> None:
    dataset = LanceDataset(uneven, 16, columns=["id"], sampler=Backwards())
    for ask in (lambda: len(dataset), dataset.state_dict, lambda: dataset.load_state_dict({})):
        with pytest.raises(TypeError, match="nobody can foresee"):
            ask()


def test_a_users_sampler_that_forgets_a_column_is_told_so(uneven: Any) -> None:
    class Forgetful(Backwards):
        def __call__(self, ds: Any, *args: Any, **kw: Any) -> Iterator[Any]:
            yield from super().__call__(ds, columns=["id"])

    with pytest.raises(ValueError, match=r"none named \['prompt'\]"):
        list(LanceDataset(uneven, 16, columns=["id", "prompt"], sampler=Forgetful()))


def test_a_users_sampler_may_fail_and_every_batch_before_arrives(uneven: Any) -> None:
    class Failing(Backwards):
        def __call__(self, ds: Any, *args: Any, **kw: Any) -> Iterator[Any]:
            for n, batch in enumerate(super().__call__(ds, *args, **kw)):
                if n == 4:
                    raise RuntimeError("the user's own mistake")
                yield batch

    running = iter(LanceDataset(uneven, 16, columns=["id"], sampler=Failing()))
    assert [next(running).size for _ in range(3)] == [16, 16, 16]
    with pytest.raises(RuntimeError, match="the user's own mistake"):
        next(running)


def test_names_of_paths_and_opened_datasets_read_the_same(uneven: Any) -> None:
    path = Path(uneven.uri.removeprefix("file://"))
    assert real_ids(LanceDataset(path, 20, columns=["id"])) == real_ids(LanceDataset(str(path), 20, columns=["id"]))


class Renamed(lance.sampler.ShardedBatchSampler):
    """A user's own of a stock sampler that cannot give row ids."""


def test_a_subclass_of_a_stock_sampler_reads_as_its_author_wrote_it(uneven: Any) -> None:
    batches = list(LanceDataset(uneven, 16, columns=["id"], sampler=Renamed(1, 2)))  # and warns of nothing
    ids = ids_of(uneven)
    assert real_ids(batches) == [i for start in range(16, 103, 32) for i in ids[start : start + 16]]


def test_a_sampler_that_cannot_give_row_ids_is_named(uneven: Any) -> None:
    with pytest.raises(ValueError, match=r"none named \['_rowid'\]"):
        list(LanceDataset(uneven, 16, columns=["id"], sampler=Renamed(0, 1), with_row_id=True))


def test_more_ranks_than_fragments_is_said_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.lance"
    write(path, [5, 6])
    words: dict[str, Any] = {"columns": ["id"], "shard_granularity": "fragment", "world_size": 3, "device": "cpu"}
    with pytest.warns(UserWarning, match=r"rows\.lance has fewer fragments than .* 2 for 3.*ShardedBatchSampler"):
        assert len(LanceDataset(str(path), 4, rank=2, **words)) == 2
    dataset = LanceDataset(str(path), 4, rank=2, **words)
    assert len(list(dataset)) == 2  # a second warning would be an error here
    assert len(LanceDataset(str(path), 4, rank=0, **{**words, "world_size": 2})) == 2
