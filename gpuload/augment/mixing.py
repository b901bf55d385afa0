"""Mixing: a batch whose images are each mixed with another's, and soft labels; partners are the valid rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpuload.augment.erase import inside
from gpuload.augment.rows import Draws, Floats
from gpuload.batch import Batch
from gpuload.errors import ConfigError, expect

_TRIES = 16  # of a rejection that succeeds nineteen times of twenty


@dataclass(frozen=True)
class _Mixing:
    """What both have: `alpha`, and the labels that become soft.

    Parameters
    ----------
    alpha : float
        The share of an image's own pixels is drawn from Beta(alpha, alpha), for each row.
    labels : str
        Column of class numbers i64[B], or of what an earlier mixing made of them; becomes f32[B, classes].
    classes : int
    images : str, optional
        Column of images; all of floating images by default.
    p : float
        Probability that a row is mixed.
    """

    alpha: float
    labels: str
    classes: int
    images: str | None = None
    p: float = 1.0

    def __post_init__(self) -> None:
        name, number = type(self).__name__, (int, float)
        expect(isinstance(self.alpha, number) and not isinstance(self.alpha, bool) and self.alpha > 0,
               f"{name}(alpha=...) above 0", self.alpha)  # fmt: skip
        expect(isinstance(self.labels, str), f'{name}(labels="name of a column")', self.labels)
        expect(
            type(self.classes) is int and 0 < self.classes < 2**31,
            f"{name}(classes=...) as a positive int",
            self.classes,
        )
        column = self.images is None or (isinstance(self.images, str) and self.images != "")
        expect(column, f'{name}(images="name of a column")', self.images)
        good = isinstance(self.p, number) and not isinstance(self.p, bool) and 0 <= self.p <= 1
        expect(good, f"{name}(p=...) as a probability in [0, 1]", self.p)

    def __call__(self, batch: Batch, draws: Draws) -> Batch:
        names = self._names(batch)
        partner = partners(batch.valid.numpy())
        own = beta(draws.uniform("beta", 2 * 3 * _TRIES + 2), self.alpha)
        mixed = (draws.uniform("p", 1)[:, 0] < self.p) & (partner != np.arange(batch.size))
        own = np.where(mixed, own, 1.0)
        mixes = {name: self._mix(batch[name], partner, own, draws) for name in names}
        _, share = mixes[names[0]]
        batch[self.labels] = _blend(self._soft(batch[self.labels], batch.valid), partner, share)
        batch.update({name: images for name, (images, _) in mixes.items()})
        return batch

    def _mix(
        self, images: torch.Tensor, partner: NDArray[np.intp], own: Floats, draws: Draws
    ) -> tuple[torch.Tensor, Floats]:
        """The images mixed, and the share of its own that each has in the end."""
        raise NotImplementedError

    def _names(self, batch: Batch) -> list[str]:
        name = type(self).__name__
        for column in (self.labels, *([self.images] if self.images else [])):
            if column not in batch:
                raise ConfigError(f"Expected {name}'s column among {list(batch)}, got {column!r}.")
        found = [self.images] if self.images else [n for n, value in batch.items() if _mixable(value)]
        if not found or not all(_mixable(batch[n]) for n in found):
            raise ConfigError(f"Expected a column of floating images of one size for {name}, got {batch!r}.")
        return found

    def _soft(self, labels: Any, valid: torch.Tensor) -> torch.Tensor:
        """f32[B, classes] of integers [B]; a label outside is an error on the CPU, and a row of NaN on a GPU, which
        nobody waits for; where the row is not valid, bool[B], it is a row of zeros."""
        if isinstance(labels, torch.Tensor) and labels.is_floating_point() and labels.shape[1:] == (self.classes,):
            return labels
        if not isinstance(labels, torch.Tensor) or labels.dim() != 1 or labels.is_floating_point():
            raise ConfigError(f"Expected labels as class numbers i64[B] in {self.labels!r}, got {labels!r}.")
        labels = labels.long()  # torch cannot compare all unsigned integers
        valid = valid.to(labels.device, non_blocking=True)
        outside = valid & ((labels < 0) | (labels >= self.classes))
        if labels.device.type == "cpu" and bool(outside.any()):
            got = int(labels[outside][0])
            raise ConfigError(f"Expected labels from 0 to {self.classes - 1} in {self.labels!r}, got {got}.")
        one_hot: torch.Tensor = (labels[:, None] == torch.arange(self.classes, device=labels.device)).float()
        return one_hot.masked_fill_(outside[:, None], math.nan)


class MixUp(_Mixing):
    """Each image is blended with the valid one before it, ``own * image + (1 - own) * other``, and so are its labels.

    Zhang et al., "mixup" (2017); the partner is torchvision's, the share is drawn for each row, as timm's ``"elem"``.
    """

    __doc__ = f"{__doc__}\n{_Mixing.__doc__.partition('soft.')[2] if _Mixing.__doc__ else ''}"

    def _mix(
        self, images: torch.Tensor, partner: NDArray[np.intp], own: Floats, draws: Draws
    ) -> tuple[torch.Tensor, Floats]:
        return _blend(images, partner, own), own


class CutMix(_Mixing):
    """A rectangle of each image is that of the valid one before it; labels are mixed by the area that it has.

    Yun et al., "CutMix" (2019). The rectangle has the image's shape and ``1 - own`` of its area, its centre anywhere,
    cut at the edges, as torchvision's.
    """

    __doc__ = f"{__doc__}\n{_Mixing.__doc__.partition('soft.')[2] if _Mixing.__doc__ else ''}"

    def _mix(
        self, images: torch.Tensor, partner: NDArray[np.intp], own: Floats, draws: Draws
    ) -> tuple[torch.Tensor, Floats]:
        height, width = images.shape[-2:]
        boxes = rectangles(draws.uniform("box", 2), own, height, width)
        mask = inside(boxes, images.flatten(1, -3) if images.dim() > 4 else images)
        mask = mask.view(len(images), *(1,) * (images.dim() - 3), height, width)
        share = 1 - boxes[:, 2] * boxes[:, 3] / (height * width)
        return torch.where(mask, images.index_select(0, _index(partner, images)), images), share


def partners(valid: NDArray[np.bool_]) -> NDArray[np.intp]:
    """For each row the valid one before it, around the end; itself where it is not valid, or alone: [B]."""
    found, rows = np.arange(len(valid)), np.flatnonzero(valid)
    found[rows] = np.roll(rows, 1)
    return found


def rectangles(uniform: Floats, own: Floats, height: int, width: int) -> NDArray[np.int64]:
    """top, left, height, width: i64[B, 4] of f64[B, 2] (x, y of the centre) and the shares of the own image."""
    half = 0.5 * np.sqrt(1 - own)
    x, y = np.floor(uniform[:, 0] * width), np.floor(uniform[:, 1] * height)
    across, down = np.trunc(half * width), np.trunc(half * height)
    left, right = np.maximum(x - across, 0), np.minimum(x + across, width)
    top, bottom = np.maximum(y - down, 0), np.minimum(y + down, height)
    return np.stack([top, left, bottom - top, right - left], axis=1).astype(np.int64)


def beta(uniform: Floats, alpha: float) -> Floats:
    """Beta(alpha, alpha) of uniforms, f64[B]: the share of the first of two gamma variates in their sum.

    Gamma variates are Marsaglia's and Tsang's ("A simple method for generating gamma variables", 2000), in logarithms,
    since a small `alpha` makes them smaller than a float can be.
    """
    half = (uniform.shape[1] - 2) // 2
    first = _log_gamma(uniform[:, :half], uniform[:, -2], alpha)
    second = _log_gamma(uniform[:, half:-2], uniform[:, -1], alpha)
    found: Floats = 1 / (1 + np.exp(np.clip(second - first, -700, 700)))
    return found


def _log_gamma(uniform: Floats, last: Floats, alpha: float) -> Floats:
    """The logarithm of Gamma(alpha) variates: the first accepted of some tries for alpha + 1, then one power."""
    a, b, u = uniform[:, 0::3], uniform[:, 1::3], uniform[:, 2::3]
    normal = np.sqrt(-2 * np.log(a)) * np.cos(2 * np.pi * b)
    d = alpha + 1 - 1 / 3
    v = np.maximum(1 + normal / np.sqrt(9 * d), 0) ** 3
    with np.errstate(divide="ignore"):
        good = (v > 0) & (np.log(u) < 0.5 * normal**2 + d - d * v + d * np.log(v))
        chosen = v[np.arange(len(v)), good.argmax(axis=1)]
        return np.log(d * np.where(good.any(axis=1), chosen, 1.0)) + np.log(last) / alpha


def _blend(values: torch.Tensor, partner: NDArray[np.intp], own: Floats) -> torch.Tensor:
    share = torch.from_numpy(own.astype(np.float32)).to(values.device, non_blocking=True)
    share = share.view(-1, *(1,) * (values.dim() - 1))
    mixed = values * share + values.index_select(0, _index(partner, values)) * (1 - share)
    return mixed.to(values.dtype)


def _index(rows: NDArray[np.intp], beside: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(rows.astype(np.int64)).to(beside.device, non_blocking=True)


def _mixable(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() in (4, 5) and value.is_floating_point()
