"""What the recipes share: words of the command line, a few steps, and the rate.

Each recipe is a `dataset(uri, batch_size, ...)`, and a `loss(batch)` with a model too small to learn: put yours there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from gpuload import Batch, LanceDataset


def run(words: str | None, make: Callable[..., LanceDataset], loss: Callable[[Batch], torch.Tensor]) -> None:
    """`make` with what the command line says, `loss` of some batches, and rows a second."""
    parser = argparse.ArgumentParser(description=words, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("uri", nargs="+", help="dataset, or for a mix two of them")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="auto")
    settings = parser.parse_args()
    uri: Any = settings.uri[0] if len(settings.uri) == 1 else settings.uri
    with make(uri, settings.batch_size, device=settings.device) as dataset:
        print(dataset)
        began, rows = time.perf_counter(), 0
        for step, batch in enumerate(dataset):
            value = float(loss(batch))
            rows += batch.size
            if step == 0:
                print(batch)
            if step + 1 >= settings.steps:
                break
    print(f"loss {value:.3f}, {rows / (time.perf_counter() - began):,.0f} rows/s")


def features(images: torch.Tensor) -> torch.Tensor:
    """[B, ..., 3, H, W] → f32[B, ..., 3]: the mean colour, where a model would be."""
    return images.float().mean((-2, -1))
