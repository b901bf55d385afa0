"""Which batches, from where: a sampler's words and the ranks enter; plans, reads and saved places leave."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import get_worker_info

from gpuload.errors import StateError
from gpuload.order import state
from gpuload.order.foreign import foreign_reads
from gpuload.order.ranks import Ranks, check_wrappers
from gpuload.order.samplers import Plan, PlanSampler, make_sampler
from gpuload.pipeline import Read
from gpuload.tables.lance import LanceTable


class Epochs:
    """The epochs of one dataset in this process, and the place in the present one.

    Parameters
    ----------
    given : lance.sampler.Sampler or None
        A sampler of the user's, which keeps its own epoch as well.
    shuffle, granularity
        `LanceDataset`'s words, where no sampler was given.
    ranks : Ranks
        Asked anew each time: a process group may be initialised after the dataset was made.
    seed, batch_size : int
    projection : dict
        What `LanceTable` was opened with; part of what a saved place must agree with.
    """

    def __init__(
        self,
        given: Any,
        shuffle: bool | str,
        granularity: str | None,
        ranks: Ranks,
        *,
        seed: int,
        batch_size: int,
        projection: Mapping[str, Any],
    ) -> None:
        self._given, self._shuffle, self._granularity, self._ranks = given, shuffle, granularity, ranks
        self._seed, self._batch_size, self._projection = seed, batch_size, projection
        shared = torch.zeros(3, dtype=torch.int64)
        shared.share_memory_()  # type: ignore[no-untyped-call]
        self._epoch = shared[0]  # workers that persist see set_epoch
        self._elsewhere = shared[1]  # 1 while workers read this epoch, whose place nobody here knows
        self._told: int | None = None  # the epoch of the sampler that was given, when it was last looked at
        self._times = shared[2]  # that an epoch was set, here or in the parent of this worker
        self._loaded: int | None = None  # the epoch of a loaded place, until another is set or begun
        self._times_then = 0  # when it was loaded
        self._position, self._resume = state.Position(), False
        self.sampler  # noqa: B018 - its words are checked now

    @property
    def sampler(self) -> Any:
        """The sampler in use, with the rank and world size of now."""
        return make_sampler(self._given, self._shuffle, self._granularity, *self._ranks.resolve(), self._seed)

    def now(self) -> int:
        """The epoch that was set or loaded last, here or on the sampler that was given."""
        told = getattr(self._given, "_epoch", None)
        if told is not None and told != self._told:  # also in a forked worker, which nobody prepared
            self._told, self._loaded = told, None
            self._epoch.fill_(told)
        return int(self._epoch) if self._loaded is None else self._loaded

    def set(self, epoch: int) -> None:
        """The epoch of the next iteration. Keeps a place loaded in it."""
        if hasattr(self._given, "set_epoch"):
            self._given.set_epoch(epoch)
            self._told = epoch
        if epoch != self.now():
            self._elsewhere.fill_(0)
        self._loaded = None
        self._epoch.fill_(epoch)
        self._times.add_(1)

    def begin(self) -> state.Position:
        """The place where an iteration starts: the loaded one, once, or the start of the epoch.

        An epoch that was set before a place of an earlier one was loaded comes after it: torchdata's StatefulDataLoader
        loads when it is iterated, after the loop's `set_epoch`, and goes past the end of an epoch by iterating again.
        """
        check_wrappers(getattr(self.sampler, "world_size", 1))
        if self._loaded is not None and not self._resume:
            late = int(self._times) != self._times_then
            self.set(int(self._epoch) if late else max(self._loaded, int(self._epoch)))
        epoch = self.now()
        self._elsewhere.fill_(get_worker_info() is not None)
        if not self._resume or self._position.epoch != epoch:
            self._position = state.Position(epoch)
        self._resume = False
        return self._position

    def plan(self, source: LanceTable, drop_last: bool, position: state.Position | None = None) -> Plan:
        """This rank's batches from `position`, by default of the whole present epoch.

        Raises
        ------
        TypeError
            The sampler is a foreign one: its order cannot be known without reading.
        """
        position = position or state.Position(self.now())
        sampler = copy.copy(self._planner("len()"))
        sampler.set_epoch(position.epoch)
        plan: Plan = sampler.plan(
            source.rows, source.fragments, self._batch_size, drop_last=drop_last, start=position.start
        )
        return plan

    def reads(self, source: LanceTable, drop_last: bool, position: state.Position, readahead: int) -> Iterator[Read]:
        """What this process reads from `position` to the epoch's end; in a DataLoader worker, its share of it."""
        worker = get_worker_info()
        first, every = (worker.id, worker.num_workers) if worker else (0, 1)
        sampler = self.sampler
        if not isinstance(sampler, PlanSampler):
            found = foreign_reads(sampler, source, self._batch_size, readahead, self._projection["filter"])
            yield from itertools.islice(found, first, None, every)
            return
        plan = self.plan(source, drop_last, position)
        for step in range(position.taken, len(plan)):
            if step % every == first:
                ranges = plan.ranges(step)
                table = functools.partial(source.read, ranges)
                yield Read(position.before + step, source.positions(ranges), plan.size(step)[1], table)

    def save(self, source: LanceTable) -> dict[str, Any]:
        """The place after the last batch that was taken, as JSON.

        Raises
        ------
        StateError
            DataLoader workers read this epoch: what was taken from them is not known here.
        """
        if int(self._elsewhere) and get_worker_info() is None:
            raise StateError(
                "Expected state_dict() where the batches are read, got it beside DataLoader workers, of whose batches "
                "nobody here knows how many were taken. Use num_workers=0, or torchdata's StatefulDataLoader."
            )
        sampler = self._planner("state_dict()")
        position = self._position if self._position.epoch == self.now() else state.Position(self.now())
        return state.save(position, self._identity(source, sampler), sampler.world_size)

    def load(self, saved: Mapping[str, Any], source: LanceTable) -> None:
        """Make a saved place the start of the next iteration."""
        sampler = self._planner("load_state_dict()")
        worker = get_worker_info() is not None
        identity = self._identity(source, sampler)
        position = state.restore(saved, identity, sampler.world_size, sampler.elastic, worker)
        self.now()  # what the given sampler was told before is older than this
        self._loaded, self._times_then = position.epoch, int(self._times)
        self._elsewhere.fill_(0)
        self._position, self._resume = position, True

    def __getstate__(self) -> dict[str, Any]:
        """For a DataLoader worker, which has no process group of its own: rank and epoch as they are here."""
        self.now()
        return {**self.__dict__, "_ranks": self._ranks.resolved()}

    def _planner(self, what: str) -> Any:
        sampler = self.sampler
        if not isinstance(sampler, PlanSampler):
            raise TypeError(f"Expected a gpuload sampler for {what}, got {sampler!r}, whose order nobody can foresee.")
        return sampler

    def _identity(self, source: LanceTable, sampler: Any) -> dict[str, Any]:
        """What a state must agree with: the dataset, and all that its order depends on."""
        return {
            "uri": source.uri,
            "dataset_version": source.version,
            "fingerprint": source.fingerprint(),
            "filter": self._projection["filter"],
            "samples": self._projection["samples"],
            "seed": self._seed,
            "batch_size": self._batch_size,
            **sampler.key(),
        }
