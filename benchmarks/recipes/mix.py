"""A mix of two datasets with weights, each in an order of its own, as often in every stretch as its weight says.

    python benchmarks/recipes/mix.py laion.lance own.lance

Columns of both: image, caption.
"""

from __future__ import annotations

from typing import Any

import torch
from run import features, run

from gpuload import Batch, Image, LanceDataset, Mix, Text

NAMES = ("large", "own")
IMAGE = Image(224, interpolation="bicubic", crop="random", scale=(0.9, 1.0), mean=0.5, std=0.5)


def dataset(uris: list[str], batch_size: int, **options: Any) -> LanceDataset:
    mixed = Mix(dict(zip(NAMES, uris, strict=True)), weights={"large": 0.7, "own": 0.3}, stop="last")
    transforms = {"image": IMAGE, "caption": Text("bytes", max_length=77)}
    words: dict[str, Any] = {"shuffle": True, "drop_last": True, "on_error": "replace", **options}
    return LanceDataset(mixed, batch_size, columns=["image", "caption"], transforms=transforms, **words)


def loss(batch: Batch) -> torch.Tensor:
    each = features(batch["image"]).square().mean(1)
    weight = torch.where(batch.source == NAMES.index("own"), 2.0, 1.0).to(each.device)  # by where a row comes from
    return (each * weight).mean()


if __name__ == "__main__":
    run(__doc__, dataset, loss)
