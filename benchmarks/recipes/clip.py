"""CLIP as open_clip trains it: nearly whole pictures, bicubic, and one of each picture's captions.

    python benchmarks/recipes/clip.py pairs.lance

Columns: image, caption (a string, or a list of them).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from run import features, run

from gpuload import Batch, Image, LanceDataset, Text

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TRAIN = Image(224, interpolation="bicubic", crop="random", scale=(0.9, 1.0), mean=MEAN, std=STD)
VALID = Image(224, interpolation="bicubic", crop="center", crop_ratio=1.0, mean=MEAN, std=STD)


def dataset(uri: str, batch_size: int, tokenizer: Any = "bytes", **options: Any) -> LanceDataset:
    text = Text(tokenizer, max_length=77, padding="max_length")
    words: dict[str, Any] = {"shuffle": True, "drop_last": True, "on_error": "replace", **options}
    return LanceDataset(
        uri, batch_size, columns=["image", "caption"], transforms={"image": TRAIN, "caption": text}, **words
    )


def loss(batch: Batch) -> torch.Tensor:
    texts = batch["caption"][:, :3].float()
    logits = F.normalize(features(batch["image"])) @ F.normalize(texts).T
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


if __name__ == "__main__":
    run(__doc__, dataset, loss)
