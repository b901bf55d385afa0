"""The order of a mix: rows of each source and their shares enter; the rows at any places of an epoch leave."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuload.errors import ConfigError
from gpuload.order import Cut, Ranges, Repeating, coalesce, expand
from gpuload.order.cut import FixedSize
from gpuload.order.draws import stream_key
from gpuload.order.orders import Blocks
from gpuload.order.permutation import Permutation
from gpuload.order.ranks import Ranks
from gpuload.order.samplers import PlanSampler
from gpuload.order.turns import Turns, shares, turns
from gpuload.tables import Table
from gpuload.tables.mix import Mix, MixTable


@dataclass(frozen=True)
class Mixed(Repeating):
    """An epoch: places are turns of the sources, and a source's turns go through its own shuffled passes.

    Attributes
    ----------
    turns : Turns
    names : tuple of str
    lengths : i64[S]
        Rows of each source.
    places : int
    block_size : int
        Rows of a source that stay together.
    before : i64[S]
        Turns of each source in earlier epochs.
    seed : int
    """

    turns: Turns
    names: tuple[str, ...]
    lengths: NDArray[np.int64]
    places: int
    block_size: int
    before: NDArray[np.int64]
    seed: int

    def __len__(self) -> int:
        return self.places

    def __call__(self, lo: int, hi: int) -> Ranges:
        source, turn = self.turns(lo, hi)
        found = np.empty_like(turn)
        start = np.cumsum(self.lengths) - self.lengths
        for s in np.unique(source).tolist():
            here = source == s
            first = int(turn[here][0] + self.before[s])  # the turns of a source follow each other
            found[here] = start[s] + self._rows(s, first, first + int(here.sum()))
        return coalesce(found)

    def source(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(np.cumsum(self.lengths), rows, "right").astype(np.int64)

    def _rows(self, s: int, lo: int, hi: int) -> NDArray[np.int64]:
        """The rows of a source at its turns `lo` to `hi`, counted from the first epoch on: i64[hi - lo]."""
        length, parts = int(self.lengths[s]), []
        key = stream_key(self.seed, f"gpuload.Mix {self.names[s]}")
        while lo < hi:
            times, place = divmod(lo, length)
            last = min(length, place + hi - lo)
            parts.append(expand(_shuffled(length, self.block_size, key, times)(place, last)))
            lo += last - place
        return np.concatenate(parts)


@lru_cache(maxsize=64)
def _shuffled(rows: int, block_size: int, key: int, times: int) -> Blocks:
    return Blocks(rows, block_size, Permutation(-(-rows // block_size), key, times))


class MixSampler(PlanSampler):
    """The order of a `MixTable`; rank r takes every world_size-th batch of it. Elastic."""

    def __init__(self, mix: Mix, ranks: Ranks, seed: int = 0, block_size: int = 1) -> None:
        super().__init__(*ranks.resolve(), True, seed)
        self._mix, self._block_size = mix, block_size

    def key(self) -> dict[str, Any]:
        weights = self._mix.weights
        return {
            **super().key(),
            "sources": ", ".join(self._mix.sources),
            "weights": None if weights is None else ", ".join(str(float(weight)) for weight in weights.values()),
            "stop": self._mix.stop,
            "block_size": self._block_size,
        }

    def cut(self, table: Table, batch_size: int, *, drop_last: bool = False, start: int = 0) -> Cut:
        """One rank's epoch over a `MixTable`."""
        if not isinstance(table, MixTable):
            raise TypeError(f"Expected a MixTable, got {table!r}.")
        weights = list(self._mix.weights.values()) if self._mix.weights else table.lengths.tolist()
        found = turns(tuple(shares(weights).tolist()))
        places = self._mix.stop if isinstance(self._mix.stop, int) else _end(found, table.lengths, self._mix.stop)
        before = self._epoch * found.taken(places) if self._epoch else np.zeros_like(table.lengths)
        order = Mixed(found, table.names, table.lengths, places, self._block_size, before, self._seed)
        return FixedSize(order, batch_size, *self._ranks.resolve(), drop_last, start)

    def __repr__(self) -> str:
        return f"MixSampler(rank={self.rank}, world_size={self.world_size}, seed={self._seed})"


def _end(turns: Turns, lengths: NDArray[np.int64], stop: str) -> int:
    """Places until the first or the last source has had all its rows once."""
    last = [int(length) - 1 for length in lengths]
    order = sorted(range(len(last)), key=lambda s: turns.earliest(s, last[s]), reverse=stop == "last")
    ends: list[int] = []
    for s in order:  # two turns on, another one cannot be before, or after, those found
        bound = turns.earliest(s, last[s]), turns.earliest(s, last[s] + 3)
        if ends and (bound[0] > min(ends) if stop == "first" else bound[1] < max(ends)):
            continue
        ends.append(turns.place(s, last[s]) + 1)
    return min(ends) if stop == "first" else max(ends)


def mix_sampler(
    mix: Mix,
    given: Any,
    shuffle: bool | str,
    granularity: str | None,
    samples: int,
    ranks: Ranks,
    seed: int,
    block: int,
) -> MixSampler:
    """The sampler of a mix.

    Raises
    ------
    ConfigError
        Words that a mix decides itself.
    """
    if given is not None:
        raise ConfigError(f"Expected Mix or sampler, got both: sampler={given!r}. A mix has an order of its own.")
    if granularity == "fragment" or shuffle == "batch" or samples:
        raise ConfigError(
            f'Expected shuffle=True, "row" or "block" and whole sources beside Mix, got shuffle={shuffle!r}, '
            f"shard_granularity={granularity!r}, samples={samples}. A mix has an order of its own."
        )
    return MixSampler(mix, ranks, seed, block if shuffle == "block" else 1)
