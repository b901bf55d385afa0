"""A read that fails: Lance's own words enter; another try, or one line that says what is wrong and what to do, leaves.

A store that is away is asked again by us, since Lance's own client either gives up or goes to sleep: with its defaults
an outage of 30 s took 172 s, because its rate limiter fell to one request a second. With `CLIENT` a request is tried
for some seconds, then the read as a whole again, until `limit`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from gpuload.errors import GpuloadError, ReadError

T = TypeVar("T")

CLIENT = {
    "client_max_retries": "6",  # of a request: 0.1 s and twice as long each time, some 3 s at most between two
    "client_retry_timeout": "8",  # seconds
    "connect_timeout": "5s",
    "read_timeout": "10s",  # without a byte; a slow answer may take longer
    "lance_aimd_min_rate": "100",  # requests a second, however many failed; Lance's own is 1
}
LIMIT = 300.0  # seconds of trying again; a user's client_retry_timeout is the limit instead
SAY_AFTER = 10.0  # seconds
_LONGEST_PAUSE = 2.0  # seconds between two tries
_LOCAL = ("file", "file-object-store", "file+uring", "memory", "shared-memory")
_PASSING = re.compile(  # in the words of object_store and of the HTTP client in it
    r"error sending request|error decoding response|connection (?:closed|reset|refused|error)|broken pipe"
    r"|timed? ?out|Connection|status code: (?:5\d\d|429|408)|\b50[0234]\b|SlowDown|InternalError|ServiceUnavailable"
    r"|max_retries|body from connection|incomplete message|dns error",
    re.IGNORECASE,
)
_PLACE = re.compile(r",? ?(?:/[\w.+@-]+)+\.rs:\d+(?::\d+)?")
_WRAPPED = re.compile(r"^(?:External error: |LanceError\(\w+\): |Arrow error: |Execution error: |Wrapped error: )+")
_FILE = re.compile(r"[^\s,'\"]*\.lance/((?:data|_deletions|_versions|_indices|_transactions)/[\w.-]+)")
_here = threading.local()
_DAMAGE = re.compile(
    r"magic|protobuf|corrupt|invalid wire|decompress|checksum|panick|Unexpected|out of (?:bounds|range)|decod|overflow"
    r"|buffer|assert|does not match",
    re.IGNORECASE,
)


def is_remote(uri: str) -> bool:
    """Whether reading it may fail and succeed later."""
    scheme, separator, _ = uri.partition("://")
    return bool(separator) and scheme not in _LOCAL


def with_client(uri: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of ``lance.dataset`` with `CLIENT` beneath the user's storage options."""
    if not is_remote(uri):
        return dict(options)
    return {**options, "storage_options": {**CLIENT, **(options.get("storage_options") or {})}}


def limit(options: Mapping[str, Any] | None) -> float:
    """Seconds for which a store is asked again: the user's ``client_retry_timeout``, else `LIMIT`."""
    given = str(((options or {}).get("storage_options") or {}).get("client_retry_timeout", ""))
    number = re.fullmatch(r"(\d+(?:\.\d+)?)s?", given.strip())
    return float(number[1]) if number else LIMIT


def words(error: BaseException) -> str:
    """Lance's own words in one line, without the places in its source code."""
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return _WRAPPED.sub("", _PLACE.sub("", line)).rstrip(" ,.")


def is_trouble(error: BaseException) -> bool:
    """Whether it is about what is stored and not about what was asked for."""
    text = str(error)
    return bool(_FILE.search(text) or _PASSING.search(text)) or any(
        part in text for part in ("failed to fill whole buffer", "too small", "storage version", "Not found")
    )


@contextlib.contextmanager
def until(stop: threading.Event) -> Iterator[None]:
    """In this thread a store that is away is not asked again once `stop` is set: nobody wants the answer any more."""
    before, _here.stop = getattr(_here, "stop", None), stop
    try:
        yield
    finally:
        _here.stop = before


