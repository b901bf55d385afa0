"""Where the time goes: spans of work and of waiting enter, one `Clock` a stage; figures and a sentence leave."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

_IDLE, _BUSY = 0.1, 0.7  # below: the loop is slower than the loader; above: a stage's threads are its limit


class Spans(Protocol):
    """What a `Clock` tells of each span, if somebody listens (trace.py)."""

    def span(self, name: str, began: float, ended: float, **details: Any) -> None: ...
    def level(self, name: str, at: float, value: int) -> None: ...


class Clock:
    """One stage's figures since the dataset was made.

    Attributes
    ----------
    items, bytes : int
        What its threads have finished.
    busy : float
        Seconds its threads spent in the stage's function, added up. Reading counts the time that storage takes.
    waited : float
        Seconds its consumer stood still for it.
    elapsed : float
        Seconds that an iteration was under way; ``busy / (threads * elapsed)`` is how busy the threads were.
    """

    def __init__(self, threads: int, name: str = "") -> None:
        self.threads, self.name = threads, name
        self.items, self.bytes, self.busy, self.waited, self.elapsed = 0, 0, 0.0, 0.0, 0.0
        self.spans: Spans | None = None
        self._lock = threading.Lock()
        self._running, self._since = 0, 0.0
        self._looks, self._depths = 0, 0

    def start(self) -> None:
        """An iteration begins."""
        with self._lock:
            if not self._running:
                self._since = time.perf_counter()
            self._running += 1

    def stop(self) -> None:
        """An iteration has ended."""
        with self._lock:
            self._running -= 1
            if not self._running:
                self.elapsed += time.perf_counter() - self._since

    def worked(self, began: float, size: int = 0) -> None:
        """One item of `size` bytes took from `began` (time.perf_counter) until now, on this thread."""
        now = time.perf_counter()
        with self._lock:
            self.items += 1
            self.bytes += size
            self.busy += now - began
        if self.spans is not None:
            self.spans.span(self.name, began, now, bytes=size)

    def stood(self, began: float, depth: int) -> None:
        """The consumer waited from `began` until now; on coming it found `depth` results finished."""
        now = time.perf_counter()
        with self._lock:
            self.waited += now - began
            self._looks += 1
            self._depths += depth
        if self.spans is not None:
            self.spans.span(f"wait for {self.name}", began, now)
            self.spans.level(f"{self.name} queue", now, depth)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """One item of a part of a stage."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.worked(began)

    def read(self) -> dict[str, float]:
        """The figures; `queue` is how many results were finished, on average, when the consumer came for one."""
        with self._lock:
            running = time.perf_counter() - self._since if self._running else 0.0
            return {
                "threads": self.threads,
                "items": self.items,
                "busy_s": self.busy,
                "waited_s": self.waited,
                "elapsed_s": self.elapsed + running,
                "bytes": self.bytes,
                "queue": self._depths / max(1, self._looks),
            }


def clocks(read_threads: int, decode_threads: int) -> dict[str, Clock]:
    """The line's stages; "tokenize" is a part of "read", "resize" one of "decode"."""
    threads = {"read": read_threads, "tokenize": read_threads, "decode": decode_threads, "resize": decode_threads}
    return {name: Clock(number, name) for name, number in threads.items()}


def share(stage: Mapping[str, float]) -> float:
    """How busy a stage's threads were, 0 to 1."""
    room = stage["threads"] * stage["elapsed_s"]
    return min(1.0, stage["busy_s"] / room) if room else 0.0


def bottleneck(stages: Mapping[str, Mapping[str, float]]) -> str:
    """What limits the rate, in words, from the figures of `Clock.read` by stage."""
    line = {name: stages[name] for name in ("read", "decode") if stages[name]["items"]}
    elapsed = max((stage["elapsed_s"] for stage in line.values()), default=0.0)
    if not elapsed:
        return "nothing was loaded yet"
    waited = sum(stage["waited_s"] for stage in line.values()) / elapsed
    if waited < _IDLE:
        return f"loop-bound: the loop that takes the batches waited {waited:.0%} of the time; loading keeps up"
    name = max(line, key=lambda name: share(line[name]))
    stage = line[name]
    parts = {"read": "tokenize", "decode": "resize"}
    part = stages[parts[name]]["busy_s"] > stage["busy_s"] / 2
    threads = f"{stage['threads']:.0f} thread{'s' if stage['threads'] > 1 else ''} busy {share(stage):.0%}"
    if share(stage) >= _BUSY:
        return f"{parts[name] if part else name}-bound: {threads}"
    return f"no stage is full: {name} is the busiest, {threads}; the loop waited {waited:.0%} of the time"
