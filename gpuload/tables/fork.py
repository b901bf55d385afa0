"""Lance's threads do not survive a fork, and its runtime then crashes or hangs: a process forked too late knows it."""

from __future__ import annotations

import os

from gpuload.errors import ForkError

_lost = False  # Lance was running in an ancestor when this process, or one between them, was forked
_lost_in_child = False  # what a child of the fork that goes on now will be


def lance_running() -> bool:
    """Whether Lance has started its threads in this process, through this package or not (Linux)."""
    try:
        tasks = os.listdir("/proc/self/task")
    except OSError:  # no procfs: be careful
        return True
    for task in tasks:
        try:
            with open(f"/proc/self/task/{task}/comm") as file:
                if file.read().startswith("lance"):
                    return True
        except OSError:  # the thread has ended
            continue
    return False


def check_fork() -> None:
    """Raise before Lance is touched in a process where it cannot work.

    Raises
    ------
    ForkError
        This process was forked while Lance was running, or an ancestor of it was.
    """
    if _lost:
        raise ForkError(
            "Expected a process in which Lance can run, got one forked after Lance was in use "
            "(a DataLoader worker started by fork?). Use num_workers=0: reading and decoding have threads of their "
            'own. Or DataLoader(..., num_workers=n, multiprocessing_context="spawn").'
        )


def _before_fork() -> None:
    global _lost_in_child
    _lost_in_child = _lost or lance_running()


def _in_child() -> None:
    global _lost
    _lost = _lost_in_child


os.register_at_fork(before=_before_fork, after_in_child=_in_child)
