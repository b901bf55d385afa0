"""After the resize: pixels of 0..1 enter, augmented and normalised images of the wanted dtype leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gpuload.errors import ConfigError, stopped
from gpuload.images.transform import Image


def finish(images: torch.Tensor, image: Image, draws: Sequence[Any]) -> torch.Tensor:
    """Augment, normalise, augment what is normalised, and convert, on the calling thread's current stream.

    Parameters
    ----------
    images : f32[M, C, H, W]
        In 0..1; may be overwritten.
    image : Image
    draws : sequence
        One an augmentation, each for M images.

    Returns
    -------
    Tensor[M, C, H, W]
        Of ``image.dtype``, in its memory format.
    """
    each = list(zip(image.augment, draws, strict=True))
    for function, drawn in each:
        if not getattr(function, "normalized", False):
            images = _called(function, images, drawn)
    if image.dtype == torch.uint8:
        images = (images * 255 + 0.5).floor_().clamp_(0, 255)
    elif image.mean is not None or image.std is not None:
        mean, std = image.mean or (0.0,) * image.channels, image.std or (1.0,) * image.channels
        mean_, std_ = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (mean, std))
        images = (images - mean_) / std_
    for function, drawn in each:
        if getattr(function, "normalized", False):
            images = _called(function, images, drawn)
            images = (images + 0.5).floor_().clamp_(0, 255) if image.dtype == torch.uint8 else images
    layout = torch.channels_last if image.channels_last else torch.contiguous_format
    return images.to(image.dtype).contiguous(memory_format=layout)


def _called(function: Any, images: torch.Tensor, draws: Any) -> torch.Tensor:
    shape, device = images.shape, images.device
    try:
        found: Any = function(images, draws)
    except StopIteration as error:
        raise stopped(f"the augmentation {function!r}") from error
    good = isinstance(found, torch.Tensor) and found.shape == shape and found.device == device
    if not good or not found.is_floating_point():
        got = (
            f"{found.dtype} {tuple(found.shape)} on {found.device}" if isinstance(found, torch.Tensor) else repr(found)
        )
        raise ConfigError(f"Expected floats {tuple(shape)} on {device} from the augmentation {function!r}, got {got}.")
    floats: torch.Tensor = found.float()
    return floats
