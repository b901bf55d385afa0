"""`gpuload bench`: a dataset is loaded as for training; its rate, the figures of every stage and advice leave."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from gpuload.badrows import BadRow
from gpuload.clock import share
from gpuload.dataset import LanceDataset
from gpuload.device import threads_here
from gpuload.errors import BadRowWarning
from gpuload.fields.text import Text
from gpuload.images.transform import Image
from gpuload.tools.describe import columns, open_table
from gpuload.tools.trace import Trace


@dataclass
class Measured:
    """What one run gave.

    Attributes
    ----------
    rows, batches : int
    seconds : float
        From asking for the first batch to having the last.
    first : float
        Seconds to the first batch.
    stats : dict
        ``dataset.stats()`` at the end.
    bad_rows : list of BadRow
        Which were met, each once.
    """

    rows: int
    batches: int
    seconds: float
    first: float
    stats: dict[str, Any]
    bad_rows: list[BadRow] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Rows per second."""
        return self.rows / self.seconds if self.seconds else 0.0


def measure(
    dataset: LanceDataset,
    seconds: float = 10.0,
    trace: Trace | None = None,
    show: Callable[[float, int], None] = lambda seconds, rows: None,
) -> Measured:
    """Take batches for `seconds`, over as many epochs as that needs, and do nothing with them.

    `show` is told the seconds and rows so far, after each batch.
    """
    if trace is not None:
        trace.watch(dataset.clocks.values())
    rows = batches = 0
    first = 0.0
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BadRowWarning)  # the report names all of them
        for epoch in range(1_000_000):
            dataset.set_epoch(epoch)
            for batch in dataset:
                rows, batches = rows + batch.size, batches + 1
                first = first or time.perf_counter() - began
                del batch
                show(time.perf_counter() - began, rows)
                if time.perf_counter() - began >= seconds:
                    break
            if not batches or time.perf_counter() - began >= seconds:
                break
    taken = time.perf_counter() - began
    stats = dataset.stats()
    dataset.close()
    return Measured(rows, batches, taken, first, stats, dataset.bad_rows)


def prepare(uri: str, batch_size: int, size: int, threads: int | None, shuffle: str | None) -> LanceDataset:
    """The dataset with every image cropped to `size` and every text as bytes, as many a training would have it."""
    transforms: dict[str, Image | Text] = {}
    for column in columns(open_table(uri)):
        if column.role == "image":
            transforms[column.name] = Image(size, crop="random", flip=0.5)
        elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            transforms[column.name] = Text("bytes", max_length=77, padding="max_length")
    options: dict[str, Any] = {"transforms": transforms, "num_threads": threads, "shuffle": shuffle or False}
    return LanceDataset(uri, batch_size, on_error="mask", **options)


def table(stats: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the stages."""
    head = ["stage", "threads", "items", "busy s", "busy", "loop waited s", "MB", "queue"]
    rows = []
    for name, stage in stats["stages"].items():
        inner = {"tokenize": "in read", "resize": "in decode"}.get(name)
        rows.append(
            [
                name,
                inner or f"{stage['threads']:.0f}",
                f"{stage['items']:,.0f}",
                f"{stage['busy_s']:,.2f}",
                "" if inner else f"{share(stage):.0%}",
                "" if inner else f"{stage['waited_s']:,.2f}",
                "" if inner else f"{stage['bytes'] / 1e6:,.0f}",
                "" if inner else f"{stage['queue']:.1f}",
            ]
        )
    return head, rows


def advice(stats: Mapping[str, Any], cores: int | None = None) -> list[str]:
    """What would make it faster, by what limits it."""
    cores, limit = cores or threads_here(), str(stats["bottleneck"]).partition("-bound")[0]
    stage = stats["stages"].get(limit, stats["stages"]["decode"])
    found = []
    if limit == "loop":
        found.append("Loading keeps up with the loop: there is nothing to gain here.")
    if limit in ("decode", "resize"):
        if stage["threads"] < cores:
            found.append(f"{stage['threads']:.0f} threads decode and {cores} cores are there: num_threads={cores}.")
        else:
            found.append(f"All {cores} cores decode. What is left: a GPU (device='cuda'), more cores, or fewer pixels.")
        found.append("Photos far larger than the crop: store them smaller, or take Image(..., fast=True).")
    if limit == "resize" and stats["resize"] == "torch":
        found.append(
            "The resize runs in torch: install gpuload where there is a C++ compiler, it is several times faster."
        )
    if limit == "read":
        found.append("Reading waits for storage: a larger batch_readahead or readahead_bytes, or a local cache=True.")
        found.append("In shuffle='row' every row is a read of its own: shuffle='block' keeps 16 neighbours together.")
    if limit == "tokenize":
        found.append(
            "Tokenizing takes most of reading: store token ids, or use a tokenizers.Tokenizer, which is compiled."
        )
    images = stats["images"]
    slow, quick = images.get("pillow", 0), sum(images.values()) - images.get("pillow", 0) - images.get("failed", 0)
    if slow > quick / 10:
        found.append(f"Pillow decoded {slow:,} images that are no plain JPEG; JPEG decodes about 1.5 times as fast.")
    return found or ["No stage is full; other work on the machine, or very small batches, may be in the way."]
