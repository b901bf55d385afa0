"""Ctrl-C and SIGTERM: a signal enters at any moment, a quiet end leaves, with nothing temporary left behind.

The command line ends with 128 + the signal's number and one line, also while packages are still being imported: so this
file imports next to nothing, and `gpuload` imports it first. Other programs keep their signals: KeyboardInterrupt is
theirs, and SIGTERM ends them as before, once what is temporary has gone.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import contextmanager, suppress
from time import monotonic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
if hasattr(signal, "SIGHUP"):
    _WORDS[signal.SIGHUP] = "hung up"  # the terminal was closed
_PATIENCE = 2.0  # seconds in which further signals change nothing: two Ctrl-C in a row mean one
_cleaners: list[tuple[int, Callable[[], None]]] = []  # with the process they belong to
_unwinding = 0
_received: tuple[int, float] | None = None  # the first signal, and when it came


def command_line() -> bool:
    """Whether this process is the command line: the script ``gpuload``, or ``python -m gpuload``."""
    if _is_child() or not sys.argv:
        return False
    if sys.argv[0] == "-m":  # the module is being looked for, and its package imported meanwhile
        words = sys.orig_argv
        return "-m" in words[:-1] and words[words.index("-m") + 1].partition(".")[0] == "gpuload"
    if os.path.basename(sys.argv[0]) != "gpuload":
        return False
    with suppress(OSError, ValueError), open(sys.argv[0], encoding="utf-8") as script:
        return "gpuload.tools.cli" in script.read()  # and not somebody's program of that name
    return False


def listen() -> None:
    """From now on a signal ends this process, with one line; within `unwinding` it raises KeyboardInterrupt."""
    for number in _WORDS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or in the background of a shell
            signal.signal(number, _end_command)


@contextmanager
def unwinding() -> Iterator[None]:
    """Around work that must take away what it made: a signal of the command line raises here, as Ctrl-C does."""
    global _unwinding
    _unwinding += 1
    try:
        yield
    finally:
        _unwinding -= 1


def received() -> bool:
    """Whether a signal has come that ends this command."""
    return _received is not None


def say_and_status() -> int:
    """After a KeyboardInterrupt: say what happened in one line, and return the exit status."""
    number = signal.SIGINT if _received is None else _received[0]
    _say(number)
    return 128 + number


def leave(status: int) -> None:
    """End the process without the interpreter's end, which threads of Lance would not survive."""
    _clean()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # a signal may have come in the middle of a print
            stream.flush()
    os._exit(status)


def before_dying(clean: Callable[[], None]) -> None:
    """Call this before a signal ends the process. One that the program handles stays its own, as Python's SIGINT."""
    if (os.getpid(), clean) not in _cleaners:
        _cleaners.append((os.getpid(), clean))
    import threading

    if _is_child() or threading.current_thread() is not threading.main_thread():
        return  # workers are ended by their parents, which have their own ways
    for number in _WORDS:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _die)


def _is_child() -> bool:
    """Whether multiprocessing started this process."""
    process = sys.modules.get("multiprocessing.process")
    return process is not None and process.parent_process() is not None


def _end_command(number: int, frame: FrameType | None) -> None:
    global _received
    if _received is None:
        _received = number, monotonic()
        if _unwinding:
            raise KeyboardInterrupt
    elif monotonic() - _received[1] < _PATIENCE:
        return
    _say(_received[0])
    leave(128 + _received[0])


def _die(number: int, frame: FrameType | None) -> None:
    """Clean up, then die of the signal, as without us."""
    _clean()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _clean() -> None:
    for process, clean in _cleaners:
        if process == os.getpid():
            with suppress(Exception):
                clean()


def _say(number: int) -> None:
    bar = "\r\x1b[K\x1b[?25h" if sys.stderr.isatty() else ""  # where a progress bar was, and the cursor that it hid
    with suppress(OSError):
        os.write(2, f"{bar}gpuload: {_WORDS[signal.Signals(number)]}\n".encode())
