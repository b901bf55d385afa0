"""A shuffle that needs no table: i64 indices enter, their places in a random order leave; constant memory at any size.

A Feistel network of keyed rounds permutes the smallest power of two that holds the range; indices that fall outside
walk the cycle until they are inside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). The
halves may differ by a bit (an unbalanced network), so the power of two is less than twice the range and a walk takes
less than one extra step on average.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gpuload import kernels  # type: ignore[attr-defined, unused-ignore]  # mypy cannot follow package-dir
from gpuload.order.philox import philox4x32

_ROUNDS = 8  # from 2**12 up, where a half has 6 bits or more
_SMALL_ROUNDS = 16  # a half of few bits mixes slowly
_SMALLEST = 6  # bits; in 4, orders of 5 items fail a chi-square test: a round is an even permutation of its domain


class Permutation:
    """A bijection of ``range(n)``, a function of (n, seed, epoch) and nothing else.

    Parameters
    ----------
    n : int
        Size of the range, from 0 to 2**62.
    seed, epoch : int
        The key; `seed` counts modulo 2**64, `epoch` modulo 2**32.
    """

    def __init__(self, n: int, seed: int, epoch: int = 0) -> None:
        bits = max(_SMALLEST, (n - 1).bit_length())
        self.n = n
        self._low_bits = np.uint64(bits // 2)
        self._low = np.uint64((1 << bits // 2) - 1)
        self._high = np.uint64((1 << (bits - bits // 2)) - 1)
        self._rounds = _ROUNDS if bits >= 12 else _SMALL_ROUNDS
        counter = np.zeros((4, self._rounds), np.uint64)
        counter[0], counter[2], counter[3] = np.arange(self._rounds), 0x5045524D, epoch & 0xFFFFFFFF
        words = philox4x32(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
        self._words = np.ascontiguousarray(words[0] << np.uint64(32) | words[1])
        self._keys: list[np.uint64] = list(self._words)
        self._bits = (bits // 2, bits - bits // 2)

    def __call__(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """What stands at each place of the shuffled order: i64[...] in ``range(n)``, same shape."""
        return self._walk(index, backwards=False)

    def inverse(self, item: NDArray[np.int64]) -> NDArray[np.int64]:
        """At which place of the shuffled order each item stands."""
        return self._walk(item, backwards=True)

    def _walk(self, index: NDArray[np.int64], backwards: bool) -> NDArray[np.int64]:
        library = kernels.tables_library()
        if library is None:
            return self.twin(index, backwards)
        flat = np.ascontiguousarray(index, np.int64).reshape(-1)
        out = np.empty_like(flat)
        kernels.run_permute(library, flat, self.n, self._bits, self._words, backwards, out)
        return out.reshape(np.shape(index))

    def twin(self, index: NDArray[np.int64], backwards: bool = False) -> NDArray[np.int64]:
        """Both ways in NumPy, ten times as long: where nothing could be compiled."""
        rounds = range(self._rounds - 1, -1, -1) if backwards else range(self._rounds)
        value = self._network(np.asarray(index).astype(np.uint64), rounds)
        outside = np.flatnonzero(value.reshape(-1) >= self.n)
        flat = value.reshape(-1)
        while outside.size:
            flat[outside] = self._network(flat[outside], rounds)
            outside = outside[flat[outside] >= self.n]
        return flat.reshape(value.shape).astype(np.int64)

    def _network(self, value: NDArray[np.uint64], rounds: range) -> NDArray[np.uint64]:
        high, low = value >> self._low_bits, value & self._low
        for r in rounds:
            if r % 2:
                high = high ^ (_mix(low ^ self._keys[r]) & self._high)
            else:
                low = low ^ (_mix(high ^ self._keys[r]) & self._low)
        return high << self._low_bits | low


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): every input bit moves every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
