"""Blur: a Gaussian whose width is drawn for each image; f32[M, C, H, W] enter and leave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from gpuload.augment.rows import Draws, between, change, filtered, happens, interval, probability
from gpuload.errors import expect


@dataclass(frozen=True)
class GaussianBlur:
    """Blurs with a Gaussian, its edges reflected.

    Parameters
    ----------
    kernel_size : int or (int, int)
        Odd widths of the kernel in pixels: across, down.
    sigma : float or (float, float)
        Standard deviation in pixels, above 0, or the interval that it is drawn from.
    p : float
        Probability.
    """

    kernel_size: int | tuple[int, int]
    sigma: float | tuple[float, float] = (0.1, 2.0)
    p: float = 1.0

    def __post_init__(self) -> None:
        size: Any = self.kernel_size
        size = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
        good = len(size) == 2 and all(isinstance(k, int) and not isinstance(k, bool) and k > 0 and k % 2 for k in size)
        expect(good, "GaussianBlur(kernel_size=...) as one or two odd ints", self.kernel_size)
        object.__setattr__(self, "kernel_size", size)
        sigma: Any = self.sigma
        sigma = sigma if isinstance(sigma, (tuple, list)) else (sigma, sigma)
        sigma = interval("GaussianBlur", "sigma", sigma, 0)
        expect(sigma[0] > 0, "GaussianBlur(sigma=...) above 0", self.sigma)
        object.__setattr__(self, "sigma", sigma)
        probability("GaussianBlur", self.p)

    def __call__(self, images: torch.Tensor, draws: Draws) -> torch.Tensor:
        sigma = between(draws, "sigma", *self.sigma)  # type: ignore[misc]
        across, down = self.kernel_size  # type: ignore[misc]
        height, width = images.shape[2:]
        fits = across // 2 < width and down // 2 < height
        expect(fits, f"images larger than half of GaussianBlur's kernel, {across} across and {down} down",
               f"{height}x{width}")  # fmt: skip
        rows = happens(draws, self.p, len(images))
        change(images, rows, lambda some, sigmas: blur(some, across, down, sigmas), sigma)
        return images


def blur(images: torch.Tensor, across: int, down: int, sigma: torch.Tensor) -> torch.Tensor:
    """Each image with its own `sigma`, f32[M, 1, 1, 1]: one dimension after the other."""
    m, channels, height, width = images.shape
    padded = pad(images, [across // 2, across // 2, down // 2, down // 2], mode="reflect")
    planes = padded.reshape(m * channels, *padded.shape[2:])
    for size, axis in ((across, 3), (down, 2)):
        weight = kernel(size, sigma.view(-1, 1)).repeat_interleave(channels, 0)  # f32[M * C, size]
        planes = filtered(planes, weight[:, None, :] if axis == 3 else weight[:, :, None])
    return planes.view(m, channels, height, width)


def kernel(size: int, sigma: torch.Tensor) -> torch.Tensor:
    """Weights of one dimension, f32[M, size] of f32[M, 1]; each row's sum is 1."""
    half = (size - 1) * 0.5
    at = torch.linspace(-half, half, size, device=sigma.device)
    return torch.softmax(-0.5 * (at / sigma).square(), dim=1)
