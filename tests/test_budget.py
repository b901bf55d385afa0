"""Readahead bounded by bytes: counted, not timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from making import encode, picture

from gpuload import ConfigError, Image, LanceDataset
from gpuload.stages import Budget, ordered_map


def read_ahead(path: str, readahead_bytes: int, **options: Any) -> int:
    """The most batches under way beyond those the loop has taken, with time enough to get further."""
    with LanceDataset(path, 5, batch_readahead=6, readahead_bytes=readahead_bytes, device="cpu", **options) as dataset:
        most = 0
        for taken, _ in enumerate(dataset, 1):
            time.sleep(0.03)
            most = max(most, int(dataset.stats()["stages"]["read"]["items"]) - taken)
        return most


@pytest.fixture
def pictures(store: Callable[..., str]) -> str:
    return store({"image": [encode(picture(60, 80, seed=i), "JPEG") for i in range(60)]})


@pytest.mark.parametrize(
    ("options", "batch"),
    [
        ({"transforms": {"image": Image(100, dtype=torch.float32)}}, 5 * 3 * 100 * 100 * 4),
        ({}, 5 * 3 * 60 * 80),  # at their own size: known once the first is decoded
        ({"to_tensor_fn": None}, 5 * 1500),  # less than the files take
    ],
)
def test_batches_under_way_fit_the_bytes(pictures: str, options: dict[str, Any], batch: int) -> None:
    assert read_ahead(pictures, 1, **options) <= 1
    assert read_ahead(pictures, 3 * batch, **options) <= 3
    assert read_ahead(pictures, 1 << 30, **options) >= 4


def test_the_same_batches_whatever_the_bytes(pictures: str) -> None:
    def rows(readahead_bytes: int) -> list[torch.Tensor]:
        options: dict[str, Any] = {"transforms": {"image": Image(16)}, "shuffle": True}
        return [batch["image"] for batch in LanceDataset(pictures, 7, readahead_bytes=readahead_bytes, **options)]

    for one, other in zip(rows(1), rows(1 << 30), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_largest_item_counts() -> None:
    budget = Budget(iter(range(100)), 100)
    assert budget.limit() == 1
    next(budget)
    budget.weigh(20)
    assert budget.limit() == 2  # the first is not out yet
    budget.leave()
    assert budget.limit() == 5
    budget.weigh(50)
    budget.weigh(10)
    assert budget.limit() == 2
    budget.weigh(1000)
    assert budget.limit() == 1


def test_a_budget_never_stops_the_line() -> None:
    budget: Budget[int] = Budget(range(50), 1)

    def work(i: int) -> int:
        budget.weigh(1000)
        return i

    got = []
    for i in ordered_map(work, budget, threads=3, ahead=9, name="read"):
        budget.leave()
        got.append(i)
    assert got == list(range(50))


@pytest.mark.parametrize("value", [0, -1, True, 1.5])
def test_readahead_bytes_is_checked(pictures: str, value: Any) -> None:
    with pytest.raises(ConfigError, match="readahead_bytes"):
        LanceDataset(pictures, 5, readahead_bytes=value)
