"""What travels: columns of one batch enter, a `Batch` leaves, which torch's DataLoader passes on untouched."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data._utils.collate import default_collate_fn_map

from gpuload.errors import ConfigError

_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32}


class Batch(dict[str, Any]):
    """Column name → tensor ``[B, ...]``, or a list of B values where there is no tensor form.

    Attributes
    ----------
    rows : i64[B]
        Positions of the rows in the dataset, on the CPU; -1 in a batch that a framework rebuilt from its columns.
    valid : bool[B]
        False for rows that only fill up a short rank and for rows that ``on_error="mask"`` blanked, on the CPU.
    epoch, step : int
        This batch's place: batch `step` of its rank in `epoch`.
    nulls : dict of str to bool[B]
        For columns without a NaN: which rows were null and hold 0 or False instead. Empty where none were.
    regions : dict of str to f64[B, 4], or f64[B, V, 4] with V > 1 views
        By column of images: x0, y0, width and height of what became the pixels, in pixels of the original image after
        its EXIF orientation, on the CPU. Means nothing where ``valid`` is False.
    original_sizes : dict of str to i64[B, 2]
        Height and width of the original images, after their EXIF orientation, on the CPU.
    """

    rows: torch.Tensor
    valid: torch.Tensor
    epoch: int
    step: int
    nulls: dict[str, torch.Tensor]
    regions: dict[str, torch.Tensor]
    original_sizes: dict[str, torch.Tensor]

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
    ) -> None:
        super().__init__(columns)
        if rows is None:  # type(batch)({...}), as transformers and accelerate write it
            rows = torch.full((max(map(len, columns.values()), default=0),), -1)
        valid = torch.ones(len(rows), dtype=torch.bool) if valid is None else valid
        self.rows, self.valid, self.epoch, self.step, self.nulls = rows, valid, epoch, step, nulls or {}
        self.regions, self.original_sizes = regions or {}, original_sizes or {}
        for name, value in columns.items():
            if len(value) != len(rows):
                raise ValueError(f"Expected {len(rows)} values in column {name!r}, got {len(value)}.")

    @property
    def size(self) -> int:
        """B, the number of rows."""
        return len(self.rows)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its columns on `device`; `rows` and `valid` stay on the CPU."""
        moved = {name: _each(value, lambda t: t.to(device, non_blocking=non_blocking)) for name, value in self.items()}
        return self._with(moved)

    def pin_memory(self, device: Any = None) -> Batch:
        """The same batch in page-locked memory; what is on a GPU already stays as it is."""
        pinned = {name: _each(value, lambda t: t if t.is_cuda else t.pin_memory()) for name, value in self.items()}
        return self._with(pinned)

    def keep(self, mask: NDArray[np.bool_]) -> Batch:
        """The rows where ``mask`` (bool[B]) is True."""
        index = torch.from_numpy(np.flatnonzero(mask))
        pinned = index.pin_memory() if any(_on_cuda(value) for value in self.values()) else index

        def pick(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                kept = pick_rows(value, (pinned if value.is_cuda else index).to(value.device, non_blocking=True))
                last = value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
                return kept.contiguous(memory_format=torch.channels_last) if last else kept
            return [value[i] for i in index.tolist()]

        columns = {name: pick(value) for name, value in self.items()}
        return Batch(columns, self.rows[index], self.valid[index], self.epoch, self.step, *self._of_rows(index))

    def _with(self, columns: dict[str, Any]) -> Batch:
        """The same rows with other columns."""
        about = (self.nulls, self.regions, self.original_sizes)
        return Batch(columns, self.rows, self.valid, self.epoch, self.step, *about)

    def _of_rows(self, index: Any) -> tuple[dict[str, torch.Tensor], ...]:
        """What is known of some rows, by column."""
        about = (self.nulls, self.regions, self.original_sizes)
        return tuple({name: values[index] for name, values in each.items()} for each in about)

    def __reduce__(self) -> tuple[type[Batch], tuple[Any, ...]]:
        about = (self.nulls, self.regions, self.original_sizes)
        return type(self), (dict(self), self.rows, self.valid, self.epoch, self.step, *about)

    def __repr__(self) -> str:
        shown = [f"{name}: {_shape(value)}" for name, value in self.items()]
        shown += [f"epoch={self.epoch}", f"step={self.step}", f"rows={self.size}"]
        invalid = int((~self.valid).sum())
        return f"Batch({', '.join(shown + [f'invalid={invalid}'] * bool(invalid))})"


def pick_rows(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    """``tensor[index]`` for every dtype: torch cannot index unsigned integers of more than 8 bits everywhere."""
    signed = _SIGNED.get(tensor.dtype)
    return tensor[index] if signed is None else tensor.view(signed)[index].view(tensor.dtype)


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
    nested = bool(value) and isinstance(value[0], torch.Tensor)
    inner = _shape(value[0]) if nested else type(value[0]).__name__ if value else ""
    return f"list[{len(value)}] of {inner}" if inner else "list[0]"


def _collate(batches: Iterable[Batch], *, collate_fn_map: Any = None) -> Batch:
    """What `DataLoader(dataset)` does with its default ``batch_size=1``: one batch stays that batch."""
    found = list(batches)
    if len(found) == 1:
        return found[0]
    raise ConfigError(
        f"Expected DataLoader(dataset) or DataLoader(dataset, batch_size=None), got batch_size={len(found)}: "
        "LanceDataset yields whole batches. Give the number of rows to LanceDataset(..., batch_size=...)."
    )


default_collate_fn_map[Batch] = _collate
