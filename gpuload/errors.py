"""What can go wrong, as one small tree. Every message says: expected, got, where, what to do.

GpuloadError
├── ConfigError (ValueError)       an argument that cannot work, found before any row is read
├── DeviceError (RuntimeError)     a device, decoder or package was asked for that this machine lacks
├── ForkError (RuntimeError)       a forked process would use Lance, which cannot survive a fork
├── StateError (ValueError)        a saved position that does not belong to this dataset
└── RowError (ValueError)          one row that cannot become tensors: .row, .column, .cause
    ├── DecodeError                its image
    └── TextError                  its text
"""

from __future__ import annotations

from numbers import Integral


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
        return type(self)(self.cause, row, column, hint)

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
    """A text that the tokenizer refused."""


def expect(ok: bool, what: str, got: object) -> None:
    """Raise `ConfigError` unless `ok`: "Expected <what>, got <got>"."""
    if not ok:
        raise ConfigError(f"Expected {what}, got {got!r}.")


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


def install(extra: str) -> str:
    """The pip line for ``"cuda"`` or ``"dali"``, with the number of the CUDA that torch was built for, else 13."""
    import torch  # here, for the command line's sake, which imports this file before anything heavy

    return f'pip install "gpuload[{extra}{(torch.version.cuda or "13").split(".")[0]}]"'
