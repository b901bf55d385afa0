"""A sampler, a table and a place enter; the cut of its epoch, the reads of this process and saved places leave."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import get_worker_info

from gpuload.options import Options
from gpuload.order import Cut, Ranges, Rows, coalesce, state
from gpuload.order.foreign import foreign_reads
from gpuload.order.samplers import PlanSampler
from gpuload.order.state import Position
from gpuload.pipeline import Read
from gpuload.tables import Selection, Table
from gpuload.tables.lance import LanceTable
from gpuload.tables.together import AT_ONCE, read_together


def planner(sampler: Any, what: str) -> PlanSampler:
    """`sampler`, if its order is known without reading.

    Raises
    ------
    TypeError
        It is a foreign one.
    """
    if not isinstance(sampler, PlanSampler):
        raise TypeError(f"Expected a gpuload sampler for {what}, got {sampler!r}, whose order nobody can foresee.")
    return sampler


def cut(sampler: PlanSampler, table: Table, options: Options, place: Position) -> Cut:
    """This rank's batches from where the run that `place` belongs to began."""
    sampler.set_epoch(place.epoch)
    return sampler.cut(table, options.batch_size, drop_last=options.drop_last, start=place.start)


def reads(sampler: Any, table: Table, options: Options, place: Position) -> tuple[int | None, Iterator[Read]]:
    """The steps of this run of the epoch, None where nobody can foresee them, and what this process reads from `place`
    to the end; in a DataLoader worker, its share of it."""
    worker = get_worker_info()
    first, every = (worker.id, worker.num_workers) if worker else (0, 1)
    if not isinstance(sampler, PlanSampler) and isinstance(table, LanceTable):
        found = foreign_reads(sampler, table, options.batch_size, options.batch_readahead, options.filter)
        return None, itertools.islice(found, first, None, every)
    steps = cut(planner(sampler, "a mix"), table, options, place)
    mine = (steps(step) for step in range(place.taken, len(steps)) if step % every == first)
    return len(steps), _reads(((rows, coalesce(rows.row)) for rows in mine), table, place, options)


def _reads(planned: Iterator[tuple[Rows, Ranges]], table: Table, place: Position, options: Options) -> Iterator[Read]:
    batches, again = itertools.tee(planned)
    stop = threading.Event()
    parts = read_together(table, (ranges for _, ranges in again), min(AT_ONCE, options.batch_readahead), stop=stop)
    try:
        for (rows, ranges), part in zip(batches, parts, strict=True):
            part = part if rows.size is None else functools.partial(_sized, part, rows.size)
            yield Read(place.before + rows.step, table.positions(ranges), rows.real, part, rows.place, rows.source)
    except GeneratorExit:  # nobody wants what a store that is away still owes
        stop.set()
        raise


def _sized(part: Callable[[], Selection], size: tuple[int, int]) -> Selection:
    return dataclasses.replace(part(), bucket=size)


def save(sampler: Any, table: Table, options: Options, place: Position) -> dict[str, Any]:
    """`place` as JSON."""
    found = planner(sampler, "state_dict()")
    identity = _identity(found, table, options)
    if options.split is None:
        del identity["split"]  # without one a state has the keys that it always had
    return state.save(place, identity, found.world_size)


def restore(sampler: Any, table: Table, options: Options, saved: object) -> tuple[Position, bool]:
    """The place that was saved, and whether it is the end of its epoch.

    A run that goes on from it begins there, so that its first batch is the first worker's. A DataLoader worker that
    gets back its own state instead keeps the beginning that its share of the steps was counted from, and knows of no
    end: other workers may have batches left.
    """
    found = planner(sampler, "load_state_dict()")
    worker = get_worker_info() is not None
    identity = _identity(found, table, options)
    place, world_size = state.restore(saved, identity, found.world_size, found.elastic, worker)
    if worker:
        return place, False
    used = cut(found.resized(world_size), table, options, place).used(place.taken)
    place = Position(place.epoch, used, place.step)
    return place, not len(cut(found, table, options, place))


def _identity(sampler: PlanSampler, table: Table, options: Options) -> dict[str, Any]:
    """What a state must agree with: the dataset, and all that its order depends on."""
    return {
        "uri": table.uri,
        "dataset_version": table.version,
        "split": None if options.split is None else list(options.split),  # before the fingerprint, which has it too
        "fingerprint": table.fingerprint(),
        "filter": options.filter,
        "samples": options.samples,
        "seed": options.seed,
        "batch_size": options.batch_size,
        **sampler.key(),
    }
