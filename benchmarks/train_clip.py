"""Pictures and their captions into one space: a tiny CLIP, trained on the pictures that `gpuload demo` draws.

A caption says exactly what its picture shows, so retrieval works only if the loader keeps the two together.

    python benchmarks/train_clip.py                                   # a minute on two CPU cores
    torchrun --nproc-per-node 2 benchmarks/train_clip.py --checkpoint-every 50
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
import torch.nn.functional as F
import training
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn

from gpuload import Batch, Image, LanceDataset, Text
from gpuload.tools.demo import BACKGROUNDS, COLOURS, FILLINGS, KINDS, PLACES, SIZES


def words() -> Tokenizer:
    """A word a token, with the vocabulary of the demo's captions; 0 is the padding."""
    known = " ".join(
        ["[PAD] [UNK] a on background", *SIZES, *FILLINGS, *COLOURS, *KINDS, *PLACES, *BACKGROUNDS]
    ).split()
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(dict.fromkeys(known))}, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    return tokenizer


def block(inward: int, outward: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inward, outward, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outward), nn.ReLU(inplace=True)
    )


class TinyCLIP(nn.Module):
    """Images f32[B, 3, S, S] and ids i64[B, L] → f32[B, D] each, of length 1; and the scale of their products."""

    def __init__(self, size: int, vocabulary: int, width: int = 128) -> None:
        super().__init__()
        self.image = nn.Sequential(block(3, 24), block(24, 48), block(48, 96), block(96, 128), nn.Flatten())
        self.image_out = nn.Linear(128 * (size // 16) ** 2, width)
        self.words = nn.Embedding(vocabulary, width, padding_idx=0)
        self.text = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.text_out = nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.tensor(2.3))

    def forward(self, images: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pictures = self.image_out(self.image(images))
        read, _ = self.text(self.words(ids))  # f32[B, L, 2D]
        kept = read.masked_fill(mask[..., None] == 0, -1e4).amax(1)
        return F.normalize(pictures, dim=1), F.normalize(self.text_out(kept), dim=1), self.scale.exp().clamp(max=100)


def contrastive(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Each picture picks its caption among the batch's, each caption its picture."""
    pictures, captions, scale = model(batch["image"], batch["caption"], batch["caption_mask"])
    logits = scale * pictures @ captions.T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@torch.no_grad()
def retrieval(model: TinyCLIP, batch: Batch) -> float:
    """Share of the pictures that find their caption among all of the batch, and the other way round."""
    model.eval()
    pictures, captions, _ = model(batch["image"], batch["caption"], batch["caption_mask"])
    target = torch.arange(len(pictures), device=pictures.device)
    products = pictures @ captions.T
    found = (products.argmax(1) == target).float().mean() + (products.argmax(0) == target).float().mean()
    return float(found) / 2


def main() -> None:
    settings = training.arguments(__doc__, gallery=128, epochs=8)
    device = training.start()
    tokenizer = words()
    common: dict[str, Any] = {"columns": ["image", "caption"], "device": device}
    text = Text(tokenizer, max_length=20, padding="max_length")
    image = Image(settings.size, crop="none", mean=0.5, std=0.25)
    mirrored = dataclasses.replace(image, flip=0.5)  # no caption says left or right
    dataset = LanceDataset(
        training.drawn(settings, settings.rows), settings.batch_size, shuffle=True, drop_last=True,
        transforms={"image": mirrored, "caption": text}, **common,
    )  # fmt: skip
    gallery = LanceDataset(
        training.drawn(settings, settings.gallery, seed=1), settings.gallery,
        transforms={"image": image, "caption": text}, rank=0, world_size=1, **common,
    )  # fmt: skip
    model = TinyCLIP(settings.size, tokenizer.get_vocab_size()).to(device)
    started = time.process_time()
    training.train(model, dataset, contrastive, settings)
    seconds = time.process_time() - started
    if training.first():
        (batch,) = gallery
        print(f"retrieval {retrieval(model, batch):.3f} of {batch.size}, {seconds:.0f} s of CPU time")
    training.finish()


if __name__ == "__main__":
    main()
