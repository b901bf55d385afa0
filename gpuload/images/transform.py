"""What an image shall become: `Image`, frozen and checked when made."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal

import torch

from gpuload.errors import ConfigError, expect, is_number, is_one_of

IMAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)


def _interval(name: str, value: tuple[float, float], upper: float = math.inf) -> None:
    pair = isinstance(value, (tuple, list)) and len(value) == 2 and all(map(is_number, value))
    good = pair and 0 < value[0] <= value[1] <= upper and value[1] < math.inf
    expect(good, f"Image({name}=(low, high)) with 0 < low <= high{f' <= {upper:g}' if upper < math.inf else ''}", value)


def _floats(name: str, value: Any, channels: int) -> tuple[float, ...]:
    """One number for each channel, of a sequence, an array or a tensor of them, or of one for all."""
    found = value.tolist() if hasattr(value, "tolist") else value
    several = list(found) if isinstance(found, (list, tuple)) else [found] * channels
    good = all(is_number(v) and math.isfinite(v) for v in several)
    expect(good, f"Image({name}=...) as a number, or one a channel", value)
    return tuple(map(float, several))


_USED = {"crop_ratio": "center", "scale": "random", "ratio": "random"}  # word → the crop that looks at it
_CROPS = ("center", "random", "none", "pad")
_UNUSED = {crop: tuple(name for name, user in _USED.items() if user != crop) for crop in _CROPS}


@dataclass(frozen=True)
class Image:
    """An encoded image becomes ``[C, H, W]`` pixels of one size: crop, antialiased resize, flip, normalise.

    Parameters
    ----------
    size : int, (int, int), "bucket" or None
        Output height and width in pixels; an int means a square. None keeps every image's own size. "bucket" is the
        size that `Buckets` chose for the batch.
    crop : {"center", "random", "none", "pad"}
        The region that fills the output. ``"center"``: the largest centred rectangle of the output's shape, its
        sides times `crop_ratio` ("resize the shorter side to 256, then centre-crop 224" is 224/256 = 0.875).
        ``"random"``: a random-resized crop as torchvision's (area drawn from `scale`, width/height from `ratio`),
        with sub-pixel edges. ``"none"``: the whole image, stretched to `size`. ``"pad"``: the whole image in its own
        shape, as large as fits, in the middle of the output; around it gray, 114 of 255 (a letterbox, for evaluation:
        one call for each size that results).
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
    views : int
        Regions of each image, drawn independently: the batch is ``[B, views, C, H, W]`` from two on. The image is read
        and decoded once, as far as their bounding rectangle needs.
    augment : sequence of callable
        From `gpuload.augment`, or your own: ``(images, draws) → images`` of the same shape, f32[M, C, H, W] in 0..1 on
        the batch's device and stream, M images (B times `views`), before `mean` and `std`. What has a true attribute
        ``normalized`` comes after them. ``draws.uniform("name", n)`` is f64[M, n], on the host.

    Crops and flips are a function of (seed, epoch, row): two image columns of one row get the same region.
    """

    size: int | tuple[int, int] | Literal["bucket"] | None
    crop: Literal["center", "random", "none", "pad"] = "center"
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
    views: int = 1
    augment: tuple[Callable[[torch.Tensor, Any], torch.Tensor], ...] = ()

    def __post_init__(self) -> None:
        if not is_one_of(self.size, (None, "bucket")):
            pair = isinstance(self.size, (tuple, list))
            size = tuple(self.size) if pair else (self.size, self.size)  # type: ignore[arg-type]
            good = len(size) == 2 and all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in size)
            expect(good, 'Image(size=...) as a positive int, (height, width), "bucket" or None', self.size)
            object.__setattr__(self, "size", size)
        expect(is_one_of(self.crop, _CROPS), 'Image(crop="center"|"random"|"none"|"pad")', self.crop)
        good = is_number(self.crop_ratio) and 0 < self.crop_ratio <= 1
        expect(good, "Image(crop_ratio=...) in (0, 1]", self.crop_ratio)
        _interval("scale", self.scale, 1)
        _interval("ratio", self.ratio)
        expect(is_number(self.flip) and 0 <= self.flip <= 1, "Image(flip=...) as a probability in [0, 1]", self.flip)
        good = is_one_of(self.interpolation, ("bilinear", "bicubic", "nearest"))
        expect(good, 'Image(interpolation="bilinear"|"bicubic"|"nearest")', self.interpolation)
        for name in ("channels_last", "orient", "fast"):
            expect(isinstance(getattr(self, name), bool), f"Image({name}=...) as True or False", getattr(self, name))
        self._expect_used()
        expect(is_one_of(self.mode, ("RGB", "L")), 'Image(mode="RGB"|"L")', self.mode)
        expect(is_one_of(self.dtype, IMAGE_DTYPES), f"Image(dtype=...) as one of {IMAGE_DTYPES}", self.dtype)
        good = isinstance(self.views, int) and not isinstance(self.views, bool) and self.views > 0
        expect(good, "Image(views=...) as an int of at least 1", self.views)
        several = isinstance(self.augment, (tuple, list))
        expect(several and all(map(callable, self.augment)), "Image(augment=...) as a tuple of callables", self.augment)
        object.__setattr__(self, "augment", tuple(self.augment))
        expect(not self.augment or self.size is not None, "Image(augment=...) beside a size", self.augment)
        expect(self.views == 1 or self.size is not None, "Image(views=...) beside a size", self.views)
        expect(not self.fast or self.crop != "pad", 'another crop than "pad" beside Image(fast=True)', self.crop)
        for name in ("mean", "std"):
            value = getattr(self, name)
            if value is not None:
                value = _floats(name, value, self.channels)
                expect(len(value) == self.channels, f"Image({name}=...) with {self.channels} values", value)
                expect(name == "mean" or all(v > 0 for v in value), "Image(std=...) above 0", value)
                expect(self.dtype != torch.uint8, f"a float dtype beside Image({name}=...)", self.dtype)
                object.__setattr__(self, name, value)

    def _expect_used(self) -> None:
        """Raise `ConfigError` for a word that would have no effect beside the others."""
        unused: tuple[str, ...] = _UNUSED[self.crop]
        if self.size is None:  # every image stays as it is
            unused = ("crop", "crop_ratio", "scale", "ratio", "channels_last", "fast")
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if name in unused and value != field.default:
                there = "size=None" if self.size is None else f"crop={self.crop!r}"
                wanted = "a size" if self.size is None else f"crop={_USED[name]!r}"
                raise ConfigError(f"Expected {wanted} beside Image({name}=...), got {there} beside {name}={value!r}.")

    @property
    def channels(self) -> int:
        return 3 if self.mode == "RGB" else 1

    @property
    def radius(self) -> int:
        """How far the filter reaches from an output's centre: in steps of the output, at least as many pixels."""
        return 2 if self.interpolation == "bicubic" else 1

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of the output, None where every image keeps its own size or each batch has one."""
        return None if self.size in (None, "bucket") else (self.channels, *self.size)  # type: ignore[misc]

    def sized(self, bucket: tuple[int, int] | None) -> Image:
        """The same with the (height, width) of a batch's bucket, where it takes that."""
        return _sized(self, bucket) if self.size == "bucket" and bucket is not None else self

    def scale_shift(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(scale, shift) per channel so that ``pixel * scale + shift`` is the output, pixel in 0..255."""
        if self.dtype == torch.uint8:
            return (1.0,) * self.channels, (0.0,) * self.channels
        mean, std = self.mean or (0.0,) * self.channels, self.std or (1.0,) * self.channels
        return tuple(1 / (255 * s) for s in std), tuple(-m / s for m, s in zip(mean, std, strict=True))


@lru_cache(maxsize=1024)
def _sized(image: Image, size: tuple[int, int]) -> Image:
    return replace(image, size=size)
