"""Image classification with a small ResNet: by default, the background's colour of the pictures `gpuload demo` draws.

    python benchmarks/train_classifier.py
    torchrun --nproc-per-node 2 benchmarks/train_classifier.py --checkpoint-every 50
    torchrun --nproc-per-node 8 benchmarks/train_classifier.py --data imagenet.lance --classes 1000 --size 224 --depth 4

`--data` needs the columns ``image`` and ``label`` (an integer), as `gpuload ingest` writes them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import training
from torch import nn

from gpuload import Batch, Image, LanceDataset
from gpuload.tools.demo import BACKGROUNDS


class Residual(nn.Module):
    """Two 3x3 convolutions and a way around them."""

    def __init__(self, inward: int, outward: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inward, outward, 3, stride, 1, bias=False), nn.BatchNorm2d(outward), nn.ReLU(inplace=True),
            nn.Conv2d(outward, outward, 3, 1, 1, bias=False), nn.BatchNorm2d(outward),
        )  # fmt: skip
        same = stride == 1 and inward == outward
        self.around = nn.Identity() if same else nn.Conv2d(inward, outward, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.around(x))


class SmallResNet(nn.Sequential):
    """f32[B, 3, S, S] → logits f32[B, classes]; `depth` stages, each half as large and twice as wide."""

    def __init__(self, classes: int, depth: int = 3, width: int = 16) -> None:
        stem = [nn.Conv2d(3, width, 7, 4, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        widths = [width * 2**i for i in range(depth)]
        stages = [Residual(max(w // 2, width), w, 1 if i == 0 else 2) for i, w in enumerate(widths)]
        super().__init__(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch["image"]), batch["label"])


@torch.no_grad()
def accuracy(model: nn.Module, dataset: LanceDataset) -> float:
    model.eval()
    right = [(model(batch["image"]).argmax(1) == batch["label"]).cpu()[batch.valid] for batch in dataset]
    return float(torch.cat(right).float().mean())


def label_of(data: str | None) -> str:
    """SQL of the label: a column, or which of the backgrounds the caption names."""
    if data:
        return "label"
    return " + ".join(
        f"{i} * CAST(caption LIKE '%a {name} background' AS BIGINT)" for i, name in enumerate(BACKGROUNDS)
    )


def main() -> None:
    settings = training.arguments(__doc__, data=None, classes=len(BACKGROUNDS), depth=3, rows=1024, epochs=4)
    device = training.start()
    path = settings.data or training.drawn(settings, settings.rows)
    common: dict[str, Any] = {"columns": {"image": "image", "label": label_of(settings.data)}, "device": device}
    crop = Image(settings.size, crop="random", scale=(0.35, 1.0), flip=0.5, mean=0.5, std=0.25)
    whole = Image(settings.size, mean=0.5, std=0.25)
    dataset = LanceDataset(
        path, settings.batch_size, shuffle=True, drop_last=True, transforms={"image": crop}, **common
    )
    held_out = settings.data or training.drawn(settings, 128, seed=1)
    model = SmallResNet(settings.classes, settings.depth).to(device)
    training.train(model, dataset, loss_of, settings)
    check = LanceDataset(held_out, settings.batch_size, rank=0, world_size=1, transforms={"image": whole}, **common)
    if training.first():  # two processes writing at once mix their lines
        print(f"accuracy {accuracy(model, check):.3f}")
    training.finish()


if __name__ == "__main__":
    main()
