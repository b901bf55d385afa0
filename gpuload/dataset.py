"""The line, wired: `LanceDataset` takes the user's words, opens, plans, and yields batches."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import IterableDataset

from gpuload.batch import Batch
from gpuload.clock import Clock, bottleneck, clocks
from gpuload.device import calls_at_once, check_words, choose_device, describe, make_decoder, threads_here
from gpuload.errors import ConfigError, expect_counts
from gpuload.fields.schema import Column, resolve
from gpuload.fields.text import Tokens
from gpuload.images import resize
from gpuload.images.decode import Decoder
from gpuload.images.decode.cpu import MAX_PIXELS
from gpuload.images.transform import Image, Text
from gpuload.order import state
from gpuload.order.epochs import Epochs
from gpuload.order.foreign import raw_batches
from gpuload.order.ranks import Ranks
from gpuload.pipeline import ON_ERROR, READ_THREADS, Pipeline
from gpuload.tables.fork import check_fork, lance_running
from gpuload.tables.lance import LanceTable

_DEFAULT: Any = ...  # to_tensor_fn was not given; a singleton also after pickling


class LanceDataset(IterableDataset[Batch]):
    """Batches of a Lance dataset: images decoded, texts tokenized, on the device, in a reproducible order.

    Takes every keyword of ``lance.torch.data.LanceDataset`` with its meaning. The dataset is opened at once where
    Lance is already in use in this process, otherwise on first need, so that a DataLoader may still fork.

    Parameters
    ----------
    dataset : str, Path or lance.LanceDataset
        URI, path, or an opened dataset, which pins its version.
    batch_size : int
        Rows of every batch but the last of an epoch.
    columns : list of str or dict of str to str, optional
        Names, or output name → SQL expression. All columns by default.
    filter : str, optional
        SQL condition, resolved once; works with every sampler.
    samples : int, optional
        Use this many rows, drawn once with `seed`.
    cache : str, Path or bool, optional
        Copy the selected rows to a temporary folder (in this folder) at first use, and read from there.
    with_row_id, with_row_address : bool
        Add Lance's ``_rowid``, ``_rowaddr`` as columns.
    rank, world_size : int, optional
        This process among all. By default from torch.distributed, else from torchrun's environment.
    shard_granularity : {"fragment", "batch"}, optional
        What ranks divide without a `sampler`: batches (the default, always equal) or whole fragments.
    batch_readahead : int
        Batches prepared ahead of the training loop; memory is bounded by it.
    readahead_bytes : int
        And by this: as many batches as it holds of the largest so far, encoded and decoded, but at least one.
    to_tensor_fn : callable or None, optional
        Called with each RecordBatch instead of gpuload's conversion; None yields the RecordBatches.
    sampler : lance.sampler.Sampler, optional
        One of gpuload's or Lance's, or your own.
    auto_detect_rank : bool
    dataset_options : dict, optional
        Keywords of ``lance.dataset``: version, storage_options, ...
    transforms : dict of str to Image or Text, optional
    device : str or torch.device
        ``"auto"`` is CUDA where there is a GPU.
    decoder : {"auto", "cpu", "nvimgcodec", "dali"}
        ``"auto"`` is nvImageCodec on CUDA, simplejpeg and Pillow on the CPU. ``"cpu"`` decodes on the host for either.
        ``"nvimgcodec:parity"`` and ``"dali:parity"`` are slower and closest to the CPU's pixels.
    on_error : {"raise", "skip", "mask"}
        A row that cannot be decoded: stop with its place, leave it out, or keep zeros with ``valid=False``.
    drop_last : bool
        Leave out the rows that do not fill a batch on every rank.
    shuffle : bool or {"row", "block", "batch"}
        True is "row". Change the order with `set_epoch`, as with torch's DistributedSampler.
    seed : int
        Of the order, the sample, the crops and the flips.
    num_threads : int, optional
        Threads that decode, or host threads of the GPU's decoder; the cores this process may use by default.
    max_pixels : int
        Images with more are errors, judged by their header.

    Raises
    ------
    ConfigError, DeviceError, ForkError
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *args: Any,
        dataset_options: dict[str, Any] | None = None,
        columns: Sequence[str] | dict[str, str] | None = None,
        filter: str | None = None,
        samples: int | None = 0,
        cache: str | Path | bool | None = None,
        with_row_id: bool = False,
        with_row_address: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        shard_granularity: Literal["fragment", "batch"] | None = None,
        batch_readahead: int = 4,
        to_tensor_fn: Callable[..., Any] | None = _DEFAULT,
        sampler: Any = None,
        auto_detect_rank: bool = True,
        transforms: Mapping[str, Image | Text] | None = None,
        device: str | torch.device = "auto",
        decoder: str = "auto",
        on_error: Literal["raise", "skip", "mask"] = "raise",
        drop_last: bool = False,
        shuffle: bool | Literal["row", "block", "batch"] = False,
        seed: int = 0,
        num_threads: int | None = None,
        max_pixels: int = MAX_PIXELS,
        readahead_bytes: int = 1 << 30,
    ) -> None:
        super().__init__()
        expect_counts(batch_size=batch_size, batch_readahead=batch_readahead, max_pixels=max_pixels)
        expect_counts(readahead_bytes=readahead_bytes, num_threads=1 if num_threads is None else num_threads)
        expect_counts(least=0, samples=samples or 0)
        if on_error not in ON_ERROR:
            raise ConfigError(f"Expected on_error as one of {ON_ERROR}, got {on_error!r}.")
        if not isinstance(transforms or {}, Mapping):
            raise ConfigError(f"Expected transforms as a dict of column to Image or Text, got {transforms!r}.")
        if to_tensor_fn not in (_DEFAULT, None) and not callable(to_tensor_fn):
            raise ConfigError(f"Expected to_tensor_fn as a function or None, got {to_tensor_fn!r}.")
        check_words(device, decoder)
        self.batch_size, self.batch_readahead, self.on_error = batch_size, batch_readahead, on_error
        self.drop_last, self.seed, self.max_pixels, self.num_threads = drop_last, seed, max_pixels, num_threads
        self.readahead_bytes = readahead_bytes
        self.transforms = dict(transforms or {})
        self._dataset, self._cache = dataset, cache
        self._projection: dict[str, Any] = {
            "columns": columns,
            "filter": filter,
            "samples": samples or 0,
            "seed": seed,
            "with_row_id": with_row_id,
            "with_row_address": with_row_address,
            "options": dataset_options,
        }
        self._to_tensor_fn = to_tensor_fn
        self._epochs = Epochs(
            sampler, shuffle, shard_granularity, Ranks(rank, world_size, auto_detect_rank),
            seed=seed, batch_size=batch_size, projection=self._projection,
        )  # fmt: skip
        self._device, self._decoder_name = device, decoder
        self._source: LanceTable | None = None
        self._decoder: Decoder | None = None
        self._reset()
        if lance_running() or not isinstance(dataset, (str, Path)):
            self._open()
        elif "://" not in str(dataset) and not os.path.exists(dataset):
            raise ConfigError(f"Expected a Lance dataset at {str(dataset)!r}, got no such folder.")

    def __iter__(self) -> Iterator[Any]:
        """This rank's batches of the current epoch, from the start or from where a loaded state says."""
        check_fork()
        running = self._run(self._epochs.begin())
        self._running.add(running)
        _in_use.add(self)
        return running

    def __len__(self) -> int:
        """Batches of this rank's epoch, the same on every rank."""
        return len(self._epochs.plan(self._open(), self.drop_last))

    def __repr__(self) -> str:
        source = self._open()
        columns = ", ".join(f"{column.name}: {column.form}" for column in self._columns)
        return (
            f"LanceDataset({source.uri!r}, version={source.version}, rows={source.rows}, "
            f"batch_size={self.batch_size}, sampler={self.sampler!r}, device={describe(self.device)!r}, "
            f"decoder={self._decode_with().name!r}, resize={resize.implementation(self.device)!r}, "
            f"columns={{{columns}}})"
        )

    @property
    def schema(self) -> Any:
        """Arrow schema of the columns that are read."""
        return self._open().schema

    @property
    def dataset(self) -> Any:
        """The opened ``lance.LanceDataset``."""
        return self._open().lance

    @property
    def device(self) -> torch.device:
        """Where the batches are."""
        return choose_device(self._device)

    @property
    def sampler(self) -> Any:
        """The sampler in use, with the rank and world size of now."""
        return self._epochs.sampler

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration yields: other order, crops and flips. Keeps a place loaded in it."""
        self._epochs.set(int(epoch))

    def state_dict(self) -> dict[str, Any]:
        """The place after the last batch that the loop took: a few scalars, ready for JSON.

        Raises
        ------
        StateError
            DataLoader workers do the reading: use torchdata's StatefulDataLoader, or ``num_workers=0``.
        TypeError
            The sampler is a foreign one.
        """
        return self._epochs.save(self._open())

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue with the batch after the saved one, at the next iteration.

        Raises
        ------
        StateError
            It belongs to other rows or another order: names the field and both values.
        """
        self._epochs.load(saved, self._open())

    def stats(self) -> dict[str, Any]:
        """Counts since this object was made: batches, rows, bad rows, images by decoder; figures by stage, and the
        stage that limits the rate, in words."""
        stages = {name: clock.read() for name, clock in self._clocks.items()}
        counted = ("batches", "rows", "rows_skipped", "rows_masked", "nulls", "bytes_read")
        return {
            "device": describe(self.device),
            "decoder": self._decode_with().name,
            "resize": resize.implementation(self.device),
            **{name: self._counts[name] for name in counted},
            "images": self._decode_with().counts(),
            "stages": stages,
            "bottleneck": bottleneck(stages),
        }

    def close(self) -> None:
        """End what still runs and free the decoder. The dataset can be used again."""
        for running in list(self._running):
            running.close()
        if self._decoder is not None:
            self._decoder.close()
            self._decoder = None

    def __enter__(self) -> LanceDataset:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """For a DataLoader worker: the cache filled here; threads and decoders stay behind."""
        self._fill_cache()
        left = ("_columns", "_tokens", "_decoder", "_running", "_clocks", "_counts")
        return {name: value for name, value in self.__dict__.items() if name not in left}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        self.__dict__.update(kept)
        self._reset()

    def _reset(self) -> None:
        self._columns: list[Column] = []
        self._tokens: dict[str, Tokens] = {}
        self._decoder = None
        self._running: weakref.WeakSet[Any] = weakref.WeakSet()
        self._counts: Counter[str] = Counter()
        self._clocks: dict[str, Clock] = clocks(READ_THREADS, self.num_threads or threads_here())

    def _open(self) -> LanceTable:
        """The source, opened and its columns resolved on first use."""
        check_fork()
        if self._source is None:
            self._source = LanceTable(self._dataset, **self._projection)
            if not self._source.rows and self._projection["filter"] is not None:
                warnings.warn(f"No row matches filter={self._projection['filter']!r}.", stacklevel=3)
        if not self._columns:
            self._columns = resolve(self._source.schema, self.transforms, self._source.first_value)
            self._tokens = {c.name: Tokens(c.transform) for c in self._columns if isinstance(c.transform, Text)}
        return self._source

    def _run(self, position: state.Position) -> Iterator[Any]:
        source = self._open()
        self._fill_cache()
        reads = self._epochs.reads(source, self.drop_last, position, self.batch_readahead)
        if self._to_tensor_fn is _DEFAULT:
            decoder = self._decode_with()
            pipeline = Pipeline(
                self._columns, self._tokens, decoder, seed=self.seed, epoch=position.epoch,
                on_error=self.on_error, threads=self._clocks["decode"].threads, ahead=self.batch_readahead,
                ahead_bytes=self.readahead_bytes, counts=self._counts, clocks=self._clocks,
            )  # fmt: skip
            running: Any = pipeline.run(reads)
        else:
            bounds = (self.batch_readahead, self.readahead_bytes)
            running = raw_batches(reads, self._to_tensor_fn, source.hf_converter(), *bounds, self._clocks["read"])
        try:
            for made in running:
                step, batch = (made.step, made) if isinstance(made, Batch) else made
                del made
                position.taken = step + 1 - position.before
                yield batch
                del batch
        finally:
            running.close()

    def _decode_with(self) -> Decoder:
        if self._decoder is None:
            self._open()
            images = any(column.role == "image" for column in self._columns)
            wish = self._decoder_name if images or self._decoder_name != "auto" else "cpu"  # nothing to decode
            device, threads = self.device, self.num_threads or threads_here()
            self._decoder = make_decoder(wish, device, self.max_pixels, threads)
            for name in ("decode", "resize"):
                self._clocks[name].threads = calls_at_once(device, threads)
        return self._decoder

    def _fill_cache(self) -> None:
        """Copy the rows to local storage once, before the first batch, so that an early end leaves it whole."""
        if not self._cache or self._open().cached:
            return
        where = None if self._cache is True else str(self._cache)
        folder = tempfile.mkdtemp(prefix="gpuload-cache-", dir=where)
        Finalize(self, shutil.rmtree, (folder,), {"ignore_errors": True}, exitpriority=0)  # in a worker too
        self._open().use_cache(folder)


_in_use: weakref.WeakSet[LanceDataset] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """End what still runs while the modules that it needs are whole: an open iterator outlives them otherwise."""
    for dataset in list(_in_use):
        dataset.close()
