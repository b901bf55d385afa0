"""DataLoader workers: each row once over ranks and workers, in order; a fork that cannot work says so at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lance.sampler
import pytest
import torch
import torch.distributed
from making import stop_workers
from support_samplers import EVERY, SHARDED, python, real_ids, write
from torch.utils.data import DataLoader

from gpuload import Image, LanceDataset, ShuffleSampler, StateError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # than there are cores


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """103 rows in fragments of 40, 7 and 56."""
    path = tmp_path_factory.mktemp("workers") / "rows.lance"
    write(path, [40, 7, 56])
    return str(path)


def loader(dataset: Any, workers: int, context: Any, **options: Any) -> DataLoader[Any]:
    return DataLoader(dataset, num_workers=workers, multiprocessing_context=context, **options)


def places(batches: list[Any]) -> list[tuple[int, int, list[int], list[bool]]]:
    return [(batch.epoch, batch.step, batch["id"].tolist(), batch.valid.tolist()) for batch in batches]


@pytest.mark.parametrize("kind", sorted(EVERY))
def test_workers_yield_the_batches_of_one_process_in_its_order(rows: str, quick: Any, kind: str) -> None:
    for rank in range(2 if kind in SHARDED else 1):
        dataset = LanceDataset(rows, 8, columns=["id"], sampler=EVERY[kind](rank, 2, 1))
        dataset.set_epoch(1)
        assert places(list(loader(dataset, 3, quick))) == places(list(dataset))


def test_ranks_times_workers_have_each_row_once(rows: str, quick: Any) -> None:
    seen = []
    for rank in range(3):
        options: dict[str, Any] = {"rank": rank, "world_size": 3, "shuffle": True, "filter": "id % 4 > 0"}
        seen += real_ids(loader(LanceDataset(rows, 5, columns=["id"], **options), 2, quick, batch_size=None))
    assert sorted(seen) == [i for i in range(103) if i % 4]


def test_a_place_that_only_workers_know_is_not_saved_as_the_start(rows: str, quick: Any) -> None:
    dataset = LanceDataset(rows, 8, columns=["id"])
    running = iter(loader(dataset, 2, quick))
    for _ in range(3):
        next(running)
    with pytest.raises(StateError, match="StatefulDataLoader"):
        dataset.state_dict()
    stop_workers(running)
    dataset.set_epoch(1)  # a new epoch, of which nothing was taken
    assert dataset.state_dict()["step"] == 0
    next(iter(dataset))
    assert dataset.state_dict()["step"] == 1


def test_more_workers_than_batches(rows: str, quick: Any) -> None:
    dataset = LanceDataset(rows, 60, columns=["id"])
    assert places(list(loader(dataset, 4, quick))) == places(list(dataset))


def test_pixels_of_workers_are_those_of_one_process(photos: str, quick: Any) -> None:
    crops = {"image": Image(16, crop="random", flip=0.5)}
    dataset = LanceDataset(photos, 8, transforms=crops, shuffle=True, device="cpu")
    pairs = zip(loader(dataset, 2, quick), dataset, strict=True)
    assert all(torch.equal(a["image"], b["image"]) and a["prompt"] == b["prompt"] for a, b in pairs)


def test_spawned_workers_take_their_rank_from_the_parent(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)  # in this process only
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    dataset = LanceDataset(rows, 8, columns=["id"], shuffle=True)
    assert len(dataset) == 5
    assert places(list(loader(dataset, 2, "spawn"))) == places(list(dataset))


def test_spawned_workers_of_a_given_sampler_take_their_rank_from_the_parent(
    rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)  # in this process only
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    dataset = LanceDataset(rows, 8, columns=["id"], sampler=ShuffleSampler(seed=1))
    assert len(dataset) == 5
    assert places(list(loader(dataset, 2, "spawn"))) == places(list(dataset))


@pytest.mark.parametrize("given", [False, True], ids=["by words", "by a sampler"])
def test_workers_that_persist_see_set_epoch(rows: str, quick: Any, given: bool) -> None:
    sampler: dict[str, Any] = {"sampler": ShuffleSampler(seed=2)} if given else {"shuffle": True, "seed": 2}
    dataset = LanceDataset(rows, 8, columns=["id"], **sampler)
    workers = loader(dataset, 2, quick, persistent_workers=True)
    epochs = []
    for epoch in (0, 1, 4, 0):
        dataset.set_epoch(epoch)
        found = list(workers)
        assert {batch.epoch for batch in found} == {epoch}
        assert places(found) == places(list(dataset))
        epochs.append(real_ids(found))
    assert epochs[0] == epochs[3] != epochs[1] != epochs[2]
    stop_workers(workers._iterator)


def test_workers_see_the_epoch_of_a_sampler_that_was_told(rows: str, quick: Any) -> None:
    sampler = ShuffleSampler(seed=2)
    dataset = LanceDataset(rows, 8, columns=["id"], sampler=sampler)
    for epoch in (3, 0):
        sampler.set_epoch(epoch)
        assert {batch.epoch for batch in loader(dataset, 2, quick)} == {epoch}


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("kind", ["shuffle", "fragment-random"])
def test_workers_go_on_from_a_state_in_order(rows: str, quick: Any, kind: str, steps: int) -> None:
    dataset = LanceDataset(rows, 8, columns=["id"], sampler=SHARDED[kind](1, 2, 1))
    dataset.set_epoch(1)
    expected = places(list(dataset))
    dataset.set_epoch(1)
    for _ in zip(range(steps), dataset, strict=False):
        pass
    state = dataset.state_dict()
    for workers in (2, 3):
        dataset.load_state_dict(state)
        assert places(list(loader(dataset, workers, quick))) == expected[steps:]


class EveryRow(lance.sampler.Sampler):
    """A user's own sampler, in batches of odd sizes."""

    def __call__(self, ds: Any, *args: Any, columns: Any = None, **kw: Any) -> Iterator[Any]:
        yield from ds.to_table(columns=columns, with_row_id=True).to_batches(max_chunksize=13)


