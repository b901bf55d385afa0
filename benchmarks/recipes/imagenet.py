"""ImageNet as timm trains it: random-resized crop, flip, RandAugment, erasing, then MixUp or CutMix with soft labels.

    python benchmarks/recipes/imagenet.py imagenet.lance

Columns: image, label (an integer).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from run import features, run

from gpuload import Batch, Image, LanceDataset
from gpuload.augment import CutMix, MixUp, RandAugment, RandomErasing

CLASSES = 1000
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TRAIN = Image(
    224, interpolation="bicubic", crop="random", scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5, mean=MEAN, std=STD,
    augment=(RandAugment(2, 9), RandomErasing(0.25, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3))),
)  # fmt: skip
VALID = Image(224, interpolation="bicubic", crop="center", crop_ratio=0.875, mean=MEAN, std=STD)
MIXUP, CUTMIX = MixUp(0.8, labels="label", classes=CLASSES), CutMix(1.0, labels="label", classes=CLASSES)


def mix(batch: Batch, draws: Any) -> Batch:
    """One of the two for the whole batch."""
    return (MIXUP if draws.uniform("which", 1)[0, 0] < 0.5 else CUTMIX)(batch, draws)


def dataset(uri: str, batch_size: int, **options: Any) -> LanceDataset:
    transforms = {"image": TRAIN}
    words: dict[str, Any] = {"shuffle": True, "drop_last": True, "on_error": "replace", "after": [mix], **options}
    return LanceDataset(uri, batch_size, columns=["image", "label"], transforms=transforms, **words)


def loss(batch: Batch) -> torch.Tensor:
    logits = F.pad(features(batch["image"]), (0, CLASSES - 3))
    return F.cross_entropy(logits, batch["label"])


if __name__ == "__main__":
    run(__doc__, dataset, loss)
