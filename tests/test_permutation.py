"""The table-free shuffle and its generator: a bijection at any size, as random as a shuffle has to be.

All keys are fixed, so each statistic is one number; the thresholds are those a fair shuffle passes with five standard
deviations to spare.
"""

from __future__ import annotations

import itertools
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuload import ShuffleSampler
from gpuload.order.permutation import Permutation
from gpuload.order.philox import philox4x32, uniform

SEEDS = st.integers(0, 2**64 - 1)
EPOCHS = st.integers(0, 2**32 - 1)


def order(n: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return Permutation(n, seed, epoch)(np.arange(n))


def chi_square(counts: np.ndarray, expected: float) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def five_sigma(freedom: int) -> float:
    """Mean and five standard deviations of a chi-square distribution."""
    return freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_vectors(counter: str, key: str, expected: str) -> None:
    words = np.array([[int(word, 16)] for word in counter.split()], np.uint64)
    k0, k1 = (int(word, 16) for word in key.split())
    assert " ".join(f"{int(word):08x}" for word in philox4x32(words, (k0, k1))[:, 0]) == expected


def test_uniforms_are_a_function_of_seed_epoch_and_row_alone() -> None:
    rows = np.array([7, 0, 2**33 + 7])
    drawn = uniform(3, 2, rows, 6)
    assert np.array_equal(drawn[::-1], uniform(3, 2, rows[::-1], 6))
    assert np.array_equal(drawn[:1], uniform(3, 2, rows[:1], 6))
    assert np.array_equal(drawn[:, :2], uniform(3, 2, rows, 2))
    others = [
        uniform(4, 2, rows, 6),
        uniform(3, 3, rows, 6),
        uniform(3 + 2**32, 2, rows, 6),
        uniform(3, 2, rows + 1, 6),
    ]
    assert all(not np.isin(drawn, other).any() for other in others)
    assert len(np.unique(drawn)) == drawn.size


def test_uniforms_fill_the_interval_evenly() -> None:
    drawn = uniform(0, 0, np.arange(20_000), 3)
    assert drawn.min() > 0
    assert drawn.max() < 1
    counts = np.histogram(drawn, 50, (0, 1))[0]
    assert chi_square(counts, drawn.size / 50) < five_sigma(49)
    assert abs(np.corrcoef(drawn.T) - np.eye(3)).max() < 5 / 20_000**0.5


@settings(deadline=None, max_examples=150)
@given(n=st.integers(0, 3000), seed=SEEDS, epoch=EPOCHS)
def test_every_item_has_one_place_and_the_inverse_finds_it(n: int, seed: int, epoch: int) -> None:
    permutation = Permutation(n, seed, epoch)
    shuffled = permutation(np.arange(n))
    assert np.array_equal(np.sort(shuffled), np.arange(n))
    assert np.array_equal(permutation.inverse(shuffled), np.arange(n))


@settings(deadline=None, max_examples=100)
@given(n=st.integers(1, 2**62), seed=SEEDS, epoch=EPOCHS, data=st.data())
def test_the_inverse_undoes_it_at_any_size(n: int, seed: int, epoch: int, data: st.DataObject) -> None:
    index = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)))
    permutation = Permutation(n, seed, epoch)
    shuffled = permutation(index)
    assert shuffled.min() >= 0
    assert shuffled.max() < n
    assert np.array_equal(permutation.inverse(shuffled), index)
    assert np.array_equal(permutation(permutation.inverse(index)), index)


def test_the_shape_of_the_indices_is_kept_and_they_are_not_written_to() -> None:
    index = np.arange(12).reshape(3, 4)
    shuffled = Permutation(12, 1)(index)
    assert shuffled.shape == (3, 4)
    assert np.array_equal(index.reshape(-1), np.arange(12))
    assert np.array_equal(shuffled.reshape(-1), order(12, 1))


