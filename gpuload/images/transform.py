"""What a column shall become: `Image` and `Text`, frozen and checked when made.

Enter: what the user wants. Leave: for `Image`, the region and the flip of every row, as plain arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from gpuload.errors import ConfigError
from gpuload.order.philox import uniform

IMAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)
_TRIES = 10  # as torchvision's RandomResizedCrop


def _expect(ok: bool, what: str, got: object) -> None:
    if not ok:
        raise ConfigError(f"Expected {what}, got {got!r}.")


def _interval(name: str, value: tuple[float, float], upper: float = math.inf) -> None:
    pair = isinstance(value, (tuple, list)) and len(value) == 2
    good = pair and 0 < value[0] <= value[1] <= upper and value[1] < math.inf
    _expect(
        good, f"Image({name}=(low, high)) with 0 < low <= high{f' <= {upper:g}' if upper < math.inf else ''}", value
    )


@dataclass(frozen=True)
class Image:
    """An encoded image becomes ``[C, H, W]`` pixels of one size: crop, antialiased bilinear resize, flip, normalise.

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

    def __post_init__(self) -> None:
        if self.size is not None:
            pair = isinstance(self.size, (tuple, list))
            size = tuple(self.size) if pair else (self.size, self.size)  # type: ignore[arg-type]
            good = len(size) == 2 and all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in size)
            _expect(good, "Image(size=...) as a positive int, (height, width) or None", self.size)
            object.__setattr__(self, "size", size)
        _expect(self.crop in ("center", "random", "none"), 'Image(crop="center"|"random"|"none")', self.crop)
        _expect(0 < self.crop_ratio <= 1, "Image(crop_ratio=...) in (0, 1]", self.crop_ratio)
        _interval("scale", self.scale, 1)
        _interval("ratio", self.ratio)
        _expect(0 <= self.flip <= 1, "Image(flip=...) as a probability in [0, 1]", self.flip)
        _expect(self.mode in ("RGB", "L"), 'Image(mode="RGB"|"L")', self.mode)
        _expect(self.dtype in IMAGE_DTYPES, f"Image(dtype=...) as one of {IMAGE_DTYPES}", self.dtype)
        for name in ("mean", "std"):
            value = getattr(self, name)
            if value is not None:
                value = tuple(float(v) for v in (value if hasattr(value, "__iter__") else [value] * self.channels))
                _expect(len(value) == self.channels, f"Image({name}=...) with {self.channels} values", value)
                _expect(name == "mean" or all(v > 0 for v in value), "Image(std=...) above 0", value)
                _expect(self.dtype != torch.uint8, f"a float dtype beside Image({name}=...)", self.dtype)
                object.__setattr__(self, name, value)

    @property
    def channels(self) -> int:
        return 3 if self.mode == "RGB" else 1

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

    def regions(
        self, heights: NDArray[np.int64], widths: NDArray[np.int64], seed: int, epoch: int, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """The region of each image that fills the output, and whether it is mirrored.

        Parameters
        ----------
        heights, widths : i64[N]
            Size in pixels of each image as a person sees it (after orientation).
        seed, epoch, rows
            What the randomness is a function of; rows is i64[N].

        Returns
        -------
        regions : f64[N, 4]
            x0, y0, width, height in pixels, sub-pixel, within the image.
        flips : bool[N]
        """
        h, w = np.asarray(heights, np.float64), np.asarray(widths, np.float64)
        needed = 3 + 2 * _TRIES if self.crop == "random" else int(self.flip > 0)  # a call costs 0.1 ms
        draws = uniform(seed, epoch, rows, needed) if needed else np.empty((len(h), 0))  # fewer are the same ones
        flips: NDArray[np.bool_] = draws[:, 0] < self.flip if needed else np.zeros(len(h), np.bool_)
        half = np.full(len(h), 0.5)
        if self.crop == "none" or self.size is None:
            rw, rh, fx, fy = w, h, half, half
        elif self.crop == "center":
            rw, rh = self._fit(h, w)
            rw, rh, fx, fy = rw * self.crop_ratio, rh * self.crop_ratio, half, half
        else:
            rw, rh, drawn = self._draw(h, w, draws[:, 3:])
            fx, fy = np.where(drawn, draws[:, 1], 0.5), np.where(drawn, draws[:, 2], 0.5)
        return np.stack([(w - rw) * fx, (h - rh) * fy, rw, rh], axis=1), flips

    def _fit(self, h: NDArray[np.float64], w: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The largest rectangle of the output's shape inside each image."""
        _, out_h, out_w = self.shape or (0, 1, 1)
        rw = np.minimum(w, h * out_w / out_h)
        return rw, np.minimum(h, rw * out_h / out_w)

    def _draw(
        self, h: NDArray[np.float64], w: NDArray[np.float64], draws: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
        """Random-resized crop: the first of ten drawn (area, ratio) that fits; else the whole image, its
        ratio clipped, as torchvision's ``RandomResizedCrop.get_params`` does."""
        area = (h * w)[:, None] * (self.scale[0] + draws[:, 0::2] * (self.scale[1] - self.scale[0]))
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        ratio = np.exp(low + draws[:, 1::2] * (high - low))
        rw, rh = np.sqrt(area * ratio), np.sqrt(area / ratio)  # f64[N, tries]
        fits: NDArray[np.bool_] = (rw <= w[:, None]) & (rh <= h[:, None])
        first, drawn = fits.argmax(axis=1), np.asarray(fits.any(axis=1), np.bool_)
        pick = np.arange(len(h))
        clipped = np.clip(w / h, self.ratio[0], self.ratio[1])
        whole_w, whole_h = np.minimum(w, h * clipped), np.minimum(h, w / clipped)
        return np.where(drawn, rw[pick, first], whole_w), np.where(drawn, rh[pick, first], whole_h), drawn


@dataclass(frozen=True)
class Text:
    """A string becomes token ids, ``i64[B, L]``, and its attention mask, ``i64[B, L]``, as ``<name>_mask``.

    Parameters
    ----------
    tokenizer : path, tokenizers.Tokenizer, transformers tokenizer, hub name, "bytes" or callable
        A path is a ``tokenizer.json``. A hub name needs ``transformers``. ``"bytes"`` is built in: the ids are the
        UTF-8 bytes, the padding is 0. A callable takes ``list[str]`` and returns a list of id lists.
    max_length : int, optional
        In tokens, special tokens included. Needed by ``padding="max_length"``.
    padding : {"longest", "max_length"}
        Pad to the longest text of the batch, or always to `max_length`.
    truncation : bool
        Cut texts at `max_length`; False makes a longer one an error of its row.
    """

    tokenizer: Any | Callable[[list[str]], Any]
    max_length: int | None = None
    padding: Literal["longest", "max_length"] = "longest"
    truncation: bool = True

    def __post_init__(self) -> None:
        _expect(self.padding in ("longest", "max_length"), 'Text(padding="longest"|"max_length")', self.padding)
        _expect(
            self.max_length is None or (type(self.max_length) is int and self.max_length > 0),
            "Text(max_length=...) as a positive int",
            self.max_length,
        )
        _expect(
            self.padding != "max_length" or self.max_length is not None,
            'Text(max_length=...) beside padding="max_length"',
            self.max_length,
        )
