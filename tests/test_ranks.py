"""Ranks: which process this is, and real jobs of several: nobody waits for ever, and a killed job goes on elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed
from support_samplers import write

from gpuload import ConfigError, LanceDataset, ShardedBatchSampler, ShardedFragmentSampler, ShuffleSampler


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """203 rows in fragments of very different sizes, fewer of them than ranks."""
    path = tmp_path_factory.mktemp("ranks") / "rows.lance"
    write(path, [120, 3, 80])
    return str(path)


def place(rows: str, **options: Any) -> tuple[int, int]:
    sampler = LanceDataset(rows, 8, columns=["id"], **options).sampler
    return sampler.rank, sampler.world_size


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process group, rank 1 of 3, started by torchrun as rank 2 of 4."""
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)


@pytest.mark.usefixtures("job")
def test_explicit_numbers_come_before_the_process_group_and_that_before_the_environment(
    rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert place(rows, rank=4, world_size=5) == (4, 5)
    assert place(rows, sampler=ShardedBatchSampler(6, 7)) == (6, 7)
    assert place(rows) == (1, 3)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    assert place(rows) == (2, 4)
    monkeypatch.delenv("WORLD_SIZE")
    assert place(rows) == (0, 1)


@pytest.mark.usefixtures("job")
@pytest.mark.parametrize("words", [{"shuffle": True}, {"shuffle": "batch"}, {"shard_granularity": "fragment"}], ids=str)
def test_every_kind_of_sampler_takes_the_rank(rows: str, words: dict[str, Any]) -> None:
    assert place(rows, **words) == (1, 3)


@pytest.mark.usefixtures("job")
def test_without_detection_this_is_the_only_process(rows: str) -> None:
    assert place(rows, auto_detect_rank=False) == (0, 1)
    assert place(rows, auto_detect_rank=False, rank=1, world_size=2) == (1, 2)


def test_a_process_group_that_starts_later_counts(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = LanceDataset(rows, 8, columns=["id"])
    assert len(dataset) == 26
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert len(dataset) == 7


GIVEN: dict[str, Callable[..., Any]] = {
    "fragment": ShardedFragmentSampler,
    "batch": ShardedBatchSampler,
    "shuffle": ShuffleSampler,
}


@pytest.mark.parametrize("kind", GIVEN)
def test_a_given_sampler_without_ranks_takes_those_of_the_process(
    rows: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = LanceDataset(rows, 8, columns=["id"], sampler=GIVEN[kind](seed=1))
    assert place(rows, sampler=GIVEN[kind](seed=1)) == (0, 1)
    seen = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        assert (dataset.sampler.rank, dataset.sampler.world_size) == (rank, 3)
        dataset.set_epoch(0)
        seen += [i for batch in dataset for i in batch["id"][batch.valid].tolist()]
    assert sorted(seen) == list(range(203))
    assert place(rows, sampler=GIVEN[kind](0, 1)) == (0, 1), "explicit ones stay"
    assert place(rows, sampler=GIVEN[kind](), auto_detect_rank=False) == (0, 1)


@pytest.mark.parametrize("kind", GIVEN)
def test_a_sampler_alone_takes_the_ranks_of_the_process(rows: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, explicit = GIVEN[kind](), GIVEN[kind](0, 1)
    seen: list[int] = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        seen += [i for batch in sampler(rows, batch_size=8, columns=["id"]) for i in batch["id"].to_pylist()]
        assert sampler.plan(203, np.array([120, 3, 80]), 8).ranges(0).tolist() == (
            GIVEN[kind](rank, 3).plan(203, np.array([120, 3, 80]), 8).ranges(0).tolist()
        )
    assert sorted(seen) == list(range(203))
    assert sum(len(batch) for batch in explicit(rows, batch_size=8)) == 203


@pytest.mark.parametrize("kind", GIVEN)
@pytest.mark.parametrize("half", [{"rank": 1}, {"world_size": 2}])
def test_half_a_place_of_a_sampler_is_refused(kind: str, half: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="rank and world_size, or neither"):
        GIVEN[kind](**half)


def test_an_environment_that_cannot_be_is_named(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "4")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="0 <= rank < world_size, got rank=4, world_size=4"):
        LanceDataset(rows, 8, columns=["id"], sampler=ShuffleSampler())


@pytest.mark.parametrize("half", [{"rank": 1}, {"world_size": 2}])
def test_half_a_place_is_refused(rows: str, half: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="rank and world_size, or neither"):
        LanceDataset(rows, 8, columns=["id"], **half)


@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, 0)])
def test_an_impossible_place_is_refused(rows: str, rank: int, world: int) -> None:
    with pytest.raises(ConfigError, match="0 <= rank < world_size"):
        LanceDataset(rows, 8, columns=["id"], rank=rank, world_size=world)


def test_an_environment_that_is_no_number_is_named(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "first")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"RANK and WORLD_SIZE as integers .*'first'"):
        LanceDataset(rows, 8, columns=["id"])


# -- torchrun ------------------------------------------------------------------------------------------------------

