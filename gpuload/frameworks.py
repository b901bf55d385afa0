"""What other people's loops look for in a loader, and what they are told where a `LanceDataset` has no such thing.

They do not say who they are, and some take a wrong answer without a word; but they are on the stack.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from gpuload.errors import ConfigError, stopped

_DEPTH = 16  # frames from a loader's loop down to iter(dataset)
_FRAMEWORKS = ("accelerate.", "transformers.")
_OWN = (
    "Leave it out of accelerator.prepare(DataLoader(...)); in a transformers.Trainer return it from "
    "get_train_dataloader(), get_eval_dataloader() or get_test_dataloader(). See the README."
)
NO_ROWS = (
    "LanceDataset yields whole batches in order and has no single rows. For train and validation open it twice: "
    "LanceDataset(..., split=(0.0, 0.9)) and LanceDataset(..., split=(0.9, 1.0)), in place of random_split and Subset. "
    "A first batch is next(iter(dataset)); a row by its position is dataset.dataset.take([row])."
)


def check_wrappers(world_size: int) -> None:
    """Raise if the loop that has just called ``iter(dataset)`` would divide its batches again, or join them.

    Accelerate, and transformers with it, wrap a loader of any IterableDataset: ``DataLoaderDispatcher`` reads on rank
    0 alone and cuts its batches up, ``IterableDatasetShard`` keeps every n-th batch of what is this rank's already.
    A `DataLoader` with a batch size makes batches of batches, with a ``collate_fn`` of its own even without an error;
    a StopIteration of such a function is made an error.

    Raises
    ------
    ConfigError
    """
    for frame in _callers(_DEPTH):
        module = frame.f_globals.get("__name__", "")
        if module == "torch.utils.data.dataloader":
            batch_size = getattr(frame.f_locals.get("loader"), "batch_size", None)
            if isinstance(batch_size, int) and batch_size > 1:
                raise ConfigError(batches_of_batches(batch_size))
        if module == "torch.utils.data._utils.fetch":
            _guard_collate(frame.f_locals.get("self"))
        if not module.startswith(_FRAMEWORKS):
            continue
        wrapper = frame.f_locals.get("self")
        kind = getattr(type(wrapper), "__name__", "")
        ranks = getattr(wrapper, "num_processes", 1)
        if kind == "DataLoaderDispatcher" or (kind == "IterableDatasetShard" and ranks > 1 and world_size > 1):
            what = "read on rank 0 and cut up" if kind == "DataLoaderDispatcher" else f"divided by {ranks} once more"
            raise ConfigError(
                f"Expected LanceDataset as the loader itself, got it inside {kind}: its batches, which are this rank's "
                f"own, would be {what}. {_OWN}"
            )


def _guard_collate(fetcher: Any) -> None:
    """A StopIteration of the user's ``collate_fn`` ends a DataLoader's epoch as if there were no more batches."""
    collate = getattr(fetcher, "collate_fn", None)
    if callable(collate) and not getattr(collate, "__module__", "").startswith("torch."):
        fetcher.collate_fn = functools.partial(_guarded, collate)


def _guarded(collate: Callable[[Any], Any], batches: Any) -> Any:
    try:
        return collate(batches)
    except StopIteration as error:
        raise stopped("collate_fn") from error


def batches_of_batches(batch_size: int | None = None) -> str:
    """What is said where a DataLoader joins batches; `batch_size` is its own, if that is known."""
    got = "a batch size" if batch_size is None else f"batch_size={batch_size}"
    return (
        f"Expected DataLoader(dataset) or DataLoader(dataset, batch_size=None), got {got}: "
        "LanceDataset yields whole batches. Give the number of rows to LanceDataset(..., batch_size=...), and the "
        f"dataset itself to a framework as the loader. {_OWN}"
    )


def check_skip() -> None:
    """Raise if Accelerate is about to skip the first batches, and transformers, which resumes by it: it would build a
    DataLoader on top of the rows that are stored.

    Raises
    ------
    ConfigError
    """
    if _called_by("skip_first_batches", "accelerate."):
        raise ConfigError(
            "Expected a saved place, got skip_first_batches on a LanceDataset, which reads and decodes no batch in "
            "order to skip it. Save dataset.state_dict() in the checkpoint and give it to dataset.load_state_dict() "
            "before the loop; in a transformers.Trainer set ignore_data_skip=True beside it. See the README."
        )


def check_random_split() -> None:
    """Raise if ``random_split`` asks for the length, which is a number of batches.

    Raises
    ------
    ConfigError
    """
    if _called_by("random_split", "torch."):
        raise ConfigError(f"Expected split=(lo, hi), got random_split. {NO_ROWS}")


def overfits(random: bool) -> bool:
    """Whether Lightning asks if batches come in order, because of ``overfit_batches``; it replaces samplers that do
    not, in a `DataLoader`. `random` is whether each epoch has an order of its own.

    Raises
    ------
    ConfigError
        It asks, and they do not come in order.
    """
    asked = _called_by("_resolve_overfit_batches", "lightning.", "pytorch_lightning.")
    if asked and random:
        raise ConfigError(
            "Expected the same batches in every epoch for overfit_batches, got a LanceDataset that shuffles. Open it "
            "with shuffle=False."
        )
    return asked


def _called_by(function: str, *packages: str) -> bool:
    """Whether a function of this name asks, at most three frames up."""
    return any(
        frame.f_code.co_name == function and frame.f_globals.get("__name__", "").startswith(packages)
        for frame in _callers(3)
    )


def _callers(depth: int) -> Iterator[FrameType]:
    """The frames above the property or method of the dataset that asks, the nearest first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith("gpuload."):
        frame = frame.f_back
    while frame is not None and depth > 0:
        yield frame
        frame, depth = frame.f_back, depth - 1
