"""Training in bfloat16, forward, backward and step: on images that are there already, or on those of gpuload."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_setup import MEAN, STD, Pass, Setup
from torch import nn

from gpuload import Image, LanceDataset

_CLASSES = 1000


class ViT(nn.Module):
    """ViT-S/16, f[B, 3, 224, 224] → f[B, classes], in torch's own layers."""

    def __init__(self, width: int = 384, depth: int = 12, heads: int = 6, patch: int = 16, size: int = 224) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.place = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2 + 1, width))
        options: dict[str, Any] = {"activation": "gelu", "batch_first": True, "norm_first": True, "dropout": 0.0}
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, **options)
        self.layers = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, _CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)  # f[B, 196, width]
        tokens = torch.cat([self.first.expand(len(tokens), -1, -1), tokens], 1) + self.place
        found: torch.Tensor = self.head(self.layers(tokens)[:, 0])
        return found


def resnet() -> nn.Module:
    from torchvision.models import resnet50

    found: nn.Module = resnet50()
    return found


def training(make: Callable[[], nn.Module], decoder: str | None) -> Callable[[Setup], Pass]:
    """Steps on synthetic images of the device (decoder None), or on batches that this decoder feeds."""

    def case(setup: Setup) -> Pass:
        model = make().to(setup.device, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        labels = torch.zeros(setup.batch_size, dtype=torch.int64, device=setup.device)
        blank = torch.randn((setup.batch_size, 3, 224, 224), device=setup.device).bfloat16()
        blank = blank.contiguous(memory_format=torch.channels_last)
        layout: dict[str, Any] = {"dtype": torch.bfloat16, "channels_last": True}
        image = Image(224, crop="random", flip=0.5, mean=MEAN, std=STD, **layout)
        options: dict[str, Any] = {"columns": ["image"], "transforms": {"image": image}, "device": str(setup.device)}
        fed = decoder and LanceDataset(setup.lance(), setup.batch_size, drop_last=True, decoder=decoder, **options)

        def step(images: torch.Tensor) -> None:
            with torch.autocast(setup.device.type, torch.bfloat16):
                loss = nn.functional.cross_entropy(model(images), labels[: len(images)])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        def run() -> Iterator[int]:
            steps = range(setup.rows // setup.batch_size)
            for images in (batch["image"] for batch in fed) if fed else (blank for _ in steps):
                step(images)
                yield len(images)
                if setup.device.type == "cuda":  # as a loop that looks at its loss; also keeps the queue of steps short
                    torch.cuda.current_stream().synchronize()

        return run

    return case
