"""A note in a dataset's folder while it is written: what a killed run leaves behind is known by it, and taken away.

Enter: a target and what is to be written there. Leave: nothing, when the run ended by itself; else a note whose lock
died with its process, and in it the data files that no version may know.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
import uuid
from dataclasses import asdict, dataclass, field
from io import TextIOWrapper
from pathlib import Path

from gpuload.errors import ConfigError

NOTE = "_gpuload_writing.jsonl"  # Lance looks at no file of a dataset's folder but its own
_QUIET = 60.0  # seconds without a byte, after which a temporary file has no writer on another machine


@dataclass
class Run:
    """One run that writes.

    Attributes
    ----------
    source, mode : str
        What is written, and whether it creates, appends or overwrites.
    id : str
        Also a property of the transaction that it commits.
    began : float
        Seconds since 1970.
    files : list of str
        Data files that it has finished.
    """

    source: str
    mode: str
    host: str = field(default_factory=lambda: os.uname().nodename)
    process: int = field(default_factory=os.getpid)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    began: float = field(default_factory=time.time)
    files: list[str] = field(default_factory=list)


class Claim:
    """The note of a run as long as it lives; one that says nothing where the target is on no disk of this machine."""

    def __init__(self, uri: str, run: Run) -> None:
        self.run = run
        self._path = Path(uri) / NOTE
        self._note: TextIOWrapper | None = None
        if "://" in uri:
            return
        try:
            note = open(self._path, "a+", encoding="utf-8")  # noqa: SIM115 - held until the end
            _lock(note, uri)
            note.truncate(0)
        except OSError as error:
            raise ConfigError(f"Expected a place to write a dataset, got {uri!r}: {error.strerror}.") from error
        self._note = note
        self._add(asdict(run))

    def finished(self, file: str) -> None:
        """A data file of this run is complete."""
        self.run.files.append(file)
        self._add({"file": file})

    def release(self) -> None:
        """The run has ended: nothing of it is left that needs a note."""
        if self._note is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()
            self._note.close()

    def _add(self, entry: dict[str, object]) -> None:
        if self._note is not None:
            with contextlib.suppress(OSError):  # a full disk: writing fails soon enough
                self._note.write(json.dumps(entry) + "\n")
                self._note.flush()


def killed(uri: str) -> Run | None:
    """The run that was killed while it wrote to this target, if its note is there.

    Raises
    ------
    ConfigError
        It is alive.
    """
    path = Path(uri) / NOTE
    if "://" in uri or not path.is_file():
        return None
    try:
        with open(path, encoding="utf-8") as note:
            _lock(note, uri)
            lines = [json.loads(line) for line in note.read().splitlines() if line.endswith("}")]
    except OSError as error:
        raise ConfigError(f"Expected a dataset that can be read, got {uri!r}: {error.strerror}.") from error
    if not lines:
        return Run("", "create", began=path.stat().st_mtime)
    return Run(**{**lines[0], "files": [line["file"] for line in lines[1:]]})


def remove_leftovers(uri: str, run: Run) -> None:
    """Take away what a run wrote that has committed nothing: its data files, the temporary ones, its note."""
    data = Path(uri) / "data"
    for name in run.files:
        with contextlib.suppress(OSError):
            (data / name).unlink()
    used = _open_files()
    for path in data.glob(".tmp*"):
        with contextlib.suppress(OSError):
            status = path.stat()
            theirs = (status.st_dev, status.st_ino) in used
            far = run.host != os.uname().nodename and time.time() - status.st_mtime < _QUIET
            if status.st_mtime >= run.began - 1 and not theirs and not far:
                path.unlink()
    forget(uri)


def forget(uri: str) -> None:
    """Take the note away."""
    with contextlib.suppress(OSError):
        (Path(uri) / NOTE).unlink()


def remove_unborn(uri: str) -> None:
    """Take away what a writer made of a target that became no dataset; what is not a writer's stays.

    A thread of Lance may still be closing a file in it: then once more.
    """
    for _ in range(20):
        for name in ("data", "_transactions", "_versions"):
            shutil.rmtree(Path(uri) / name, ignore_errors=True)
        forget(uri)
        if not os.path.isdir(uri) or os.listdir(uri):
            return
        with contextlib.suppress(OSError):
            os.rmdir(uri)
            return
        time.sleep(0.05)


def _lock(note: TextIOWrapper, uri: str) -> None:
    """Hold the file until it is closed, or the process is gone."""
    try:
        fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        note.seek(0)
        first = note.readline()
        who = (
            f"process {json.loads(first)['process']} on {json.loads(first)['host']}" if first.endswith("\n") else "one"
        )
        raise ConfigError(f"Expected a target that nobody writes to, got {uri!r}, which {who} is writing.") from None


def _open_files() -> set[tuple[int, int]]:
    """(device, inode) of every file that another process of this user holds open, on Linux."""
    found = set[tuple[int, int]]()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        if link.parts[2] == str(os.getpid()):
            continue  # what Lance has not closed yet after a failure
        with contextlib.suppress(OSError):
            status = link.stat()
            found.add((status.st_dev, status.st_ino))
    return found
