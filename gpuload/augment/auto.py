"""RandAugment and TrivialAugmentWide: operations drawn from a table for each image; f32[M, C, H, W] in 0..1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import grid_sample

from gpuload.augment import colour
from gpuload.augment.rows import Draws, Floats, below, change, filtered
from gpuload.errors import expect

_Space = dict[str, tuple[Floats | None, bool]]  # operation → its magnitudes by bin, and whether their sign is drawn


@dataclass(frozen=True)
class RandAugment:
    """`num_ops` operations for each image, one after the other, drawn with replacement from torchvision's fourteen.

    Parameters
    ----------
    num_ops : int
    magnitude : int
        Bin of every magnitude, 0 to ``num_magnitude_bins - 1``; the sign is drawn where there is one.
    num_magnitude_bins : int

    Pixels that geometric operations bring in from outside are black; they take the nearest pixel, as torchvision does
    by default. Cubuk et al., "RandAugment" (2019), with the table of ``torchvision.transforms.v2.RandAugment``.
    """

    num_ops: int = 2
    magnitude: int = 9
    num_magnitude_bins: int = 31

    def __post_init__(self) -> None:
        _count("RandAugment", "num_ops", self.num_ops, 0)
        _count("RandAugment", "num_magnitude_bins", self.num_magnitude_bins, 2)
        _count("RandAugment", "magnitude", self.magnitude, 0)
        expect(
            self.magnitude < self.num_magnitude_bins,
            "RandAugment(magnitude=...) below num_magnitude_bins",
            self.magnitude,
        )

    def __call__(self, images: torch.Tensor, draws: Draws) -> torch.Tensor:
        space = self.space(self.num_magnitude_bins, *images.shape[2:])
        for k in range(self.num_ops):
            drawn = draws.uniform(f"op{k}", 2)
            bins = np.full(len(images), self.magnitude)
            _apply(images, space, below(drawn[:, 0], len(space)), bins, drawn[:, 1] < 0.5)
        return images

    @staticmethod
    def space(bins: int, height: int, width: int) -> _Space:
        """The table for images of a size: operation → (magnitudes f64[bins] or None, signed)."""
        return _space(bins, 0.3, 150.0 / 331.0 * width, 150.0 / 331.0 * height, 30.0, 0.9, 4)


@dataclass(frozen=True)
class TrivialAugmentWide:
    """One operation for each image, its magnitude and sign drawn, too.

    Müller and Hutter, "TrivialAugment" (2021), with the table of ``torchvision.transforms.v2.TrivialAugmentWide``.
    """

    num_magnitude_bins: int = 31

    def __post_init__(self) -> None:
        _count("TrivialAugmentWide", "num_magnitude_bins", self.num_magnitude_bins, 2)

    def __call__(self, images: torch.Tensor, draws: Draws) -> torch.Tensor:
        space = self.space(self.num_magnitude_bins, *images.shape[2:])
        drawn = draws.uniform("op", 3)
        bins = below(drawn[:, 2], self.num_magnitude_bins)
        _apply(images, space, below(drawn[:, 0], len(space)), bins, drawn[:, 1] < 0.5)
        return images

    @staticmethod
    def space(bins: int, height: int, width: int) -> _Space:
        """The table: operation → (magnitudes f64[bins] or None, signed)."""
        return _space(bins, 0.99, 32.0, 32.0, 135.0, 0.99, 6)


def _space(bins: int, shear: float, across: float, down: float, turn: float, colour: float, bits: int) -> _Space:
    """The fourteen operations, with the largest magnitude of each kind; `bits` are what posterising takes away."""
    strength = (np.linspace(0.0, colour, bins), True)
    return {
        "Identity": (None, False),
        "ShearX": (np.linspace(0.0, shear, bins), True),
        "ShearY": (np.linspace(0.0, shear, bins), True),
        "TranslateX": (np.linspace(0.0, across, bins), True),
        "TranslateY": (np.linspace(0.0, down, bins), True),
        "Rotate": (np.linspace(0.0, turn, bins), True),
        "Brightness": strength,
        "Color": strength,
        "Contrast": strength,
        "Sharpness": strength,
        "Posterize": (8 - np.rint(np.arange(bins) / ((bins - 1) / bits)), False),
        "Solarize": (np.linspace(1.0, 0.0, bins), False),
        "AutoContrast": (None, False),
        "Equalize": (None, False),
    }


def operate(name: str, images: torch.Tensor, magnitudes: Floats) -> torch.Tensor:
    """An operation of the tables by name on every image, with f64[M] magnitudes."""
    if name in _MATRICES:
        return warp(images, _MATRICES[name](magnitudes, *images.shape[2:]))
    function, offset = _POINTS[name]
    factor = torch.as_tensor((magnitudes + offset).astype(np.float32)).to(images.device, non_blocking=True)
    return function(images, factor.view(-1, 1, 1, 1))


def _apply(
    images: torch.Tensor, space: _Space, which: NDArray[np.intp], bins: NDArray[np.intp], negative: NDArray[np.bool_]
) -> None:
    for k, (name, (magnitudes, signed)) in enumerate(space.items()):
        rows = np.flatnonzero(which == k)
        if name == "Identity" or not len(rows):
            continue
        values = np.zeros(len(rows)) if magnitudes is None else magnitudes[bins[rows]]
        values = np.where(negative[rows], -values, values) if signed else values
        change(images, rows, lambda some, name=name, values=values: operate(name, some, values))


def sharpness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Towards or away from a 3 x 3 blur; the border stays."""
    m, channels, height, width = images.shape
    if height <= 2 or width <= 2:
        return images
    weight = torch.full((3, 3), 1 / 13, device=images.device)
    weight[1, 1] = 5 / 13
    blurred = filtered(images.reshape(-1, height, width), weight.expand(m * channels, 3, 3))
    found = images.clone(memory_format=torch.contiguous_format)
    inner = found[:, :, 1:-1, 1:-1]
    inner.add_((blurred.view_as(inner) - inner) * (1 - factor))
    return found.clamp_(0, 1)


