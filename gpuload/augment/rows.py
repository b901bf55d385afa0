"""Rows of a batch: uniforms and images enter; some rows changed by their own factors leave, without a host wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import conv2d

from gpuload.errors import expect

Floats = NDArray[np.float64]


class Draws(Protocol):
    """Random numbers of M images."""

    def uniform(self, name: str, n: int) -> Floats:
        """f64[M, n], each in (0, 1)."""
        ...


def probability(what: str, p: Any) -> None:
    """Raise `ConfigError` unless `p` is one."""
    expect(_is_number(p) and 0 <= p <= 1, f"{what}(p=...) as a probability in [0, 1]", p)


def interval(what: str, name: str, value: Any, least: float, most: float = float("inf")) -> tuple[float, float]:
    """(low, high) with least <= low <= high <= most."""
    pair = isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_is_number, value))
    good = pair and least <= value[0] <= value[1] <= most
    expect(good, f"{what}({name}=(low, high)) with {least:g} <= low <= high <= {most:g}", value)
    return float(value[0]), float(value[1])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def happens(draws: Draws, p: float, count: int) -> NDArray[np.intp]:
    """The rows, of `count`, where something of probability `p` happens."""
    return np.arange(count) if p >= 1 else np.flatnonzero(draws.uniform("p", 1)[:, 0] < p)


def between(draws: Draws, name: str, low: float, high: float) -> Floats:
    """f64[M], uniform between the two."""
    return low + draws.uniform(name, 1)[:, 0] * (high - low)


def below(uniform: Floats, n: Any) -> NDArray[np.int64]:
    """An integer in [0, n) of each uniform."""
    found: NDArray[np.int64] = np.minimum(np.floor(uniform * n), n - 1).astype(np.int64)
    return found


def per_image(values: Any, images: torch.Tensor) -> torch.Tensor:
    """[M] → f32[M, 1, 1, 1] beside the images."""
    return torch.as_tensor(np.asarray(values, np.float32)).to(images.device, non_blocking=True).view(-1, 1, 1, 1)


def change(
    images: torch.Tensor, rows: NDArray[np.intp], function: Callable[..., torch.Tensor], *factors: NDArray[Any]
) -> None:
    """``images[rows] = function(images[rows], *factors[rows])``, in place; `factors` are [M] each."""
    if not len(rows):
        return
    mine = [per_image(factor[rows], images) for factor in factors]
    if len(rows) == len(images):
        images.copy_(function(images, *mine))
        return
    index = torch.from_numpy(np.ascontiguousarray(rows, np.int64)).to(images.device, non_blocking=True)
    images.index_copy_(0, index, function(images.index_select(0, index), *mine))


def filtered(planes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Each plane of f32[P, H, W] under its own weights, f32[P, h, w], where these lie wholly inside it.

    A library takes another algorithm, with other rounding, where there is a single plane: there are two then, so that
    an image's pixels are the same in a batch of its own.
    """
    count = len(planes)
    if count == 1:
        planes, weight = planes.expand(2, -1, -1), weight.expand(2, -1, -1)
    return conv2d(planes[None], weight[:, None], groups=len(planes))[0, :count]
