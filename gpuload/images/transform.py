"""What an image shall become: `Image`, frozen and checked when made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from gpuload.errors import expect

IMAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)


def _interval(name: str, value: tuple[float, float], upper: float = math.inf) -> None:
    pair = isinstance(value, (tuple, list)) and len(value) == 2
    good = pair and 0 < value[0] <= value[1] <= upper and value[1] < math.inf
    expect(good, f"Image({name}=(low, high)) with 0 < low <= high{f' <= {upper:g}' if upper < math.inf else ''}", value)


@dataclass(frozen=True)
class Image:
    """An encoded image becomes ``[C, H, W]`` pixels of one size: crop, antialiased resize, flip, normalise.

    Parameters
    ----------
    size : int, (int, int) or None
        Output height and width in pixels; an int means a square. None keeps every image's own size.
    crop : {"center", "random", "none"}
        The region that fills the output. ``"center"``: the largest centred rectangle of the output's shape, its
        sides times `crop_ratio` ("resize the shorter side to 256, then centre-crop 224" is 224/256 = 0.875).
        ``"random"``: a random-resized crop as torchvision's (area drawn from `scale`, width/height from `ratio`),
        with sub-pixel edges. ``"none"``: the whole image, stretched to `size`.
    crop_ratio : float
        In (0, 1]; used by ``"center"``.
    scale, ratio : (float, float)
        Used by ``"random"``: limits of the region's share of the area, and of its width over its height.
    flip : float
        Probability of a horizontal flip, in [0, 1].
    mean, std : sequence of float, optional
        Per channel, on the scale 0..1: ``(pixel / 255 - mean) / std``. One alone takes the other as 0 or 1.
        Without both, float pixels are ``pixel / 255``.
    dtype : torch.dtype
        float32, float16, bfloat16, or uint8 (0..255, rounded; no mean or std).
    mode : {"RGB", "L"}
        Three channels, or one of luma (ITU-R 601-2, as Pillow's ``convert("L")``).
    channels_last : bool
        Memory format of the batch; the shape stays ``[B, C, H, W]``.
    orient : bool
        Apply the EXIF orientation.
    fast : bool
        On the CPU, halve a JPEG inside its DCT, once or more, while the region stays as large as `size`. Quicker on
        large photos, and not the same pixels; the README has the PSNR.
    interpolation : {"bilinear", "bicubic", "nearest"}
        Pillow's filters of these names, within 1.01 of 255 levels of ``resize(size, filter, box=region)``. The first
        two are antialiased. Bicubic (a = -0.5) rounds and clips to 0..255 between its two passes, as Pillow does.

    Crops and flips are a function of (seed, epoch, row): two image columns of one row get the same region.
    """

    size: int | tuple[int, int] | None
    crop: Literal["center", "random", "none"] = "center"
    crop_ratio: float = 0.875
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    dtype: torch.dtype = torch.float32
    mode: Literal["RGB", "L"] = "RGB"
    channels_last: bool = False
    orient: bool = True
    fast: bool = False
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear"

    def __post_init__(self) -> None:
        if self.size is not None:
            pair = isinstance(self.size, (tuple, list))
            size = tuple(self.size) if pair else (self.size, self.size)  # type: ignore[arg-type]
            good = len(size) == 2 and all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in size)
            expect(good, "Image(size=...) as a positive int, (height, width) or None", self.size)
            object.__setattr__(self, "size", size)
        expect(self.crop in ("center", "random", "none"), 'Image(crop="center"|"random"|"none")', self.crop)
        expect(0 < self.crop_ratio <= 1, "Image(crop_ratio=...) in (0, 1]", self.crop_ratio)
        _interval("scale", self.scale, 1)
        _interval("ratio", self.ratio)
        expect(0 <= self.flip <= 1, "Image(flip=...) as a probability in [0, 1]", self.flip)
        good = self.interpolation in ("bilinear", "bicubic", "nearest")
        expect(good, 'Image(interpolation="bilinear"|"bicubic"|"nearest")', self.interpolation)
        expect(self.mode in ("RGB", "L"), 'Image(mode="RGB"|"L")', self.mode)
        expect(self.dtype in IMAGE_DTYPES, f"Image(dtype=...) as one of {IMAGE_DTYPES}", self.dtype)
        for name in ("mean", "std"):
            value = getattr(self, name)
            if value is not None:
                value = tuple(float(v) for v in (value if hasattr(value, "__iter__") else [value] * self.channels))
                expect(len(value) == self.channels, f"Image({name}=...) with {self.channels} values", value)
                expect(name == "mean" or all(v > 0 for v in value), "Image(std=...) above 0", value)
                expect(self.dtype != torch.uint8, f"a float dtype beside Image({name}=...)", self.dtype)
                object.__setattr__(self, name, value)

    @property
    def channels(self) -> int:
        return 3 if self.mode == "RGB" else 1

    @property
    def radius(self) -> int:
        """How far the filter reaches from an output's centre: in steps of the output, at least as many pixels."""
        return 2 if self.interpolation == "bicubic" else 1

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of the output, None where every image keeps its own size."""
        return None if self.size is None else (self.channels, *self.size)  # type: ignore[misc]

    def scale_shift(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(scale, shift) per channel so that ``pixel * scale + shift`` is the output, pixel in 0..255."""
        if self.dtype == torch.uint8:
            return (1.0,) * self.channels, (0.0,) * self.channels
        mean, std = self.mean or (0.0,) * self.channels, self.std or (1.0,) * self.channels
        return tuple(1 / (255 * s) for s in std), tuple(-m / s for m, s in zip(mean, std, strict=True))
