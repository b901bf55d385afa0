"""SDXL: batches of one size by aspect ratio, the size and crop that the model is told of, captions left out at times.

    python benchmarks/recipes/sdxl.py pairs.lance

Columns: image, caption (a string, or a list of them); height and width, as `gpuload ingest` writes them.
"""

from __future__ import annotations

from typing import Any

import torch
from run import features, run

from gpuload import Batch, Buckets, Image, LanceDataset, Text

UPRIGHT = [(1152, 896), (1216, 832), (1344, 768), (1536, 640)]
SIZES = [(1024, 1024), *UPRIGHT, *((width, height) for height, width in UPRIGHT)]
IMAGE = Image("bucket", crop="center", crop_ratio=1.0, mean=0.5, std=0.5)  # pixels in -1..1


def dataset(uri: str, batch_size: int, sizes: Any = SIZES, tokenizer: Any = "bytes", **options: Any) -> LanceDataset:
    transforms = {"image": IMAGE, "caption": Text(tokenizer, max_length=77, padding="max_length", dropout=0.1)}
    buckets = Buckets(sizes, of="image", height="height", width="width")
    words: dict[str, Any] = {"shuffle": True, "drop_last": True, "on_error": "replace", "buckets": buckets, **options}
    return LanceDataset(uri, batch_size, columns=["image", "caption"], transforms=transforms, **words)


def conditioning(batch: Batch) -> torch.Tensor:
    """i64[B, 6]: original height and width, top and left of the crop in the resized picture, height and width."""
    region, size = batch.regions["image"], batch.original_sizes["image"]
    out = torch.tensor(batch["image"].shape[2:])
    corner = (region[:, [1, 0]] * out[0] / region[:, 3:4]).round().long()
    return torch.cat([size, corner, out.expand(len(size), 2)], dim=1)


def loss(batch: Batch) -> torch.Tensor:
    return features(batch["image"]).square().mean() + 0 * conditioning(batch).sum()


if __name__ == "__main__":
    run(__doc__, dataset, loss)
