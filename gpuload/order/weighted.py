"""Rows by weight, with replacement: a weight for each row enters; the row at any place of an epoch leaves.

Walker's alias method: a row is drawn by two random numbers and two look-ups, however many rows there are. Every place
has random numbers of its own, so the order is the same for any number of ranks and can be entered anywhere.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpuload.errors import ConfigError, expect_counts
from gpuload.order import Cut, Ranges, Repeating, coalesce
from gpuload.order.cut import FixedSize
from gpuload.order.draws import Draws
from gpuload.order.samplers import PlanSampler
from gpuload.tables import Table

_STREAM = "gpuload.WeightedSampler"


class Alias:
    """A distribution over rows, from which a row is drawn by two uniforms.

    Parameters
    ----------
    weights : f64[N]
        Finite, not negative, not all 0.

    The N columns of Walker's table are filled as a sweep over the rows below the mean and over those above it fills
    them, but with prefix sums in place of its loop (Hübschle-Schneider and Sanders, "Parallel Weighted Random
    Sampling", ESA 2019): a row below the mean gets what it lacks from the row above it whose excess is not used up yet.
    """

    def __init__(self, weights: NDArray[np.float64]) -> None:
        scaled = weights / weights.max()  # the sum of the largest numbers is infinite
        scaled = scaled * (len(scaled) / np.cumsum(scaled)[-1])  # cumsum adds in order, the same on every machine
        light, heavy = np.flatnonzero(scaled < 1), np.flatnonzero(scaled >= 1)
        self.keep = np.minimum(scaled, 1)  # f64[N]: the probability of a column's own row
        self.other = np.arange(len(scaled))  # i64[N]: the row that has the rest of the column
        if not len(light) or not len(heavy):  # all weights are equal, up to rounding
            self.keep[:] = 1
            return
        lacks, excess = np.cumsum(np.append(0.0, 1 - scaled[light])), np.cumsum(scaled[heavy] - 1)
        giver = np.searchsorted(excess, lacks[:-1], "right")  # the first with something left
        self.other[light] = heavy[np.minimum(giver, len(heavy) - 1)]
        spent = np.searchsorted(lacks, excess[:-1])  # how many rows have taken from each when nothing is left of it
        lack = lacks[np.minimum(spent, len(light))]
        self.keep[heavy[:-1]] = np.clip(1 + excess[:-1] - lack, 0, 1)
        self.other[heavy[:-1]] = heavy[1:]

    def draw(self, uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
        """Rows, i64[n], by four uniforms of 32 bits each: f64[n, 4]."""
        column = np.minimum(_wide(uniforms[:, :2]) * len(self.keep), len(self.keep) - 1).astype(np.int64)
        own = _wide(uniforms[:, 2:]) < self.keep[column]
        found: NDArray[np.int64] = np.where(own, column, self.other[column])
        return found


def _wide(pair: NDArray[np.float64]) -> NDArray[np.float64]:
    """One uniform with 53 bits from two of 32, f64[n, 2] → f64[n]."""
    return (np.floor(pair[:, 0] * 2.0**32) + pair[:, 1]) * 2.0**-32


@dataclass(frozen=True)
class Weighted(Repeating):
    """So many rows, each drawn by `alias` with the random numbers of its place."""

    rows: int
    alias: Alias
    seed: int
    epoch: int

    def __len__(self) -> int:
        return self.rows

    def __call__(self, lo: int, hi: int) -> Ranges:
        return coalesce(self.alias.draw(Draws(self.seed, self.epoch, np.arange(lo, hi)).uniform(_STREAM, 4)))


class WeightedSampler(PlanSampler):
    """Rows drawn by weight, with replacement, anew each epoch; rank r takes every world_size-th batch. Elastic.

    A row that comes twice in an epoch has other draws (crop, flip, ...) each time: those of its place.

    Parameters
    ----------
    weights : str or array_like
        A column of numbers, read once, or an SQL expression; or a weight for each row that the filter left, or for each
        row that is stored. They need not sum to 1. A row of weight 0 never comes.
    rows : int, optional
        Rows of an epoch; by default as many as the dataset has.
    rank, world_size : int, optional
        By default from torch.distributed, else from torchrun's environment.
    seed : int

    Raises
    ------
    ConfigError
        A weight that is negative, infinite or no number, all of them 0, or not as many as rows; those of a column when
        it is read.
    """

    def __init__(
        self,
        weights: str | ArrayLike = "weight",
        rows: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(rank, world_size, True, seed)
        expect_counts(rows=1 if rows is None else rows)
        self._column = weights if isinstance(weights, str) else None
        self._weights = None if isinstance(weights, str) else _checked(_array(weights), "weights")
        self._rows = rows

    def key(self) -> dict[str, Any]:
        weights = (
            self._column if self._weights is None else hashlib.blake2b(self._weights.data, digest_size=8).hexdigest()
        )
        return {**super().key(), "weights": weights, "sampler_rows": self._rows}

    def order(self, rows: int, fragments: NDArray[np.int64], batch_size: int) -> Weighted:
        """The epoch's order of `rows` rows, where the weights are an array."""
        if self._weights is None:
            raise ConfigError(f"Expected weights as an array where no table is, got the column {self._column!r}.")
        if len(self._weights) != rows:
            raise ConfigError(f"Expected a weight for each of {rows} rows, got {len(self._weights)}.")
        return self._order(rows, Alias(self._weights) if rows else None)

    def cut(self, table: Table, batch_size: int, *, drop_last: bool = False, start: int = 0) -> Cut:
        """One rank's epoch over `table`, whose weights are read at the first call."""
        order = self._order(table.rows, self._alias(table) if table.rows else None)
        return FixedSize(order, batch_size, *self._ranks.resolve(), drop_last, start)

    def _order(self, rows: int, alias: Alias | None) -> Weighted:
        if alias is None:
            if self._rows is not None:
                raise ConfigError(f"Expected a row to draw {self._rows} from, got an empty dataset.")
            alias = Alias(np.ones(1))
        return Weighted(rows if self._rows is None else self._rows, alias, self._seed, self._epoch)

    def _alias(self, table: Table) -> Alias:
        """Of this table's rows; kept as long as the table is, in this process."""
        known, name = _ALIASES.setdefault(table, {}), str(self.key()["weights"])
        if name not in known:
            known[name] = Alias(self._of(table))
        return known[name]

    def _of(self, table: Table) -> NDArray[np.float64]:
        """The weight of each row that is used, f64[rows]."""
        if self._column is not None:
            return _checked(table.small(self._column).astype(np.float64), f"column {self._column!r}")
        assert self._weights is not None
        if len(self._weights) == table.rows:
            return self._weights
        if len(self._weights) != table.stored:
            stored = f", or of the {table.stored} that are stored" if table.stored != table.rows else ""
            raise ConfigError(f"Expected a weight for each of {table.rows} rows{stored}, got {len(self._weights)}.")
        return _checked(
            self._weights[table.positions(np.array([[0, table.rows]]))], "weights of the rows that are left"
        )

    def __repr__(self) -> str:
        weights = repr(self._column) if self._weights is None else f"f64[{len(self._weights)}]"
        rows = "" if self._rows is None else f", rows={self._rows}"
        return f"WeightedSampler({weights}{rows}, rank={self.rank}, world_size={self.world_size}, seed={self._seed})"


_ALIASES: WeakKeyDictionary[Table, dict[str, Alias]] = WeakKeyDictionary()  # not pickled with a sampler


def _array(weights: ArrayLike) -> NDArray[np.float64]:
    try:
        found = np.asarray(weights, np.float64).copy()  # the user's own may change
    except (TypeError, ValueError) as error:
        raise ConfigError(f"Expected weights as a column's name or an array of numbers, got {weights!r}.") from error
    if found.ndim != 1:
        raise ConfigError(f"Expected weights of shape [rows], got {list(found.shape)}.")
    return found


def _checked(weights: NDArray[np.float64], where: str) -> NDArray[np.float64]:
    """The same weights, f64[N], if a row can be drawn by them."""
    bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if len(bad):
        raise ConfigError(f"Expected {where} of at least 0 and finite, got {weights[bad[0]]} for row {bad[0]}.")
    if len(weights) and not weights.any():
        raise ConfigError(f"Expected {where} with at least one above 0, got {len(weights)} times 0.")
    return weights
