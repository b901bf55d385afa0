"""The line, wired: `LanceDataset` takes the user's words, opens, plans, and yields batches."""

from __future__ import annotations

import inspect
import os
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.util import Finalize
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NoReturn

import torch
from torch.utils.data import IterableDataset, SequentialSampler

from gpuload import ending
from gpuload.badrows import BadRow, BadRows
from gpuload.batch import Batch
from gpuload.clock import Clock, bottleneck, clocks
from gpuload.device import Streams, choose_device, describe, memory_ahead, threads_here
from gpuload.errors import ConfigError, StateError, expect_epoch
from gpuload.fields import Column, Parts
from gpuload.fields.choose import Transform, fields, resolve
from gpuload.frameworks import NO_ROWS, check_random_split, check_skip, check_wrappers, overfits
from gpuload.images import Decoder, resize
from gpuload.images.decode.choose import calls_at_once, make_decoder, takes_batches
from gpuload.images.decode.host import MAX_PIXELS
from gpuload.iteration import Batches
from gpuload.options import NOT_GIVEN, Options
from gpuload.order import plans
from gpuload.order.buckets import Buckets
from gpuload.order.choose import telling
from gpuload.order.epochs import Epochs
from gpuload.order.foreign import raw_batches
from gpuload.order.state import Position
from gpuload.pipeline import Pipeline, read_threads
from gpuload.tables.cache import make_folder, remove_folder
from gpuload.tables.fork import check_fork, lance_running
from gpuload.tables.lance import LanceTable
from gpuload.tables.mix import Mix, MixTable
from gpuload.tables.versions import OneVersion

_KEYWORD = inspect.Parameter.KEYWORD_ONLY


