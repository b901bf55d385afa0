"""DINOv3: two global crops that are changed differently, eight local ones, all of one decoded picture.

    python benchmarks/recipes/dino.py pictures.lance

Column: image.
"""

from __future__ import annotations

from typing import Any

import torch
from run import features, run

from gpuload import Batch, Image, LanceDataset
from gpuload.augment import ColorJitter, GaussianBlur, RandomGrayscale, RandomSolarize

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COMMON: dict[str, Any] = {"interpolation": "bicubic", "crop": "random", "flip": 0.5, "mean": MEAN, "std": STD}
COLOUR = (ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8), RandomGrayscale(0.2))


def blur(p: float) -> GaussianBlur:
    return GaussianBlur(9, (0.1, 2.0), p=p)


FIRST = Image(224, scale=(0.32, 1.0), augment=(*COLOUR, blur(1.0)), **COMMON)
SECOND = Image(224, scale=(0.32, 1.0), augment=(*COLOUR, blur(0.1), RandomSolarize(0.5, p=0.2)), **COMMON)
LOCAL = Image(96, scale=(0.05, 0.32), views=8, augment=(*COLOUR, blur(0.5)), **COMMON)


def dataset(uri: str, batch_size: int, **options: Any) -> LanceDataset:
    transforms = {"first": FIRST, "second": SECOND, "local": LOCAL}
    words: dict[str, Any] = {"shuffle": True, "drop_last": True, "on_error": "replace", **options}
    return LanceDataset(uri, batch_size, columns=dict.fromkeys(transforms, "image"), transforms=transforms, **words)


def loss(batch: Batch) -> torch.Tensor:
    student = features(batch["local"]).mean(1)  # f32[B, 8, 3] → f32[B, 3]
    teacher = (features(batch["first"]) + features(batch["second"])) / 2
    return (student - teacher).square().mean()


if __name__ == "__main__":
    run(__doc__, dataset, loss)
