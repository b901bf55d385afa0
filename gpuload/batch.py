"""What travels: columns of one batch enter, a `Batch` leaves, which torch's DataLoader passes on untouched."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data._utils.collate import default_collate_fn_map

from gpuload.errors import ConfigError
from gpuload.frameworks import batches_of_batches

_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32}


class Batch(dict[str, Any]):
    """Column name → tensor ``[B, ...]``, or a list of B values where there is no tensor form.

    Its user may put anything else beside the columns, a loss for instance: it is shown, moved and pickled with them.

    Attributes
    ----------
    rows : i64[B]
        Positions of the rows in the dataset, on the CPU; -1 in a batch that a framework rebuilt from its columns.
    valid : bool[B]
        False for rows that only fill up a short rank and for bad ones that ``on_error="mask"`` blanked or
        ``"replace"`` filled in, on the CPU.
    epoch, step : int
        This batch's place: batch `step` of its rank in `epoch`.
    nulls : dict of str to bool[B]
        For columns without a NaN: which rows were null and hold 0, False or the empty text instead. Empty where none
        were.
    regions : dict of str to f64[B, 4], or f64[B, V, 4] with V > 1 views
        By column of images: x0, y0, width and height of what became the pixels, in pixels of the original image after
        its EXIF orientation (as it is stored with ``Image(orient=False)``), on the CPU. Means nothing where ``valid``
        is False.
    original_sizes : dict of str to i64[B, 2]
        Height and width of the original images, in the same way, on the CPU.
    source : i64[B] or None
        Which source of a `Mix` each row is from, by number in its order, on the CPU; None for one dataset.
    """

    rows: torch.Tensor
    valid: torch.Tensor
    epoch: int
    step: int
    nulls: dict[str, torch.Tensor]
    regions: dict[str, torch.Tensor]
    original_sizes: dict[str, torch.Tensor]
    source: torch.Tensor | None

    def __init__(
        self,
        columns: dict[str, Any],
        rows: torch.Tensor | None = None,
        valid: torch.Tensor | None = None,
        epoch: int = 0,
        step: int = 0,
        nulls: dict[str, torch.Tensor] | None = None,
        regions: dict[str, torch.Tensor] | None = None,
        original_sizes: dict[str, torch.Tensor] | None = None,
        source: torch.Tensor | None = None,
    ) -> None:
        super().__init__(columns)
        if rows is None:  # type(batch)({...}), as transformers and accelerate write it
            rows = torch.full((max((len(v) for v in columns.values() if _has_rows(v)), default=0),), -1)
        valid = torch.ones(len(rows), dtype=torch.bool) if valid is None else valid
        self.rows, self.valid, self.epoch, self.step, self.nulls = rows, valid, epoch, step, nulls or {}
        self.regions, self.original_sizes = regions or {}, original_sizes or {}
        self.source = source
        for name, value in columns.items():
            if _has_rows(value) and len(value) != len(rows):
                raise ValueError(f"Expected {len(rows)} values in column {name!r}, got {len(value)}.")

    @property
    def size(self) -> int:
        """B, the number of rows."""
        return len(self.rows)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its columns on `device`; `rows` and `valid` stay on the CPU."""
        return self._with({n: _each(v, lambda t: t.to(device, non_blocking=non_blocking)) for n, v in self.items()})

    def pin_memory(self, device: Any = None) -> Batch:
        """The same batch in page-locked memory; what is on a GPU already stays as it is."""
        return self._with({n: _each(v, lambda t: t if t.is_cuda else t.pin_memory()) for n, v in self.items()})

    def _with(self, columns: dict[str, Any]) -> Batch:
        """The same rows with other columns; what the user has put among them may have any form."""
        return _rebuilt(Batch, columns, self.rows, self.valid, self.epoch, self.step, *self._about())

    def _about(self) -> tuple[Any, ...]:
        """What is known of the rows: dicts of a tensor by column, and tensors or None."""
        return self.nulls, self.regions, self.original_sizes, self.source

    def keep(self, mask: NDArray[np.bool_]) -> Batch:
        """The rows where ``mask`` (bool[B]) is True."""
        kept = np.flatnonzero(mask)
        columns, about = self._picked(kept)
        index = torch.from_numpy(kept)
        return _rebuilt(Batch, columns, self.rows[index], self.valid[index], self.epoch, self.step, *about)

    def replace(self, bad: NDArray[np.bool_]) -> Batch:
        """The same rows; where ``bad`` (bool[B]) is True with the columns of the next row where it is not, around the
        end, and with zeros where there is none. `rows`, `source` and `valid` stay."""
        good, at = np.flatnonzero(~bad), np.flatnonzero(bad)
        if not len(good):
            return self._with({name: _each(value, torch.zeros_like) for name, value in self.items()})
        index = np.arange(self.size)
        index[at] = good[np.searchsorted(good, at) % len(good)]
        columns, (*about, _) = self._picked(index)
        return _rebuilt(Batch, columns, self.rows, self.valid, self.epoch, self.step, *about, self.source)

    def _picked(self, rows: NDArray[np.int64]) -> tuple[dict[str, Any], tuple[Any, ...]]:
        """The columns of these rows of the batch, in this order, and what is known of them."""
        index = torch.from_numpy(rows)
        pinned = index.pin_memory() if any(_on_cuda(value) for value in self.values()) else index

        def pick(value: Any) -> Any:
            if not _has_rows(value) or len(value) != self.size:  # the user's own
                return value
            if isinstance(value, torch.Tensor):
                kept = pick_rows(value, (pinned if value.is_cuda else index).to(value.device, non_blocking=True))
                last = value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
                return kept.contiguous(memory_format=torch.channels_last) if last else kept
            return [value[i] for i in rows.tolist()]  # a list, or a sequence of the user's

        about = tuple(
            {name: values[index] for name, values in each.items()} if isinstance(each, dict)
            else each if each is None else each[index]
            for each in self._about()
        )  # fmt: skip
        return {name: pick(value) for name, value in self.items()}, about

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return _rebuilt, (type(self), dict(self), self.rows, self.valid, self.epoch, self.step, *self._about())

    def __repr__(self) -> str:
        shown = [f"{name}: {_shape(value)}" for name, value in self.items()]
        shown += [f"epoch={self.epoch}", f"step={self.step}", f"rows={self.size}"]
        invalid = int((~self.valid).sum())
        return f"Batch({', '.join(shown + [f'invalid={invalid}'] * bool(invalid))})"