def test_a_users_sampler_gives_each_row_once_over_workers(rows: str, quick: Any) -> None:
    found = list(loader(LanceDataset(rows, 8, columns=["id"], sampler=EveryRow()), 2, quick))
    assert real_ids(found) == list(range(103))
    assert [batch.size for batch in found] == [8] * 12 + [7]


def test_lances_own_sampler_gives_each_row_once_over_workers(rows: str, quick: Any) -> None:
    seen = []
    for rank in range(2):
        sampler = lance.sampler.ShardedFragmentSampler(rank, 2, randomize=True)
        seen += real_ids(loader(LanceDataset(rows, 8, columns=["id"], sampler=sampler), 2, quick))
    assert sorted(seen) == list(range(103))


def test_workers_read_record_batches(rows: str, quick: Any) -> None:
    dataset = LanceDataset(rows, 8, columns=["id"], to_tensor_fn=None)
    found = list(loader(dataset, 2, quick, batch_size=None))
    assert [i for batch in found for i in batch["id"].to_pylist()] == list(range(103))


def test_workers_share_the_cache_of_the_parent(rows: str, quick: Any, tmp_path: Path) -> None:
    dataset = LanceDataset(rows, 8, columns=["id"], filter="id > 50", cache=str(tmp_path))
    assert real_ids(loader(dataset, 2, quick)) == list(range(51, 103))
    assert len(list(tmp_path.iterdir())) == 1  # filled once, by the parent
    del dataset
    assert list(tmp_path.iterdir()) == []


# -- fork: in processes of their own, where a crash or a hang can be seen ------------------------------------------