class LanceDataset(IterableDataset[Batch]):
    """Batches of a Lance dataset: images decoded, texts tokenized, on the device, in a reproducible order.

    Takes every keyword of ``lance.torch.data.LanceDataset`` with its meaning. The dataset is opened at once where
    Lance is already in use in this process, otherwise on first need, so that a DataLoader may still fork.

    Parameters
    ----------
    dataset : str, Path, lance.LanceDataset or Mix
        URI, path, or an opened dataset, which pins its version; or several of them as a `Mix`, always shuffled.
    batch_size : int
        Rows of every batch but the last of an epoch.
    columns : list of str or dict of str to str, optional
        Names, or output name → SQL expression. All columns by default.
    filter : str, optional
        SQL condition, resolved once; works with every sampler.
    samples : int, optional
        Use this many rows, drawn once with `seed`.
    split : (float, float), optional
        ``(lo, hi)``: only the rows whose hashed position lies there, half-open, whatever `seed` is; `filter` and
        `samples` choose among them. ``(0.0, 0.9)`` and ``(0.9, 1.0)`` have no row in common and all of them together,
        and a row stays in its split when others are appended. Where rows before it are deleted its position is
        another: delete first, then split.
    cache : str, Path or bool, optional
        Copy the selected rows to a temporary folder (in this folder) at first use, and read from there.
    with_row_id, with_row_address : bool
        Add Lance's ``_rowid``, ``_rowaddr`` as columns.
    rank, world_size : int, optional
        This process among all. By default from torch.distributed, else from torchrun's environment.
    shard_granularity : {"fragment", "batch"}, optional
        What ranks divide: batches (the default, always equal) or whole fragments.
    batch_readahead : int
        Batches under way at most, from the beginning of their reading until the loop takes them.
    readahead_bytes : int, optional
        And by this. It bounds together the batches under way, encoded and finished, each as large as the largest so
        far, and what is being decoded, by what headers say: what does not fit waits. Beyond it are allowed one batch,
        and one image, which is decoded alone. 1 GiB by default; on a GPU a twelfth of its memory where that is more.
    to_tensor_fn : callable or None, optional
        Called with each RecordBatch instead of gpuload's conversion, and ``hf_converter=``, ``use_blob_api=``; None
        yields the RecordBatches. With columns of blobs each is a dict: Arrow arrays, ``_rowid``, and lists of
        ``lance.BlobFile``, with ``use_blob_api=True``.
    sampler : lance.sampler.Sampler, optional
        One of gpuload's or Lance's, or your own; instead of `shuffle`, `shard_granularity`, `rank` and `world_size`.
        One without rank and world size takes those of the process.
    auto_detect_rank : bool
    dataset_options : dict, optional
        Keywords of ``lance.dataset``: version, storage_options, ...
    transforms : dict of str to Image, Text, Boxes, Mask or bytes, optional
        What a column becomes. `Image` says that it is one of images; `bytes` leaves files as they are. Without it a
        binary column is one of images if it is declared so, or if any of the values looked at starts like one.
    after : sequence of callable, optional
        What mixes the rows of a finished batch, in this order: `gpuload.augment.MixUp`, `CutMix`, or your own,
        ``(batch, draws) → batch``, on the batch's stream. ``draws.uniform("name", n)`` is f64[B, n], on the host.
    device : str or torch.device
        ``"auto"`` is CUDA where there is a GPU.
    decoder : {"auto", "cpu", "nvjpeg", "nvimgcodec", "dali"} or Decoder
        ``"auto"`` is nvJPEG on a GPU with JPEG engines, nvImageCodec on another, libjpeg-turbo and Pillow on the CPU.
        ``"cpu"`` decodes on the host for either. ``"nvjpeg"`` gives the CPU's pixels; threads to spare decode a fixed
        share of its JPEG files, with ``"nvjpeg:alone"`` none.
        ``"nvimgcodec:parity"`` and ``"dali:parity"`` are slower and closest to the CPU's pixels. Or an object of your
        own with the members of `gpuload.Decoder`.
    on_error : {"raise", "skip", "mask", "replace"}
        A row that cannot be decoded: stop with its place; leave it out, and its batch where nothing else is in it,
        which is an error where other ranks wait for that batch; keep zeros with ``valid=False``; or the columns of the
        next good row of its batch (around the end, zeros where there is none) with ``valid=False``. The first is a
        `BadRowWarning`, and `bad_rows` lists them.
    drop_last : bool
        Leave out the rows that do not fill a batch on every rank.
    shuffle : bool or {"row", "block", "batch"}
        True is "row". Each epoch has an order of its own; `set_epoch` says which epoch comes next.
    seed : int
        Of the order, the sample, the crops and the flips.
    num_threads : int, optional
        Threads that decode, or host threads of the GPU's decoder; the cores this process may use by default.
    max_pixels : int
        Images with more are errors, judged by their header.
    buckets : Buckets, optional
        Batches whose images share a size, that of ``Image("bucket")``; instead of `sampler`.

    Raises
    ------
    ConfigError, DeviceError, ForkError
    """

    _formats: tuple[str, ...] = ()  # kinds of images that stay encoded

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *args: Any,
        dataset_options: dict[str, Any] | None = None,
        columns: Sequence[str] | dict[str, str] | None = None,
        filter: str | None = None,
        samples: int | None = 0,
        split: tuple[float, float] | None = None,
        cache: str | Path | bool | None = None,
        with_row_id: bool = False,
        with_row_address: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        shard_granularity: Literal["fragment", "batch"] | None = None,
        batch_readahead: int = 4,
        to_tensor_fn: Callable[..., Any] | None = NOT_GIVEN,
        sampler: Any = None,
        auto_detect_rank: bool = True,
        transforms: Mapping[str, Transform] | None = None,
        after: Sequence[Callable[..., Batch]] = (),
        device: str | torch.device = "auto",
        decoder: str | Decoder = "auto",
        on_error: Literal["raise", "skip", "mask", "replace"] = "raise",
        drop_last: bool = False,
        shuffle: bool | Literal["row", "block", "batch"] = False,
        seed: int = 0,
        num_threads: int | None = None,
        max_pixels: int = MAX_PIXELS,
        readahead_bytes: int | None = None,
        buckets: Buckets | None = None,
    ) -> None:
        super().__init__()
        if args:
            names = [name for name, word in inspect.signature(LanceDataset).parameters.items() if word.kind is _KEYWORD]
            raise ConfigError(
                f"Expected keywords after batch_size, got {', '.join(map(repr, args))} by position. "
                f"Name it: {', '.join(f'{name}=' for name in names)}."
            )
        self._options = Options(
            dataset=dataset,
            batch_size=batch_size,
            dataset_options=dataset_options,
            columns=columns,
            filter=filter,
            samples=0 if samples is None else samples,
            split=split,
            cache=cache,
            with_row_id=with_row_id,
            with_row_address=with_row_address,
            rank=rank,
            world_size=world_size,
            shard_granularity=shard_granularity,
            batch_readahead=batch_readahead,
            to_tensor_fn=to_tensor_fn,
            sampler=sampler,
            auto_detect_rank=auto_detect_rank,
            transforms={} if transforms is None else transforms,
            after=after,
            device=device,
            decoder=decoder,
            on_error=on_error,
            drop_last=drop_last,
            shuffle=shuffle,
            seed=seed,
            num_threads=num_threads,
            max_pixels=max_pixels,
            readahead_bytes=readahead_bytes,
            buckets=buckets,
        )
        self._ranks, self._epochs = self._options.ranks(), Epochs(sampler)
        self._versions = self._options.versions()
        self._source: LanceTable | MixTable | None = None
        self._read: dict[str, int] = {}  # version of each source that was opened
        self._decoder: Decoder | None = None
        self._begun: list[weakref.ref[Batches]] = []
        self._images: dict[str, int] = {}  # decoded by decoders that were closed
        self._before: dict[str, int] = {}  # by the present one, before it was taken
        self._reset()
        dataset = self._options.dataset
        places = dataset.places() if isinstance(dataset, Mix) else [dataset]
        if lance_running() or not all(isinstance(place, (str, Path)) for place in places):
            self._open()
            return
        for place in places:
            if "://" not in str(place) and not os.path.exists(place):
                raise ConfigError(f"Expected a Lance dataset at {str(place)!r}, got no such folder.")

    def __iter__(self) -> Batches:
        """This rank's batches of the current epoch, from the start or from where a loaded state says."""
        check_fork()
        sampler = self._sampler()
        check_wrappers(getattr(sampler, "world_size", 1))
        running = Batches(self._epochs, getattr(sampler, "randomize", False), self._start, self._save)
        self._begun = [reference for reference in self._begun if reference() is not None] + [weakref.ref(running)]
        _in_use.add(self)
        return running

    def __len__(self) -> int:
        """Batches of this rank's epoch, the same on every rank."""
        check_random_split()
        found = plans.planner(self._sampler(), "len()")
        return len(plans.cut(found, self._open(), self._options, Position(self._epochs.now())))

    def __getitem__(self, index: Any) -> NoReturn:
        """Always ConfigError: there are no single rows. `split` is for train and validation."""
        raise ConfigError(f"Expected iteration, got dataset[{index!r}]. {NO_ROWS}")

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
        """Arrow schema of the columns that were asked for."""
        return self._open().asked

    @property
    def dataset(self) -> Any:
        """The opened ``lance.LanceDataset``; a dict of them by name where this is a mix."""
        return self._open().lance

    @property
    def sources(self) -> tuple[str, ...]:
        """What the numbers in `Batch.source` mean: the names of a mix, empty for one dataset."""
        source = self._open()
        return source.names if isinstance(source, MixTable) else ()

    @property
    def device(self) -> torch.device:
        """Where the batches are."""
        return choose_device(self._options.device)

    @property
    def sampler(self) -> Any:
        """The sampler in use, with the rank and world size of now; a copy, whose `set_epoch` is the dataset's."""
        found = self._sampler()
        if overfits(getattr(found, "randomize", False)):
            return SequentialSampler(self)
        return telling(found, self._epochs.now(), self.set_epoch)

    @property
    def batch_sampler(self) -> None:
        """None, as of a DataLoader of any IterableDataset: no indices make the batches."""
        check_skip()

    @property
    def clocks(self) -> Mapping[str, Clock]:
        """The clock of each stage, for a timeline."""
        return MappingProxyType(self._clocks)

    @property
    def batch_size(self) -> int:
        """Rows of every batch but the last."""
        return self._options.batch_size

    @property
    def batch_readahead(self) -> int:
        """Batches prepared ahead."""
        return self._options.batch_readahead

    @property
    def readahead_bytes(self) -> int:
        """Bytes that these may take, and what is being decoded."""
        given = self._options.readahead_bytes
        return memory_ahead(self.device) if given is None else given

    @property
    def transforms(self) -> Mapping[str, Transform]:
        """Column → what it becomes, as it was asked for."""
        return MappingProxyType(self._options.transforms)

    @property
    def on_error(self) -> str:
        """What a row that cannot be decoded does."""
        return self._options.on_error

    @property
    def drop_last(self) -> bool:
        """Whether rows that do not fill a batch on every rank are left out."""
        return self._options.drop_last

    @property
    def seed(self) -> int:
        """Of the order, the sample, the crops and the flips."""
        return self._options.seed

    @property
    def split(self) -> tuple[float, float] | None:
        """The share of the rows that is used, as asked for."""
        return self._options.split

    @property
    def num_threads(self) -> int | None:
        """Threads that decode, as asked for."""
        return self._options.num_threads

    @property
    def max_pixels(self) -> int:
        """Pixels of the largest image."""
        return self._options.max_pixels

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration yields: other order, crops and flips. Keeps a place loaded in it.

        Without it an epoch that ran to its end is followed by the next one; one that was left early starts again.
        """
        expect_epoch(epoch)
        self._epochs.set(int(epoch))

    def state_dict(self) -> dict[str, Any]:
        """The place after the last batch that the loop took: a few scalars, ready for JSON.

        It is the place of the iterator begun last among those in use; without one, the loaded place or where the last
        iteration ended. Each iterator has a `state_dict` of its own.

        Raises
        ------
        StateError
            DataLoader workers do the reading: use torchdata's StatefulDataLoader, or ``num_workers=0``.
        TypeError
            The sampler is a foreign one.
        """
        running = next((batches for batches in reversed(self._iterators()) if batches.alive), None)
        if running is not None:
            return running.state_dict()
        place = self._epochs.place()
        if place is None:
            raise StateError(
                "Expected state_dict() where the batches are read, got it beside DataLoader workers, of whose batches "
                "nobody here knows how many were taken. Use num_workers=0, or torchdata's StatefulDataLoader."
            )
        return self._save(place)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue with the batch after the saved one, at the next iteration; after the last, with the next epoch.

        Raises
        ------
        ConfigError
            It is no mapping.
        StateError
            It is no state, or belongs to other rows or another order: names the field and both values.
        """
        self._epochs.load(*plans.restore(self._sampler(), self._open(), self._options, saved))

    def stats(self) -> dict[str, Any]:
        """Counts since this object was made: batches, rows, bad rows, images by decoder; figures by stage, and the
        stage that limits the rate, in words."""
        stages = {name: clock.read() for name, clock in self._clocks.items()}
        counted = ("batches", "rows", "rows_skipped", "rows_masked", "rows_replaced", "nulls", "bytes_read")
        decoder = self._decode_with()
        return {
            "device": describe(self.device),
            "decoder": decoder.name,
            "resize": resize.implementation(self.device),
            **{name: self._counts[name] for name in counted},
            "images": self._decoded(decoder),
            **({"decoder_facts": decoder.facts()} if hasattr(decoder, "facts") else {}),
            "stages": stages,
            "bottleneck": bottleneck(stages),
        }

    @property
    def bad_rows(self) -> list[BadRow]:
        """The rows that could not become tensors, in this process and since this object was made: each once, the first
        10,000 of them. `stats` counts all, epoch for epoch."""
        return self._bad_rows.listed()

    def _decoded(self, decoder: Decoder) -> dict[str, int]:
        """Images by the library that decoded them, and those that none could, since this object was made."""
        found = _added(self._images, self._counted(decoder))
        return {**found, "failed": found.get("failed", 0) + self._counts["images_refused"]}

    def _counted(self, decoder: Decoder) -> dict[str, int]:
        """What `decoder` has decoded since it was taken: one of the user's own may have worked before."""
        return {name: count - self._before.get(name, 0) for name, count in decoder.counts().items()}

    def close(self) -> None:
        """End what still runs and free the decoder. The dataset can be used again."""
        for running in self._iterators():
            running.close()
        if self._decoder is not None:
            self._decoder.close()
            self._images = _added(self._images, self._counted(self._decoder))
            self._decoder = None

    def __enter__(self) -> LanceDataset:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """For a DataLoader worker: the cache filled here; threads and decoders stay behind."""
        self._fill_cache()
        if any(each.needs_parent(self._place()[1]) for each in self._versions.values()):
            self._open()
        left = ("_columns", "_decoder", "_begun", "_clocks", "_counts", "_images", "_before", "_bad_rows")
        return {name: value for name, value in self.__dict__.items() if name not in left}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        self.__dict__.update(kept)
        self._reset()

    def _reset(self) -> None:
        self._columns: list[Column] = []
        self._decoder, self._begun = None, []
        self._images, self._before = {}, {}
        self._counts: Counter[str] = Counter()
        self._bad_rows = BadRows()
        self._clocks: dict[str, Clock] = clocks(read_threads(threads_here()), self.num_threads or threads_here())

    def _iterators(self) -> list[Batches]:
        """Those that somebody still holds, in the order in which they were begun."""
        return [running for running in (reference() for reference in self._begun) if running is not None]

    def _sampler(self) -> Any:
        return self._options.choose_sampler(self._ranks)

    def _open(self) -> LanceTable | MixTable:
        """The source, opened and its columns resolved on first use."""
        check_fork()
        options, place = self._options, self._place()
        with ending.inside():
            if self._source is None or any(each.due(place[1]) for each in self._versions.values()):
                opened = {name: _opened(name, each, place) for name, each in self._versions.items()}
                if self._source is None or any(int(opened[name].version) != n for name, n in self._read.items()):
                    self._source, self._columns = options.open(opened), []
                    self._read = {name: int(each.version) for name, each in opened.items()}
                if not self._source.rows and (options.filter is not None or options.split is not None):
                    words = {"filter": options.filter, "split": options.split}
                    given = ", ".join(f"{name}={value!r}" for name, value in words.items() if value is not None)
                    warnings.warn(f"No row matches {given}.", stacklevel=3)
            if not self._columns:
                self._columns = resolve(self._source.schema, options.transforms, self._source.values, self._formats)
            return self._source

    def _place(self) -> tuple[int, int]:
        """(rank, world size) among those who must read one version, which a sampler for every row has too."""
        sampler = self._sampler()
        given = getattr(sampler, "rank", 0), getattr(sampler, "world_size", 1)
        return given if given[1] > 1 else self._ranks.resolve()

    def _save(self, place: Position) -> dict[str, Any]:
        return plans.save(self._sampler(), self._open(), self._options, place)

    def _start(self, place: Position) -> tuple[int | None, Iterator[Any]]:
        """The steps of an epoch from where the run that `place` belongs to began, and its batches from there on."""
        options, source = self._options, self._open()
        self._fill_cache()
        sampler = self._sampler()
        steps, reads = plans.reads(sampler, source, options, place)
        if options.to_tensor_fn is not NOT_GIVEN:
            bounds = (options.batch_readahead, self.readahead_bytes)
            return steps, raw_batches(reads, options.to_tensor_fn, source, *bounds, self._clocks["read"])
        streams, clocks, decoder = Streams(self.device), self._clocks, self._decode_with()
        parts = Parts(decoder, streams, self.max_pixels, clocks["tokenize"], clocks["resize"], source.origin)
        order = [name for column in self._columns for name in (column.name, *column.more)]
        pipeline = Pipeline(
            fields(self._columns, parts), order, streams, seed=self.seed, epoch=place.epoch, on_error=self.on_error,
            alone=getattr(sampler, "world_size", 1) == 1, after=options.after, whole=takes_batches(decoder),
            ahead=self.batch_readahead, ahead_bytes=self.readahead_bytes,
            counts=self._counts, clocks=clocks, bad_rows=self._bad_rows, sources=self.sources,
        )  # fmt: skip
        return steps, pipeline.run(reads)

    def _decode_with(self) -> Decoder:
        if self._decoder is None:
            self._open()
            images = any(column.decodes for column in self._columns)
            wish = self._options.decoder
            wish = "cpu" if wish == "auto" and not images else wish  # nothing to decode
            device, threads = self.device, self.num_threads or threads_here()
            self._decoder = make_decoder(wish, device, self.max_pixels, threads)
            self._before = self._decoder.counts()
            for name in ("decode", "resize"):
                self._clocks[name].threads = calls_at_once(self._decoder, threads)
        return self._decoder

    def _fill_cache(self) -> None:
        """Copy the rows to local storage once, before the first batch, so that an early end leaves it whole."""
        cache = self._options.cache
        if not cache or self._open().cached:
            return
        folder = make_folder(None if cache is True else str(cache))
        remove = Finalize(self, remove_folder, (folder,), exitpriority=0)  # in a worker too
        try:
            self._open().use_cache(folder)
        except BaseException:
            remove()
            raise


def _opened(name: str, each: OneVersion, place: tuple[int, int]) -> Any:
    """The ``lance.LanceDataset`` of a source; an error says which one it is of a mix."""
    try:
        return each.open(*place)
    except ConfigError as error:
        if not name:
            raise
        raise ConfigError(f"In source {name!r}: {error}") from error


def _added(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    return {name: a.get(name, 0) + b.get(name, 0) for name in {**a, **b}}


_in_use: weakref.WeakSet[LanceDataset] = weakref.WeakSet()


def _close_all() -> None:
    """End what still runs while the modules that it needs are whole: an open iterator outlives them otherwise."""
    for dataset in list(_in_use):
        dataset.close()


ending.then(_close_all)
