"""What a column becomes: a `Field` takes the Arrow column of a batch and gives finished values, or work on pixels.

The pipeline knows no kind of column by name. A new kind is one file in this folder and one line in choose.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from gpuload.clock import Clock
from gpuload.device import Streams
from gpuload.errors import RowError
from gpuload.images import Decoder
from gpuload.order.draws import Draws
from gpuload.tables import Selection

Fails = list[tuple[int, str, RowError]]  # (row of the batch, column, why)


@dataclass(frozen=True)
class Column:
    """One output column, for people and for the field that makes it.

    Attributes
    ----------
    name : str
    type : pa.DataType
        As it is read.
    role : str
        In a word: image, text, tensor, list, bytes.
    form : str
        dtype and shape of a batch in words, B rows.
    transform : object
        What the user gave for it, None without.
    make : callable
        The field of this column and of others with the same `make` and `origin`.
    ready : object
        What was opened for it already, such as a tokenizer.
    more : tuple of str
        Names of what it gives beside the column of its own name.
    decodes : bool
        Whether it needs the decoder.
    follows : str
        The column of images that it moves with, "" without: its field comes after theirs.
    """

    name: str
    type: pa.DataType
    role: str
    form: str
    transform: Any
    make: Callable[[list[Column], Parts], list[Field]]
    ready: Any = None
    more: tuple[str, ...] = ()
    decodes: bool = False
    follows: str = ""


@dataclass(frozen=True)
class Geometry:
    """Where the images of an output are looked at, for what moves with their pixels.

    Attributes
    ----------
    views : VIEW[B * V]
        V of each image, one image after the other.
    count : int
        V.
    sizes : i64[B, 2]
        Height and width of each image as a person sees it; 0 where it is unknown.
    orientation : u8[B]
        EXIF, 1 to 8: what is applied to each stored image.
    size : (int, int) or None
        Height and width of the output; None where every image keeps its own.
    orient : bool
        Whether the orientation of files is applied at all.
    """

    views: NDArray[np.void]
    count: int
    sizes: NDArray[np.int64]
    orientation: NDArray[np.uint8]
    size: tuple[int, int] | None
    orient: bool = True

    @property
    def regions(self) -> NDArray[np.float64]:
        """x0, y0, width, height of each view in the image as a person sees it: f64[B, 4], or [B, V, 4] with V > 1."""
        found = self.views["region"].copy()  # from rows of 41 bytes
        return found if self.count == 1 else found.reshape(-1, self.count, 4)


@dataclass(frozen=True)
class Looked:
    """Values of a binary column that were looked at, and how many of them start like an image."""

    images: int
    count: int


@dataclass(frozen=True)
class Known:
    """What is known of the columns beside their Arrow types.

    Attributes
    ----------
    names : tuple of str
        Of all columns that are read.
    features : mapping
        Hugging Face's own description of the columns, by name.
    values : callable
        Name → some values of a binary column that are not null, the first one first, as Arrow scalars; read as they are
        asked for.
    formats : tuple of str
        Kinds of images that somebody else will decode: images stay encoded. Empty where they are decoded here.
    looked : dict
        What binary columns turned out to be.
    """

    names: tuple[str, ...]
    features: Mapping[str, Any]
    values: Callable[[str], Iterable[Any]]
    formats: tuple[str, ...] = ()
    looked: dict[str, Looked] = field(default_factory=dict)


@dataclass(frozen=True)
class Parts:
    """What fields work with; one for all of them.

    Attributes
    ----------
    decoder : Decoder
    streams : Streams
    max_pixels : int
    tokenize, resize : Clock
    origin : callable
        Output name → the stored column or expression that it comes from.
    """

    decoder: Decoder
    streams: Streams
    max_pixels: int
    tokenize: Clock
    resize: Clock
    origin: Callable[[str], str]


class Work(Protocol):
    """What is left to do for a batch's column once it was read: decoding, in slices and on any thread.

    Attributes
    ----------
    cost : i64[N]
        Encoded bytes of each row: what slices are cut by.
    room : i64[N]
        Bytes that decoding each row takes: what slices are cut by, too, and wait for.
    size : int
        Bytes of the finished column; grows where it was not known before.
    """

    cost: NDArray[np.int64]
    room: NDArray[np.int64]
    size: int

    def run(self, lo: int, hi: int) -> tuple[Fails, Any]:
        """Rows lo to hi; slices may run at the same time. Returns the rows that failed, and the event after what it put
        on a stream of its own, None on the CPU."""
        ...

    def finish(self) -> dict[str, Any]:
        """The values, once every slice has run; the current stream already waits for all events."""
        ...


@dataclass
class Taken:
    """What a field made of a batch's column.

    Attributes
    ----------
    values : dict of str to Tensor or list
        Finished.
    nulls : dict of str to bool[B]
        Rows whose null became 0 or False.
    fails : list of (row, column, RowError)
    work : Work or None
        What gives the other values.
    read : int
        Bytes that were read beside the table.
    refused : int
        Images that will not be decoded, for what their headers say.
    geometry : dict of str to Geometry
        Of its outputs of images.
    last : dict of str to callable
        What is made of a tensor of `values` once it is on the device, without a copy: a list of its parts.
    """

    values: dict[str, Any] = field(default_factory=dict)
    nulls: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    fails: Fails = field(default_factory=list)
    work: Work | None = None
    read: int = 0
    refused: int = 0
    geometry: dict[str, Geometry] = field(default_factory=dict)
    last: dict[str, Callable[[Any], Any]] = field(default_factory=dict)


class Field(Protocol):
    """What columns become. `take` may be called from many threads at once."""

    columns: list[Column]

    def take(self, rows: Selection, draws: Draws, geometry: Mapping[str, Geometry]) -> Taken:
        """The batch's columns of `rows`, B of them; `geometry` is that of the image columns taken before."""
        ...


def stacked(values: list[torch.Tensor | None], blank: torch.Tensor) -> Any:
    """One tensor where all that are there have one shape, else the list; what is not there becomes zeros: of that
    shape, or like `blank` where there are several."""
    shapes = {tuple(value.shape) for value in values if value is not None}
    empty = blank.new_zeros(next(iter(shapes))) if len(shapes) == 1 else blank
    filled = [empty if value is None else value for value in values]
    return torch.stack(filled) if len(shapes) <= 1 and filled else filled


def is_text(kind: pa.DataType) -> bool:
    """Whether an Arrow type is a string, plain or dictionary-encoded."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def storage_type(kind: pa.DataType) -> pa.DataType:
    """The type below an extension type."""
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
