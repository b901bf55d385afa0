"""Samplers: (rows, fragments, seed, epoch, rank, world size, batch size) enter, a cut leaves.

A sampler is a few numbers; what it plans is pure, reads nothing and answers for any step at once. So resuming is a
look-up and no thread can change an order.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Generator
from typing import Any, ClassVar, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gpuload.errors import ConfigError, expect, expect_int
from gpuload.order import Cut, Order, Ranges, coalesce
from gpuload.order.cut import FixedSize
from gpuload.order.orders import Blocks, Fragments, InTurn, ShuffledBatches
from gpuload.order.permutation import Permutation
from gpuload.order.ranks import Ranks
from gpuload.tables import Table, one_batch
from gpuload.tables.lance import LanceSampler, LanceTable

Self = TypeVar("Self", bound="PlanSampler")


class PlanSampler(LanceSampler):
    """What the samplers below share: a place among the ranks, a seed, an epoch, and Lance's own protocol.

    Without `rank` and `world_size` they are those of torch.distributed, else of torchrun's environment, when a plan is
    made.
    """

    elastic: ClassVar[bool] = True  # whether the order is the same for every world size

    def __init__(
        self, rank: int | None = None, world_size: int | None = None, randomize: bool = False, seed: int = 0
    ) -> None:
        self._ranks = Ranks(rank, world_size)
        expect_int(seed=seed)
        expect(isinstance(randomize, (bool, np.bool_)), "randomize as True or False", randomize)
        self._randomize, self._seed = bool(randomize), int(seed)
        self._epoch = self._times = 0

    @property
    def rank(self) -> int:
        return self._ranks.resolve()[0]

    @property
    def world_size(self) -> int:
        return self._ranks.resolve()[1]

    @property
    def randomize(self) -> bool:
        """Whether each epoch has an order of its own."""
        return self._randomize

    @property
    def told(self) -> tuple[int, int]:
        """How often `set_epoch` was called, and the epoch: another pair is another call."""
        return self._times, self._epoch

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order the next plan has."""
        self._epoch, self._times = int(epoch), self._times + 1

    def placed(self: Self, ranks: Ranks) -> Self:
        """The same sampler with a rank and world size: its own where it was given them, else those of `ranks`."""
        found = copy.copy(self)
        found._ranks = Ranks(*(ranks if self._ranks.rank is None else self._ranks).resolve())
        return found

    def resized(self: Self, world_size: int) -> Self:
        """The same sampler among so many ranks, the first of them."""
        found = copy.copy(self)
        found._ranks = Ranks(0, world_size)
        return found

    def key(self) -> dict[str, Any]:
        """What the order depends on besides the epoch and the rank: part of a saved state."""
        return {"sampler": type(self).__name__, "randomize": self._randomize, "sampler_seed": self._seed}

    def order(self, rows: int, fragments: NDArray[np.int64], batch_size: int) -> Order:
        """The epoch's order of `rows` rows that lie in `fragments` (i64[F] rows each, sum = rows)."""
        return InTurn(rows)

    def plan(
        self, rows: int, fragments: NDArray[np.int64], batch_size: int, *, drop_last: bool = False, start: int = 0
    ) -> FixedSize:
        """One rank's epoch over `rows` rows that lie in `fragments` (i64[F] rows each, sum = rows).

        `start` is the number of places that were used up before, as a saved state has it.
        """
        order = self.order(rows, fragments, max(1, batch_size))  # the cut refuses a batch of none
        return FixedSize(order, batch_size, *self._ranks.resolve(), drop_last, start)

    def cut(self, table: Table, batch_size: int, *, drop_last: bool = False, start: int = 0) -> Cut:
        """One rank's epoch over `table`: what reads a column first, or cuts otherwise, overrides this."""
        return self.plan(table.rows, table.fragments, batch_size, drop_last=drop_last, start=start)

    def ranges(self, step: int, *, rows: int, fragments: NDArray[np.int64], batch_size: int) -> Ranges:
        """The rows of one batch, without a plan at hand: i64[N, 2]."""
        return self.plan(rows, fragments, batch_size).ranges(step)

    def __call__(
        self,
        ds: Any,
        *args: Any,
        batch_size: int = 128,
        columns: list[str] | dict[str, str] | None = None,
        filter: str | None = None,
        batch_readahead: int = 16,
        with_row_id: bool | None = False,
        **kwargs: Any,
    ) -> Generator[pa.RecordBatch, None, None]:
        """Lance's protocol: the rows of this rank as RecordBatches of `batch_size`, without fill-up rows."""
        source = LanceTable(ds, columns, filter, with_row_id=bool(with_row_id))
        cut = self.cut(source, batch_size)
        for step in range(len(cut)):
            rows = cut(step)
            if rows.real:
                yield one_batch(source.read(coalesce(rows.row[: rows.real])))

    def __repr__(self) -> str:
        random = f", randomize=True, seed={self._seed}" if self._randomize else ""
        return f"{type(self).__name__}(rank={self.rank}, world_size={self.world_size}{random})"