FORK = """
import os, sys, threading
from torch.utils.data import DataLoader
from gpuload import ForkError, LanceDataset, ShuffleSampler
path, columns = sys.argv[1], ["id"]

def fork(dataset, workers=2, **options):
    return DataLoader(dataset, num_workers=workers, multiprocessing_context="fork", **options)

def ids(batches):
    return [int(i) for batch in batches for i in batch["id"][batch.valid]]
"""

FORK_FIRST = """
for rank in range(2):
    dataset = LanceDataset(path, 8, columns=columns, sampler=ShuffleSampler(rank, 2, seed=1))
    batches = [batch for batch in fork(dataset)]  # list() would ask for the length, which opens the dataset
    print(*ids(batches))
    assert [batch.size for batch in batches] == [8] * 6 + [7]
os.environ.update(RANK="1", WORLD_SIZE="2")
dataset = LanceDataset(path, 8, columns=columns)
print(*ids(fork(dataset)))
sampler = ShuffleSampler(0, 1, seed=1)  # not what the environment says
dataset = LanceDataset(path, 8, columns=columns, sampler=sampler)
persistent = fork(dataset, persistent_workers=True)
for epoch in (0, 1):
    dataset.set_epoch(epoch)
    print(*ids(persistent))
sampler.set_epoch(1)
print(*ids(fork(LanceDataset(path, 8, columns=columns, sampler=sampler))))
dataset = LanceDataset(path, 8, columns=columns, cache=sys.argv[2])
print(*ids(fork(dataset)))
assert not os.listdir(sys.argv[2])  # each worker had a copy and took it along
print(*ids(LanceDataset(path, 8, columns=columns, sampler=ShuffleSampler(0, 1, seed=1))))  # the parent may open it
"""


def test_fork_works_where_lance_was_not_opened(rows: str, tmp_path: Path) -> None:
    done = python(FORK + FORK_FIRST, rows, tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [[int(i) for i in line.split()] for line in done.stdout.splitlines()]
    everything = list(range(103))
    assert sorted(lines[0] + lines[1]) == everything
    assert lines[2] == [i for i in everything if i // 8 % 2]
    assert sorted(lines[3]) == everything
    assert lines[6] == lines[2]
    assert lines[3] == lines[7]
    assert lines[4] == lines[5] != lines[3]
    assert sorted(lines[4]) == everything


FORK_AFTER = """
import lance
opened = {
    "gpuload": lambda: next(iter(dataset)),
    "lance": lambda: lance.dataset(path).count_rows(),
}[sys.argv[2]]
dataset = LanceDataset(path, 8, columns=columns)
opened()
for workers in (1, 2):
    running = iter(fork(dataset, workers, timeout=60))
    try:
        next(running)
        print("read")
    except ForkError as error:
        print("ForkError", "num_workers=0" in str(error), "spawn" in str(error))
    running._shutdown_workers()  # else torch waits 5 seconds for each worker when the cycle is collected
print(len(ids(dataset)), [t.name for t in threading.enumerate() if t.name.startswith("gpuload")])  # the parent goes on
"""


@pytest.mark.parametrize("how", ["gpuload", "lance"])
def test_fork_after_lance_was_opened_is_an_error_at_once(rows: str, how: str) -> None:
    done = python(FORK + FORK_AFTER, rows, how)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["ForkError True True"] * 2 + ["103 []"]


FORK_BARE = """
dataset = LanceDataset(path, 8, columns=columns)
len(dataset)
child = os.fork()
if not child:
    answers = []
    other = LanceDataset(path, 8)
    for touch in (lambda: len(dataset), lambda: iter(dataset), lambda: len(other), lambda: repr(dataset)):
        try:
            touch()
            answers.append("touched")
        except ForkError:
            answers.append("ForkError")
    print(*answers, flush=True)
    os._exit(0)
_, status = os.waitpid(child, 0)
print(status, len(ids(dataset)))
"""


def test_nothing_touches_lance_in_a_forked_process(rows: str) -> None:
    done = python(FORK + FORK_BARE, rows)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["ForkError ForkError ForkError ForkError", "0 103"]
