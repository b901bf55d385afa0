"""A timeline: spans of work enter, a file in the trace-event format leaves, for Perfetto or chrome://tracing.

One track a thread. https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU is the format.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpuload.clock import Clock
from gpuload.errors import ConfigError

_MOST = 1_000_000  # events; what comes later is left out, and counted


class Trace:
    """Collects what the clocks tell; `write` makes the file. Appending is all that the measured threads do."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._events: list[tuple[str, str, str, float, float, dict[str, Any]]] = []
        self.left_out = 0

    def watch(self, clocks: Iterable[Clock]) -> None:
        """Listen to these clocks from now on."""
        for clock in clocks:
            clock.spans = self

    def span(self, name: str, began: float, ended: float, **details: Any) -> None:
        """This thread did `name` from `began` to `ended`, in seconds of time.perf_counter."""
        self._add(("X", name, threading.current_thread().name, began, ended, details))

    def level(self, name: str, at: float, value: int) -> None:
        """A quantity has this value from now on."""
        self._add(("C", name, threading.current_thread().name, at, at, {"depth": value}))

    def write(self, path: str | Path) -> int:
        """The file; returns how many events are in it.

        Raises
        ------
        ConfigError
            It cannot be written there.
        """
        events = list(self._events)
        tracks = {name: i for i, name in enumerate(dict.fromkeys(event[2] for event in events), 1)}
        process = os.getpid()
        named = [{"ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": {"name": "gpuload"}}]
        for name, i in tracks.items():
            named.append({"ph": "M", "name": "thread_name", "pid": process, "tid": i, "args": {"name": name}})
        found: list[dict[str, Any]] = [*named]
        for kind, name, thread, began, ended, details in events:
            event = {"ph": kind, "name": name, "cat": "gpuload", "pid": process, "tid": tracks[thread]}
            event |= {"ts": round((began - self._began) * 1e6, 3), "args": details}
            found.append({**event, "dur": round((ended - began) * 1e6, 3)} if kind == "X" else event)
        try:
            Path(path).write_text(json.dumps({"traceEvents": found, "displayTimeUnit": "ms"}) + "\n")
        except OSError as error:
            raise ConfigError(f"Expected a place for the timeline, got {str(path)!r}: {error.strerror}.") from error
        return len(found)

    def _add(self, event: tuple[str, str, str, float, float, dict[str, Any]]) -> None:
        if len(self._events) < _MOST:
            self._events.append(event)
        else:
            self.left_out += 1
