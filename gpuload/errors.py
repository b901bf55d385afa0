"""What can go wrong, as one small tree. Every message says: expected, got, where, what to do.

GpuloadError
├── ConfigError (ValueError)       an argument that cannot work, found before any row is read
├── DeviceError (RuntimeError)     a device, decoder or package was asked for that this machine lacks
├── ForkError (RuntimeError)       a forked process would use Lance, which cannot survive a fork
├── StateError (ValueError)        a saved position that does not belong to this dataset
├── ReadError (OSError, RuntimeError)  stored rows that cannot be read: .uri, .rows, .cause, .waited
├── VersionError (RuntimeError)    the ranks of a job cannot have one version of a dataset
└── RowError (ValueError)          one row that cannot become tensors: .row, .column, .cause
    ├── DecodeError                its image
    └── TextError                  its text

BadRowWarning (UserWarning)        the first such row of a dataset that goes on without it
"""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any, TypeGuard


class GpuloadError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(GpuloadError, ValueError):
    """An argument that cannot work: unknown column, wrong type, contradicting options."""


class DeviceError(GpuloadError, RuntimeError):
    """The device, the decoder or a package that was asked for is not there."""


class ForkError(GpuloadError, RuntimeError):
    """Lance was in use when this process was forked; using it here would crash or hang."""


class StateError(GpuloadError, ValueError):
    """A saved state that does not fit this dataset. ``field``, ``saved`` and ``here`` say where they differ."""

    def __init__(self, message: str, field: str = "", saved: object = None, here: object = None) -> None:
        super().__init__(message)
        self.field, self.saved, self.here = field, saved, here


class ReadError(GpuloadError, OSError, RuntimeError):
    """Stored rows that cannot be read: a file is missing or damaged, a version is gone, a store is away.

    Attributes
    ----------
    cause : str
        What was expected and what was there, with the file.
    uri : str
    rows : tuple of int
        Positions that were to be read; empty where it was something else.
    waited : float
        Seconds of trying again, 0 for what another try would not change.
    """

    def __init__(
        self, cause: str, uri: str = "", rows: tuple[int, ...] = (), hint: str = "", waited: float = 0.0
    ) -> None:
        self.cause, self.uri, self.rows, self.hint, self.waited = cause, uri, rows, hint, waited
        which = f"{_few(rows)} of " if rows else ""
        super().__init__(f"{cause} - reading {which}{uri}.{' ' + hint if hint else ''}")

    def __reduce__(self) -> tuple[type[ReadError], tuple[str, str, tuple[int, ...], str, float]]:
        return type(self), (self.cause, self.uri, self.rows, self.hint, self.waited)

    def at(self, rows: tuple[int, ...]) -> ReadError:
        """The same error for other rows: those of one batch among several that were read together."""
        return type(self)(self.cause, self.uri, rows, self.hint, self.waited)


class VersionError(GpuloadError, RuntimeError):
    """The ranks of a job cannot have one version of a dataset: rank 0 did not come, or has other files."""


class RowError(GpuloadError, ValueError):
    """One row that cannot become tensors.

    Attributes
    ----------
    row : int
        Position of the row in the dataset (after deletions, before any filter), -1 if unknown.
    column : str
    cause : str
        What was expected and what was there.
    """

    def __init__(self, cause: str, row: int = -1, column: str = "", hint: str = "") -> None:
        self.row, self.column, self.cause, self.hint = row, column, cause, hint
        where = f" - at row {row}, column `{column}`." if column else ""
        super().__init__(f"{cause}{where}{' ' + hint if hint else ''}")

    def __reduce__(self) -> tuple[type[RowError], tuple[str, int, str, str]]:
        return type(self), (self.cause, self.row, self.column, self.hint)

    def at(self, row: int, column: str, hint: str) -> RowError:
        """The same error with its place: a decoder knows the bytes, only the dataset knows the row."""
        found = type(self)(self.cause, row, column, hint)
        found.__cause__ = self.__cause__  # of somebody else's code, with its traceback
        return found

    def bare(self) -> None:
        """Lets go of the frames that it and what caused it were raised in. Whoever keeps it keeps those that called
        them otherwise, a decoder with its threads and memory of a GPU, until the collector of cycles comes by."""
        error: BaseException | None = self
        while error is not None:
            error.__traceback__ = None
            error = error.__cause__ or error.__context__


class DecodeError(RowError):
    """An image that cannot be decoded: null, empty, broken, unknown format, too large."""


class TextError(RowError):
    """A text that the tokenizer, or what prepares texts for it, refused: too long, or it choked on it."""


class BadRowWarning(UserWarning):
    """A row cannot become tensors, and ``on_error`` goes on without it. The first of a dataset, once."""


def _few(rows: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, rows[:4]))
    return f"row {shown}" if len(rows) == 1 else f"rows {shown}{f', ... ({len(rows)})' if len(rows) > 4 else ''}"


def expect(ok: bool, what: str, got: object) -> None:
    """Raise `ConfigError` unless `ok`: "Expected <what>, got <got>"."""
    if not ok:
        raise ConfigError(f"Expected {what}, got {got!r}.")


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is one real number, of Python's or NumPy's, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_one_of(value: Any, choices: Iterable[Any]) -> bool:
    """Whether it equals one of these; an array, which compares by element, equals none."""
    return not getattr(value, "ndim", 0) and value in tuple(choices)


def expect_counts(least: int = 1, **counts: object) -> None:
    """Raise `ConfigError` for the first keyword that is not an int of at least `least`."""
    for name, value in counts.items():
        if type(value) is not int or value < least:
            raise ConfigError(f"Expected {name} as an int of at least {least}, got {value!r}.")


def expect_int(**numbers: object) -> None:
    """Raise `ConfigError` for the first keyword that is not an int, of Python's or NumPy's."""
    for name, value in numbers.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise ConfigError(f"Expected {name} as an int, got {value!r}.")


def expect_epoch(epoch: object) -> None:
    """Raise `ConfigError` unless it is an int of at most 64 bits."""
    expect_int(epoch=epoch)
    expect(-(2**63) <= epoch < 2**63, "epoch as an int of 64 bits", epoch)  # type: ignore[operator]


def stopped(where: str) -> RuntimeError:
    """What becomes of a StopIteration that somebody's function let out: it would end the epoch without a word."""
    return RuntimeError(
        f"Expected a result in {where}, got StopIteration out of a function that was called there: next() of something "
        "that was at its end? Catch it, or give next() a default."
    )


def install(extra: str) -> str:
    """The pip line for ``"cuda"`` or ``"dali"``, with the number of the CUDA that torch was built for, else 13."""
    import torch  # here, for the command line's sake, which imports this file before anything heavy

    return f'pip install "gpuload[{extra}{(torch.version.cuda or "13").split(".")[0]}]"'