def patiently(
    call: Callable[[], T],
    uri: str,
    rows: Callable[[], tuple[int, ...]] = tuple,
    *,
    limit: float = LIMIT,
    explain: Callable[[BaseException], tuple[str, str]] | None = None,
) -> T:
    """What `call` returns; a store that is away is asked again, and after ten seconds a line on stderr says so.

    Parameters
    ----------
    call : callable
        Reads, and changes nothing.
    rows : callable
        The positions that it reads, asked for where they are to be named.
    limit : float
        Seconds after which it is an error.
    explain : callable, optional
        An error → what is wrong, and what to do about it.

    Raises
    ------
    ReadError
    """
    began, pause = time.monotonic(), 0.1
    stop = getattr(_here, "stop", None) or threading.Event()
    notice = _notice(uri, rows) if is_remote(uri) else None
    try:
        while True:
            try:
                return call()
            except GpuloadError:
                raise
            except BaseException as error:
                if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
                    raise
                waited = time.monotonic() - began
                passing = notice is not None and bool(_PASSING.search(str(error)))
                if not passing or waited + pause > limit or stop.is_set():
                    raise _translated(error, uri, rows(), waited if passing else 0.0, explain) from None
            stop.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
    finally:
        if notice is not None:
            notice.cancel()


def _notice(uri: str, rows: Callable[[], tuple[int, ...]]) -> threading.Timer:
    def say() -> None:
        what = ReadError("", uri, rows()).args[0].removeprefix(" - ").rstrip(".")
        print(f"gpuload: {what} has taken {SAY_AFTER:.0f} s so far", file=sys.stderr, flush=True)

    timer = threading.Timer(SAY_AFTER, say)
    timer.name, timer.daemon = "gpuload-notice", True
    timer.start()
    return timer


def _translated(
    error: BaseException,
    uri: str,
    rows: tuple[int, ...],
    waited: float,
    explain: Callable[[BaseException], tuple[str, str]] | None,
) -> ReadError:
    if waited:
        cause = f"Expected {_file(error) or 'the store'} to be readable, got none in {waited:.0f} s: {words(error)}"
        hint = (
            "load_state_dict(state) goes on from here once it is back; client_retry_timeout in storage_options is how "
            "long it is waited for."
        )
        return ReadError(cause, uri, rows, hint, waited)
    cause, hint = explain(error) if explain else explained(error)
    return ReadError(cause, uri, rows, hint)


def explained(error: BaseException, file: str = "", gone: bool = False, version: int = 0) -> tuple[str, str]:
    """What is wrong, and what to do.

    Parameters
    ----------
    file : str
        The file that was found to be the broken one, where the error does not say.
    gone : bool
        Whether the version that is read is no longer listed.
    """
    text, file = words(error), _file(error) or file or "its files"
    if gone:
        return (
            f"Expected version {version} with all its files, got it cleaned up meanwhile: {text}",
            f"Tags keep a version: lance.dataset(uri).tags.create('training', {version}) before the clean-up; "
            "the latest version is still there.",
        )
    if "Not found" in text or "not found" in text or "No such file" in text:
        return (
            f"Expected {file}, got no such file",
            "Restore it from a copy, or restore an older version of the dataset.",
        )
    if "storage version" in text:
        here = importlib.metadata.version("pylance")
        return f"Expected a storage version that pylance {here} reads, got in {file}: {text}", "Upgrade pylance."
    if "Offset overflow" in text:
        return f"Expected values of at most 2 GiB together, got more: {text}", "Store the column as large_binary."
    if "whole buffer" in text or "too small" in text or "UnexpectedEof" in text:
        return f"Expected {file} as it was written, got it cut short: {text}", "Restore it from a copy."
    if "Permission denied" in text or "AccessDenied" in text or "status code: 403" in text:
        return f"Expected {file} to be readable, got no permission: {text}", ""
    if _DAMAGE.search(text):
        return f"Expected {file} as it was written, got it damaged: {text}", "Restore it from a copy."
    return f"Expected {file} to be readable, got: {text}", ""


def _file(error: BaseException) -> str:
    found = _FILE.search(str(error))
    return found[1] if found else ""