def posterize(images: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """As many levels as `bits` have."""
    levels = torch.exp2(bits)
    return torch.minimum((images * levels).floor().clamp_(min=0), levels - 1) / levels


def autocontrast(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Each channel stretched to 0..1; a flat one stays."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    flat = low == high
    span = torch.where(flat, torch.ones_like(low), high - low)
    return ((images - torch.where(flat, torch.zeros_like(low), low)) / span).clamp_(0, 1)


def equalize(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Each channel's histogram made flat, in 256 levels, as Pillow does."""
    m, channels = images.shape[:2]
    levels = (images * 255.999).to(torch.int64).clamp_(0, 255).view(m * channels, -1)  # torchvision's to uint8
    counts = torch.zeros((m * channels, 256), dtype=torch.int64, device=images.device)
    counts.scatter_add_(1, levels, torch.ones_like(levels))
    total = counts.cumsum(1)
    most = levels.amax(1, keepdim=True)  # the last level that occurs: its own count is no step
    step = (total[:, -1:] - counts.gather(1, most)) // 255
    usable = step != 0
    table = ((total + step // 2) // torch.where(usable, step, torch.ones_like(step))).clamp_(0, 255)
    table = torch.cat([torch.zeros_like(table[:, :1]), table[:, :-1]], dim=1)
    found = torch.where(usable, table.gather(1, levels), levels)
    return (found.to(images.dtype) / 255).view_as(images)


def warp(images: torch.Tensor, matrices: Floats) -> torch.Tensor:
    """The nearest pixel at ``matrix @ (x, y, 1)``, in pixels from the image's centre; black outside.

    Parameters
    ----------
    matrices : f64[M, 2, 3]
        From output to input.
    """
    (m, _, height, width), device = images.shape, images.device
    half = torch.tensor([0.5 * width, 0.5 * height], device=device)
    theta = torch.as_tensor(matrices.astype(np.float32)).to(device, non_blocking=True).transpose(1, 2) / half
    at = torch.ones((height, width, 3), device=device)  # x, y, 1 of the centre of each pixel, from the image's
    at[..., 0] = torch.linspace(0.5 - width * 0.5, width * 0.5 - 0.5, width, device=device)
    at[..., 1] = torch.linspace(0.5 - height * 0.5, height * 0.5 - 0.5, height, device=device)[:, None]
    grid = at.view(1, -1, 3).expand(m, -1, 3).bmm(theta).view(m, height, width, 2)  # in torchvision's order, for ties
    return grid_sample(images, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def _shear_x(magnitudes: Floats, height: int, width: int) -> Floats:
    found = _identity(len(magnitudes))  # around the upper left corner
    found[:, 0, 1] = magnitudes
    found[:, 0, 2] = magnitudes * height / 2
    return found


def _shear_y(magnitudes: Floats, height: int, width: int) -> Floats:
    found = _identity(len(magnitudes))
    found[:, 1, 0] = magnitudes
    found[:, 1, 2] = magnitudes * width / 2
    return found


def _translate_x(magnitudes: Floats, height: int, width: int) -> Floats:
    found = _identity(len(magnitudes))
    found[:, 0, 2] = -np.trunc(magnitudes)
    return found


def _translate_y(magnitudes: Floats, height: int, width: int) -> Floats:
    found = _identity(len(magnitudes))
    found[:, 1, 2] = -np.trunc(magnitudes)
    return found


def _rotate(magnitudes: Floats, height: int, width: int) -> Floats:
    """Degrees, counter-clockwise."""
    found, angle = _identity(len(magnitudes)), np.radians(-magnitudes)
    found[:, 0, 0] = found[:, 1, 1] = np.cos(angle)
    found[:, 0, 1], found[:, 1, 0] = np.sin(angle), -np.sin(angle)
    return found


def _identity(count: int) -> Floats:
    return np.tile(np.eye(2, 3), (count, 1, 1))


def _count(what: str, name: str, value: Any, least: int) -> None:
    good = isinstance(value, int) and not isinstance(value, bool) and value >= least
    expect(good, f"{what}({name}=...) as an int of at least {least}", value)


_Point = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_POINTS: dict[str, tuple[_Point, float]] = {  # with what is added to the magnitude
    "Brightness": (colour.brightness, 1.0),
    "Color": (colour.saturation, 1.0),
    "Contrast": (colour.contrast, 1.0),
    "Sharpness": (sharpness, 1.0),
    "Posterize": (posterize, 0.0),
    "Solarize": (colour.solarize, 0.0),
    "AutoContrast": (autocontrast, 0.0),
    "Equalize": (equalize, 0.0),
}
_MATRICES: dict[str, Callable[[Floats, int, int], Floats]] = {
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateX": _translate_x,
    "TranslateY": _translate_y,
    "Rotate": _rotate,
}
