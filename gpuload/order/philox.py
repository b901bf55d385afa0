"""Random numbers that are a function of (seed, epoch, row): no state, no order, same everywhere.

Philox4x32-10 is the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as
1, 2, 3" (SC 2011). Enter: a seed and arrays of counters. Leave: uniforms, one independent stream per counter.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gpuload import kernels  # type: ignore[attr-defined, unused-ignore]  # mypy cannot follow package-dir

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def philox4x32(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Ten rounds of Philox4x32.

    Parameters
    ----------
    counter : u64[4, ...]
        Four words of 32 bits each.
    key : tuple of int
        Two words of 32 bits.

    Returns
    -------
    u64[4, ...]
        Four random words of 32 bits for each counter.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ np.uint64(k0), p1 & _LOW, (p0 >> _32) ^ c3 ^ np.uint64(k1), p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3))


def uniform(seed: int, epoch: int, rows: NDArray[np.int64], n: int) -> NDArray[np.float64]:
    """``n`` uniforms in the open interval (0, 1) for every row: f64[len(rows), n]. The word of each is number j % 4 of
    block j // 4, whose counter is (row's low and high 32 bits, block, epoch), under the 64 bits of `seed`."""
    library = kernels.tables_library()
    if library is None:
        return uniform_twin(seed, epoch, rows, n)
    rows, out = np.ascontiguousarray(rows, np.int64), np.empty((len(rows), n))
    kernels.run_uniform(library, rows, n, epoch & 0xFFFFFFFF, seed & 0xFFFFFFFFFFFFFFFF, out)
    return out


def uniform_twin(seed: int, epoch: int, rows: NDArray[np.int64], n: int) -> NDArray[np.float64]:
    """`uniform` in NumPy, ten times as long: where nothing could be compiled."""
    blocks = -(-n // 4)
    row = np.asarray(rows).astype(np.uint64)[:, None]
    counter = np.zeros((4, len(row), blocks), np.uint64)
    counter[0], counter[1] = row & _LOW, row >> _32
    counter[2] = np.arange(blocks, dtype=np.uint64)
    counter[3] = np.uint64(epoch & 0xFFFFFFFF)
    words = philox4x32(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))  # u64[4, rows, blocks]
    flat = np.moveaxis(words, 0, -1).reshape(len(row), blocks * 4)[:, :n]
    return (flat.astype(np.float64) + 0.5) * 2.0**-32
