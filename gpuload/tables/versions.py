"""One version, everywhere: a dataset's name enters; what rank 0, or this process's parent, opened is opened here.

Without this each rank and each DataLoader worker would open the latest: with a writer at work, rows are lost and
doubled, and ranks have different numbers of steps. Among ranks the word goes through a store, never a collective,
which would hang where only some of them ask; among the processes of one rank through shared memory, because opening
Lance in a parent would forbid the fork.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import secrets
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import get_worker_info

from gpuload.errors import GpuloadError, VersionError
from gpuload.order import rank_store
from gpuload.order.rank_store import Address
from gpuload.tables.lance import digest, open_dataset

_PINNED = "dataset_options={'version': n}"
_turns: Counter[str] = Counter()  # datasets made so far in this process, by what their ranks have in common


class OneVersion:
    """Which version of a dataset every process of a job reads.

    Made with the dataset, since each rank makes its datasets in the same order: the how-manieth of its kind it is goes
    into the key, so that two of one URI are not mixed up.

    Parameters
    ----------
    dataset : str, Path or lance.LanceDataset
    options : dict, optional
        Keywords of ``lance.dataset``. A number as its version leaves nothing to agree on, nor does an opened dataset;
        a tag does, for it may move.
    words : dict
        What is the same on every rank that opens it.
    """

    def __init__(self, dataset: Any, options: Mapping[str, Any] | None, words: Mapping[str, Any]) -> None:
        self._dataset, self._options = dataset, dict(options or {})
        self._pinned = not isinstance(dataset, (str, Path)) or isinstance(self._options.get("version"), int)
        self._uri = str(dataset if isinstance(dataset, (str, Path)) else getattr(dataset, "uri", dataset)).rstrip("/")
        kind = hashlib.sha256(repr((self._uri, self._options.get("version"), *words.items())).encode()).hexdigest()
        self._key = f"{kind[:16]}/{_turns[kind]}"
        _turns[kind] += 1
        self._cell = torch.zeros(2, dtype=torch.int64)  # the version, once a process has opened it; 1 once agreed on
        self._cell.share_memory_()  # type: ignore[no-untyped-call]
        self._lock = secrets.token_hex(8)
        self._address: Address | None = None

    @property
    def version(self) -> int:
        """What was opened by some process that shares this, 0 before."""
        return int(self._cell[0])

    def due(self, world_size: int) -> bool:
        """Whether it was opened when nobody could be asked, and ranks can talk now."""
        return world_size > 1 and not int(self._cell[1]) and get_worker_info() is None and self._reachable()

    def open(self, rank: int, world_size: int) -> Any:
        """The ``lance.LanceDataset``, at the version that all have.

        Raises
        ------
        ConfigError
            No such dataset, or no such version of it.
        VersionError
            Rank 0 did not come in time or could not open it, or has other files under this name.
        """
        with self._alone():
            known = self.version
            if known and (world_size == 1 or int(self._cell[1]) or get_worker_info() is not None):
                return self._at(known)
            store, limit = self._store() if world_size > 1 else (None, 0.0)
            if store is None:
                opened = open_dataset(self._dataset, self._options)
            elif rank == 0:
                opened = self._lead(store)
            elif self._pinned:
                opened = self._compared(store, rank)
            else:
                opened = self._follow(store, rank, limit)
            self._cell[0] = int(opened.version)
            self._cell[1] = store is not None
        return opened

    def needs_parent(self, world_size: int) -> bool:
        """Whether a spawned worker could not ask for the version, since the ranks' store cannot be reached from it."""
        return world_size > 1 and not self.version and self._reachable() and self._known_address() is None

    def __getstate__(self) -> dict[str, Any]:
        """For a spawned worker: with the address of the store, which its parent knows."""
        return {**self.__dict__, "_address": self._known_address()}

    def _known_address(self) -> Address | None:
        return self._address or rank_store.address()

    def _reachable(self) -> bool:
        return self._known_address() is not None or rank_store.group_store() is not None

    def _store(self) -> tuple[Any, float]:
        """A store and for how long it is waited for a rank; None where nobody can be asked."""
        where = self._known_address()
        if where is not None:
            return where.connect(), where.limit
        store = rank_store.group_store()  # a FileStore, which a forked worker may use as well
        return store, rank_store.time_limit(store)

    def _name(self) -> str:
        return f"{rank_store.prefix()}/{self._key}"

    def _lead(self, store: Any) -> Any:
        """Rank 0 says what it has opened, and waits for nobody. Where several call themselves so, the first one's."""
        try:
            known = self.version
            opened = self._at(known) if known else open_dataset(self._dataset, self._options)
        except GpuloadError as error:
            store.compare_set(self._name(), "", json.dumps({"error": str(error)}))
            raise
        mine = json.dumps({"version": int(opened.version), "fingerprint": digest(opened)})
        found = store.compare_set(self._name(), "", mine).decode()
        if "error" in json.loads(found):  # an earlier try
            found = store.compare_set(self._name(), found, mine).decode()
        return opened if found == mine or self._pinned else self._checked(json.loads(found), 0)

    def _follow(self, store: Any, rank: int, limit: float) -> Any:
        found = rank_store.wait(store, self._name(), limit, lambda waited: self._waiting(rank, waited))
        if found is None:
            raise VersionError(
                f"Expected rank 0 to open {self._uri!r} within {limit:.0f} s, it did not come; rank {rank} waited for "
                "its version. Make and open the dataset on every rank, with the same words and in the same order, or "
                f"give {_PINNED}. GPULOAD_RANK_TIMEOUT=seconds waits longer."
            )
        return self._checked(json.loads(found), rank)

    def _compared(self, store: Any, rank: int) -> Any:
        """What was given, held against rank 0's if that is there already."""
        opened = open_dataset(self._dataset, self._options)
        if store.check([self._name()]):
            leader = json.loads(store.get(self._name()))
            if "error" not in leader:
                self._expect_same(opened, leader, rank)
        return opened

    def _checked(self, leader: Mapping[str, Any], rank: int) -> Any:
        if "error" in leader:
            raise VersionError(f"Rank 0 could not open {self._uri!r}, so rank {rank} cannot: {leader['error']}")
        opened = self._at(leader["version"])
        self._expect_same(opened, leader, rank)
        return opened

    def _expect_same(self, opened: Any, leader: Mapping[str, Any], rank: int) -> None:
        here = {"version": int(opened.version), "fingerprint": digest(opened)}
        if here != dict(leader):
            raise VersionError(
                f"Expected {self._uri!r} as rank 0 has it, version {leader['version']} ({leader['fingerprint']}), got "
                f"version {here['version']} ({here['fingerprint']}) on rank {rank}. Ranks must read the same files: "
                "one shared dataset or exact copies, at one version."
            )

    def _at(self, version: int) -> Any:
        if self._pinned:
            return open_dataset(self._dataset, self._options)
        options = {name: value for name, value in self._options.items() if name != "asof"}
        return open_dataset(self._dataset, {**options, "version": version})

    def _waiting(self, rank: int, waited: float) -> str:
        return f"gpuload: rank {rank} has waited {waited:.0f} s for rank 0 to open {self._uri!r}"

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One thread of one process at a time, among those that share this. A name that only one socket can have is
        a lock that needs no file and no inheritance, and that ends with its process."""
        if sys.platform != "linux":
            yield
            return
        with socket.socket(socket.AF_UNIX) as lock:
            while True:
                try:
                    lock.bind(f"\0gpuload-{self._lock}")
                    break
                except OSError as error:
                    if error.errno != errno.EADDRINUSE:
                        raise
                time.sleep(0.002)
            yield
