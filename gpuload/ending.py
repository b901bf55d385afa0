"""The interpreter's end: calls that it must not cut off enter; it waits for them, and daemon threads stay outside.

Before Python 3.14 a daemon thread that comes back from Rust or C++ after the end began is unwound through their frames,
which aborts the process. So the end waits until no thread is `inside`, and a daemon thread that would go on after that
waits for ever, without a word: it is about to be gone.
"""

from __future__ import annotations

import atexit
import multiprocessing.util  # noqa: F401 - its exit hook removes what is temporary: hooks registered later run before it
import os
import threading
import time
from collections.abc import Callable
from types import TracebackType

_PATIENCE = 10.0  # seconds that the end waits: a read from an object store may take so long
_inside: list[int] = []  # the threads that are, once for each time; append and remove are atomic
_then: list[Callable[[], None]] = []
_over = False


class InterpreterEnds(RuntimeError):
    """Work was asked for while the interpreter ends, when no thread can do it."""


class inside:
    """Around calls into Lance, torch and the line, in whatever thread the user makes them."""

    def __enter__(self) -> None:
        me = threading.get_ident()
        if _over and me not in _inside:
            _stay()
        _inside.append(me)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        me = threading.get_ident()
        _inside.remove(me)
        if (_over or isinstance(error, InterpreterEnds)) and me not in _inside:
            _stay()


def is_over() -> bool:
    """Whether the end has begun: whoever is inside should come out."""
    return _over


def then(do: Callable[[], None]) -> None:
    """Call this when the interpreter ends, once every thread has come out."""
    _then.append(do)


def _stay() -> None:
    """A daemon thread goes no further."""
    if threading.current_thread().daemon:
        threading.Event().wait()


@atexit.register
def _end() -> None:
    global _over
    _over = True
    me, until = threading.get_ident(), time.monotonic() + _PATIENCE
    while any(thread != me for thread in list(_inside)) and time.monotonic() < until:
        time.sleep(0.005)
    for do in reversed(_then):
        do()


os.register_at_fork(after_in_child=_inside.clear)  # the threads are the parent's
