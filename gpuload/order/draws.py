"""Randomness with names: a seed, an epoch and rows enter, `uniform("name", n)` of them leaves.

The numbers are those of Philox, countered by (row, epoch) under a key: the seed for the nameless stream, and for a name
what Philox makes of the name's BLAKE2 digest under the seed. So names are independent of each other, and none of them,
nor their order, changes another.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from gpuload.order.philox import philox4x32, uniform


@dataclass(frozen=True)
class Draws:
    """What the randomness of one batch is a function of.

    Attributes
    ----------
    seed, epoch : int
    rows : i64[B]
        What identifies each row: its position in the dataset.
    """

    seed: int
    epoch: int
    rows: NDArray[np.int64]

    def uniform(self, name: str, n: int) -> NDArray[np.float64]:
        """``n`` uniforms in the open interval (0, 1) for every row, f64[B, n]: a function of (seed, epoch, row, name).

        Fewer are the first of more. The name ``""`` is the stream that crops and flips have of a column's first output.
        """
        return uniform(stream_key(self.seed, name), self.epoch, self.rows, n)


@dataclass(frozen=True)
class Named:
    """The draws of one purpose: its names come after a prefix, so that two purposes never share a number.

    Attributes
    ----------
    draws : Draws
        Of B rows.
    prefixes : tuple of str
        V of them: every row has V sets of numbers, one after the other.
    """

    draws: Draws
    prefixes: tuple[str, ...]

    def uniform(self, name: str, n: int) -> NDArray[np.float64]:
        """``n`` uniforms in the open interval (0, 1) for every row and prefix, f64[B * V, n]."""
        found = [self.draws.uniform(f"{prefix}/{name}", n) for prefix in self.prefixes]
        return found[0] if len(found) == 1 else np.stack(found, axis=1).reshape(-1, n)


@lru_cache(maxsize=1024)
def stream_key(seed: int, name: str) -> int:
    """The key of a name's stream: 64 bits, as many of `seed`."""
    seed &= 0xFFFFFFFFFFFFFFFF
    if not name:
        return seed
    digest = np.frombuffer(hashlib.blake2b(name.encode(), digest_size=16).digest(), "<u4")
    words = philox4x32(digest.astype(np.uint64)[:, None], (seed & 0xFFFFFFFF, seed >> 32))[:, 0]
    return int(words[0]) | int(words[1]) << 32
