"""Randomness with names: the numbers that crops and flips always had, and streams that do not know of each other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuload import Image, kernels
from gpuload.images.views import regions
from gpuload.order.draws import Draws
from gpuload.order.permutation import Permutation
from gpuload.order.philox import uniform, uniform_twin

# What the first edition drew: uniform(5, 2, [0, 1, 10**10], 6), and a random crop with flips.
DRAWN = [
    [
        0.23616523493546993,
        0.7057998020900413,
        0.9856767883757129,
        0.554766813875176,
        0.0761115214554593,
        0.1555024249246344,
    ],
    [
        0.4163656240561977,
        0.1578141440404579,
        0.3971085489029065,
        0.9239589270437136,
        0.6850266690598801,
        0.4235580327222124,
    ],
    [
        0.6447456890018657,
        0.5788647824665532,
        0.18731467856559902,
        0.4313964477041736,
        0.695481140515767,
        0.7808160000713542,
    ],
]
CROPPED = [
    [80.85452686336926, 28.137018650573058, 221.53754588061312, 224.9679049601991],
    [36.79153491441343, 263.81370049487373, 187.18495488078244, 183.23695023968278],
    [69.6012785311714, 13.589869691516343, 80.66235220065148, 66.38664209800697],
    [459.3306087252404, 580.6251600016581, 640.2173278300551, 532.1926473294639],
]
FLIPPED = [False, False, True, False]


def test_the_nameless_stream_has_the_numbers_of_saved_runs() -> None:
    assert Draws(5, 2, np.array([0, 1, 10**10])).uniform("", 6).tolist() == DRAWN


def test_crops_and_flips_are_those_of_saved_runs() -> None:
    image = Image(224, crop="random", flip=0.5)
    draws = Draws(7, 3, np.array([0, 12, 99999, 2**33 + 5]))
    where, flips = regions(image, np.array([300, 500, 81, 2000]), np.array([400, 300, 640, 1500]), draws)
    np.testing.assert_array_max_ulp(where, np.array(CROPPED), 4)  # exp and sqrt of other machines
    assert flips.tolist() == FLIPPED


@settings(deadline=None)
@given(
    st.integers(-(2**70), 2**70), st.integers(0, 2**40), st.lists(st.integers(0, 2**62), max_size=20),
    st.integers(0, 30), st.sampled_from(["", "a", "b", "ä"]),
)  # fmt: skip
def test_a_number_is_a_function_of_seed_epoch_row_and_name(
    seed: int, epoch: int, rows: list[int], n: int, name: str
) -> None:
    all_rows = np.array(rows, np.int64)
    together = Draws(seed, epoch, all_rows).uniform(name, n)
    assert together.shape == (len(rows), n)
    assert ((together > 0) & (together < 1)).all()
    for i, row in enumerate(rows):
        alone = Draws(seed, epoch, np.array([row])).uniform(name, n + 3)
        np.testing.assert_array_equal(alone[0, :n], together[i])


def test_names_are_independent_of_each_other() -> None:
    draws = Draws(3, 1, np.arange(4000))
    streams = np.stack([draws.uniform(name, 1)[:, 0] for name in ("", "a", "b", "ab", "image", "image/view1")])
    assert np.abs(np.corrcoef(streams) - np.eye(len(streams))).max() < 0.07  # four deviations of 1/sqrt(4000)
    assert len(np.unique(streams)) == streams.size


def test_a_seed_under_a_name_is_no_other_seed_without() -> None:
    rows = np.arange(50)
    others = {draw for seed in range(200) for draw in Draws(seed, 0, rows).uniform("", 1)[:, 0].tolist()}
    assert not others & set(Draws(0, 0, rows).uniform("a", 1)[:, 0].tolist())


@pytest.mark.skipif(kernels.tables_library() is None, reason="needs the compiled part")
@settings(deadline=None)
@given(st.integers(1, 2**62), st.integers(-5, 2**64), st.integers(0, 2**33), st.data())
def test_the_compiled_order_is_the_twins(n: int, seed: int, epoch: int, data: st.DataObject) -> None:
    shuffled = Permutation(n, seed, epoch)
    index = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=20)), np.int64)
    places = shuffled(index)
    np.testing.assert_array_equal(places, shuffled.twin(index))
    np.testing.assert_array_equal(shuffled.inverse(places), index)
    np.testing.assert_array_equal(shuffled.twin(places, backwards=True), index)


@pytest.mark.skipif(kernels.tables_library() is None, reason="needs the compiled part")
@settings(deadline=None)
@given(st.integers(-5, 2**64), st.integers(0, 2**33), st.lists(st.integers(-9, 2**62)), st.integers(0, 25))
def test_the_compiled_numbers_are_the_twins(seed: int, epoch: int, rows: list[int], n: int) -> None:
    where = np.array(rows, np.int64)
    np.testing.assert_array_equal(uniform(seed, epoch, where, n), uniform_twin(seed, epoch, where, n))
