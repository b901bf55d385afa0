"""Colours: brightness, contrast, saturation, hue, gray, solarisation; f32[M, C, H, W] in 0..1, a factor an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gpuload.augment.rows import Draws, between, change, happens, interval, probability
from gpuload.errors import expect

_LUMA = (0.2989, 0.587, 0.114)  # torchvision's
_Range = float | tuple[float, float]


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast, saturation and hue, each by a factor of its own, in an order that is drawn for each image.

    Parameters
    ----------
    brightness, contrast, saturation : float or (float, float)
        A factor is drawn from [max(0, 1 - value), 1 + value], or from the interval given.
    hue : float or (float, float)
        A shift is drawn from [-value, value], value in [0, 0.5], or from the interval given; 1 is once around.
    p : float
        Probability that an image is changed at all.
    """

    brightness: _Range = 0.0
    contrast: _Range = 0.0
    saturation: _Range = 0.0
    hue: _Range = 0.0
    p: float = 1.0

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            object.__setattr__(self, name, _around(name, getattr(self, name), 1.0, 0.0, float("inf")))
        object.__setattr__(self, "hue", _around("hue", self.hue, 0.0, -0.5, 0.5))
        probability("ColorJitter", self.p)

    def __call__(self, images: torch.Tensor, draws: Draws) -> torch.Tensor:
        rows = happens(draws, self.p, len(images))
        order = draws.uniform("order", 4).argsort(axis=1)  # i64[M, 4]
        for place in range(4):
            for k, (name, function) in enumerate(_JITTERS):
                low, high = getattr(self, name)
                if low == high == (0.0 if name == "hue" else 1.0):
                    continue
                mine = rows[order[rows, place] == k]
                if len(mine):
                    change(images, mine, function, between(draws, name, low, high))
        return images


@dataclass(frozen=True)
class RandomGrayscale:
    """Gray with probability `p`, in as many channels as there were."""

    p: float = 0.1

    def __post_init__(self) -> None:
        probability("RandomGrayscale", self.p)

    def __call__(self, images: torch.Tensor, draws: Draws) -> torch.Tensor:
        change(images, happens(draws, self.p, len(images)), lambda some: gray(some).expand_as(some))
        return images


@dataclass(frozen=True)
class RandomSolarize:
    """Values of at least `threshold` (0..1) are inverted, with probability `p`."""

    threshold: float
    p: float = 0.5

    def __post_init__(self) -> None:
        value = self.threshold
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
        expect(good, "RandomSolarize(threshold=...) in [0, 1], as pixels are", value)
        probability("RandomSolarize", self.p)

    def __call__(self, images: torch.Tensor, draws: Draws) -> torch.Tensor:
        change(images, happens(draws, self.p, len(images)), solarize, np.full(len(images), self.threshold))
        return images


def gray(images: torch.Tensor) -> torch.Tensor:
    """[M, 1, H, W]."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2]).unsqueeze(1)


def brightness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Factors f32[M, 1, 1, 1] of at least 0, here and below."""
    return (images * factor).clamp_(0, 1)


def contrast(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Towards or away from the mean gray value of each image."""
    return _blend(images, gray(images).mean((1, 2, 3), keepdim=True), factor)


def saturation(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Towards or away from gray."""
    return images if images.shape[1] == 1 else _blend(images, gray(images), factor)


def hue(images: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Shifts in [-0.5, 0.5]: through HSV and back."""
    if images.shape[1] == 1:
        return images
    found = _to_hsv(images)
    found[:, 0] = (found[:, 0] + shift[:, 0]).remainder_(1.0)
    return _to_rgb(found)


def solarize(images: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """1 - value from `threshold` on."""
    return torch.where(images >= threshold, 1 - images, images)


_SIXTHS = ((0, 2, 1, 1, 3, 0), (3, 0, 0, 2, 1, 1), (1, 1, 3, 0, 0, 2))  # red, green, blue of v, p, q, t by hue
_JITTERS = (("brightness", brightness), ("contrast", contrast), ("saturation", saturation), ("hue", hue))


def _around(name: str, value: Any, middle: float, least: float, most: float) -> tuple[float, float]:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        good = value >= 0 and (name != "hue" or value <= 0.5)
        limit = " up to 0.5" if name == "hue" else ""
        expect(good, f"ColorJitter({name}=...) of at least 0{limit}, or (low, high)", value)
        value = (max(least, middle - value), middle + value)
    return interval("ColorJitter", name, value, least, most)


def _blend(images: torch.Tensor, other: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return (images * factor + other * (1 - factor)).clamp_(0, 1)


def _to_hsv(images: torch.Tensor) -> torch.Tensor:
    """As torchvision's ``_rgb_to_hsv``, which is colorsys's on tensors."""
    red, green, _ = images.unbind(1)
    least, most = torch.aminmax(images, dim=1)
    equal = most == least
    span = most - least
    ones = torch.ones_like(most)
    saturation_ = span / torch.where(equal, ones, most)
    divisor = torch.where(equal, ones, span).unsqueeze(1)
    rc, gc, bc = ((most.unsqueeze(1) - images) / divisor).unbind(1)
    is_red, is_green = most == red, (most == green) & (most != red)
    hue_ = torch.where(is_red, bc - gc, torch.where(is_green, rc - bc + 2, gc - rc + 4))
    hue_ = (hue_ * (1 / 6) + 1).fmod_(1)
    return torch.stack((hue_, saturation_, most), dim=1)


def _to_rgb(images: torch.Tensor) -> torch.Tensor:
    h, s, v = images.unbind(1)
    h6 = h * 6
    i = h6.floor()
    f = h6 - i
    i = i.to(torch.int64).remainder_(6)
    sxf = s * f
    p, q, t = ((1 - s) * v).clamp_(0, 1), ((1 - sxf) * v).clamp_(0, 1), ((sxf + 1 - s) * v).clamp_(0, 1)
    which = torch.tensor(_SIXTHS, device=images.device)[:, i].movedim(0, 1)  # i64[M, 3, H, W]
    return torch.stack((v, p, q, t), dim=1).gather(1, which)