def _rebuilt(kind: type[Batch], columns: dict[str, Any], *rest: Any) -> Batch:
    """A batch with whatever its user had put among the columns, of any form."""
    batch = kind({}, *rest)
    batch.update(columns)
    return batch


def pick_rows(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    """``tensor[index]`` for every dtype: torch cannot index unsigned integers of more than 8 bits everywhere."""
    signed = _SIGNED.get(tensor.dtype)
    return tensor[index] if signed is None else tensor.view(signed)[index].view(tensor.dtype)


def _has_rows(value: Any) -> bool:
    """Whether it is a column, and no number, scalar or text of the user's."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return value.ndim > 0
    return isinstance(value, (list, tuple))


def _on_cuda(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_cuda


def _each(value: Any, function: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, list) and value and isinstance(value[0], (torch.Tensor, list)):
        return [_each(item, function) for item in value]
    return value


def _shape(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        device = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{device}"
    if not isinstance(value, list):  # the user's own
        return type(value).__name__
    first = value[0] if value else None
    inner = _shape(first) if isinstance(first, torch.Tensor) else type(first).__name__
    return f"list[{len(value)}] of {inner}" if value else "list[0]"


def _collate(batches: Iterable[Batch], *, collate_fn_map: Any = None) -> Batch:
    """What `DataLoader(dataset)` does with its default ``batch_size=1``: one batch stays that batch."""
    found = list(batches)
    if len(found) == 1:
        return found[0]
    raise ConfigError(batches_of_batches())


default_collate_fn_map[Batch] = _collate
