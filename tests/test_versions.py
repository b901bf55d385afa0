"""One version everywhere: whatever a writer does, ranks and workers read what rank 0 and their parent read."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lance
import pytest
import torch.distributed as dist
from support_samplers import table, write

from gpuload import ConfigError, FullScanSampler, LanceDataset, VersionError
from gpuload.order import rank_store


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """100 rows in fragments of 60 and 40."""
    path = tmp_path / "rows.lance"
    write(path, [60, 40])
    return str(path)


# -- ranks: processes that really talk ------------------------------------------------------------------------------


class Ranks:
    """Processes of a job of two; `ask` calls a function of this file in one of them and waits for its answer."""

    def __init__(self, context: Any, how: str, folder: Path) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False) if how != "file" else None
        port = self.store.port if self.store else 0
        self.pipes, self.processes = [], []
        for rank in range(2):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(there, how, rank, port, str(folder / "group")), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def start(self, rank: int, function: Callable[..., Any], /, *arguments: Any, **words: Any) -> None:
        self.pipes[rank].send((function, arguments, words))

    def answer(self, rank: int) -> Any:
        assert self.pipes[rank].poll(60), f"rank {rank} does not answer"
        found = self.pipes[rank].recv()
        if isinstance(found, Exception):
            raise found
        return found

    def ask(self, rank: int, function: Callable[..., Any], /, *arguments: Any, **words: Any) -> Any:
        self.start(rank, function, *arguments, **words)
        return self.answer(rank)

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.close()
            process.join(10)
            process.kill()


def serve(pipe: Any, how: str, rank: int, port: int, file: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    if how == "launcher":
        os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    elif how != "late":
        join(rank, port, file)
    while True:
        try:
            function, arguments, words = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            pipe.send(function(*arguments, **words))
        except Exception as error:
            pipe.send(error)


def join(rank: int, port: int, file: str = "", limit: float = 60) -> None:
    where = f"tcp://127.0.0.1:{port}" if port else f"file://{file}"
    if port:
        store = dist.TCPStore("127.0.0.1", port, None, False, timeout=timedelta(seconds=limit))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=limit))
    else:
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2)


MADE: dict[str, LanceDataset] = {}


def make(name: str, uri: str, folder: str = "", limit: float | None = None, **words: Any) -> None:
    os.environ.pop("GPULOAD_RANK_TIMEOUT", None)
    if folder:
        os.chdir(folder)
    if limit is not None:
        os.environ["GPULOAD_RANK_TIMEOUT"] = str(limit)
    MADE[name] = LanceDataset(uri, words.pop("batch_size", 8), columns=["id"], device="cpu", **words)


def read(name: str) -> tuple[int, int, list[int]]:
    """(version, batches, ids)."""
    dataset = MADE[name]
    ids = [i for batch in dataset for i in batch["id"][batch.valid].tolist()]
    return int(dataset.dataset.version), len(dataset), ids


def length(name: str) -> int:
    return len(MADE[name])


def open_now(name: str, *arguments: Any, **words: Any) -> int:
    make(name, *arguments, **words)
    return int(MADE[name].dataset.version)


@pytest.fixture
def ranks(request: pytest.FixtureRequest, quick: Any, tmp_path: Path) -> Any:
    found = Ranks(quick, getattr(request, "param", "launcher"), tmp_path)
    yield found
    found.close()


everywhere = pytest.mark.parametrize("ranks", ["launcher", "group", "file"], indirect=True)


@everywhere
@pytest.mark.parametrize("words", [{"shuffle": True}, {"shard_granularity": "fragment"}], ids=str)
def test_a_rank_that_opens_after_a_writer_reads_what_rank_0_reads(ranks: Ranks, rows: str, words: Any) -> None:
    for rank in range(2):
        ranks.ask(rank, make, "train", rows, **words)
    steps = ranks.ask(0, length, "train")
    lance.dataset(rows).delete("id < 20")
    assert ranks.ask(1, length, "train") == steps
    (version, length_0, ids_0), (other, length_1, ids_1) = (ranks.ask(rank, read, "train") for rank in range(2))
    assert version == other
    assert length_0 == length_1 == steps
    assert sorted(ids_0 + ids_1) == list(range(100))


@everywhere
def test_a_rank_that_comes_first_waits_for_rank_0(ranks: Ranks, rows: str) -> None:
    ranks.start(1, open_now, "train", rows)
    time.sleep(0.3)
    lance.dataset(rows).delete("id < 20")
    expected = lance.dataset(rows).version
    assert not ranks.pipes[1].poll()
    assert ranks.ask(0, open_now, "train", rows) == expected
    lance.dataset(rows).delete("id < 30")
    assert ranks.answer(1) == expected


def test_samplers_that_read_every_row_agree_too(ranks: Ranks, rows: str) -> None:
    version = ranks.ask(0, open_now, "all", rows, sampler=FullScanSampler())
    lance.dataset(rows).delete("id < 20")
    assert ranks.ask(1, open_now, "all", rows, sampler=FullScanSampler()) == version


def test_a_tag_that_moved_is_rank_0s(ranks: Ranks, rows: str) -> None:
    dataset = lance.dataset(rows)
    dataset.tags.create("main", dataset.version)
    options = {"dataset_options": {"version": "main"}}
    version = ranks.ask(0, open_now, "tagged", rows, **options)
    dataset.delete("id < 20")
    dataset.tags.update("main", dataset.version)
    assert ranks.ask(1, open_now, "tagged", rows, **options) == version


def test_explicit_ranks_agree_and_one_alone_asks_nobody(ranks: Ranks, rows: str) -> None:
    version = ranks.ask(1, open_now, "a", rows, rank=0, world_size=2)  # not what the launcher calls it
    lance.dataset(rows).delete("id < 20")
    assert ranks.ask(0, open_now, "a", rows, rank=1, world_size=2) == version
    assert ranks.ask(1, open_now, "b", rows, rank=0, world_size=1) == version + 1
    assert ranks.ask(1, open_now, "c", rows, auto_detect_rank=False) == version + 1


def test_datasets_of_one_uri_are_not_mixed_up(ranks: Ranks, rows: str) -> None:
    """Made in one order, opened in two, with a writer between."""
    kinds = {"train": {"shuffle": True}, "valid": {"batch_size": 10}, "again": {"shuffle": True}}
    for rank in range(2):
        for name, words in kinds.items():
            ranks.ask(rank, make_lazily, name, rows, **words)
    found = {}
    for name in ("again", "valid", "train"):
        found[name] = ranks.ask(0, read, name)[0]
        lance.write_dataset(table(range(8)), rows, mode="append")
    assert len(set(found.values())) == 3
    assert {name: ranks.ask(1, read, name)[0] for name in kinds} == found


def make_lazily(name: str, uri: str, **words: Any) -> None:
    """As where Lance is not in use yet: nothing is opened."""
    import gpuload.dataset

    running = gpuload.dataset.lance_running
    gpuload.dataset.lance_running = lambda: False
    try:
        make(name, uri, **words)
    finally:
        gpuload.dataset.lance_running = running


def test_rank_0_alone_waits_for_nobody(ranks: Ranks, rows: str) -> None:
    began = time.monotonic()
    ranks.ask(0, make, "check", rows, sampler=FullScanSampler())
    assert len(ranks.ask(0, read, "check")[2]) == 100
    version = ranks.ask(0, open_now, "train", rows, shuffle=True)
    lance.dataset(rows).delete("id < 20")
    assert ranks.ask(1, open_now, "train", rows, shuffle=True) == version
    assert time.monotonic() - began < 20


def test_a_rank_that_did_not_come_is_named(ranks: Ranks, rows: str) -> None:
    with pytest.raises(VersionError, match=r"rank 0 to open .*rows.lance' within 1 s, .* rank 1 waited .*version"):
        ranks.ask(1, open_now, "train", rows, limit=0.6)


@pytest.mark.parametrize("ranks", ["late"], indirect=True)
def test_a_process_groups_time_limit_is_the_limit(ranks: Ranks, rows: str) -> None:
    assert ranks.store is not None
    for rank in range(2):
        ranks.start(rank, join, rank, ranks.store.port, limit=2)
    for rank in range(2):
        ranks.answer(rank)
    with pytest.raises(VersionError, match="within 2 s"):
        ranks.ask(1, open_now, "train", rows)


@pytest.mark.parametrize("ranks", ["late"], indirect=True)
def test_what_was_opened_before_ranks_could_talk_is_agreed_on_then(ranks: Ranks, rows: str) -> None:
    version = ranks.ask(0, open_now, "train", rows)
    lance.dataset(rows).delete("id < 20")
    assert ranks.ask(1, open_now, "train", rows) == version + 1  # as good as can be
    assert ranks.store is not None
    for rank in range(2):
        ranks.start(rank, join, rank, ranks.store.port)
    for rank in range(2):
        ranks.answer(rank)
    both = [ranks.ask(rank, read, "train") for rank in range(2)]
    assert both[0][:2] == both[1][:2]
    assert sorted(both[0][2] + both[1][2]) == list(range(100))


def test_other_files_under_one_name_are_refused(ranks: Ranks, tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        write(tmp_path / str(rank) / "x.lance", [10, 10])
    ranks.ask(0, open_now, "x", "x.lance", folder=str(tmp_path / "0"))
    with pytest.raises(VersionError, match=r"as rank 0 has it, version 2 \(\w+\), got version 2 \(\w+\) on rank 1"):
        ranks.ask(1, open_now, "x", "x.lance", folder=str(tmp_path / "1"))
    pinned = {"dataset_options": {"version": 2}}
    ranks.ask(0, open_now, "y", "x.lance", **pinned)
    with pytest.raises(VersionError, match="exact copies"):
        ranks.ask(1, open_now, "y", "x.lance", **pinned)


def test_an_explicit_version_waits_for_nobody(ranks: Ranks, rows: str) -> None:
    assert ranks.ask(1, open_now, "train", rows, limit=0.1, dataset_options={"version": 1}) == 1


def test_opened_datasets_of_other_versions_are_refused(ranks: Ranks, rows: str) -> None:
    ranks.ask(0, open_given, rows, 1)
    with pytest.raises(VersionError, match=r"version 1 .*, got version 2"):
        ranks.ask(1, open_given, rows, 2)


def open_given(uri: str, version: int) -> int:
    dataset = LanceDataset(lance.dataset(uri, version=version), 8, columns=["id"])
    return int(dataset.dataset.version)


def test_that_rank_0_could_not_open_it_is_said_at_once(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "no.lance").mkdir()
    with pytest.raises(ConfigError, match="Lance dataset at"):
        ranks.ask(0, open_now, "no", str(tmp_path / "no.lance"))
    with pytest.raises(VersionError, match=r"Rank 0 could not open .*so rank 1 cannot"):
        ranks.ask(1, open_now, "no", str(tmp_path / "no.lance"))


def test_who_waits_says_so(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(rank_store, "SAY_AFTER", 0.05)
    store = dist.HashStore()
    assert rank_store.wait(store, "key", 0.2, lambda waited: "waiting") is None
    store.set("key", "value")
    assert rank_store.wait(store, "key", 0.2, lambda waited: "waiting") == "value"
    assert capfd.readouterr().err == "waiting\n"


def test_a_launchers_store_that_is_away_is_said(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        words = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "RANK": "1", "WORLD_SIZE": "2"}
        for name, value in {**words, "MASTER_PORT": str(taken.getsockname()[1])}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(rank_store, "CONNECT", 0.3)
        with pytest.warns(UserWarning, match=r"store at 127.0.0.1:\d+, got no answer.*'version'"):
            assert len(LanceDataset(rows, 10, columns=["id"])) == 5


# -- workers: in processes whose parent has not opened Lance ---------------------------------------------------------

WORKERS = """
import functools, json, os, sys, time
from torch.utils.data import DataLoader, get_worker_info
from gpuload import LanceDataset
from gpuload.tables.fork import lance_running

