"""A StopIteration that a user's function lets out is an error, in every one of them, and never a short epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lance
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from gpuload import FullScanSampler, Image, LanceDataset, Ragged, Text
from gpuload.stages import ordered_map


class Stops:
    """A function that works `times` times."""

    def __init__(self, function: Callable[..., Any], times: int = 2) -> None:
        self._function, self._left = function, iter(range(times))

    def __call__(self, *args: Any, **options: Any) -> Any:
        next(self._left)
        return self._function(*args, **options)


class Decodes:
    """A decoder of black pictures, until it stops."""

    name, device = "mine", torch.device("cpu")

    def __init__(self) -> None:
        self._make = Stops(lambda n, headers: Ragged.of([np.zeros((8, 8, 3), np.uint8)] * n, headers))

    def decode(self, encoded: Any, headers: Any, windows: Any) -> Any:
        return self._make(len(encoded), headers)

    def counts(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        pass


class Reads(lance.sampler.Sampler):
    def __call__(self, ds: Any, *args: Any, columns: Any = None, **options: Any) -> Iterator[Any]:
        pull = Stops(lambda batch: batch)
        for batch in ds.to_batches(columns=columns):
            yield pull(batch)


class Refuses(lance.sampler.Sampler):
    def __call__(self, ds: Any, *args: Any, **options: Any) -> Any:
        return next(iter([]))


class Cuts(FullScanSampler):
    def cut(self, *args: Any, **options: Any) -> Any:
        return next(iter([]))


class Epochs(Reads):
    """One of the user's own that cannot go on to another epoch."""

    def __call__(self, ds: Any, *args: Any, columns: Any = None, **options: Any) -> Iterator[Any]:
        yield from ds.to_batches(columns=columns)

    def set_epoch(self, epoch: int) -> None:
        next(iter([]))


def numbers(batch: Any, **options: Any) -> torch.Tensor:
    return torch.tensor(batch["number"].to_pylist())


MAKES: dict[str, Callable[[str], Any]] = {
    "tokenizer": lambda uri: LanceDataset(
        uri, 8, columns=["prompt"], transforms={"prompt": Text(Stops(lambda texts: [[1]] * len(texts)))}
    ),
    "tokenizer of the first batch": lambda uri: LanceDataset(
        uri, 8, columns=["prompt"], transforms={"prompt": Text(Stops(lambda texts: [[1]] * len(texts), 0))}
    ),
    "to_tensor_fn": lambda uri: LanceDataset(uri, 8, columns=["number"], to_tensor_fn=Stops(numbers)),
    "decoder": lambda uri: LanceDataset(uri, 8, columns=["image"], transforms={"image": Image(8)}, decoder=Decodes()),
    "sampler in its loop": lambda uri: LanceDataset(uri, 8, columns=["number"], sampler=Reads()),
    "sampler when it is called": lambda uri: LanceDataset(uri, 8, columns=["number"], sampler=Refuses()),
    "sampler at the end of the epoch": lambda uri: LanceDataset(uri, 8, columns=["number"], sampler=Epochs()),
    "sampler that plans": lambda uri: LanceDataset(uri, 8, columns=["number"], sampler=Cuts()),
}


@pytest.mark.parametrize("where", MAKES)
def test_a_function_that_stops_ends_the_loop_with_an_error(photos: str, where: str) -> None:
    batches = iter(MAKES[where](photos))
    with pytest.raises(RuntimeError, match="StopIteration") as caught:
        list(batches)
    assert isinstance(caught.value.__cause__, StopIteration)


def test_the_error_says_where_and_comes_after_the_batches_before(photos: str) -> None:
    def tokenizer(texts: list[str]) -> Any:
        return next(iter([])) if texts[0].startswith("16 ") else [[1]] * len(texts)

    dataset = LanceDataset(photos, 8, columns=["prompt"], transforms={"prompt": Text(tokenizer)})
    batches = iter(dataset)
    assert next(batches).rows.tolist() == list(range(8))
    assert next(batches).step == 1
    with pytest.raises(RuntimeError, match="Expected a result in gpuload's read stage, got StopIteration"):
        next(batches)
    assert list(batches) == []


@pytest.mark.parametrize("batch_size", [1, None])
def test_a_collate_fn_that_stops_ends_the_loop_with_an_error(photos: str, batch_size: int | None) -> None:
    with LanceDataset(photos, 8, columns=["number"]) as dataset:
        loader = DataLoader(dataset, batch_size, collate_fn=Stops(lambda batches: batches))
        with pytest.raises(RuntimeError, match="Expected a result in collate_fn, got StopIteration"):
            list(loader)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_passes_the_error_on(photos: str, quick: Any, workers: int) -> None:
    loader = DataLoader(
        LanceDataset(photos, 8, columns=["number"]), collate_fn=stop, num_workers=workers,
        multiprocessing_context=quick,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="Expected a result in collate_fn, got StopIteration"):
        list(loader)


def stop(batches: list[Any]) -> Any:
    return next(iter([]))


def test_a_collate_fn_is_called_as_before(photos: str) -> None:
    dataset = LanceDataset(photos, 8, columns=["number"])
    loader = DataLoader(dataset, collate_fn=lambda batches: [batch["number"].sum().item() for batch in batches])
    assert list(loader) == [[batch["number"].sum().item()] for batch in dataset]


@given(st.integers(0, 9), st.integers(1, 4), st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_a_stage_gives_what_was_before_and_then_the_error(at: int, threads: int, ahead: int) -> None:
    def work(item: int) -> int:
        if item == at:
            next(iter([]))
        return item

    stage = ordered_map(work, range(10), threads=threads, ahead=ahead, name="test")
    assert [next(stage) for _ in range(at)] == list(range(at))
    with pytest.raises(RuntimeError, match="gpuload's test stage"):
        next(stage)
