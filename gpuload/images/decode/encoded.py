"""No pixels: byte views enter; the errors that headers and ends of files give away leave. For who decodes elsewhere."""

from __future__ import annotations

import contextlib
import io
import threading
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image as pillow

from gpuload.errors import DecodeError
from gpuload.fields.columns import Views
from gpuload.images.decode import IMAGE_ROW, Crop, Ragged
from gpuload.images.decode.cpu import MAX_PIXELS
from gpuload.images.decode.header import expect_bytes, expect_size, has_end, sniff


class Encoded:
    """Stands where a decoder stands and leaves the images as they are.

    Parameters
    ----------
    formats : tuple of str
        What the decoder behind it reads, in the words of `sniff`.
    max_pixels : int
        Larger images (height times width, from the header) are errors.
    """

    name = "none"
    device = torch.device("cpu")

    def __init__(self, formats: tuple[str, ...], max_pixels: int = MAX_PIXELS) -> None:
        self._formats, self._max_pixels = formats, max_pixels
        self._lock = threading.Lock()
        self._counts = {"encoded": 0, "failed": 0}

    def decode(self, views: Views, *, orient: bool = True, crop: Crop | None = None) -> Ragged:
        """The errors by row, no pixels. About 5 µs for a JPEG file."""
        errors: dict[int, DecodeError] = {}
        for i, view in enumerate(views):
            try:
                self._judge(view)
            except DecodeError as error:
                errors[i] = error
        with self._lock:
            self._counts["encoded"] += len(views) - len(errors)
            self._counts["failed"] += len(errors)
        return Ragged(torch.empty(0, dtype=torch.uint8), np.zeros(len(views), IMAGE_ROW), errors)

    def counts(self) -> dict[str, int]:
        """Images that were passed on, and those that were judged broken."""
        with self._lock:
            return dict(self._counts)

    def close(self) -> None:
        pass

    def _judge(self, view: Any) -> None:
        expect_bytes(view)
        kind = sniff(view)
        if kind not in self._formats:
            got = f"a {kind} file" if kind else f"{len(view)} bytes starting {bytes(view[:4]).hex()}"
            raise DecodeError(f"Expected an image as {', '.join(self._formats)}, got {got}")
        if (kind == "JPEG" and not has_end(view)) or (kind == "PNG" and b"IEND" not in bytes(view)):
            raise DecodeError(f"Expected a whole {kind} file, got {len(view)} bytes without its end marker")
        expect_size(*_size(view, kind), self._max_pixels)


def _size(view: Any, kind: str) -> tuple[int, int]:
    """Height and width by the header, in pixels."""
    if kind == "JPEG":
        with contextlib.suppress(ValueError):  # colours that simplejpeg does not know
            height, width, *_ = simplejpeg.decode_jpeg_header(view)
            return int(height), int(width)
    try:
        with pillow.open(io.BytesIO(view)) as image:
            return image.height, image.width
    except Exception as error:  # Pillow's plugins raise nearly anything on broken files
        raise DecodeError(f"Expected a whole {kind} file, got {len(view)} bytes that broke: {error}") from error
