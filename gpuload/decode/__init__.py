"""Pixels: byte views enter, ragged uint8 HWC pixels in one arena on the device leave, with the errors by row.

A decoder is anything with the three members of `Decoder`; `make_decoder` picks one. The dataset never sees more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from gpuload.errors import DecodeError

IMAGE_ROW = np.dtype(
    [
        ("offset", np.int64),  # bytes into the arena
        ("pitch", np.int64),  # bytes from one row of pixels to the next
        ("height", np.int32),  # as stored, before orientation
        ("width", np.int32),
        ("channels", np.int32),  # 3 (RGB) or 1 (L), interleaved
        ("orientation", np.int32),  # EXIF 1..8, what still has to be applied
    ]
)


@dataclass
class Ragged:
    """N images of N sizes in one allocation.

    The arena belongs to the decoder and is overwritten by its next call from the same thread: copy what must stay.
    """

    arena: torch.Tensor  # u8[bytes]
    table: NDArray[np.void]  # IMAGE_ROW[N]; height 0 where there is no image
    errors: dict[int, DecodeError] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.table)

    def pixels(self, i: int) -> torch.Tensor:
        """View of image i as it is stored: u8[height, width, channels]."""
        row = self.table[i]
        shape = (int(row["height"]), int(row["width"]), int(row["channels"]))
        return self.arena.as_strided(shape, (int(row["pitch"]), shape[2], 1), int(row["offset"]))

    def sizes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Heights and widths as a person sees them: orientations 5 to 8 swap the two."""
        turned = self.table["orientation"] >= 5
        h, w = self.table["height"].astype(np.int64), self.table["width"].astype(np.int64)
        return np.where(turned, w, h), np.where(turned, h, w)


class Decoder(Protocol):
    """Decodes on one device. `decode` may be called from many threads at once."""

    name: str
    device: torch.device

    def decode(self, views: list[NDArray[np.uint8] | None], *, mode: str, orient: bool) -> Ragged: ...
    def counts(self) -> dict[str, int]: ...
    def close(self) -> None: ...
