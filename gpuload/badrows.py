"""Rows that could not become tensors: errors enter as batches are finished; a bounded list and one warning leave."""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass

from gpuload.errors import BadRowWarning, RowError

MOST = 10_000  # of a list: some 3 MB; `stats()` counts all of them
_WHAT = {"skip": "is left out", "mask": "is masked", "replace": "is replaced"}


@dataclass(frozen=True)
class BadRow:
    """A row with a value that could not become a tensor.

    Attributes
    ----------
    row : int
        Position in the dataset, or in its source.
    column : str
    reason : str
        What was expected and what was there.
    epoch : int
        In which it was met first.
    source : str or None
        Name of the dataset in a mix; None for a dataset alone.
    """

    row: int
    column: str
    reason: str
    epoch: int
    source: str | None = None


class BadRows:
    """The first `most` bad rows that one process has met, each column of a row once, in the order of their batches."""

    def __init__(self, most: int = MOST) -> None:
        self._most, self._warned = most, False
        self._found: dict[tuple[str | None, int, str], BadRow] = {}
        self._lock = threading.Lock()

    def add(
        self, row: int, column: str, error: RowError, epoch: int, source: str | None = None, on_error: str = "raise"
    ) -> None:
        """One that was met; with another `on_error` than "raise" the first of all is a `BadRowWarning`."""
        with self._lock:
            key = (source, row, column)
            if key not in self._found and len(self._found) < self._most:
                self._found[key] = BadRow(row, column, error.cause, epoch, source)
            first, self._warned = not self._warned, self._warned or on_error != "raise"
        if first and on_error in _WHAT:
            where = f"row {row}, column `{column}`" + (f" of {source!r}" if source else "")
            warnings.warn(
                f'{where}: {error.cause}. The row {_WHAT[on_error]} (on_error="{on_error}"), as later ones will be '
                "without a warning: dataset.bad_rows lists them, and `gpuload verify` finds the images among them.",
                BadRowWarning,
                stacklevel=2,
            )

    def listed(self) -> list[BadRow]:
        """What was met so far."""
        with self._lock:
            return list(self._found.values())
