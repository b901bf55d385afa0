"""`LanceDataset`'s words: every keyword enters, checked once; nothing here changes afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpuload.device import choose_device
from gpuload.errors import ConfigError, expect_counts, expect_int
from gpuload.fields.text import Text
from gpuload.images.decode.choose import check_decoder
from gpuload.images.transform import Image
from gpuload.order.choose import expect_alone, make_sampler
from gpuload.order.ranks import Ranks
from gpuload.pipeline import ON_ERROR

NOT_GIVEN: Any = ...  # to_tensor_fn was not given; a singleton also after pickling


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `LanceDataset` was asked for; see there.

    Raises
    ------
    ConfigError, DeviceError
        A word that is not known, of another type, or against another.
    """

    dataset: Any
    batch_size: int
    dataset_options: Mapping[str, Any] | None
    columns: Sequence[str] | dict[str, str] | None
    filter: str | None
    samples: int
    cache: str | Path | bool | None
    with_row_id: bool
    with_row_address: bool
    rank: int | None
    world_size: int | None
    shard_granularity: str | None
    batch_readahead: int
    to_tensor_fn: Callable[..., Any] | None
    sampler: Any
    auto_detect_rank: bool
    transforms: Mapping[str, Image | Text]
    device: str | torch.device
    decoder: Any
    on_error: str
    drop_last: bool
    shuffle: bool | str
    seed: int
    num_threads: int | None
    max_pixels: int
    readahead_bytes: int

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("batch_size", "batch_readahead", "max_pixels")}
        threads = 1 if self.num_threads is None else self.num_threads
        expect_counts(**counts, readahead_bytes=self.readahead_bytes, num_threads=threads)
        expect_counts(least=0, samples=self.samples)
        expect_int(seed=self.seed)
        if self.on_error not in ON_ERROR:
            raise ConfigError(f"Expected on_error as one of {ON_ERROR}, got {self.on_error!r}.")
        if not isinstance(self.transforms, Mapping):
            raise ConfigError(f"Expected transforms as a dict of column to Image or Text, got {self.transforms!r}.")
        object.__setattr__(self, "transforms", dict(self.transforms))  # the user's own may change
        if not isinstance(self.filter, (str, type(None))):
            raise ConfigError(f"Expected filter as an SQL condition, got {self.filter!r}.")
        if self.to_tensor_fn not in (NOT_GIVEN, None) and not callable(self.to_tensor_fn):
            raise ConfigError(f"Expected to_tensor_fn as a function or None, got {self.to_tensor_fn!r}.")
        if self.device != "auto":
            choose_device(self.device)
        if self.decoder == "nvjpeg" and str(self.device).startswith("cpu"):
            raise ConfigError(
                f"Expected a GPU for decoder='nvjpeg', its JPEG engine, got device={str(self.device)!r}. "
                "decoder='cpu' gives the same pixels on the host."
            )
        check_decoder(self.decoder)
        ranks = {"rank": self.rank, "world_size": self.world_size, "shard_granularity": self.shard_granularity}
        expect_alone(self.sampler, self.shuffle, **ranks)
        self.choose_sampler(self.ranks())

    def ranks(self) -> Ranks:
        """Where rank and world size come from."""
        return Ranks(self.rank, self.world_size, self.auto_detect_rank)

    def choose_sampler(self, ranks: Ranks) -> Any:
        """The sampler with its rank and world size of now: a process group may be initialised late."""
        return make_sampler(self.sampler, self.shuffle, self.shard_granularity, ranks, self.seed)

    def table(self) -> dict[str, Any]:
        """The keywords of the table."""
        return {
            "columns": self.columns,
            "filter": self.filter,
            "samples": self.samples,
            "seed": self.seed,
            "with_row_id": self.with_row_id,
            "with_row_address": self.with_row_address,
            "options": self.dataset_options,
        }
