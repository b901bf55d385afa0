"""Erasing: a rectangle of each image becomes one value; normalised images [M, C, H, W] enter and leave."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from gpuload.augment.rows import Draws, below, happens, interval, probability
from gpuload.errors import expect

_TRIES = 10  # as torchvision


@dataclass(frozen=True)
class RandomErasing:
    """A random rectangle becomes `value`, after normalisation.

    Parameters
    ----------
    p : float
        Probability.
    scale, ratio : (float, float)
        Limits of its share of the image's area, and of its height over its width. An image that none of ten drawn
        rectangles fits stays as it is.
    value : float or three of them
        In the normalised image, by channel: 0 is its mean.
    """

    p: float = 0.5
    scale: tuple[float, float] = (0.02, 0.33)
    ratio: tuple[float, float] = (0.3, 3.3)
    value: float | tuple[float, ...] = 0.0

    normalized: ClassVar[bool] = True

    def __post_init__(self) -> None:
        probability("RandomErasing", self.p)
        object.__setattr__(self, "scale", interval("RandomErasing", "scale", self.scale, 0, 1))
        object.__setattr__(self, "ratio", interval("RandomErasing", "ratio", self.ratio, 0))
        expect(self.ratio[0] > 0, "RandomErasing(ratio=...) above 0", self.ratio)
        values = self.value if isinstance(self.value, (tuple, list)) else (self.value,)
        good = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values) and len(values) in (1, 3)
        expect(good, "RandomErasing(value=...) as a number, or three", self.value)
        object.__setattr__(self, "value", tuple(map(float, values)))

    def __call__(self, images: torch.Tensor, draws: Draws) -> torch.Tensor:
        rows = happens(draws, self.p, len(images))
        if len(rows):
            boxes = np.zeros((len(images), 4), np.int64)
            boxes[rows] = self.boxes(draws, *images.shape[2:])[rows]
            fill(images, boxes, self.value)  # type: ignore[arg-type]
        return images

    def boxes(self, draws: Draws, height: int, width: int) -> NDArray[np.int64]:
        """top, left, height, width of the rectangle of every image: i64[M, 4]; height 0 where none fits."""
        drawn = draws.uniform("box", 2 + 2 * _TRIES)
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        area = height * width * (self.scale[0] + drawn[:, 2::2] * (self.scale[1] - self.scale[0]))  # f64[M, tries]
        shape = np.exp(low + drawn[:, 3::2] * (high - low))
        h, w = np.rint(np.sqrt(area * shape)), np.rint(np.sqrt(area / shape))
        fits = (h < height) & (w < width)
        pick, first = np.arange(len(drawn)), fits.argmax(axis=1)
        h, w = np.where(fits.any(axis=1), h[pick, first], 0), np.where(fits.any(axis=1), w[pick, first], 0)
        top, left = below(drawn[:, 0], height - h + 1), below(drawn[:, 1], width - w + 1)
        return np.stack([top, left, h.astype(np.int64), w.astype(np.int64)], axis=1)


def fill(images: torch.Tensor, boxes: NDArray[np.int64], value: tuple[float, ...]) -> None:
    """`value`, one or one a channel, into a rectangle of every image, in place; boxes as of `RandomErasing.boxes`."""
    where = inside(boxes, images)
    for channel in range(images.shape[1]):
        images[:, channel].masked_fill_(where[:, 0], value[channel % len(value)])


def inside(boxes: NDArray[np.int64], images: torch.Tensor) -> torch.Tensor:
    """bool[M, 1, H, W]: which pixels lie in the rectangle (top, left, height, width) of their image."""
    where = torch.from_numpy(boxes).to(images.device, non_blocking=True).view(-1, 4, 1, 1, 1)
    top, left, tall, wide = where.unbind(1)
    y = torch.arange(images.shape[2], device=images.device).view(1, 1, -1, 1)
    x = torch.arange(images.shape[3], device=images.device).view(1, 1, 1, -1)
    return (y >= top) & (y < top + tall) & (x >= left) & (x < left + wide)
