"""Where ranks can talk without a collective: the launcher's or the process group's key-value store, reached anew.

A store is asked through a connection of its own, so that a forked worker never writes into its parent's, and a spawned
one, which has no process group, needs the address alone. Nothing here waits for a rank, except `wait`.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed

CONNECT = 10.0  # seconds; whoever serves a store does it before anybody is told of it
WAIT = 120.0  # seconds for a rank; GPULOAD_RANK_TIMEOUT, or a process group's own time limit where that is shorter
SAY_AFTER = 10.0  # seconds until somebody who waits says so

_TCPStore: Any = getattr(torch.distributed, "TCPStore", None)  # a torch may be built without torch.distributed
_PrefixStore: Any = getattr(torch.distributed, "PrefixStore", None)


@dataclass(frozen=True)
class Address:
    """A TCPStore that any process may reach.

    Attributes
    ----------
    host, port : str, int
    limit : float
        Seconds that the process group allows, or `WAIT`.
    """

    host: str
    port: int
    limit: float

    def connect(self) -> Any:
        """A connection of this process's own; None, with a warning, where nobody answers."""
        try:
            return _TCPStore(
                self.host, self.port, None, False, timeout=timedelta(seconds=CONNECT), wait_for_workers=False
            )
        except (RuntimeError, ValueError) as error:
            warnings.warn(
                f"Expected the job's store at {self.host}:{self.port}, got no answer: {str(error).splitlines()[0]}. "
                "Ranks open the latest version each; give dataset_options={'version': n} to have one.",
                stacklevel=2,
            )
            return None


def address() -> Address | None:
    """The launcher's store, which is there before any process group and after it; else the process group's."""
    if not torch.distributed.is_available():
        return None
    store = group_store()
    limit = time_limit(store)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return Address(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), limit)
    while isinstance(store, _PrefixStore):
        store = store.underlying_store
    return Address(store.host, store.port, limit) if isinstance(store, _TCPStore) else None


def time_limit(store: Any) -> float:
    """Seconds for which a rank is waited for."""
    limit = float(os.environ.get("GPULOAD_RANK_TIMEOUT", WAIT))
    return limit if store is None else min(limit, float(store.timeout.total_seconds()))


def group_store() -> Any:
    """The default process group's store, None without one. torch has no public name for it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    try:
        return torch.distributed.distributed_c10d._get_default_store()
    except (ValueError, RuntimeError):  # a backend without a store, such as MPI
        return None


def prefix() -> str:
    """Of the keys of this start of the job: a launcher's store outlives the processes that it starts again."""
    run = [os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RUN_ID", "RESTART_COUNT")]
    return f"gpuload/{'/'.join(run)}"


def wait(store: Any, key: str, limit: float, told: Callable[[float], str]) -> str | None:
    """The value of `key` once it is there; None after `limit` seconds. After ten, one line on stderr: `told(seconds)`.

    Asks again and again: a `wait` of the store's own would hold its lock, and say nothing.
    """
    began, said, pause = time.monotonic(), False, 0.002
    while not store.check([key]):
        waited = time.monotonic() - began
        if waited > limit:
            return None
        if waited > SAY_AFTER and not said:
            said = True
            print(told(waited), file=sys.stderr, flush=True)
        time.sleep(pause)
        pause = min(pause * 1.5, 0.25)
    found: bytes = store.get(key)
    return found.decode()