def test_memory_is_constant_at_ten_billion_rows() -> None:
    shuffled = ShuffleSampler(7, 1024, seed=3).plan(1000, np.array([1000]), 1)  # NumPy has allocated what it keeps
    tracemalloc.start()
    try:
        rows = 10**10
        plan = ShuffleSampler(7, 1024, seed=3).plan(rows, np.array([rows]), 128)
        block = ShuffleSampler(7, 1024, seed=3, block_size=16).plan(rows, np.array([rows]), 128)
        first, last = plan.ranges(0), plan.ranges(len(plan) - 1)
        block.ranges(len(block) // 2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(plan) == -(-rows // (128 * 1024))
    assert len(shuffled) == 1
    assert first.max() <= rows
    assert last.max() <= rows
    assert peak < 200_000  # bytes; a batch of 128 indices needs 1 kB, a table of the order would need 80 GB


@pytest.mark.parametrize("by", ["seed", "epoch"])
def test_every_item_is_equally_likely_at_every_place(by: str) -> None:
    n, keys = 12, 1000
    counts = np.zeros((n, n))
    for key in range(keys):
        shuffled = order(n, key, 5) if by == "seed" else order(n, 5, key)
        counts[shuffled, np.arange(n)] += 1
    assert chi_square(counts, keys / n) < five_sigma((n - 1) ** 2)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_every_order_of_a_few_items_is_equally_likely(n: int) -> None:
    orders = [tuple(o) for o in itertools.permutations(range(n))]
    keys = max(300, 10 * len(orders))
    found = Counter(tuple(order(n, key, key % 3).tolist()) for key in range(keys))
    assert set(found) <= set(orders)
    counts = np.array([found[o] for o in orders])
    assert chi_square(counts, keys / len(orders)) < five_sigma(len(orders) - 1)


def test_regions_of_a_large_range_are_spread_evenly() -> None:
    n, keys, cells = 50_000, 40, 20
    counts = np.zeros((cells, cells))
    for key in range(keys):
        np.add.at(counts, (np.arange(n) * cells // n, order(n, key) * cells // n), 1)
    assert chi_square(counts, keys * n / cells**2) < five_sigma((cells - 1) ** 2)


def test_each_place_of_a_large_range_is_uniform_over_keys() -> None:
    n, keys, cells = 10**10, 4000, 20
    places = np.array([0, 1, n // 2, n - 1])
    items = np.stack([Permutation(n, key, 1)(places) for key in range(keys)])
    for column in items.T:
        counts = np.bincount(column * cells // n, minlength=cells)
        assert chi_square(counts, keys / cells) < five_sigma(cells - 1)


@pytest.mark.parametrize("n", [1000, 65_536, 65_537, 100_000])
def test_neighbours_are_torn_apart(n: int) -> None:
    distances = np.concatenate([np.diff(order(n, seed)) for seed in range(1 + 200_000 // n)])
    trials = len(distances) / n
    spread = 0.236 / len(distances) ** 0.5  # of the mean of |difference| / n, which is 1/3
    assert abs(np.abs(distances).mean() / n - 1 / 3) < 5 * spread
    assert (distances == 1).sum() <= trials + 5 * trials**0.5 + 5  # about one each
    assert abs((distances > 0).mean() - 0.5) < 5 * 0.29 / len(distances) ** 0.5  # ups and downs, Var = n/12


@pytest.mark.parametrize(("n", "keys"), [(40, 300), (64, 300), (1024, 60)])
def test_what_follows_an_item_is_any_other_item(n: int, keys: int) -> None:
    steps, masks = np.zeros(n), np.zeros(2 * n)
    for key in range(keys):
        shuffled = order(n, key, 1)
        steps += np.bincount((np.roll(shuffled, -1) - shuffled) % n, minlength=n)
        masks += np.bincount(shuffled[::2] ^ shuffled[1::2], minlength=2 * n)
    assert chi_square(steps[1:], keys * n / (n - 1)) < five_sigma(n - 2)
    if n & (n - 1) == 0:  # then every difference of bits is as likely as any other
        assert chi_square(masks[1:n], keys * n / 2 / (n - 1)) < five_sigma(n - 2)


def test_seeds_and_epochs_and_the_given_order_are_independent() -> None:
    n = 20_000
    keys = [(s, e) for s in (0, 1, 2, 2**32, 2**63, 2**64 - 1) for e in (0, 1, 2, 3)]
    orders = np.stack([np.arange(n), *(order(n, seed, epoch) for seed, epoch in keys)])
    ranks = np.corrcoef(orders) - np.eye(len(orders))  # Spearman's: the orders are ranks themselves
    assert np.abs(ranks).max() < 5 / n**0.5
    places = np.stack([np.arange(n), *(Permutation(n, s, e).inverse(np.arange(n)) for s, e in keys)])
    assert np.abs(np.corrcoef(places) - np.eye(len(places))).max() < 5 / n**0.5
    same = sum(int((a == b).sum()) for a, b in itertools.combinations(orders, 2))
    pairs = len(orders) * (len(orders) - 1) // 2
    assert abs(same - pairs) < 5 * pairs**0.5  # items at the same place: one a pair, Poisson


def test_a_batch_holds_rows_of_the_whole_dataset_at_every_step() -> None:
    rows, size = 10**9, 256
    plan = ShuffleSampler(seed=1).plan(rows, np.array([rows]), size)
    for step in (0, 1, len(plan) // 2, len(plan) - 2):
        ids = plan.ranges(step)[:, 0]
        assert len(ids) == size
        assert abs(ids.mean() / rows - 0.5) < 5 * 0.289 / size**0.5
        assert abs(ids.std() / rows - 0.289) < 5 * 0.13 / size**0.5
