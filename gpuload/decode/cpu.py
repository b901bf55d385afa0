"""The CPU decoder: simplejpeg (libjpeg-turbo) for JPEG, Pillow for what it cannot read. Exactly Pillow's pixels."""

from __future__ import annotations

import io
import threading
from typing import Any

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image as pillow
from PIL import UnidentifiedImageError

from gpuload.decode import IMAGE_ROW, Ragged
from gpuload.decode.header import jpeg_orientation, sniff, valid_orientation
from gpuload.errors import DecodeError

MAX_PIXELS = 89_478_485  # Pillow's own limit, a quarter GiB of RGB
_NOT_IMAGES = {"EPS", "WMF"}  # these run other programs, or draw
_ALIGN = 64  # bytes


class CpuDecoder:
    """Decodes in the calling thread; simplejpeg and Pillow release the GIL.

    Parameters
    ----------
    max_pixels : int
        Larger images (height times width, from the header) are an error before anything is decoded.
    """

    name = "cpu"
    device = torch.device("cpu")

    def __init__(self, max_pixels: int = MAX_PIXELS) -> None:
        self._max_pixels = max_pixels
        self._local = (
            threading.local()
        )  # .arena: u8[bytes], kept from call to call: fresh pages cost more than decoding
        self._lock = threading.Lock()
        self._counts = {"simplejpeg": 0, "pillow": 0, "failed": 0}

    def decode(self, views: list[NDArray[np.uint8] | None], *, mode: str = "RGB", orient: bool = True) -> Ragged:
        """One ragged arena with every image that could be decoded; gray ones keep one channel."""
        table = np.zeros(len(views), IMAGE_ROW)
        decoded: dict[int, NDArray[np.uint8]] = {}
        errors: dict[int, DecodeError] = {}
        for i, view in enumerate(views):
            try:
                self._layout(table, decoded, i, view, mode, orient)
            except DecodeError as error:
                errors[i] = error
        sizes = table["pitch"] * table["height"]
        ends = np.cumsum((sizes + _ALIGN - 1) // _ALIGN * _ALIGN)
        table["offset"] = ends - (sizes + _ALIGN - 1) // _ALIGN * _ALIGN
        arena = self._arena(int(ends[-1]) if len(ends) else 0)
        for i in np.flatnonzero(table["height"]).tolist():
            try:
                self._fill(arena, table[i], decoded.pop(i, None), views[i], mode)
            except DecodeError as error:
                errors[i] = error
                table[i]["height"] = table[i]["width"] = 0
        with self._lock:
            self._counts["failed"] += len(errors)
        return Ragged(torch.from_numpy(arena), table, errors)

    def counts(self) -> dict[str, int]:
        """Images by the library that decoded them, and those that none could."""
        with self._lock:
            return dict(self._counts)

    def close(self) -> None:
        self._local = threading.local()

    def _layout(
        self, table: NDArray[np.void], decoded: dict[int, Any], i: int, view: Any, mode: str, orient: bool
    ) -> None:
        """Height, width and channels from the header; what is not a plain JPEG is decoded at once."""
        if view is None or not len(view):
            raise DecodeError(f"Expected an encoded image, got {'a null' if view is None else '0 bytes'}")
        if view[0] == 0xFF and len(view) > 3 and view[1] == 0xD8:
            try:
                height, width, space, _ = simplejpeg.decode_jpeg_header(view)
            except ValueError:
                space = "?"
            if space in ("YCbCr", "RGB", "Gray"):
                self._check(height, width)
                channels = 1 if space == "Gray" else 3
                orientation = jpeg_orientation(view) if orient else 1
                table[i] = (0, width * channels, height, width, channels, orientation)
                return
        pixels, orientation = self._pillow(view, mode)
        decoded[i] = pixels
        height, width, channels = pixels.shape
        table[i] = (0, width * channels, height, width, channels, orientation if orient else 1)

    def _fill(self, arena: NDArray[np.uint8], row: Any, pixels: Any, view: Any, mode: str) -> None:
        """Pixels of one image into its place."""
        h, w, c, offset = int(row["height"]), int(row["width"]), int(row["channels"]), int(row["offset"])
        place = arena[offset : offset + h * w * c].reshape(h, w, c)
        if pixels is None:
            try:
                simplejpeg.decode_jpeg(view, "GRAY" if c == 1 else "RGB", buffer=place)
            except ValueError:  # strict: libjpeg warned. Pillow knows which warnings leave the image whole
                pixels, _ = self._pillow(view, mode)
            else:
                self._count("simplejpeg")
                return
        if pixels.shape[:2] != (h, w):
            raise DecodeError(f"Expected {h}x{w} pixels as the header says, got {pixels.shape[0]}x{pixels.shape[1]}")
        place[:] = pixels if pixels.shape[2] == c else pixels[:, :, :1]

    def _pillow(self, view: Any, mode: str) -> tuple[NDArray[np.uint8], int]:
        """(u8[H, W, 1 or 3], EXIF orientation still to be applied) of anything Pillow reads; first frame only."""
        try:
            with pillow.open(io.BytesIO(view), formats=_formats()) as image:
                self._check(image.height, image.width)
                image.load()
                orientation = _exif_orientation(image)
                pixels = _to_uint8(image)
        except DecodeError:
            raise
        except UnidentifiedImageError:
            got = f"{len(view)} bytes starting {bytes(view[:4]).hex()}"
            raise DecodeError(f"Expected {_whole(view)}, got {got}") from None
        except (pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
            raise DecodeError(f"Expected at most {self._max_pixels} pixels (max_pixels), got more: {error}") from error
        except Exception as error:  # Pillow's plugins raise nearly anything on broken files
            raise DecodeError(f"Expected {_whole(view)}, got {len(view)} bytes that broke: {error}") from error
        self._count("pillow")
        return pixels, orientation

    def _check(self, height: int, width: int) -> None:
        if height < 1 or width < 1:
            raise DecodeError(f"Expected an image of at least 1x1 pixels, got {height}x{width}")
        if height * width > self._max_pixels:
            raise DecodeError(
                f"Expected at most {self._max_pixels} pixels (max_pixels), got {height}x{width} = {height * width}"
            )

    def _arena(self, size: int) -> NDArray[np.uint8]:
        arena: NDArray[np.uint8] | None = getattr(self._local, "arena", None)
        if arena is None or len(arena) < size:
            arena = self._local.arena = np.empty(max(size + size // 4, 1 << 20), np.uint8)
        return arena

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1


def _whole(view: Any) -> str:
    kind = sniff(view)
    return f"a whole {kind} file" if kind else "an image"


def _formats() -> list[str]:
    if not pillow.OPEN or "TGA" not in pillow.OPEN:
        pillow.init()
    return [name for name in pillow.ID if name not in _NOT_IMAGES]


def _exif_orientation(image: pillow.Image) -> int:
    try:
        return valid_orientation(image.getexif().get(0x0112))
    except Exception:  # broken metadata does not make an image unreadable
        return 1


def _to_uint8(image: pillow.Image) -> NDArray[np.uint8]:
    """u8[H, W, 1 or 3]. Alpha is dropped, not blended. 16-bit samples keep their high byte, where Pillow clips."""
    if image.mode.startswith("I"):  # I;16 and its byte orders; I is what Pillow makes of 16-bit PGM
        return (np.clip(np.asarray(image, np.int64), 0, 65535) >> 8).astype(np.uint8)[:, :, None]
    if image.mode in ("L", "1", "F", "LA", "La"):
        return np.asarray(image.convert("L"))[:, :, None]
    if image.mode in ("P", "PA") and "transparency" in image.info:
        return np.asarray(image.convert("RGBA"))[:, :, :3]  # the same pixels without Pillow's warning
    return np.asarray(image.convert("RGB"))
