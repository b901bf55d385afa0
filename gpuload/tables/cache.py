"""Temporary folders for copies of rows: each goes with its process, however that ends.

A folder goes when its dataset does, when the interpreter ends, and before SIGTERM ends the process. What a process left
that was killed is known by its lock, which the kernel let go, and taken away by the next one that makes a folder there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from gpuload import ending, signals

try:
    import fcntl
except ImportError:  # no POSIX: nothing is known of others
    fcntl = None  # type: ignore[assignment]

_PREFIX, _OWNER = "gpuload-cache-", "owner"
_held: dict[str, int] = {}  # folder → the open file whose lock says that somebody uses it


def make_folder(where: str | None = None) -> str:
    """A new folder in `where`, or in the system's place for temporary files."""
    _remove_orphans(where or tempfile.gettempdir())
    folder = tempfile.mkdtemp(prefix=_PREFIX, dir=where)
    owner = os.open(Path(folder) / _OWNER, os.O_RDWR | os.O_CREAT)  # open as long as the folder is used, forks included
    if fcntl is not None:
        os.write(owner, os.uname().nodename.encode())
        with contextlib.suppress(OSError):
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if not _held:
        signals.before_dying(_remove_all)
    _held[folder] = owner
    return folder


def remove_folder(folder: str) -> None:
    """Take the folder away."""
    with ending.inside():  # a daemon thread whose dataset is collected as the interpreter ends
        for _ in range(10):  # Lance may still be writing to it
            shutil.rmtree(folder, ignore_errors=True)
            if not os.path.exists(folder):
                break
        owner = _held.pop(folder, None)
        if owner is not None:
            os.close(owner)


def _remove_all() -> None:
    for folder in list(_held):
        remove_folder(folder)


ending.then(_remove_all)
os.register_at_fork(after_in_child=_held.clear)  # the folders are the parent's


def _remove_orphans(where: str) -> None:
    """Folders of processes of this machine that are no more."""
    if fcntl is None:
        return
    for path in Path(where).glob(f"{_PREFIX}*/{_OWNER}"):
        with contextlib.suppress(OSError), open(path, "r+", encoding="utf-8") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError: in use
            if owner.read() == os.uname().nodename:  # a lock of another machine may not be seen here
                shutil.rmtree(path.parent, ignore_errors=True)
