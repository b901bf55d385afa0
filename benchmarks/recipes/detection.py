"""Detection: random-resized crops whose boxes move along; for evaluation the whole picture with gray around it.

    python benchmarks/recipes/detection.py boxes.lance

Columns: image, boxes (list of x0, y0, x1, y1 in pixels), labels (list of integers, one a box).
"""

from __future__ import annotations

from typing import Any

import torch
from run import features, run

from gpuload import Batch, Boxes, Image, LanceDataset
from gpuload.augment import ColorJitter

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TRAIN = Image(
    (512, 512), crop="random", scale=(0.3, 1.0), ratio=(0.5, 2.0), flip=0.5, mean=MEAN, std=STD,
    augment=(ColorJitter(0.2, 0.2, 0.2),),
)  # fmt: skip
VALID = Image((512, 512), crop="pad", mean=MEAN, std=STD)  # the whole picture, in the middle of its output


def dataset(uri: str, batch_size: int, image: Image = TRAIN, **options: Any) -> LanceDataset:
    transforms = {"image": image, "boxes": Boxes("image", format="xyxy")}
    words: dict[str, Any] = {"shuffle": image is TRAIN, "on_error": "replace", **options}
    return LanceDataset(uri, batch_size, columns=["image", "boxes", "labels"], transforms=transforms, **words)


def targets(batch: Batch) -> list[dict[str, torch.Tensor]]:
    """What torchvision's detectors take: the boxes that have area left, and their labels."""
    rows = zip(batch["boxes"], batch["boxes_keep"], batch["labels"], strict=True)
    return [
        {"boxes": boxes[keep], "labels": torch.tensor(labels or [], device=keep.device, dtype=torch.int64)[keep]}
        for boxes, keep, labels in rows
    ]


def loss(batch: Batch) -> torch.Tensor:
    wide = torch.stack([(t["boxes"][:, 2] - t["boxes"][:, 0]).sum() for t in targets(batch)])
    return (features(batch["image"]).mean(1) - wide / 512).square().mean()


if __name__ == "__main__":
    run(__doc__, dataset, loss)