class _FromTorch(PlanSampler):
    @classmethod
    def from_torch(cls, randomize: bool = False, seed: int = 0) -> Any:
        """Rank and world size from :mod:`torch.distributed`, which must be initialised."""
        import torch.distributed

        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size(), randomize=randomize, seed=seed)


class FullScanSampler(PlanSampler):
    """Every row in the order of the dataset, on every rank."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def __repr__(self) -> str:
        return "FullScanSampler()"


_said: set[tuple[str, int]] = set()  # datasets and world sizes of which it was said that fragments are too few


class ShardedFragmentSampler(_FromTorch):
    """Whole fragments: rank r reads ``fragments[r::world_size]``, one after the other.

    Ranks with fewer rows than the longest are filled up, so this suits fragments of about one size and more of them
    than ranks; with `drop_last` every rank stops with the shortest. Not elastic: the order depends on the world size.

    Parameters
    ----------
    rank, world_size : int, optional
        By default from torch.distributed, else from torchrun's environment.
    randomize : bool
        Shuffle the fragments, anew each epoch, the same way on all ranks.
    seed : int
    """

    elastic = False

    def order(self, rows: int, fragments: NDArray[np.int64], batch_size: int) -> Fragments:
        """This rank's fragments."""
        fragments = np.asarray(fragments, np.int64)
        mine = self._shares(len(fragments))[self.rank]
        return Fragments((np.cumsum(fragments) - fragments)[mine], fragments[mine])

    def plan(
        self, rows: int, fragments: NDArray[np.int64], batch_size: int, *, drop_last: bool = False, start: int = 0
    ) -> FixedSize:
        fragments = np.asarray(fragments, np.int64)
        totals = [int(fragments[share].sum()) for share in self._shares(len(fragments))]
        order = self.order(rows, fragments, batch_size)
        return FixedSize(order, batch_size, drop_last=drop_last, start=start, shortest=min(totals), longest=max(totals))

    def cut(self, table: Table, batch_size: int, *, drop_last: bool = False, start: int = 0) -> Cut:
        """Also says, once for each dataset, that there are ranks without any fragment."""
        if table.rows and len(table.fragments) < self.world_size and (table.uri, self.world_size) not in _said:
            _said.add((table.uri, self.world_size))
            warnings.warn(
                f"{table.uri} has fewer fragments than there are ranks, {len(table.fragments)} for {self.world_size}: "
                "ranks without one train on one row over and over, with valid=False. Leave shard_granularity out, or "
                "use ShardedBatchSampler.",
                stacklevel=2,
            )
        return super().cut(table, batch_size, drop_last=drop_last, start=start)

    def _shares(self, count: int) -> list[NDArray[np.int64]]:
        """The fragments of each rank, by their numbers."""
        index = np.arange(count)
        if self._randomize:
            index = Permutation(count, self._seed, self._epoch)(index)
        return [index[rank :: self.world_size] for rank in range(self.world_size)]


class ShardedBatchSampler(_FromTorch):
    """Batches in turn: batch i of the epoch goes to rank ``i % world_size``. Elastic.

    Parameters
    ----------
    rank, world_size : int, optional
        By default from torch.distributed, else from torchrun's environment.
    randomize : bool
        Shuffle the batches, anew each epoch; each batch stays a run of neighbouring rows and the short one last.
    seed : int
    """

    def order(self, rows: int, fragments: NDArray[np.int64], batch_size: int) -> Order:
        if not self._randomize:
            return InTurn(rows)
        return ShuffledBatches(rows, batch_size, Permutation(rows // batch_size, self._seed, self._epoch))


class ShuffleSampler(PlanSampler):
    """All rows in a random order, anew each epoch; rank r takes every world_size-th batch of it. Elastic.

    The order needs no table: memory is constant and a batch costs the same at 10**10 rows.

    Parameters
    ----------
    rank, world_size : int, optional
        By default from torch.distributed, else from torchrun's environment.
    seed : int
    block_size : int
        Rows that stay together. 1 shuffles every row; 16 reads 1.4 (format 2.2) to 1.8 times (2.0) as fast.
    """

    def __init__(
        self, rank: int | None = None, world_size: int | None = None, seed: int = 0, block_size: int = 1
    ) -> None:
        super().__init__(rank, world_size, True, seed)
        if not isinstance(block_size, int) or block_size < 1:
            raise ConfigError(f"Expected block_size as an int of at least 1, got {block_size!r}.")
        self._block_size = block_size

    @classmethod
    def from_torch(cls, seed: int = 0, block_size: int = 1) -> ShuffleSampler:
        """Rank and world size from :mod:`torch.distributed`, which must be initialised."""
        import torch.distributed

        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size(), seed, block_size)

    def key(self) -> dict[str, Any]:
        return {**super().key(), "block_size": self._block_size}

    def order(self, rows: int, fragments: NDArray[np.int64], batch_size: int) -> Blocks:
        blocks = -(-rows // self._block_size)
        return Blocks(rows, self._block_size, Permutation(blocks, self._seed, self._epoch))

    def __repr__(self) -> str:
        block = f", block_size={self._block_size}" if self._block_size > 1 else ""
        return f"ShuffleSampler(rank={self.rank}, world_size={self.world_size}, seed={self._seed}{block})"
