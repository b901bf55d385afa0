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
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from gpuload.clock import Clock
from gpuload.ending import InterpreterEnds
from gpuload.errors import stopped

T = TypeVar("T")
R = TypeVar("R")


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
    size : callable, optional
        Bytes of a result, for the clock.

    An exception of `fn` or of `items` comes out at the place of its item, after all results before it; then the
    iterator is closed. A StopIteration of `fn` is a RuntimeError. `close` cancels what has not started, waits for what
    has, and ends the threads.
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
        size: Callable[[R], int] | None = None,
    ) -> None:
        self._fn, self._items, self._name = fn, iter(items), name
        self._ahead = sys.maxsize if ahead is None else max(ahead, 1)
        self._clock, self._size = clock or Clock(threads, name), size
        self._finished: deque[None] = deque()  # one mark a result that waits to be taken
        self._clock.start()
        self._pending: deque[Future[R]] = deque()
        self._exhausted = self._closed = False
        self._pool = ThreadPoolExecutor(max(threads, 1), f"gpuload-{name}", initializer)

    def __iter__(self) -> ordered_map[T, R]:
        return self

    def __next__(self) -> R:
        self._fill()
        if not self._pending:
            self.close()
            raise StopIteration
        future = self._pending.popleft()
        started, depth = time.perf_counter(), len(self._finished)
        try:
            result = future.result()
        except BaseException:
            self.close()
            raise
        self._clock.stood(started, depth)
        self._finished.popleft()
        return result

    def ready(self) -> bool:
        """Whether `next` would return, raise or end at once. Starts whatever may be started."""
        self._fill(wait=False)
        return self._pending[0].done() if self._pending else self._exhausted

    def close(self) -> None:
        """End the threads, and those of the stages before. Safe to call twice."""
        self._exhausted = True
        if not self._closed:
            self._closed = True
            self._clock.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._pending.clear()
        close = getattr(self._items, "close", None)
        if close is not None:
            close()  # first, so that what still runs may hear of it
        self._pool.shutdown(wait=True)

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
                self._submit(item)

    def _submit(self, item: T) -> None:
        try:
            self._pending.append(self._pool.submit(self._run, item))
        except RuntimeError as error:  # Python has ended its pools, while a daemon thread goes on
            raise InterpreterEnds("The interpreter ends: no thread can read or decode any more.") from error

    def _run(self, item: T) -> R:
        started, size = time.perf_counter(), 0
        try:
            result = self._fn(item)
            size = self._size(result) if self._size else 0
        except StopIteration as error:
            raise stopped(f"gpuload's {self._name} stage") from error
        except Exception as error:
            if hasattr(error, "add_note"):  # Python 3.11
                error.add_note(f"(raised in gpuload's {self._name} stage)")
            raise
        finally:
            self._clock.worked(started, size)
            self._finished.append(None)
        return result


class flat_map(Generic[T, R], Iterator[R]):
    """The parts of every item, one after the other; as ready and as closable as the stage it pulls from."""

    def __init__(self, parts: Callable[[T], Iterable[R]], items: ordered_map[Any, T]) -> None:
        self._parts, self._items = parts, items
        self._left: deque[R] = deque()

    def __next__(self) -> R:
        while not self._left:
            self._left.extend(self._parts(next(self._items)))
        return self._left.popleft()

    def ready(self) -> bool:
        return bool(self._left) or self._items.ready()

    def close(self) -> None:
        self._left.clear()
        self._items.close()


class Room:
    """Bytes for work that runs at once: what does not fit waits, and what is larger than all of them runs alone.

    Parameters
    ----------
    free : callable
        How many bytes there are now; asked when somebody comes and when somebody goes.
    """

    def __init__(self, free: Callable[[], int]) -> None:
        self._free, self._used = free, 0
        self._changed = threading.Condition()

    @contextmanager
    def of(self, size: int) -> Iterator[None]:
        """Wait for `size` bytes, and have them for the length of a with block."""
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + size <= self._free())
            self._used += size
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()


class Budget(Generic[T], Iterator[T]):
    """Items while they fit: at most `items_most` under way, and as many as `most` bytes hold of the largest one seen so
    far, at least one.

    Until the first is weighed there is one, and until it leaves no more than two: reading further ahead would only take
    the processor from the batch that everybody waits for. The stage that pulls asks `ready` first; `weigh` may come
    from any thread, `leave` from the one that pulls.
    """

    def __init__(self, items: Iterable[T], most: int, items_most: int = sys.maxsize) -> None:
        self._items, self._most, self._items_most = iter(items), most, items_most
        self._largest, self._under_way, self._begun = 0, 0, False
        self._lock = threading.Lock()

    def __next__(self) -> T:
        item = next(self._items)
        self._under_way += 1
        return item

    def limit(self) -> int:
        """Items that fit."""
        fits = min(self._items_most, max(1, self._most // self._largest) if self._largest else 1)
        return fits if self._begun else min(fits, 2)

    def ready(self) -> bool:
        return self._under_way < self.limit()

    def weigh(self, size: int) -> None:
        """An item has turned out to take `size` bytes."""
        with self._lock:
            self._largest = max(self._largest, size)

    def taken(self) -> int:
        """Bytes of the items under way, each as large as the largest."""
        return self._under_way * self._largest

    def leave(self) -> None:
        """An item is the consumer's now."""
        self._under_way -= 1
        self._begun = True

    def close(self) -> None:
        close = getattr(self._items, "close", None)
        if close is not None:
            close()
