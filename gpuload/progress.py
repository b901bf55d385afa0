"""Progress on stderr: how much there is to do enters, a bar with rates and the time left is shown while it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn


@contextmanager
def files_bar(files: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Files, files/s, MB/s, time left. Yields what to call with each file's bytes."""
    began, read = time.perf_counter(), 0
    rate = TextColumn("files  {task.fields[rate]}")
    with _bar(files, shown, BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn()) as bar:

        def advance(size: int) -> None:
            nonlocal read
            read += size
            seconds = time.perf_counter() - began
            done = bar.tasks[0].completed + 1
            said = f"{done / seconds:,.0f} files/s  {read / seconds / 1e6:,.0f} MB/s"
            bar.update(bar.tasks[0].id, advance=1, rate=said)

        yield advance


@contextmanager
def rows_bar(what: str, total: float, shown: bool) -> Iterator[Callable[[float, int], None]]:
    """How much of `total` is done, and rows/s. Yields what to call with how much is done, and with how many rows."""
    began = time.perf_counter()
    rate = TextColumn("{task.percentage:>3.0f}%  {task.fields[rate]}")
    with _bar(total, shown, TextColumn(what), BarColumn(), rate, TimeRemainingColumn()) as bar:

        def show(done: float, rows: int) -> None:
            said = f"{rows:,} rows  {rows / (time.perf_counter() - began):,.0f} rows/s"
            bar.update(bar.tasks[0].id, completed=min(done, total), rate=said)

        yield show


@contextmanager
def checked_bar(rows: int, begun: int, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """Rows, how many are bad, time left. Yields what to call with rows that were done, and bad ones so far."""
    bad = TextColumn("rows  {task.fields[rate]}")
    with _bar(rows, shown, BarColumn(), MofNCompleteColumn(), bad, TimeRemainingColumn()) as bar:
        bar.update(bar.tasks[0].id, completed=begun, rate="0 bad")
        yield lambda done, bad: bar.update(bar.tasks[0].id, advance=done, rate=f"{bad} bad")


@contextmanager
def _bar(total: float, shown: bool, *columns: ProgressColumn) -> Iterator[Progress]:
    """One bar with one task; a run that fails or is interrupted leaves none behind."""
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        bar.add_task("", total=total, rate="")
        try:
            yield bar
        except BaseException:
            bar.live.transient = True
            bar.console.quiet = not bar.console.is_terminal  # else an empty line is all that stays
            raise
