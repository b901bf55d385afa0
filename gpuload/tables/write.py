"""Batches made in Python become a Lance dataset, in a way that can be interrupted.

Lance pulls from a Python iterator in a thread of its own, and leaves it pulling when its call is interrupted: a thread
that then calls into an interpreter that is ending aborts the process. So Lance is called in a thread that no signal
reaches, the caller waits, and a wish to stop ends the stream with an error, which Lance reports.
"""

from __future__ import annotations

import os
import re
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import lance
import pyarrow as pa

from gpuload import ending
from gpuload.errors import ConfigError
from gpuload.tables import reading

_PATIENCE = 5.0  # seconds after which a further Ctrl-C gives up waiting for Lance
_POLL = 0.05


def write_stream(batches: Iterable[pa.RecordBatch], schema: pa.Schema, uri: str, **options: Any) -> lance.LanceDataset:
    """``lance.write_dataset`` of `batches`, which are made while Lance asks for them, in one of its threads.

    Nothing is committed unless all of them were. An exception of `batches` comes out as it is; so does a
    KeyboardInterrupt of the caller, once Lance has stopped pulling.

    Raises
    ------
    ConfigError
        It cannot be written there: the disk is full, or read-only, ...
    """
    writing = _Writing(batches, schema, uri, options)
    try:
        writing.start()
        writing.wait()
    except BaseException:
        writing.stop()
        raise
    if writing.raised is not None:
        raise writing.raised  # the cause, without Lance's wrapping
    if isinstance(writing.error, OSError):
        raise ConfigError(f"Expected room for a dataset, got {uri!r}: {why(writing.error)}.") from writing.error
    if writing.error is not None:
        raise writing.error
    assert writing.dataset is not None
    return writing.dataset


def why(error: OSError) -> str:
    """What stood in Lance's way: the system's words where it was the system, else Lance's without its source code."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    if found is not None:
        return os.strerror(int(found[1]))
    return reading.words(error)


class _Stopped(Exception):
    """Ends the stream."""


class _Writing:
    """One call of Lance in a thread, and what came of it."""

    def __init__(self, batches: Iterable[pa.RecordBatch], schema: pa.Schema, uri: str, options: dict[str, Any]) -> None:
        self.dataset: lance.LanceDataset | None = None
        self.error: BaseException | None = None
        self.raised: Exception | None = None  # by the batches
        self._schema, self._uri, self._options = schema, uri, options
        self._wanted, self._done, self._let_go = True, threading.Event(), threading.Event()
        self._source = self._pulled(batches)
        weakref.finalize(self._source, self._let_go.set).atexit = False
        self._thread = threading.Thread(target=self._run, name="gpuload-write", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        try:
            reader = pa.RecordBatchReader.from_batches(self._schema, self._source)
            del self._source
            self.dataset = lance.write_dataset(reader, self._uri, **self._options)
        except BaseException as error:
            self.error = error.with_traceback(None)  # whose frames would hold the reader
        finally:
            reader = None
            self._let_go.wait(_PATIENCE)  # Lance's threads drop it a moment later
            self._done.set()

    def wait(self) -> None:
        while not self._done.wait(_POLL):  # short waits: a signal is seen between them in every thread library
            if ending.is_over():
                self._wanted = False

    def stop(self) -> None:
        """End the stream and wait for Lance. Further interruptions do not hasten it, until they insist."""
        self._wanted, since = False, time.monotonic()
        while self._thread.ident is not None and not self._done.is_set():  # None: it was never begun
            try:
                self._done.wait(_POLL)
            except KeyboardInterrupt:
                if time.monotonic() - since > _PATIENCE:
                    raise

    def _pulled(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        try:
            for batch in batches:
                if not self._wanted:
                    raise _Stopped
                yield batch
                if not self._wanted:
                    raise _Stopped
        except _Stopped:
            raise
        except Exception as error:
            self.raised = error
            raise
        finally:
            close = getattr(batches, "close", None)
            if close is not None:
                close()
