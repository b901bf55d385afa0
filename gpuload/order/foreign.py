"""Other people's parts: a `lance.sampler.Sampler` of the user's own is rebatched, a `to_tensor_fn` is called."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from gpuload.clock import Clock
from gpuload.device import one_torch_thread
from gpuload.order.samplers import PlanSampler
from gpuload.pipeline import Read
from gpuload.stages import Budget, ordered_map
from gpuload.tables import Selection, one_batch
from gpuload.tables.lance import LanceTable
from gpuload.tables.mix import MixTable


def told(sampler: Any) -> tuple[int, int] | None:
    """What changes when somebody calls the sampler's `set_epoch`, the epoch last; None for one that never tells."""
    if isinstance(sampler, PlanSampler):
        return sampler.told
    epoch = getattr(sampler, "_epoch", None)  # Lance's own have no other way to be asked
    return None if epoch is None else (0, int(epoch))


def follow(sampler: Any, epoch: int) -> None:
    """Tell a sampler that reads by itself which epoch comes next; for the others it is part of each plan."""
    if not isinstance(sampler, PlanSampler) and hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)


def foreign_reads(
    sampler: Any, source: LanceTable, batch_size: int, readahead: int, filter: str | None
) -> Iterator[Read]:
    """Reads of exactly `batch_size` rows from the RecordBatches that the sampler yields; the last may be shorter.

    Positions are Lance's row ids where the sampler gives them, else the running number of the row.
    """
    columns = source.request()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "with_row_id is not supported")  # positions can do without
        stream = sampler(
            source.lance, batch_size=batch_size, columns=columns, filter=filter, batch_readahead=readahead,
            with_row_id=True,
        )  # fmt: skip
    seen = 0
    for step, table in enumerate(_exactly(stream, batch_size)):
        if "_rowid" in table.schema.names:
            rows = table.column("_rowid").to_numpy().astype(np.int64)
        else:
            rows = np.arange(seen, seen + len(table))
        seen += len(table)
        missing = [name for name in source.schema.names if name not in table.schema.names]
        if missing:
            raise ValueError(f"Expected the columns {source.schema.names} from {sampler!r}, got none named {missing}.")
        yield Read(step, rows, len(table), functools.partial(Selection, table.select(source.schema.names)))


def _exactly(stream: Iterable[pa.RecordBatch], size: int) -> Iterator[pa.Table]:
    """The same rows in tables of `size`; slices of the batches, no copy."""
    held: list[pa.RecordBatch] = []
    count = 0
    for batch in stream:
        while batch.num_rows:
            part = batch.slice(0, size - count)
            batch = batch.slice(part.num_rows)
            held.append(part)
            count += part.num_rows
            if count == size:
                yield pa.Table.from_batches(held)
                held, count = [], 0
    if held:
        yield pa.Table.from_batches(held)


def raw_batches(
    reads: Iterable[Read],
    function: Callable[..., Any] | None,
    source: LanceTable | MixTable,
    ahead: int,
    ahead_bytes: int,
    clock: Clock,
) -> Iterator[tuple[int, Any]]:
    """(step, RecordBatch or what `function` makes of it); rows that would only fill up a rank are left out. Where
    `source` opens blobs, a dict of arrays and lists of BlobFile instead, as `lance.torch.data` has it."""
    budget, converter = Budget(reads, ahead_bytes, ahead), source.hf_converter()

    def fetch(read: Read) -> tuple[int, pa.Table, dict[str, list[Any]]]:
        table = read.selection().head(read.real)
        budget.weigh(table.nbytes)
        return read.step, table, source.blobs(table)

    fetched = ordered_map(
        fetch, budget, threads=clock.threads, name="read", clock=clock, initializer=one_torch_thread,
        size=lambda found: found[1].nbytes,
    )  # fmt: skip
    try:
        for step, table, blobs in fetched:
            budget.leave()
            fetched.ready()  # starts what may be under way while the loop works
            batch: Any = one_batch(table)
            if blobs:
                batch = {**dict(zip(table.column_names, batch.columns, strict=True)), **blobs}
            yield step, batch if function is None else function(batch, hf_converter=converter, use_blob_api=bool(blobs))
    finally:
        fetched.close()
