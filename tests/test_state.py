"""States: JSON of a few scalars from which the epoch goes on, bit for bit, in another process or world size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lance
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from making import stop_workers
from support_samplers import ELASTIC, EVERY, SHARDED, gpuload_threads, python, real_ids, write, write_images
from torchdata.stateful_dataloader import StatefulDataLoader

from gpuload import Image, LanceDataset, ShardedBatchSampler, ShuffleSampler, StateError, Text
from gpuload.tables.lance import LanceTable

RANDOM_CROPS = {"image": Image(size=16, crop="random", flip=0.5), "prompt": Text("bytes", max_length=20)}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """203 rows in fragments of 60, 83 and 60."""
    return write(tmp_path_factory.mktemp("state") / "rows.lance", [60, 83, 60])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("state") / "images.lance"
    write_images(path, 60)
    return str(path)


def reopened(saved: dict[str, Any]) -> dict[str, Any]:
    """What comes back from a file."""
    back: dict[str, Any] = json.loads(json.dumps(saved))
    assert back == saved
    return back


def take(dataset: Any, steps: int) -> list[Any]:
    running = iter(dataset)
    return [next(running) for _ in range(steps)]


def same(a: Any, b: Any) -> bool:
    """Two batches, bit for bit."""
    tensors = all(torch.equal(a[name], b[name]) for name in a if isinstance(a[name], torch.Tensor))
    lists = all(a[name] == b[name] for name in a if not isinstance(a[name], torch.Tensor))
    places = (a.epoch, a.step, list(a)) == (b.epoch, b.step, list(b))
    return tensors and lists and places and torch.equal(a.rows, b.rows) and torch.equal(a.valid, b.valid)


# -- going on ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(EVERY))
@pytest.mark.parametrize("options", [{}, {"filter": "id % 3 > 0"}, {"samples": 77}, {"drop_last": True}], ids=str)
def test_every_sampler_goes_on_where_it_was(rows: Any, kind: str, options: dict[str, Any]) -> None:
    def fresh() -> LanceDataset:
        return LanceDataset(rows, 16, columns=["id"], sampler=EVERY[kind](0, 2, 5), **options)

    whole = fresh()
    whole.set_epoch(3)
    batches, following = list(whole), list(whole)
    assert {batch.epoch for batch in following} == {4}
    for step in (0, 1, len(batches) - 1, len(batches)):
        dataset = fresh()
        dataset.set_epoch(3)
        running = iter(dataset)
        for _ in range(step):
            next(running)
        other = fresh()
        other.load_state_dict(reopened(dataset.state_dict()))
        expected = batches[step:] or following  # the end of an epoch goes on with the next
        assert all(same(a, b) for a, b in zip(list(other), expected, strict=True))


@pytest.mark.filterwarnings("ignore:.*fewer fragments than there are ranks")
@settings(deadline=None, max_examples=25)
@given(
    kind=st.sampled_from(sorted(SHARDED)),
    batch=st.integers(3, 40),
    world=st.integers(1, 4),
    epoch=st.integers(0, 2),
    data=st.data(),
)
def test_a_chain_of_resumes_is_one_epoch(
    rows: Any, kind: str, batch: int, world: int, epoch: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, world - 1))

    def fresh() -> LanceDataset:
        return LanceDataset(rows, batch, columns=["id"], sampler=SHARDED[kind](rank, world, 1), num_threads=1)

    whole = fresh()
    whole.set_epoch(epoch)
    expected = list(whole)
    found: list[Any] = []
    dataset = fresh()
    dataset.set_epoch(epoch)
    while len(found) < len(expected):
        found += take(dataset, data.draw(st.integers(0, len(expected) - len(found))) or 1)
        saved = reopened(dataset.state_dict())
        assert saved["step"] == len(found)
        dataset = fresh()
        dataset.load_state_dict(saved)
        place = {name: dataset.state_dict()[name] for name in ("epoch", "step")}  # also before it is used
        assert place == {"epoch": epoch, "step": len(found)}
    dataset.set_epoch(epoch)
    assert list(dataset) == []  # nothing is left of it
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))


def test_a_state_is_a_few_scalars(rows: Any) -> None:
    dataset = LanceDataset(rows, 16, columns=["id"], shuffle=True, filter="id > 3")
    take(dataset, 3)
    saved = dataset.state_dict()
    assert all(isinstance(value, (int, str, bool, type(None))) for value in saved.values())
    assert len(json.dumps(saved)) < 1000
    assert (saved["epoch"], saved["step"]) == (0, 3)


@pytest.mark.parametrize("readahead", [1, 2, 16])
def test_a_state_counts_what_was_taken_and_not_what_was_read_ahead(rows: Any, readahead: int) -> None:
    dataset = LanceDataset(rows, 16, columns=["id"], batch_readahead=readahead, shuffle=True)
    assert dataset.state_dict()["step"] == 0
    steps = []
    for batch in dataset:
        steps.append((batch.step + 1, dataset.state_dict()["step"]))
    assert steps == [(k, k) for k in range(1, 14)]


def test_pixels_and_ids_go_on_bit_for_bit_with_other_threads(images: str) -> None:
    options = {"transforms": RANDOM_CROPS, "shuffle": True, "seed": 4, "device": "cpu"}
    whole = LanceDataset(images, 8, num_threads=2, **options)
    whole.set_epoch(2)
    batches = list(whole)
    whole.set_epoch(2)
    take(whole, 3)
    saved = reopened(whole.state_dict())
    for threads, readahead in ((1, 1), (4, 8)):
        other = LanceDataset(images, 8, num_threads=threads, batch_readahead=readahead, **options)
        other.load_state_dict(saved)
        rest = list(other)
        assert len(rest) == len(batches) - 3
        assert all(same(a, b) for a, b in zip(rest, batches[3:], strict=True))


RESUME = """
import json, sys, torch
from gpuload import Image, LanceDataset, Text
transforms = {"image": Image(size=16, crop="random", flip=0.5), "prompt": Text("bytes", max_length=20)}
path, state, out, rank, world = sys.argv[1:]
dataset = LanceDataset(path, 8, transforms=transforms, shuffle=True, seed=4, device="cpu", num_threads=3,
                       rank=int(rank), world_size=int(world))
