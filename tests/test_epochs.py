"""Which epoch comes next, and whose place is whose: an epoch that ended goes on with the next, an iterator owns its
place."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import lance.sampler
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support_samplers import EVERY, RANDOM, python, real_ids, write

from gpuload import (
    ConfigError,
    Image,
    LanceDataset,
    ShardedBatchSampler,
    ShardedFragmentSampler,
    ShuffleSampler,
    StateError,
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """203 rows in fragments of 60, 83 and 60."""
    return write(tmp_path_factory.mktemp("epochs") / "rows.lance", [60, 83, 60])


def shuffled(rows: Any, epoch: int | None = None, batch_size: int = 16) -> LanceDataset:
    """13 batches of 16, in the order of an epoch."""
    dataset = LanceDataset(rows, batch_size, columns=["id"], shuffle=True, num_threads=1, device="cpu")
    if epoch is not None:
        dataset.set_epoch(epoch)
    return dataset


def place(saving: Any) -> tuple[int, int]:
    """(epoch, step) of a state; also that it survives JSON."""
    state = saving.state_dict()
    assert json.loads(json.dumps(state)) == state
    return state["epoch"], state["step"]


# -- one after the other -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(EVERY))
def test_an_epoch_that_ran_to_its_end_is_followed_by_the_next(rows: Any, kind: str) -> None:
    def fresh() -> LanceDataset:
        return LanceDataset(rows, 16, columns=["id"], sampler=EVERY[kind](0, 2, 5), num_threads=1)

    dataset, orders = fresh(), []
    for epoch in range(3):
        batches = list(dataset)
        assert {batch.epoch for batch in batches} == {epoch}
        told = fresh()
        told.set_epoch(epoch)
        orders.append(real_ids(batches))
        assert orders[-1] == real_ids(told)
    assert (len({tuple(order) for order in orders}) > 1) == (kind in RANDOM)


def test_crops_change_with_every_epoch_of_an_unshuffled_dataset(photos: str) -> None:
    dataset = LanceDataset(photos, 25, transforms={"image": Image(16, crop="random")}, device="cpu")
    first, second = (torch.cat([batch["image"] for batch in dataset]) for _ in range(2))
    dataset.set_epoch(0)
    again = torch.cat([batch["image"] for batch in dataset])
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_the_last_batch_is_the_end_whether_another_is_asked_for_or_not(rows: Any) -> None:
    dataset = shuffled(rows)
    for epoch in range(2):
        for _, batch in zip(range(len(dataset)), dataset, strict=False):
            assert batch.epoch == epoch
        assert place(dataset) == (epoch, 13)


def test_an_epoch_that_was_left_early_starts_again(rows: Any) -> None:
    dataset = shuffled(rows)
    for batch in dataset:
        if batch.step == 11:  # one before the last
            break
    assert place(dataset) == (0, 12)
    assert real_ids(dataset) == real_ids(shuffled(rows, 0))


@pytest.mark.parametrize("by", ["dataset", "given sampler", "dataset.sampler"])
@pytest.mark.parametrize("when", ["before", "within", "after"])
def test_set_epoch_decides_where_it_is_called(rows: Any, when: str, by: str) -> None:
    sampler = ShuffleSampler()
    dataset = LanceDataset(rows, 16, columns=["id"], sampler=sampler)
    told = {"dataset": dataset, "given sampler": sampler, "dataset.sampler": dataset.sampler}[by]
    for _ in range(2):
        if when == "before":
            told.set_epoch(0)
        for batch in dataset:
            if when == "within" and batch.step == 5:
                told.set_epoch(0)
            assert batch.epoch == 0
        if when == "after":
            told.set_epoch(0)
    assert place(dataset) == ((0, 13) if when == "before" else (0, 0))


@pytest.mark.filterwarnings("ignore:No row matches")
def test_an_epoch_without_rows_ends_too(rows: Any) -> None:
    dataset = LanceDataset(rows, 8, columns=["id"], filter="id < 0")
    assert [len(list(dataset)) for _ in range(3)] == [0, 0, 0]
    assert place(dataset) == (2, 0)


@pytest.mark.filterwarnings("ignore::gpuload.BadRowWarning")
@pytest.mark.parametrize("last", [1, 30])
def test_rows_that_are_skipped_do_not_hide_the_end(store: Callable[..., str], last: int) -> None:
    """Nothing is left of the last batches, or of them all."""
    path = store({"image": pa.array([None] * 30, pa.binary()), "number": range(30)})
    options: dict[str, Any] = {"transforms": {"image": Image(8)}, "on_error": "skip", "device": "cpu"}
    dataset = LanceDataset(path, 4, samples=last, **options)
    for epoch in range(2):
        assert sum(batch.size for batch in dataset) == 0
        assert place(dataset) == (epoch, len(dataset))


def test_record_batches_have_epochs_too(rows: Any) -> None:
    dataset = LanceDataset(rows, 16, columns=["id"], shuffle=True, to_tensor_fn=None)
    orders = [[i for batch in dataset for i in batch["id"].to_pylist()] for _ in range(2)]
    assert orders == [real_ids(shuffled(rows, 0)), real_ids(shuffled(rows, 1))]


class Shifted(lance.sampler.Sampler):
    """A user's own, with an epoch as in Lance's: starts at row `epoch`."""

    def __init__(self) -> None:
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __call__(self, ds: Any, *args: Any, columns: Any = None, **kw: Any) -> Iterator[Any]:
        table = ds.to_table(columns=columns, with_row_id=True)
        yield from table.slice(self._epoch).to_batches(max_chunksize=50)


def test_a_users_sampler_is_told_the_next_epoch(rows: Any) -> None:
    sampler = Shifted()
    dataset = LanceDataset(rows, 16, columns=["id"], sampler=sampler)
    assert [next(iter(dataset))["id"][0].item() for _ in range(2)] == [0, 0]  # left early
    firsts = [real_ids(dataset)[0] for _ in range(3)]
    sampler.set_epoch(0)
    assert [*firsts, real_ids(dataset)[0]] == [0, 1, 2, 0]


@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_a_given_sampler_that_is_told_the_same_epoch_again_gives_it_again(rows: Any, kind: str) -> None:
    sampler: Any = ShuffleSampler(seed=1)
    if kind == "stock":
        sampler = lance.sampler.ShardedBatchSampler(0, 1, randomize=True, seed=1)
    dataset = LanceDataset(rows, 16, columns=["id"], sampler=sampler)
    orders = []
    for _ in range(2):
        sampler.set_epoch(0)
        orders.append(real_ids(dataset))
    assert orders[0] == orders[1] != real_ids(dataset)


SAMPLERS: dict[str, Callable[[], dict[str, Any]]] = {
    "words": lambda: {"shuffle": True},
    "ours": lambda: {"sampler": ShuffleSampler(seed=1)},
    "stock": lambda: {"sampler": lance.sampler.ShardedBatchSampler(0, 1, randomize=True)},
    "own": lambda: {"sampler": Shifted()},
}


@pytest.mark.parametrize("kind", SAMPLERS)
def test_set_epoch_of_the_datasets_sampler_is_the_datasets(rows: Any, kind: str) -> None:
    dataset = LanceDataset(rows, 16, columns=["id"], **SAMPLERS[kind]())
    expected = LanceDataset(rows, 16, columns=["id"], **SAMPLERS[kind]())
    for epoch in (3, 3, 0):
        dataset.sampler.set_epoch(epoch)
        expected.set_epoch(epoch)
        batches = list(dataset)
        assert {batch.epoch for batch in batches} == {epoch}
        assert real_ids(batches) == real_ids(expected)


# -- places --------------------------------------------------------------------------------------------------------


def test_a_look_at_the_first_batch_moves_nobodys_place(rows: Any) -> None:
    dataset, expected = shuffled(rows), real_ids(shuffled(rows, 0))
    seen: list[int] = []
    for step, batch in enumerate(dataset):
        seen += real_ids([batch])
        if step == 3:
            assert next(iter(dataset)).step == 0
            assert place(dataset) == (0, 4)
            look = iter(dataset)
            next(look)
            assert place(dataset) == (0, 1)  # begun last, and alive
            look.close()
            assert place(dataset) == (0, 4)
            other = shuffled(rows)
            other.load_state_dict(dataset.state_dict())
            assert seen + real_ids(other) == expected
    assert seen == expected
    assert place(dataset) == (0, 13)
    assert {batch.epoch for batch in dataset} == {1}


def test_a_whole_look_within_an_epoch_does_not_skip_one(rows: Any) -> None:
    dataset = shuffled(rows)
    for batch in dataset:
        if batch.step == 5:
            assert real_ids(dataset) == real_ids(shuffled(rows, 0))
    assert place(dataset) == (0, 13)
    assert {batch.epoch for batch in dataset} == {1}


def test_each_iterator_has_a_state_of_its_own(rows: Any) -> None:
    dataset = shuffled(rows)
    first = iter(dataset)
    for _ in range(7):
        next(first)
    second = iter(dataset)
    next(second)
    assert (place(first), place(second), place(dataset)) == ((0, 7), (0, 1), (0, 1))
    for running in (first, second):
        other = shuffled(rows)
        other.load_state_dict(running.state_dict())
        assert real_ids(other) == real_ids(running)
    assert (place(first), place(second)) == ((0, 13), (0, 13))


def test_a_place_that_was_loaded_is_kept_from_an_iterator_that_goes(rows: Any) -> None:
    dataset = shuffled(rows, 2)
    running = iter(dataset)
    for _ in range(7):
        next(running)
    state = dataset.state_dict()
    next(running)
    dataset.load_state_dict(state)
    del running
    gc.collect()
    assert place(dataset) == (2, 7)
    assert [batch.step for batch in dataset] == list(range(7, 13))


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["begin", "next", "next", "close", "drop", "set"]), st.integers(0, 3)), max_size=30
)


@dataclass
class Running:
    """What the model knows of an iterator; `sets` is how often an epoch had been set when it began."""

    batches: Any
    epoch: int
    sets: int
    step: int = 0
    alive: bool = True


@settings(deadline=None, max_examples=40)
@given(OPERATIONS)
def test_places_and_epochs_follow_a_model(rows: Any, operations: list[tuple[str, int]]) -> None:
    """Up to four iterators of three batches at once, which are pulled, closed and dropped while epochs are set."""
    dataset = shuffled(rows, batch_size=70)
    iterators: list[Running] = []
    epoch = sets = 0
    for what, which in operations:
        left = None
        if what == "set":
            dataset.set_epoch(which)
            epoch, sets = which, sets + 1
        elif what == "begin" and len(iterators) < 4:
            iterators.append(Running(iter(dataset), epoch, sets))
        elif what != "begin" and which < len(iterators):
            left = iterators[which] if iterators[which].alive else None
            if what == "close":
                iterators[which].batches.close()
            elif what == "drop":
                iterators.pop(which).batches = None
            elif left is None:
                assert next(iterators[which].batches, None) is None
            else:
                batch = next(left.batches)
                assert (batch.epoch, batch.step) == (left.epoch, left.step)
                left.step += 1
                left = left if left.step == 3 else None
        own = left is not None and left.sets == sets
        if left is not None:
            left.alive = False
            if own and left.step == 3 and what == "next":
                epoch, sets = left.epoch + 1, sets + 1
        alive = [(running.epoch, running.step) for running in iterators if running.alive]
        if alive:
            assert place(dataset) == alive[-1]
        elif left is not None and own:
            assert place(dataset) == (left.epoch, left.step)
    for running in iterators:
        running.batches.close()
    with closing(iter(dataset)) as batches:
        assert next(batches).epoch == epoch


# -- states of before ----------------------------------------------------------------------------------------------

# What version 0.1.0 saved after three steps of epoch 2, and the rows of the batch that follows.
SAVED: dict[str, tuple[dict[str, Any], dict[str, Any], list[int]]] = {
    "words": (
        {"shuffle": True, "seed": 4, "filter": "id % 7 > 0"},
        {
            "version": 1, "epoch": 2, "step": 3, "start": 0, "taken": 3, "world_size": 1, "dataset_version": 3,
            "filter": "id % 7 > 0", "samples": 0, "seed": 4, "batch_size": 8, "sampler": "ShuffleSampler",
            "randomize": True, "sampler_seed": 4, "block_size": 1,
        },
        [187, 102, 164, 100, 103, 106, 158, 145],
    ),
    "block": (
        {"shuffle": "block", "seed": 4, "samples": 150},
        {
            "version": 1, "epoch": 2, "step": 3, "start": 0, "taken": 3, "world_size": 1, "dataset_version": 3,
            "filter": None, "samples": 150, "seed": 4, "batch_size": 8, "sampler": "ShuffleSampler",
            "randomize": True, "sampler_seed": 4, "block_size": 16,
        },
        [135, 137, 138, 142, 143, 144, 145, 146],
    ),
    "batch": (
        {"sampler": ShardedBatchSampler(1, 2, randomize=True, seed=3)},
        {
            "version": 1, "epoch": 2, "step": 3, "start": 0, "taken": 3, "world_size": 2, "dataset_version": 3,
            "filter": None, "samples": 0, "seed": 0, "batch_size": 8, "sampler": "ShardedBatchSampler",
            "randomize": True, "sampler_seed": 3,
        },
        [32, 33, 34, 35, 36, 37, 38, 39],
    ),
    "resumed batch": (  # saved by a run that was resumed itself, three steps in
        {"sampler": ShardedBatchSampler(1, 2, randomize=True, seed=3)},
        {
            "version": 1, "epoch": 2, "step": 3, "start": 32, "taken": 1, "world_size": 2, "dataset_version": 3,
            "filter": None, "samples": 0, "seed": 0, "batch_size": 8, "sampler": "ShardedBatchSampler",
            "randomize": True, "sampler_seed": 3,
        },
        [32, 33, 34, 35, 36, 37, 38, 39],
    ),
    "fragment": (
        {"sampler": ShardedFragmentSampler(1, 2, randomize=True, seed=3)},
        {
            "version": 1, "epoch": 2, "step": 3, "start": 0, "taken": 3, "world_size": 2, "dataset_version": 3,
            "filter": None, "samples": 0, "seed": 0, "batch_size": 8, "sampler": "ShardedFragmentSampler",
            "randomize": True, "sampler_seed": 3,
        },
        [24, 25, 26, 27, 28, 29, 30, 31],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAVED)
def test_a_state_of_version_0_1_0_goes_on(rows: Any, name: str) -> None:
    words, saved, following = SAVED[name]
    files = [file.path for fragment in rows.get_fragments() for file in fragment.data_files()]
    fingerprint = hashlib.sha256(f"{rows.version}\n{chr(10).join(files)}".encode()).hexdigest()[:16]
    state = {**saved, "uri": "/where/it/was.lance", "fingerprint": fingerprint}  # the files' names are random
    dataset = LanceDataset(rows, 8, columns=["id"], **words)
    dataset.load_state_dict(state)
    batch = next(iter(dataset))
    assert (batch.epoch, batch.step, batch.rows.tolist()) == (2, 3, following)
    assert set(dataset.state_dict()) == set(state)


@pytest.mark.parametrize("saved", [None, [], "state", 3])
def test_what_is_no_state_is_refused(rows: Any, saved: Any) -> None:
    with pytest.raises(ConfigError, match=r"Expected a state_dict\(\) of gpuload.LanceDataset, got "):
        shuffled(rows).load_state_dict(saved)


@pytest.mark.parametrize(
    ("name", "value"), [("epoch", "two"), ("step", -1), ("taken", None), ("start", 1.5), ("taken", 4)]
)
def test_a_state_with_nonsense_in_it_is_refused(rows: Any, name: str, value: Any) -> None:
    dataset = shuffled(rows)
    for batch in dataset:
        if batch.step == 2:
            break
    state = dataset.state_dict()
    assert (state["step"], state["taken"]) == (3, 3)
    with pytest.raises(StateError, match=f"Expected {name}") as caught:
        dataset.load_state_dict({**state, name: value})
    assert (caught.value.field, caught.value.saved) == (name, value)


# -- DataLoader workers --------------------------------------------------------------------------------------------

AGAIN = """
import sys
from torch.utils.data import DataLoader
from gpuload import LanceDataset
path, told, words = sys.argv[1], sys.argv[2] == "told", eval(sys.argv[3])
dataset = LanceDataset(path, 16, columns=["id"], **words)
options = {"num_workers": 2, "persistent_workers": len(sys.argv) > 4, "multiprocessing_context": "fork"}
loader = DataLoader(dataset, **options)
for epoch in range(3):
    if told:
        dataset.set_epoch(0)
    for batch in loader:
        assert batch.epoch == 0
"""


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_that_read_a_random_order_again_say_so(rows: Any, persistent: bool) -> None:
    path = str(rows.uri).removeprefix("file://")
    done = python(AGAIN, path, "-", {"shuffle": True}, *["persistent"] * persistent)
    assert done.returncode == 0, done.stderr
    assert "Epoch 0 is read again by DataLoader workers" in done.stderr
    assert "Call dataset.set_epoch(n) before each epoch" in done.stderr


@pytest.mark.parametrize(("told", "words"), [("told", {"shuffle": True}), ("-", {})])
def test_workers_that_were_told_or_read_in_order_say_nothing(rows: Any, told: str, words: dict[str, Any]) -> None:
    done = python(AGAIN, str(rows.uri).removeprefix("file://"), told, words)
    assert done.returncode == 0, done.stderr
    assert "read again" not in done.stderr
