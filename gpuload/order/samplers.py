"""Which rows, when: (rows, fragments, seed, epoch, rank, world size, batch size) enter, the ranges of batch k leave.

A sampler is a few numbers; its `plan` is pure, reads nothing and answers for any step at once. So resuming is a
look-up and no thread can change an order. Shared by all plans: every batch has `batch_size` rows except the last,
every rank has the same number of batches of the same size, and each row is in exactly one of them. Ranks that run
short are filled up with rows they had before, marked as such.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gpuload.errors import ConfigError
from gpuload.order.permutation import Permutation
from gpuload.tables import Ranges, coalesce, one_batch
from gpuload.tables.lance import LanceBatches, LanceFragments, LanceFullScan, LanceSampler, LanceTable

_BLOCK = 16  # rows; LanceDataset(shuffle="block"): 1.4 times the rate of single rows (benchmarks/results/read-2.2.json)

Order = Callable[[int, int], Ranges]  # places lo to hi of an order of rows → the rows there


@dataclass(frozen=True)
class Plan:
    """One rank's epoch.

    Attributes
    ----------
    order : callable
        ``order(lo, hi)``: i64[N, 2] ranges of the rows at places lo to hi of the order that is cut into batches.
    rows : int
        Rows in that order.
    longest : int
        Rows in the longest such order of all ranks; the same as `rows` where the ranks share one.
    batch_size, rank, world_size : int
        Step k of this rank has the places from ``start + (k * world_size + rank) * batch_size``.
    drop_last : bool
    start : int
        Places that earlier steps of this epoch have used up, maybe with another world size.
    shortest : int
        Rows in the shortest such order of all ranks.
    """

    order: Order
    rows: int
    longest: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    drop_last: bool = False
    start: int = 0
    shortest: int = -1

    def __len__(self) -> int:
        """Steps that are left, the same on every rank."""
        full = self.batch_size * self.world_size
        if self.drop_last:
            return max(0, (self.rows if self.shortest < 0 else self.shortest) - self.start) // full
        return -(-max(0, self.longest - self.start) // full)

    def size(self, step: int) -> tuple[int, int]:
        """(rows of this step's batch, how many of them are not fill-up rows)."""
        if not 0 <= step < len(self):
            raise IndexError(f"Expected a step from 0 to {len(self) - 1}, got {step}.")
        first = self.start + step * self.world_size * self.batch_size
        size = min(self.batch_size, self.longest - first)
        return size, min(max(self.rows - first - self.rank * self.batch_size, 0), size)

    def ranges(self, step: int) -> Ranges:
        """The rows of batch `step` in order, fill-up rows last: i64[N, 2], half-open."""
        size, real = self.size(step)
        place = self.start + (step * self.world_size + self.rank) * self.batch_size
        parts = [self.order(place, place + real)] if real else []
        while real < size:  # from the start of the order, again and again where it is shorter than a batch
            more = min(size - real, max(self.rows, 1))
            parts.append(self.order(0, more) if self.rows else np.array([[0, 1]]))
            real += more
        return np.concatenate(parts)


class PlanSampler(LanceSampler):
    """What the samplers below share: a place among the ranks, a seed, an epoch, and Lance's own protocol."""

    elastic: ClassVar[bool] = True  # whether the order is the same for every world size

    def __init__(self, rank: int = 0, world_size: int = 1, randomize: bool = False, seed: int = 0) -> None:
        for name, value in (("rank", rank), ("world_size", world_size), ("seed", seed)):
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
                raise ConfigError(f"Expected {name} as an int, got {value!r}.")
        if not 0 <= rank < world_size:
            raise ConfigError(f"Expected 0 <= rank < world_size, got rank={rank}, world_size={world_size}.")
        self._rank, self._world_size = int(rank), int(world_size)
        self._randomize, self._seed, self._epoch = bool(randomize), int(seed), 0

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order the next plan has."""
        self._epoch = int(epoch)

    def key(self) -> dict[str, Any]:
        """What the order depends on besides the epoch and the rank: part of a saved state."""
        return {"sampler": type(self).__name__, "randomize": self._randomize, "sampler_seed": self._seed}

    def plan(
        self, rows: int, fragments: NDArray[np.int64], batch_size: int, *, drop_last: bool = False, start: int = 0
    ) -> Plan:
        """One rank's epoch over `rows` rows that lie in `fragments` (i64[F] rows each, sum = rows).

        `start` is the number of places that were used up before, as a saved state has it.
        """
        if batch_size < 1:
            raise ConfigError(f"Expected batch_size of at least 1, got {batch_size}.")
        order = self._order(rows, batch_size)
        return Plan(order, rows, rows, batch_size, self._rank, self._world_size, drop_last, start)

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
        plan = self.plan(source.rows, source.fragments, batch_size)
        for step in range(len(plan)):
            _, real = plan.size(step)
            if real:
                yield one_batch(source.read(plan.ranges(step)).slice(0, real))

    def __repr__(self) -> str:
        random = f", randomize=True, seed={self._seed}" if self._randomize else ""
        return f"{type(self).__name__}(rank={self._rank}, world_size={self._world_size}{random})"

    def _order(self, rows: int, batch_size: int) -> Order:
        return _in_order


class _FromTorch(PlanSampler):
    @classmethod
    def from_torch(cls, randomize: bool = False, seed: int = 0) -> Any:
        """Rank and world size from :mod:`torch.distributed`, which must be initialised."""
        import torch.distributed

        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size(), randomize=randomize, seed=seed)


class FullScanSampler(PlanSampler):
    """Every row in the order of the dataset, on every rank."""

    def __init__(self) -> None:
        super().__init__()

    def __repr__(self) -> str:
        return "FullScanSampler()"


class ShardedFragmentSampler(_FromTorch):
    """Whole fragments: rank r reads ``fragments[r::world_size]``, one after the other.

    Ranks with fewer rows than the longest are filled up, so this suits fragments of about one size and more of them
    than ranks; with `drop_last` every rank stops with the shortest. Not elastic: the order depends on the world size.

    Parameters
    ----------
    rank, world_size : int
    randomize : bool
        Shuffle the fragments, anew each epoch, the same way on all ranks.
    seed : int
    """

    elastic = False

    def plan(
        self, rows: int, fragments: NDArray[np.int64], batch_size: int, *, drop_last: bool = False, start: int = 0
    ) -> Plan:
        fragments = np.asarray(fragments, np.int64)
        first = np.cumsum(fragments) - fragments
        index = np.arange(len(fragments))
        if self._randomize:
            index = Permutation(len(fragments), self._seed, self._epoch)(index)
        totals = [int(fragments[index[r :: self._world_size]].sum()) for r in range(self._world_size)]
        mine = index[self._rank :: self._world_size]
        starts = first[mine]
        ends = np.cumsum(fragments[mine])  # places in this rank's order where its fragments end
        begins = ends - fragments[mine]

        def order(lo: int, hi: int) -> Ranges:
            a, b = np.searchsorted(ends, lo, "right"), np.searchsorted(begins, hi, "left")
            at = starts[a:b] - begins[a:b]
            ranges = np.stack([np.maximum(begins[a:b], lo) + at, np.minimum(ends[a:b], hi) + at], axis=1)
            return ranges[ranges[:, 0] < ranges[:, 1]]

        if batch_size < 1:
            raise ConfigError(f"Expected batch_size of at least 1, got {batch_size}.")
        return Plan(order, totals[self._rank], max(totals), batch_size, 0, 1, drop_last, start, shortest=min(totals))


class ShardedBatchSampler(_FromTorch):
    """Batches in turn: batch i of the epoch goes to rank ``i % world_size``. Elastic.

    Parameters
    ----------
    rank, world_size : int
    randomize : bool
        Shuffle the batches, anew each epoch; each batch stays a run of neighbouring rows and the short one last.
    seed : int
    """

    def _order(self, rows: int, batch_size: int) -> Order:
        if not self._randomize:
            return _in_order
        full = rows // batch_size
        return _blocks(Permutation(full, self._seed, self._epoch), batch_size, rows, tail_last=True)


class ShuffleSampler(PlanSampler):
    """All rows in a random order, anew each epoch; rank r takes every world_size-th batch of it. Elastic.

    The order needs no table: memory is constant and a batch costs the same at 10**10 rows.

    Parameters
    ----------
    rank, world_size : int
    seed : int
    block_size : int
        Rows that stay together. 1 shuffles every row; 16 reads 1.4 (format 2.2) to 1.8 times (2.0) as fast.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, seed: int = 0, block_size: int = 1) -> None:
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

    def _order(self, rows: int, batch_size: int) -> Order:
        blocks = -(-rows // self._block_size)
        return _blocks(Permutation(blocks, self._seed, self._epoch), self._block_size, rows, tail_last=False)

    def __repr__(self) -> str:
        block = f", block_size={self._block_size}" if self._block_size > 1 else ""
        return f"ShuffleSampler(rank={self._rank}, world_size={self._world_size}, seed={self._seed}{block})"


def _in_order(lo: int, hi: int) -> Ranges:
    return np.array([[lo, hi]], np.int64)


def _blocks(shuffled: Permutation, size: int, rows: int, *, tail_last: bool) -> Order:
    """An order of blocks of `size` rows. The short block of a range that does not divide stands last, or at the
    place the permutation gives it: then everything behind it moves up by what it lacks."""
    short = rows % size
    if tail_last or not short:
        gap = rows - short  # the short block stands behind all full ones
    else:
        gap = int(shuffled.inverse(np.array([rows // size]))[0]) * size

    def order(lo: int, hi: int) -> Ranges:
        place = np.arange(lo, hi)
        behind = place >= gap + short
        lifted = place + np.where(behind, size - short, 0) if short else place
        block, within = np.divmod(lifted, size)
        if tail_last:
            tail = block >= shuffled.n
            moved = shuffled(np.where(tail, 0, block)) if shuffled.n else block
            return coalesce(np.where(tail, block, moved) * size + within)
        return coalesce(shuffled(block) * size + within)

    return order


def make_sampler(
    sampler: Any, shuffle: bool | str, granularity: str | None, rank: int, world_size: int, seed: int
) -> Any:
    """The sampler that `LanceDataset`'s keywords ask for; Lance's own ones become their equals here.

    Raises
    ------
    ConfigError
        Keywords that contradict each other, or words that are not known.
    """
    if shuffle not in (False, True, "row", "block", "batch"):
        raise ConfigError(f'Expected shuffle=False, True, "row", "block" or "batch", got {shuffle!r}.')
    if granularity not in (None, "fragment", "batch"):
        raise ConfigError(f'Expected shard_granularity=None, "fragment" or "batch", got {granularity!r}.')
    if sampler is not None:
        if shuffle:
            raise ConfigError(f"Expected shuffle or sampler, got both: shuffle={shuffle!r}, sampler={sampler!r}.")
        return _adopt(sampler)
    if shuffle in (True, "row", "block"):
        if granularity == "fragment":
            raise ConfigError(
                f'Expected shuffle="batch" or False beside shard_granularity="fragment", got {shuffle!r}.'
            )
        return ShuffleSampler(rank, world_size, seed, _BLOCK if shuffle == "block" else 1)
    kind = ShardedFragmentSampler if granularity == "fragment" else ShardedBatchSampler
    return kind(rank, world_size, randomize=shuffle == "batch", seed=seed)


def _adopt(sampler: Any) -> Any:
    """Lance's stock samplers, exactly those, become ours: the same rows, with equal ranks, a length and a state."""
    if isinstance(sampler, PlanSampler):
        return sampler
    if type(sampler) is LanceFullScan:
        return FullScanSampler()
    for theirs, ours in ((LanceFragments, ShardedFragmentSampler), (LanceBatches, ShardedBatchSampler)):
        if type(sampler) is theirs:
            adopted = ours(sampler._rank, sampler._world_size, sampler._randomize, sampler._seed)
            adopted.set_epoch(sampler._epoch)
            return adopted
    if not isinstance(sampler, LanceSampler):
        raise ConfigError(
            f"Expected sampler as a gpuload or lance.sampler.Sampler, got {type(sampler).__name__}. "
            "Subclass lance.sampler.Sampler and yield RecordBatches."
        )
    return sampler
