"""The three tasks that every loader does here, and the best a user would write for a loader that does not decode.

pixels: shorter side 256 antialiased, centre crop 224, u8[64, 3, 224, 224]. captions: the same, and the captions as
i64[64, 77]. training: random-resized crop 224, flip, normalised, f32[64, 3, 224, 224].
"""

from __future__ import annotations

import io
import math
import random
from functools import cached_property
from typing import Any

import data
import numpy as np
import torch
import torch.nn.functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TASKS = ("pixels", "captions", "training")
LENGTH = 77  # tokens


class Task:
    """What becomes of rows; goes to other processes by pickle.

    Parameters
    ----------
    settings
        Of the benchmark: its `task` and where its data is.
    pillow : bool
        Decode and resize as Lance's documentation does, instead of simplejpeg and torch's uint8 resize.
    """

    def __init__(self, settings: Any, pillow: bool = False) -> None:
        self.name, self.pillow = settings.task, pillow
        self._tokenizer = data.tokenizer(settings) if self.name == "captions" else ""

    @property
    def columns(self) -> list[str]:
        return ["image", "caption"] if self.name == "captions" else ["image"]

    @cached_property
    def _encode(self) -> Any:
        from tokenizers import Tokenizer

        found = Tokenizer.from_file(self._tokenizer)
        found.enable_truncation(LENGTH)
        found.enable_padding(length=LENGTH)
        return found.encode_batch_fast

    def ids(self, captions: list[str]) -> torch.Tensor:
        """i64[B, 77]"""
        return torch.from_numpy(np.array([encoded.ids for encoded in self._encode(captions)], np.int64))

    def image(self, encoded: Any) -> torch.Tensor:
        """One image: u8 or f32 [3, 224, 224]."""
        if self.pillow:
            return self._by_pillow(encoded)
        import simplejpeg

        pixels = torch.from_numpy(simplejpeg.decode_jpeg(encoded, "RGB")).permute(2, 0, 1)
        if self.name != "training":
            h, w = pixels.shape[1:]
            size = (256, int(256 * w / h)) if h <= w else (int(256 * h / w), 256)
            scaled = F.interpolate(pixels[None], size=size, mode="bilinear", antialias=True)[0]
            y, x = (size[0] - 224) // 2, (size[1] - 224) // 2
            return scaled[:, y : y + 224, x : x + 224]
        y, x, h, w = random_crop(*pixels.shape[1:])
        part = pixels[None, :, y : y + h, x : x + w]
        return finish(F.interpolate(part, size=(224, 224), mode="bilinear", antialias=True)[0])

    def batch(self, images: Any, captions: list[str]) -> int:
        """Stack and tokenize as a collate function would; the number of rows."""
        made = torch.stack(list(images))
        if self.name == "captions":
            self.ids(captions)
        return len(made)

    def collate(self, rows: list[tuple[Any, str]]) -> int:
        return self.batch([self.image(row[0]) for row in rows], [row[1] for row in rows])

    def _by_pillow(self, encoded: Any) -> torch.Tensor:
        from PIL import Image

        picture, bilinear = Image.open(io.BytesIO(encoded)).convert("RGB"), Image.Resampling.BILINEAR
        w, h = picture.size
        if self.name == "training":
            y, x, ch, cw = random_crop(h, w)
            picture = picture.resize((224, 224), bilinear, (x, y, x + cw, y + ch))
            return finish(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
        picture = picture.resize((256 * w // h, 256) if h <= w else (256, 256 * h // w), bilinear)
        x, y = (picture.width - 224) // 2, (picture.height - 224) // 2
        return torch.from_numpy(np.array(picture.crop((x, y, x + 224, y + 224)))).permute(2, 0, 1)


def random_crop(height: int, width: int) -> tuple[int, int, int, int]:
    """y, x, height, width of torchvision's random-resized crop."""
    for _ in range(10):
        area = height * width * random.uniform(0.08, 1)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def finish(pixels: torch.Tensor) -> torch.Tensor:
    """u8[3, H, W] → f32, mirrored one time in two, normalised."""
    pixels = pixels.flip(2) if random.random() < 0.5 else pixels
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return pixels.float().div_(255).sub_(mean).div_(std)


def one_thread(_: int = 0) -> None:
    """For worker processes and threads: torch's own loops would only fight each other."""
    torch.set_num_threads(1)
