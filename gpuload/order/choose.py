"""`LanceDataset`'s words enter, the sampler they mean leaves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from gpuload.errors import ConfigError, is_one_of
from gpuload.order.ranks import Ranks
from gpuload.order.samplers import (
    FullScanSampler,
    PlanSampler,
    ShardedBatchSampler,
    ShardedFragmentSampler,
    ShuffleSampler,
)
from gpuload.tables.lance import LanceBatches, LanceFragments, LanceFullScan, LanceSampler

BLOCK = 16  # rows; LanceDataset(shuffle="block"): 1.4 times the rate of single rows (benchmarks/results/read-2.2.json)


def make_sampler(given: Any, shuffle: bool | str, granularity: str | None, ranks: Ranks, seed: int) -> Any:
    """The sampler that the words ask for, with the rank and world size of now; Lance's own become their equals here.

    Raises
    ------
    ConfigError
        Keywords that contradict each other, or words that are not known.
    """
    if not is_one_of(shuffle, (False, True, "row", "block", "batch")):
        raise ConfigError(f'Expected shuffle=False, True, "row", "block" or "batch", got {shuffle!r}.')
    if not is_one_of(granularity, (None, "fragment", "batch")):
        raise ConfigError(f'Expected shard_granularity=None, "fragment" or "batch", got {granularity!r}.')
    if given is not None:
        sampler = _adopt(given)
        return sampler.placed(ranks) if isinstance(sampler, PlanSampler) else sampler
    place = ranks.resolve()
    if shuffle in (True, "row", "block"):
        if granularity == "fragment":
            raise ConfigError(
                f'Expected shuffle="batch" or False beside shard_granularity="fragment", got {shuffle!r}.'
            )
        return ShuffleSampler(*place, seed, BLOCK if shuffle == "block" else 1)
    kind = ShardedFragmentSampler if granularity == "fragment" else ShardedBatchSampler
    return kind(*place, randomize=shuffle == "batch", seed=seed)


def expect_alone(given: Any, shuffle: object, **words: object) -> None:
    """Raise `ConfigError` where a sampler was given beside words that it would leave without effect."""
    if given is None:
        return
    if shuffle:
        raise ConfigError(f"Expected shuffle or sampler, got both: shuffle={shuffle!r}, sampler={given!r}.")
    for name, value in words.items():
        if value is not None:
            raise ConfigError(
                f"Expected {name} or sampler, got both: {name}={value!r}, sampler={given!r}. A sampler decides that "
                "itself: give it rank and world_size, or neither, and it takes those of the process."
            )


def expect_planned(sampler: Any, **words: object) -> None:
    """Raise `ConfigError` where a sampler that reads by itself is beside words that choose rows."""
    if isinstance(sampler, PlanSampler):
        return
    for name, value in words.items():
        if value is not None:
            raise ConfigError(
                f"Expected {name} beside a gpuload sampler, got {name}={value!r} beside {sampler!r}, which reads the "
                f"dataset by itself. Leave {name} out and choose the rows there."
            )


def telling(sampler: Any, epoch: int, tell: Callable[[int], None]) -> Any:
    """A copy of `sampler` in `epoch` whose `set_epoch` is `tell`: frameworks call ``loader.sampler.set_epoch``."""
    found = copy.copy(sampler)
    if isinstance(found, PlanSampler):
        found.set_epoch(epoch)
    found.set_epoch = tell
    return found


def _adopt(sampler: Any) -> Any:
    """Lance's stock samplers, exactly those, become ours: the same rows, with equal ranks, a length and a state."""
    if isinstance(sampler, PlanSampler):
        return sampler
    if type(sampler) is LanceFullScan:
        return FullScanSampler()
    for stock, ours in ((LanceFragments, ShardedFragmentSampler), (LanceBatches, ShardedBatchSampler)):
        if type(sampler) is stock:
            return ours(sampler._rank, sampler._world_size, sampler._randomize, sampler._seed)
    if not isinstance(sampler, LanceSampler):
        raise ConfigError(
            f"Expected sampler as a gpuload or lance.sampler.Sampler, got {type(sampler).__name__}. "
            "Subclass lance.sampler.Sampler and yield RecordBatches."
        )
    return sampler
