"""Segmentation: random-resized crops, and label images that move along.

    python benchmarks/recipes/segmentation.py masks.lance

Columns: image, mask (an encoded label image: a palette PNG, gray, or 16 bits).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from run import run

from gpuload import Batch, Image, LanceDataset, Mask
from gpuload.augment import ColorJitter

CLASSES, IGNORE = 150, 255
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TRAIN = Image(
    (512, 512), crop="random", scale=(0.25, 1.0), ratio=(0.75, 4 / 3), flip=0.5, mean=MEAN, std=STD,
    augment=(ColorJitter(0.3, 0.3, 0.3, 0.05, p=0.5),),
)  # fmt: skip


def dataset(uri: str, batch_size: int, **options: Any) -> LanceDataset:
    transforms = {"image": TRAIN, "mask": Mask("image")}
    words: dict[str, Any] = {"shuffle": True, "drop_last": True, "on_error": "replace", **options}
    return LanceDataset(uri, batch_size, columns=["image", "mask"], transforms=transforms, **words)


def loss(batch: Batch) -> torch.Tensor:
    logits = F.pad(batch["image"].float(), (0, 0, 0, 0, 0, CLASSES - 3))  # [B, classes, H, W]
    return F.cross_entropy(logits, batch["mask"], ignore_index=IGNORE)


if __name__ == "__main__":
    run(__doc__, dataset, loss)