dataset.load_state_dict(json.loads(state))
batches = [(dict(batch), batch.rows, batch.valid, batch.epoch, batch.step) for batch in dataset]
torch.save(batches, out)
"""


def test_a_new_process_goes_on_bit_for_bit(images: str, tmp_path: Path) -> None:
    dataset = LanceDataset(images, 8, transforms=RANDOM_CROPS, shuffle=True, seed=4, device="cpu")
    dataset.set_epoch(1)
    batches = list(dataset)
    dataset.set_epoch(1)
    take(dataset, 4)
    done = python(RESUME, images, json.dumps(dataset.state_dict()), tmp_path / "rest.pt", 0, 1)
    assert done.returncode == 0, done.stderr
    rest = torch.load(tmp_path / "rest.pt", weights_only=True)
    assert len(rest) == len(batches) - 4 > 0
    for expected, (columns, row, valid, epoch, step) in zip(batches[4:], rest, strict=True):
        assert (epoch, step) == (expected.epoch, expected.step)
        assert torch.equal(row, expected.rows)
        assert torch.equal(valid, expected.valid)
        assert all(torch.equal(columns[name], expected[name]) for name in ("id", "image", "prompt", "prompt_mask"))


# -- another world size --------------------------------------------------------------------------------------------


def ranks(rows: Any, kind: str, world: int, batch: int, epoch: int, **options: Any) -> list[LanceDataset]:
    found = []
    for rank in range(world):
        sampler = SHARDED[kind](rank, world, 6)
        found.append(LanceDataset(rows, batch, columns=["id"], sampler=sampler, num_threads=1, **options))
        found[-1].set_epoch(epoch)
    return found


@pytest.mark.parametrize("kind", ELASTIC)
def test_eight_ranks_stop_and_six_go_on(rows: Any, kind: str) -> None:
    before = [(dataset, take(dataset, 2)) for dataset in ranks(rows, kind, 8, 5, 1)]
    states = [reopened(dataset.state_dict()) for dataset, _ in before]
    assert all(state == states[0] for state in states)  # any rank's state will do
    seen = [i for _, batches in before for i in real_ids(batches)]
    sizes = set()
    for dataset in ranks(rows, kind, 6, 5, 0):
        dataset.load_state_dict(states[0])
        batches = list(dataset)
        assert [batch.step for batch in batches] == list(range(2, 2 + len(batches)))
        assert {batch.epoch for batch in batches} == {1}
        sizes.add(tuple(batch.size for batch in batches))
        seen += real_ids(batches)
    assert sorted(seen) == list(range(203))
    assert len(sizes) == 1  # equal ranks, as in a whole epoch


@settings(deadline=None, max_examples=25)
@given(
    kind=st.sampled_from(ELASTIC),
    batch=st.integers(1, 12),
    worlds=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), min_size=1, max_size=4),
    last=st.integers(1, 6),
    options=st.sampled_from([{}, {"filter": "id % 3 = 0"}, {"samples": 50}]),
    epoch=st.integers(0, 2),
)
def test_however_often_the_world_changes_each_row_comes_once(
    rows: Any,
    kind: str,
    batch: int,
    worlds: list[tuple[int, int]],
    last: int,
    options: dict[str, Any],
    epoch: int,
) -> None:
    expected = sorted(real_ids(LanceDataset(rows, 50, columns=["id"], **options)))
    seen: list[int] = []
    state: dict[str, Any] | None = None
    for world, steps in [*worlds, (last, 1000)]:
        states = []
        for dataset in ranks(rows, kind, world, batch, epoch, **options):
            if state is not None:
                dataset.load_state_dict(state)
            for _, found in zip(range(steps), dataset, strict=False):
                seen += real_ids([found])
            states.append(reopened(dataset.state_dict()))
        assert all(other == states[0] for other in states)
        state = states[0]
    assert sorted(seen) == expected


def test_the_order_of_the_whole_epoch_survives_a_change_of_world(rows: Any) -> None:
    (alone,) = ranks(rows, "shuffle", 1, 5, 1)
    order = real_ids(alone)
    three = ranks(rows, "shuffle", 3, 5, 1)
    parts = [take(dataset, 4) for dataset in three]
    seen = [i for step in range(4) for part in parts for i in real_ids([part[step]])]
    two = ranks(rows, "shuffle", 2, 5, 1)
    for dataset in two:
        dataset.load_state_dict(three[0].state_dict())
    rest = [list(dataset) for dataset in two]
    seen += [i for step in range(len(rest[0])) for part in rest for i in real_ids([part[step]])]
    assert seen == order


@pytest.mark.parametrize("kind", ["fragment", "fragment-random"])
def test_the_fragment_sampler_refuses_another_world_size(rows: Any, kind: str) -> None:
    saved = ranks(rows, kind, 2, 5, 0)[0].state_dict()
    with pytest.raises(StateError, match=r"world_size=2 .* got world_size=3\. The fragment sampler's") as caught:
        ranks(rows, kind, 3, 5, 0)[0].load_state_dict(saved)
    assert (caught.value.field, caught.value.saved, caught.value.here) == ("world_size", 2, 3)


# -- what is refused -----------------------------------------------------------------------------------------------

BASE: dict[str, Any] = {"batch_size": 16, "columns": ["id"], "filter": "id > 3", "seed": 1, "shuffle": "batch"}


@pytest.mark.parametrize(
    ("change", "field", "saved", "here"),
    [
        ({"filter": "id > 4"}, "filter", "id > 3", "id > 4"),
        ({"filter": None}, "filter", "id > 3", None),
        ({"seed": 2}, "seed", 1, 2),
        ({"batch_size": 17}, "batch_size", 16, 17),
        ({"samples": 50}, "samples", 0, 50),
        ({"shuffle": True}, "sampler", "ShardedBatchSampler", "ShuffleSampler"),
        ({"shuffle": False}, "randomize", True, False),
        ({"shard_granularity": "fragment"}, "sampler", "ShardedBatchSampler", "ShardedFragmentSampler"),
        (
            {"shuffle": False, "sampler": ShardedBatchSampler(randomize=True, seed=9)},
            "sampler_seed",
            1,
            9,
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_state_of_another_order_is_refused(
    rows: Any, change: dict[str, Any], field: str, saved: Any, here: Any
) -> None:
    state = LanceDataset(rows, **BASE).state_dict()
    other = LanceDataset(rows, **{**BASE, **change})
    with pytest.raises(StateError) as caught:
        other.load_state_dict(state)
    error = caught.value
    assert (error.field, error.saved, error.here) == (field, saved, here)
    assert f"{field}={saved!r}" in str(error)
    assert f"{field}={here!r}" in str(error)
    assert other.state_dict()["step"] == 0  # and nothing has changed


def test_another_block_size_is_refused(rows: Any) -> None:
    state = LanceDataset(rows, 8, columns=["id"], shuffle="block").state_dict()
    with pytest.raises(StateError, match="block_size=16 as in the saved state, got block_size=1"):
        LanceDataset(rows, 8, columns=["id"], shuffle=True).load_state_dict(state)


def test_a_state_of_another_dataset_is_refused(rows: Any, tmp_path: Path) -> None:
    other = write(tmp_path / "other.lance", [60, 83, 60])  # the same rows and version, but not the same files
    assert other.version == rows.version
    state = LanceDataset(rows, 8, columns=["id"]).state_dict()
    with pytest.raises(StateError) as caught:
        LanceDataset(other, 8, columns=["id"]).load_state_dict(state)
    assert caught.value.field == "dataset"
    assert str(rows.uri) in str(caught.value)
    assert str(other.uri) in str(caught.value)


def test_a_state_of_another_version_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "versions.lance"
    old = write(path, [30])
    dataset = LanceDataset(old, 8, columns=["id"], shuffle=True)
    first = real_ids(take(dataset, 2))
    state = dataset.state_dict()
    write(tmp_path / "more.lance", [5])
    lance.write_dataset(lance.dataset(str(tmp_path / "more.lance")).to_table(), str(path), mode="append")
    with pytest.raises(StateError, match=r"dataset_options=\{'version': 1\}") as caught:
        LanceDataset(path, 8, columns=["id"], shuffle=True).load_state_dict(state)
    assert (caught.value.field, caught.value.saved, caught.value.here) == ("dataset_version", 1, 2)
    pinned = LanceDataset(path, 8, columns=["id"], shuffle=True, dataset_options={"version": 1})
    pinned.load_state_dict(state)
    assert sorted(first + real_ids(pinned)) == list(range(30))


def test_the_same_dataset_elsewhere_is_accepted(rows: Any, tmp_path: Path) -> None:
    here = Path(str(rows.uri).removeprefix("file://"))
    shutil.copytree(here, tmp_path / "copy.lance")
    dataset = LanceDataset(rows, 8, columns=["id"], shuffle=True)
    first = real_ids(take(dataset, 5))
    copy = LanceDataset(tmp_path / "copy.lance", 8, columns=["id"], shuffle=True)
    copy.load_state_dict(dataset.state_dict())
    assert sorted(first + real_ids(copy)) == list(range(203))


@pytest.mark.parametrize("missing", ["version", "epoch", "step", "start", "taken", "world_size", "fingerprint", "seed"])
def test_a_state_with_a_piece_missing_is_refused(rows: Any, missing: str) -> None:
    dataset = LanceDataset(rows, 8, columns=["id"])
    state = dataset.state_dict()
    del state[missing]
    with pytest.raises(StateError, match=missing if missing != "fingerprint" else "dataset"):
        dataset.load_state_dict(state)


def test_a_state_of_another_format_is_refused(rows: Any) -> None:
    dataset = LanceDataset(rows, 8, columns=["id"])
    with pytest.raises(StateError, match="version=99 as in the saved state, got version=1"):
        dataset.load_state_dict({**dataset.state_dict(), "version": 99})


# -- what it costs, and epochs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(EVERY))
def test_no_row_before_the_place_is_read(rows: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fresh() -> LanceDataset:
        return LanceDataset(rows, 8, columns=["id"], sampler=EVERY[kind](0, 1, 2), batch_readahead=1)

    dataset = fresh()
    rest = list(dataset)[10:]
    dataset.set_epoch(0)
    take(dataset, 10)
    state, other = dataset.state_dict(), fresh()
    other.load_state_dict(state)
    len(other)  # opened
    reads: list[list[list[int]]] = []
    original = LanceTable.read

    def read(self: LanceTable, ranges: Any) -> Any:
        reads.append(ranges.tolist())
        return original(self, ranges)

    monkeypatch.setattr(LanceTable, "read", read)
    running = iter(other)
    assert same(next(running), rest[0])
    del running
    rows_read = {i for ranges in reads for low, high in ranges for i in range(low, high)}
    assert set(rest[0].rows.tolist()) <= rows_read <= {i for batch in rest for i in batch.rows.tolist()}
    assert len(rows_read) <= 8 * 4  # what is read ahead, and not the epoch


def test_bytes_read_after_a_resume_do_not_grow_with_the_step(images: str) -> None:
    cost = []
    for step in (0, 6):
        dataset = LanceDataset(images, 8, columns=["id", "image"], transforms={"image": Image(8)}, shuffle=True)
        take(dataset, step)
        opened = lance.dataset(images)
        other = LanceDataset(opened, 8, columns=["id", "image"], transforms={"image": Image(8)}, shuffle=True)
        other.load_state_dict(dataset.state_dict())
        opened.io_stats_incremental()
        take(other, 1)
        cost.append(opened.io_stats_incremental().read_bytes)
    assert cost[1] <= cost[0] * 1.2


def test_the_next_epoch_after_a_resumed_one_is_whole(rows: Any) -> None:
    dataset = LanceDataset(rows, 8, columns=["id"], shuffle=True)
    dataset.set_epoch(4)
    take(dataset, 20)
    other = LanceDataset(rows, 8, columns=["id"], shuffle=True)
    other.load_state_dict(dataset.state_dict())
    seen = {}
    for epoch in (4, 5):  # what a training script does
        other.set_epoch(epoch)
        seen[epoch] = real_ids(other)
    assert len(seen[4]) == 203 - 160
    assert sorted(seen[5]) == list(range(203))
    assert other.state_dict()["epoch"] == 5


def test_a_state_from_the_end_of_an_epoch_goes_on_with_the_next(rows: Any) -> None:
    dataset = LanceDataset(rows, 8, columns=["id"], shuffle=True)
    list(dataset)
    state = reopened(dataset.state_dict())
    other = LanceDataset(rows, 8, columns=["id"], shuffle=True)
    expected = list(dataset)
    for told in (None, 0, 1):
        other.load_state_dict(state)
        assert (other.state_dict()["epoch"], other.state_dict()["step"]) == (0, 26)
        if told is not None:
            other.set_epoch(told)
        found = list(other)
        if told == 0:  # the loop asks for the rest of the epoch
            assert found == []
            found = list(other)
        assert all(same(a, b) for a, b in zip(found, expected, strict=True)), told
        assert sorted(real_ids(found)) == list(range(203))


def test_another_epoch_forgets_the_place(rows: Any) -> None:
    dataset = LanceDataset(rows, 8, columns=["id"], shuffle=True)
    take(dataset, 5)
    other = LanceDataset(rows, 8, columns=["id"], shuffle=True)
    other.load_state_dict(dataset.state_dict())
    other.set_epoch(1)
    assert other.state_dict()["step"] == 0
    assert len(real_ids(other)) == 203


def test_a_state_sets_the_epoch_of_a_sampler_that_was_given(rows: Any) -> None:
    sampler = ShuffleSampler(seed=3)
    dataset = LanceDataset(rows, 8, columns=["id"], sampler=sampler)
    sampler.set_epoch(7)
    expected = list(dataset)[5:]
    sampler.set_epoch(7)
    take(dataset, 5)
    other = LanceDataset(rows, 8, columns=["id"], sampler=ShuffleSampler(seed=3))
    other.load_state_dict(dataset.state_dict())
    assert all(same(a, b) for a, b in zip(list(other), expected, strict=True))


# -- torchdata's StatefulDataLoader --------------------------------------------------------------------------------


TORCHDATA = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 with torch 2.13


def stateful(rows: Any, workers: int, context: Any = None, rank: int = 0, world: int = 1) -> StatefulDataLoader:
    dataset = LanceDataset(rows, 8, columns=["id"], sampler=ShuffleSampler(rank, world, seed=2), device="cpu")
    return StatefulDataLoader(dataset, batch_size=None, num_workers=workers, multiprocessing_context=context)


@TORCHDATA
@pytest.mark.parametrize("steps", [0, 1, 7, 25])
def test_a_stateful_data_loader_goes_on(rows: Any, steps: int) -> None:
    expected = list(stateful(rows, 0))
    loader = stateful(rows, 0)
    running = iter(loader)
    for _ in range(steps):
        next(running)
    state = reopened(loader.state_dict())
    other = stateful(rows, 0)
    other.load_state_dict(state)
    assert all(same(a, b) for a, b in zip(list(other), expected[steps:], strict=True))
    assert len(list(other)) == len(expected)  # and then a whole epoch


@TORCHDATA
@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_the_epoch_after_a_saved_end_is_the_one_that_the_loop_sets(
    rows: Any, workers: int, persistent: bool, quick: Any
) -> None:
    """A checkpoint at the end of an epoch, the place where most are made; the loop goes on with the next."""

    def loader() -> StatefulDataLoader:
        dataset = LanceDataset(rows, 8, columns=["id"], sampler=ShuffleSampler(seed=2), device="cpu")
        context = quick if workers else None
        options = {"num_workers": workers, "persistent_workers": persistent, "multiprocessing_context": context}
        return StatefulDataLoader(dataset, batch_size=None, **options)

    expected = LanceDataset(rows, 8, columns=["id"], sampler=ShuffleSampler(seed=2))
    first = loader()
    first.dataset.set_epoch(4)
    assert len(list(first)) == 26
    state = reopened(first.state_dict())
    resumed = loader()
    resumed.load_state_dict(state)
    for epoch in (5, 6):
        resumed.dataset.set_epoch(epoch)
        expected.set_epoch(epoch)
        assert all(same(a, b) for a, b in zip(list(resumed), list(expected), strict=True)), epoch


@TORCHDATA
def test_workers_that_persist_take_an_earlier_epoch_after_a_loaded_place(rows: Any, quick: Any) -> None:
    def dataset() -> LanceDataset:
        return LanceDataset(rows, 8, columns=["id"], sampler=ShuffleSampler(seed=2), device="cpu")

    def loader() -> StatefulDataLoader:
        options = {"num_workers": 2, "persistent_workers": True, "multiprocessing_context": quick}
        return StatefulDataLoader(dataset(), batch_size=None, **options)

    first = loader()
    first.dataset.set_epoch(4)
    running = iter(first)
    for _ in range(7):
        next(running)
    resumed, expected = loader(), dataset()
    resumed.load_state_dict(reopened(first.state_dict()))
    for epoch, skipped in ((4, 7), (1, 0)):
        resumed.dataset.set_epoch(epoch)
        expected.set_epoch(epoch)
        assert all(same(a, b) for a, b in zip(list(resumed), list(expected)[skipped:], strict=True)), epoch


def test_a_place_loaded_after_set_epoch_is_where_the_next_iteration_starts(rows: Any) -> None:
    def dataset(epoch: int) -> LanceDataset:
        made = LanceDataset(rows, 8, columns=["id"], sampler=ShuffleSampler(seed=2))
        made.set_epoch(epoch)
        return made

    whole, other, third = dataset(3), dataset(7), dataset(0)
    state = take(whole, 5) and whole.state_dict()
    expected = list(dataset(3))
    for late in (other, third):
        late.load_state_dict(state)
        assert late.state_dict()["epoch"] == 3
        assert all(same(a, b) for a, b in zip(list(late), expected[5:], strict=True))
    assert all(same(a, b) for a, b in zip(list(third), list(dataset(4)), strict=True)), "no other epoch was set"
    assert all(same(a, b) for a, b in zip(list(other), list(dataset(7)), strict=True)), "set before, begun after"


@TORCHDATA
def test_a_stateful_data_loader_with_workers_goes_on(rows: Any) -> None:
    expected = list(LanceDataset(rows, 8, columns=["id"], sampler=ShuffleSampler(seed=2)))
    loader = stateful(rows, 2, "spawn")
    running = iter(loader)
    for _ in range(7):  # an odd number: the workers are not in step
        next(running)
    state = reopened(loader.state_dict())
    stop_workers(running)
    other = stateful(rows, 2, "spawn")
    other.load_state_dict(state)
    assert all(same(a, b) for a, b in zip(list(other), expected[7:], strict=True))


@TORCHDATA
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("world", [1, 2])
def test_a_stateful_data_loader_with_workers_goes_on_and_on(rows: Any, quick: Any, world: int) -> None:
    dataset = LanceDataset(rows, 8, columns=["id"], sampler=ShuffleSampler(world - 1, world, seed=2))
    expected = list(dataset)
    dataset.set_epoch(0)
    take(dataset, 1)
    loader, found = stateful(rows, 3, quick, world - 1, world), expected[:1]
    loader.dataset.load_state_dict(dataset.state_dict())  # from a run without workers
    for steps in (2, 1, 4, 100):
        running = iter(loader)
        found += [batch for _, batch in zip(range(steps), running, strict=False)]
        state = reopened(loader.state_dict())
        stop_workers(running)
        loader = stateful(rows, 3, quick, world - 1, world)
        loader.load_state_dict(state)
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))


def test_what_one_worker_knows_does_not_fit_another_world_size(rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = ranks(rows, "shuffle", 2, 8, 0)[0].state_dict()
    other = ranks(rows, "shuffle", 3, 8, 0)[0]
    other.load_state_dict(saved)
    info = SimpleNamespace(id=0, num_workers=2)
    monkeypatch.setattr("torch.utils.data._utils.worker._worker_info", info)  # as in a worker
    with pytest.raises(StateError, match=r"world_size=2 .* got world_size=3\. A DataLoader worker"):
        other.load_state_dict(saved)


# -- the cache -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["batch", "shuffle", "fragment-random"])
def test_the_cache_serves_when_the_source_is_gone(images: str, tmp_path: Path, kind: str) -> None:
    copied, cache = tmp_path / "source.lance", tmp_path / "cache"
    shutil.copytree(images, copied)
    cache.mkdir()
    options = {"transforms": RANDOM_CROPS, "device": "cpu", "filter": "id % 5 > 0", "with_row_id": True}
    plain = LanceDataset(images, 8, sampler=SHARDED[kind](0, 1, 1), **options)
    expected = {}
    for epoch in (0, 1):
        plain.set_epoch(epoch)
        expected[epoch] = list(plain)
    dataset = LanceDataset(copied, 8, sampler=SHARDED[kind](0, 1, 1), cache=str(cache), **options)
    for batch in dataset:  # an epoch that is left early leaves the cache whole
        assert same(batch, expected[0][0])
        break
    shutil.rmtree(copied)
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        assert all(same(a, b) for a, b in zip(list(dataset), expected[epoch], strict=True))
    dataset.set_epoch(1)
    take(dataset, 3)
    dataset.load_state_dict(dataset.state_dict())
    assert all(same(a, b) for a, b in zip(list(dataset), expected[1][3:], strict=True))
    del dataset
    assert list(cache.iterdir()) == []  # it goes with the dataset


# -- leaving early -------------------------------------------------------------------------------------------------


def test_nothing_runs_on_after_a_break_an_error_or_another_iteration(images: str) -> None:
    dataset = LanceDataset(images, 4, transforms=RANDOM_CROPS, device="cpu", num_threads=3, batch_readahead=4)
    for _ in dataset:
        assert gpuload_threads()
        break
    assert not gpuload_threads()

    def fail() -> None:
        for _ in dataset:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not gpuload_threads()
    first, second = iter(dataset), iter(dataset)
    assert same(next(first), next(second))
    assert same(next(first), next(second))  # side by side
    del first
    assert len(list(second)) == 13
    assert not gpuload_threads()


def test_close_ends_what_runs_and_the_dataset_can_be_used_again(images: str) -> None:
    with LanceDataset(images, 4, transforms=RANDOM_CROPS, device="cpu") as dataset:
        running = iter(dataset)
        next(running)
        assert gpuload_threads()
    assert not gpuload_threads()
    assert list(running) == []
    assert np.unique([i for batch in dataset for i in real_ids([batch])]).size == 60
    assert not gpuload_threads()
