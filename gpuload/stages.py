"""Threads: a function and items enter, results leave in the order of the items, a bounded number of them ahead.

Nothing runs but when the consumer pulls, so there is no feeder thread, and closing needs no signal but the pool's.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Clock:
    """Where a stage's time goes: items done, seconds its threads were busy, seconds its consumer waited for it."""

    def __init__(self, threads: int) -> None:
        self.threads, self.items, self.busy, self.waited = threads, 0, 0.0, 0.0
        self._lock = threading.Lock()

    def add(self, items: int = 0, busy: float = 0.0, waited: float = 0.0) -> None:
        with self._lock:
            self.items += items
            self.busy += busy
            self.waited += waited

    def read(self) -> dict[str, float]:
        return {"threads": self.threads, "items": self.items, "busy_s": self.busy, "waited_s": self.waited}


class ordered_map(Generic[T, R], Iterator[R]):
    """Like ``map(fn, items)``, on threads.

    Parameters
    ----------
    fn : callable
        Called with one item, in any of the threads.
    items : iterable
        Pulled only by the thread that iterates. An `ordered_map` is asked whether it is ready before it is
        pulled, so that a slow stage never holds up results that are there.
    threads : int
    ahead : int, optional
        At most this many items are running or finished and not yet taken; without it, what `items` admits.
    name : str
        Of the threads: ``gpuload-<name>_0``. An exception gets a note with it.
    clock : Clock, optional
    initializer : callable, optional
        Called once in each thread.

    An exception of `fn` or of `items` comes out at the place of its item, after all results before it; then the
    iterator is closed. `close` cancels what has not started, waits for what has, and ends the threads.
    """

    def __init__(
        self,
        fn: Callable[[T], R],
        items: Iterable[T],
        *,
        threads: int,
        ahead: int | None = None,
        name: str,
        clock: Clock | None = None,
        initializer: Callable[[], Any] | None = None,
    ) -> None:
        self._fn, self._items, self._name = fn, iter(items), name
        self._ahead = sys.maxsize if ahead is None else max(ahead, 1)
        self._clock = clock or Clock(threads)
        self._pending: deque[Future[R]] = deque()
        self._exhausted = False
        self._pool = ThreadPoolExecutor(max(threads, 1), f"gpuload-{name}", initializer)

    def __iter__(self) -> ordered_map[T, R]:
        return self

    def __next__(self) -> R:
        self._fill()
        if not self._pending:
            self.close()
            raise StopIteration
        future = self._pending.popleft()
        started = time.perf_counter()
        try:
            result = future.result()
        except BaseException:
            self.close()
            raise
        self._clock.add(waited=time.perf_counter() - started)
        return result

    def ready(self) -> bool:
        """Whether `next` would return, raise or end at once. Starts whatever may be started."""
        self._fill(wait=False)
        return self._pending[0].done() if self._pending else self._exhausted

    def close(self) -> None:
        """End the threads, and those of the stages before. Safe to call twice."""
        self._exhausted = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()
        close = getattr(self._items, "close", None)
        if close is not None:
            close()

    def _fill(self, wait: bool = True) -> None:
        ready = getattr(self._items, "ready", None)
        while not self._exhausted and len(self._pending) < self._ahead:
            if ready is not None and (self._pending or not wait) and not ready():
                return
            try:
                item = next(self._items)
            except StopIteration:
                self._exhausted = True
            except Exception as error:
                self._exhausted = True
                failed: Future[R] = Future()
                failed.set_exception(error)
                self._pending.append(failed)
            else:
                self._pending.append(self._pool.submit(self._run, item))

    def _run(self, item: T) -> R:
        started = time.perf_counter()
        try:
            return self._fn(item)
        except Exception as error:
            if hasattr(error, "add_note"):  # Python 3.11
                error.add_note(f"(raised in gpuload's {self._name} stage)")
            raise
        finally:
            self._clock.add(1, time.perf_counter() - started)


class flat_map(Generic[T, R], Iterator[R]):
    """The parts of every item, one after the other; as ready and as closable as the stage it pulls from.

    `admit` says whether the next item may be taken yet. It holds the next stage back only while that one has
    something to wait for, so it cannot block for ever.
    """

    def __init__(
        self, parts: Callable[[T], Iterable[R]], items: ordered_map[Any, T], admit: Callable[[], bool] = lambda: True
    ) -> None:
        self._parts, self._items, self._admit = parts, items, admit
        self._left: deque[R] = deque()

    def __next__(self) -> R:
        while not self._left:
            self._left.extend(self._parts(next(self._items)))
        return self._left.popleft()

    def ready(self) -> bool:
        return bool(self._left) or (self._admit() and self._items.ready())

    def close(self) -> None:
        self._left.clear()
        self._items.close()
