"""`LanceDataset`'s words: every keyword enters, checked once; nothing here changes afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpuload.device import choose_device
from gpuload.errors import ConfigError, expect, expect_counts, expect_int, is_one_of
from gpuload.fields.choose import Transform
from gpuload.images.decode.choose import check_decoder
from gpuload.images.transform import Image
from gpuload.order.buckets import Buckets, bucket_sampler
from gpuload.order.choose import BLOCK, expect_alone, expect_planned, make_sampler
from gpuload.order.mix import mix_sampler
from gpuload.order.ranks import Ranks
from gpuload.order.samplers import PlanSampler
from gpuload.order.split import make_split
from gpuload.pipeline import ON_ERROR
from gpuload.tables.lance import LanceTable
from gpuload.tables.mix import Mix, MixTable, own_options
from gpuload.tables.versions import OneVersion

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
    split: tuple[float, float] | None
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
    transforms: Mapping[str, Transform]
    after: Sequence[Callable[..., Any]]
    device: str | torch.device
    decoder: Any
    on_error: str
    drop_last: bool
    shuffle: bool | str
    seed: int
    num_threads: int | None
    max_pixels: int
    readahead_bytes: int | None
    buckets: Buckets | None

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("batch_size", "batch_readahead", "max_pixels")}
        threads = 1 if self.num_threads is None else self.num_threads
        ahead = 1 if self.readahead_bytes is None else self.readahead_bytes
        expect_counts(**counts, readahead_bytes=ahead, num_threads=threads)
        expect_counts(least=0, samples=self.samples)
        expect_int(seed=self.seed)
        if not is_one_of(self.on_error, ON_ERROR):
            raise ConfigError(f"Expected on_error as one of {ON_ERROR}, got {self.on_error!r}.")
        if not isinstance(self.transforms, Mapping):
            raise ConfigError(
                f"Expected transforms as a dict of column to Image, Text, Boxes or Mask, got {self.transforms!r}."
            )
        object.__setattr__(self, "transforms", dict(self.transforms))  # the user's own may change
        if not isinstance(self.after, (tuple, list)) or not all(map(callable, self.after)):
            raise ConfigError(f"Expected after as a list of callables (batch, draws) → batch, got {self.after!r}.")
        object.__setattr__(self, "after", tuple(self.after))
        if self.after and self.to_tensor_fn is not NOT_GIVEN:
            raise ConfigError(f"Expected after or to_tensor_fn, got both: {self.after!r} takes gpuload's batches.")
        if not isinstance(self.filter, (str, type(None))):
            raise ConfigError(f"Expected filter as an SQL condition, got {self.filter!r}.")
        if self.to_tensor_fn is not NOT_GIVEN and self.to_tensor_fn is not None and not callable(self.to_tensor_fn):
            raise ConfigError(f"Expected to_tensor_fn as a function or None, got {self.to_tensor_fn!r}.")
        if not is_one_of(self.device, ["auto"]):
            choose_device(self.device)
        check_decoder(self.decoder, self.device)
        wish = self.dataset_options
        expect(isinstance(wish, (Mapping, type(None))), "dataset_options as a dict of keywords of lance.dataset", wish)
        expect(isinstance(self.cache, (str, Path, bool, type(None))), "cache as True, False or a folder", self.cache)
        for name in ("dataset", "cache"):
            if isinstance(place := getattr(self, name), (str, Path)):
                object.__setattr__(self, name, type(place)(os.path.expanduser(place)))
        folder = isinstance(self.cache, Path) or (isinstance(self.cache, str) and self.cache != "")
        expect(not folder or os.path.isdir(str(self.cache)), "cache as a folder that exists", self.cache)
        self._expect_used()
        self._check_buckets()
        ranks = {"rank": self.rank, "world_size": self.world_size, "shard_granularity": self.shard_granularity}
        expect_alone(self.sampler, self.shuffle, **ranks)
        sampler = self.choose_sampler(self.ranks())
        for name in ("samples", "cache", "drop_last"):
            if getattr(self, name) and not isinstance(sampler, PlanSampler):
                raise ConfigError(
                    f"Expected a gpuload sampler beside {name}, got {name}={getattr(self, name)!r} and {sampler!r}, "
                    "which reads by itself."
                )
        object.__setattr__(self, "split", make_split(self.split))
        expect_planned(sampler, split=self.split)

    def _expect_used(self) -> None:
        """Raise `ConfigError` for a word that another leaves without effect, and for one that is no bool."""
        for name in ("with_row_id", "with_row_address", "auto_detect_rank", "drop_last"):
            if not isinstance(value := getattr(self, name), (bool, np.bool_)):
                raise ConfigError(f"Expected {name} as True or False, got {value!r}.")
        places = self.dataset.places() if isinstance(self.dataset, Mix) else [self.dataset]
        if self.dataset_options and not any(isinstance(place, (str, Path)) for place in places):
            raise ConfigError(
                f"Expected dataset_options beside a URI or a path, got {dict(self.dataset_options)!r} beside an opened "
                "dataset. Open it with them."
            )
        if isinstance(self.dataset, Mix) and "version" in (self.dataset_options or {}):
            raise ConfigError(
                f"Expected the version of each source in the Mix, got dataset_options={self.dataset_options!r}."
            )
        cuda = str(self.device).startswith("cuda")
        if self.to_tensor_fn is not NOT_GIVEN:
            given = {
                "transforms": bool(self.transforms), "decoder": self.decoder != "auto", "device": cuda,
                "on_error": self.on_error != "raise",
            }  # fmt: skip
            for name in (name for name, wanted in given.items() if wanted):
                raise ConfigError(
                    f"Expected {name} or to_tensor_fn, got both: {name}={getattr(self, name)!r}. What to_tensor_fn is "
                    "called with is what Lance read; it converts, decodes and moves that itself."
                )
        fast = next((name for name, one in self.transforms.items() if getattr(one, "fast", False)), None)
        if fast is not None and (self.decoder not in ("auto", "cpu") or choose_device(self.device).type == "cuda"):
            raise ConfigError(
                f"Expected Image(fast=True) with decoder='cpu' and device='cpu', got it for column {fast!r} with "
                f"decoder={self.decoder!r} and device={self.device!r}, where nothing is decoded to a smaller size."
            )

    def _check_buckets(self) -> None:
        sized = [name for name, wish in self.transforms.items() if isinstance(wish, Image) and wish.size == "bucket"]
        if self.buckets is None and sized:
            raise ConfigError(f'Expected buckets=Buckets(...) beside Image("bucket") of {sized[0]!r}, got none.')
        if self.buckets is not None and not isinstance(self.buckets, Buckets):
            raise ConfigError(f"Expected buckets as a gpuload.Buckets, got {self.buckets!r}.")
        if self.buckets is not None and isinstance(self.dataset, Mix):
            raise ConfigError("Expected Mix or buckets, got both: batches of one size are not in the turns of a mix.")

    def ranks(self) -> Ranks:
        """Where rank and world size come from."""
        return Ranks(self.rank, self.world_size, self.auto_detect_rank)

    def choose_sampler(self, ranks: Ranks) -> Any:
        """The sampler with its rank and world size of now: a process group may be initialised late."""
        words = (self.sampler, self.shuffle, self.shard_granularity)
        if self.buckets is not None:
            return bucket_sampler(self.buckets, *words, self.max_pixels, ranks, self.seed)
        if isinstance(self.dataset, Mix):
            return mix_sampler(self.dataset, *words, self.samples, ranks, self.seed, BLOCK)
        return make_sampler(*words, ranks, self.seed)

    def versions(self) -> dict[str, OneVersion]:
        """Which version each of the sources has on all ranks; of one dataset under the name ""."""
        options, words = self.dataset_options or {}, self.in_common()
        if not isinstance(self.dataset, Mix):
            return {"": OneVersion(self.dataset, options, words)}
        return {
            name: OneVersion(source["uri"], {**options, **own_options(source)}, {**words, "source": name})
            for name, source in self.dataset.sources.items()
        }

    def open(self, opened: Mapping[str, Any]) -> LanceTable | MixTable:
        """The rows of what was opened by the names of `versions`."""
        if isinstance(self.dataset, Mix):
            return MixTable(self.dataset, opened, **self.table())
        return LanceTable(opened[""], **self.table())

    def in_common(self) -> dict[str, Any]:
        """What is the same on all ranks that read this dataset together."""
        sampler = None if self.sampler is None else type(self.sampler).__name__
        words = ("batch_size", "columns", "samples", "shuffle", "shard_granularity", "seed", "drop_last")
        return {"sampler": sampler, **{word: getattr(self, word) for word in words}}

    def table(self) -> dict[str, Any]:
        """The keywords of the table."""
        return {
            "columns": self.columns,
            "filter": self.filter,
            "samples": self.samples,
            "split": self.split,
            "seed": self.seed,
            "with_row_id": self.with_row_id,
            "with_row_address": self.with_row_address,
            "options": self.dataset_options,
            "open_blobs": self.to_tensor_fn is not NOT_GIVEN,
        }
