"""What torchvision v2 makes of some pictures and factors, by operation; `python tests/torchvision_says.py` records it.

The record is compared with in every run of the tests, torchvision itself where it is installed: it pins its torch, so
it is in an extra of its own, ``pip install "gpuload[torchvision]"``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

RECORD = Path(__file__).with_name("torchvision_says.npz")

# operation → a factor for each of the pictures: what its function of gpuload gets
FACTORS: dict[str, list[float]] = {
    "brightness": [0.0, 0.3, 1.0, 2.4],
    "contrast": [0.0, 0.7, 1.0, 2.0],
    "saturation": [0.0, 0.5, 1.0, 1.9],
    "hue": [-0.5, -0.13, 0.0, 0.41],
    "solarize": [0.0, 0.3, 0.5, 1.0],
    "blur": [0.1, 0.7, 1.5, 2.0],
    "ShearX": [-0.3, 0.04, 0.2, 0.99],
    "ShearY": [-0.3, 0.04, 0.2, 0.99],
    "TranslateX": [-5.7, 0.9, 3.0, 7.2],
    "TranslateY": [-5.7, 0.9, 3.0, 7.2],
    "Rotate": [-135.0, -9.0, 13.0, 90.0],
    "Sharpness": [-0.9, -0.1, 0.3, 0.99],
    "Posterize": [8.0, 6.0, 4.0, 2.0],
    "AutoContrast": [0.0] * 4,
    "Equalize": [0.0] * 4,
}
KERNEL = (5, 3)  # of the blur: across, down


def pictures() -> torch.Tensor:
    """f32[4, 3, 11, 14] in 0..1: noise, a narrow range, a flat channel, few levels."""
    found = np.random.default_rng(0).integers(0, 256, (4, 3, 11, 14)).astype(np.float32) / 255
    found[1] = found[1] * 0.3 + 0.2
    found[2, 1] = 0.5
    found[3] = np.floor(found[3] * 4) / 5
    return torch.from_numpy(found)


def says(name: str) -> torch.Tensor:
    """torchvision's own answer: f32[4, 3, 11, 14]."""
    from torchvision.transforms.v2 import functional as F  # type: ignore[import-not-found,unused-ignore]

    def affine(image: torch.Tensor, move: list[float], shear: list[float], center: Any = None) -> torch.Tensor:
        degrees = [math.degrees(math.atan(value)) for value in shear]
        moved: torch.Tensor = F.affine(
            image, angle=0.0, translate=[int(v) for v in move], scale=1.0, shear=degrees, center=center
        )
        return moved

    functions: dict[str, Any] = {
        "brightness": F.adjust_brightness,
        "contrast": F.adjust_contrast,
        "saturation": F.adjust_saturation,
        "hue": F.adjust_hue,
        "solarize": F.solarize,
        "blur": lambda image, sigma: F.gaussian_blur(image, list(KERNEL), [sigma, sigma]),
        "ShearX": lambda image, m: affine(image, [0, 0], [m, 0.0], [0, 0]),
        "ShearY": lambda image, m: affine(image, [0, 0], [0.0, m], [0, 0]),
        "TranslateX": lambda image, m: affine(image, [m, 0], [0.0, 0.0]),
        "TranslateY": lambda image, m: affine(image, [0, m], [0.0, 0.0]),
        "Rotate": F.rotate,
        "Sharpness": lambda image, m: F.adjust_sharpness(image, 1.0 + m),
        "Posterize": lambda image, bits: F.posterize(image, int(bits)),
        "AutoContrast": lambda image, _: F.autocontrast(image),
        "Equalize": lambda image, _: F.equalize(image),
    }
    pairs = zip(pictures(), FACTORS[name], strict=True)
    return torch.stack([functions[name](image, factor) for image, factor in pairs])


if __name__ == "__main__":
    np.savez_compressed(RECORD, **{name: says(name).numpy() for name in FACTORS})