path, folder, context, who = sys.argv[1:5]

def begin(worker, after):
    while worker and not os.path.exists(after):  # all but the first open it when the writer has been there
        time.sleep(0.01)

if __name__ == "__main__":
    if "MASTER_PORT" in os.environ and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ:
        import torch.distributed
        torch.distributed.init_process_group("gloo")
    dataset = LanceDataset(path, 8, columns=["id"], device="cpu")
    written = os.path.join(folder, "written")
    if who == "1":
        begin(1, written)
    for epoch in range(2):
        options = {"multiprocessing_context": context, "worker_init_fn": functools.partial(begin, after=written)}
        loader = iter(DataLoader(dataset, num_workers=2, batch_size=None, **options))
        batches = [next(loader)]
        open(os.path.join(folder, "begun"), "w").close()
        batches += loader
        print(json.dumps([i for batch in batches for i in batch["id"][batch.valid].tolist()]))
    print(lance_running(), len(dataset))  # the parent had not opened it; it then reads what its workers read
"""


def run_workers(rows: str, folder: Path, context: str, ranks: int, **environment: str) -> list[list[str]]:
    """What each rank prints: the ids of two epochs, and whether it had Lance opened and how many batches it sees."""
    (folder / "program.py").write_text(WORKERS)
    running = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
        command = [sys.executable, str(folder / "program.py"), rows, str(folder), context, str(rank)]
        words = {**os.environ, **place, **environment}
        running.append(subprocess.Popen(command, env=words, stdout=subprocess.PIPE, text=True))
    end = time.monotonic() + 60
    while not (folder / "begun").exists() and time.monotonic() < end and running[0].poll() is None:
        time.sleep(0.01)
    lance.dataset(rows).delete("id < 20")
    (folder / "written").touch()
    found = [process.communicate(timeout=100)[0].splitlines() for process in running]
    assert [process.returncode for process in running] == [0] * ranks
    return found


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_one_version_though_their_parent_had_not_opened_it(
    rows: str, tmp_path: Path, context: str
) -> None:
    ((first, second, last),) = run_workers(rows, tmp_path, context, 1)
    assert sorted(json.loads(first)) == sorted(json.loads(second)) == list(range(100))
    assert last == "False 13"


@pytest.mark.parametrize(
    ("context", "how"),
    [
        ("fork", "group"),
        pytest.param("spawn", "launcher", marks=pytest.mark.slow),
        pytest.param("fork", "launcher", marks=pytest.mark.slow),
        pytest.param("spawn", "group", marks=pytest.mark.slow),
    ],
)
def test_workers_of_ranks_read_one_version(rows: str, tmp_path: Path, context: str, how: str) -> None:
    if how == "launcher":
        store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        words = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(store.port)}
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            words = {"MASTER_PORT": str(free.getsockname()[1])}
    found = run_workers(rows, tmp_path, context, 2, MASTER_ADDR="127.0.0.1", **words)
    for epoch in range(2):
        assert sorted(i for rank in found for i in json.loads(rank[epoch])) == list(range(100))
    assert [rank[2] for rank in found] == ["False 7"] * 2