JOB = '''
import json, os, signal, sys
from pathlib import Path

import torch
import torch.distributed as dist

from gpuload import LanceDataset, ShardedFragmentSampler, ShuffleSampler

path, out, task = sys.argv[1], Path(sys.argv[2]), sys.argv[3]

def train(name, dataset, batches=None):
    """An epoch with a collective in every step; logs what each step had."""
    with open(out / f"{task}-{name}-{rank}", "w") as log:
        for batch in dataset if batches is None else batches:
            sizes = torch.tensor([batch.size, -batch.size])
            dist.all_reduce(sizes, dist.ReduceOp.MAX)  # hangs where a rank has fewer batches
            ids = batch["id"][batch.valid].tolist()
            print(json.dumps([batch.step, batch.size, sizes.tolist(), ids]), file=log, flush=True)
            yield batch.step


def shuffled():
    return LanceDataset(path, 8, columns=["id"], shuffle=True, seed=3, device="cpu")


if __name__ == "__main__":  # spawned workers read this file too
    signal.alarm(90)  # what hangs ends, and the test fails
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if task.startswith("epoch"):
        for name, words in {"batch": {}, "shuffle": {"shuffle": True}, "filter": {"filter": "id % 3 = 0"},
                            "fragment": {"sampler": ShardedFragmentSampler.from_torch(randomize=True)}}.items():
            for _ in train(name, LanceDataset(path, 8, columns=["id"], device="cpu", **words)):
                pass
    if task == "epoch-workers":
        options = {"num_workers": 1, "batch_size": None, "multiprocessing_context": "spawn"}
        for _ in train("spawned", None, torch.utils.data.DataLoader(shuffled(), **options)):
            pass
    if task == "epoch-killed":
        dataset = shuffled()
        dataset.set_epoch(2)
        for step in train("killed", dataset):
            if rank == 0 and step == 2:
                (out / "state.json").write_text(json.dumps(dataset.state_dict()))
            if step == 4:
                dist.barrier()
                if rank == 0:
                    os.kill(os.getppid(), signal.SIGKILL)  # torchrun itself
                os.kill(os.getpid(), signal.SIGKILL)
    if task == "resumed":
        dataset = shuffled()
        dataset.load_state_dict(json.loads((out / "state.json").read_text()))
        for _ in train("rest", dataset):
            pass
    dist.barrier()
    dist.destroy_process_group()
'''


def torchrun(path: str, out: Path, task: str, ranks: int) -> subprocess.CompletedProcess[str]:
    (out / "job.py").write_text(JOB)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [*launch, str(out / "job.py"), path, str(out), task]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def logged(out: Path, name: str, ranks: int) -> list[list[tuple[int, int, list[int], list[int]]]]:
    """For each rank its steps: (step, rows, [largest, -smallest] of all ranks, ids)."""
    logs = [(out / f"{name}-{rank}").read_text().splitlines() for rank in range(ranks)]
    return [[tuple(json.loads(line)) for line in log] for log in logs]


def check_epoch(steps: list[Any], expected: list[int]) -> None:
    assert len({len(rank) for rank in steps}) == 1
    for rank in steps:
        assert all(size == largest == -smallest for _, size, (largest, smallest), _ in rank)
    assert Counter(i for rank in steps for *_, ids in rank for i in ids) == Counter(expected)


def test_two_ranks_of_torchrun_meet_in_every_step(rows: str, tmp_path: Path) -> None:
    done = torchrun(rows, tmp_path, "epoch-workers", 2)
    assert done.returncode == 0, done.stderr
    for name in ("batch", "shuffle", "fragment", "spawned"):
        check_epoch(logged(tmp_path, f"epoch-workers-{name}", 2), list(range(203)))
    check_epoch(logged(tmp_path, "epoch-workers-filter", 2), list(range(0, 203, 3)))


def test_four_ranks_meet_are_killed_and_go_on_as_three(rows: str, tmp_path: Path) -> None:
    done = torchrun(rows, tmp_path, "epoch-killed", 4)
    assert done.returncode == -9
    for name in ("batch", "shuffle", "fragment"):  # the fragment sampler has a rank without any row
        check_epoch(logged(tmp_path, f"epoch-killed-{name}", 4), list(range(203)))
    check_epoch(logged(tmp_path, "epoch-killed-filter", 4), list(range(0, 203, 3)))
    killed = logged(tmp_path, "epoch-killed-killed", 4)
    assert [len(steps) for steps in killed] == [5, 5, 5, 5]
    before = [i for steps in killed for step, *_, ids in steps if step <= 2 for i in ids]  # until the state was saved
    done = torchrun(rows, tmp_path, "resumed", 3)
    assert done.returncode == 0, done.stderr
    rest = logged(tmp_path, "resumed-rest", 3)
    check_epoch(rest, sorted(set(range(203)) - set(before)))
    assert len(before) == 3 * 4 * 8
    assert [step for step, *_ in rest[0]] == list(range(3, 3 + len(rest[0])))
