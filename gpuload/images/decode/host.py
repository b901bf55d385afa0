"""One image on the host: simplejpeg (libjpeg-turbo) for JPEG, Pillow for what it cannot read. Exactly Pillow's pixels.

What every decoder falls back on: bytes enter, a row of the table and the pixels in their place leave.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image as pillow
from PIL import UnidentifiedImageError

from gpuload.errors import DecodeError
from gpuload.images.decode.header import expect_bytes, expect_size, jpeg_orientation, sniff, valid_orientation

_NOT_IMAGES = {"EPS", "WMF"}  # these run other programs, or draw
Run = Callable[[Callable[[int], Any], Iterable[int]], Iterable[Any]]  # as the built-in map; in order


class Host:
    """Decodes on the host in two steps, `measure` and `fill`, and counts images by the library that read them.

    Both steps take `which`, the indices they are for, and put what fails into `errors`. They may be called from many
    threads at once; with a `run` that maps on threads, the images of one call share these.
    """

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._lock = threading.Lock()
        self._counts = {"simplejpeg": 0, "pillow": 0, "failed": 0}

    def measure(
        self,
        table: NDArray[np.void],
        which: Iterable[int],
        views: list[NDArray[np.uint8] | None],
        orient: bool,
        errors: dict[int, DecodeError],
        run: Run = map,
    ) -> dict[int, NDArray[np.uint8]]:
        """Everything of the table's rows but the offsets; the pixels of what had to be decoded to know them."""
        slow: list[int] = []
        for i in which:
            try:
                if not self._plain_jpeg(table[i], views[i], orient):
                    slow.append(i)
            except DecodeError as error:
                errors[i] = error

        def decode(i: int) -> tuple[int, NDArray[np.uint8] | None]:
            try:
                pixels, orientation = self._pillow(views[i])
            except DecodeError as error:
                errors[i] = error
                return i, None
            height, width, channels = pixels.shape
            table[i] = (0, width * channels, height, width, channels, orientation if orient else 1)
            return i, pixels

        return {i: pixels for i, pixels in run(decode, slow) if pixels is not None}

    def fill(
        self,
        memory: NDArray[np.uint8],
        offsets: NDArray[np.int64],
        table: NDArray[np.void],
        which: Iterable[int],
        decoded: dict[int, NDArray[np.uint8]],
        views: list[NDArray[np.uint8] | None],
        errors: dict[int, DecodeError],
        run: Run = map,
    ) -> None:
        """Pixels of each image into ``memory[offsets[i]:]``; what fails becomes an image of height 0."""

        def one(i: int) -> None:
            try:
                self._fill(memory[int(offsets[i]) :], table[i], decoded.pop(i, None), views[i])
            except DecodeError as error:
                errors[i] = error
                table[i]["height"] = table[i]["width"] = 0

        for _ in run(one, [i for i in which if table[i]["height"]]):
            pass

    def count(self, name: str, number: int = 1) -> None:
        with self._lock:
            self._counts[name] = self._counts.get(name, 0) + number

    def counts(self) -> dict[str, int]:
        """Images by the library that decoded them, and those that none could."""
        with self._lock:
            return dict(self._counts)

    def _plain_jpeg(self, row: Any, view: Any, orient: bool) -> bool:
        """Whether it is a JPEG that simplejpeg decodes to Pillow's pixels; its header is then in `row`."""
        expect_bytes(view)
        if len(view) < 4 or view[0] != 0xFF or view[1] != 0xD8:
            return False
        try:
            height, width, space, _ = simplejpeg.decode_jpeg_header(view)
        except ValueError:
            return False
        if space not in ("YCbCr", "RGB", "Gray"):
            return False
        expect_size(height, width, self._max_pixels)
        channels = 1 if space == "Gray" else 3
        for name, value in zip(
            ("pitch", "height", "width", "channels", "orientation"),
            (width * channels, height, width, channels, jpeg_orientation(view) if orient else 1),
            strict=True,
        ):
            row[name] = value
        return True

    def _fill(self, memory: NDArray[np.uint8], row: Any, pixels: Any, view: Any) -> None:
        h, w, c = int(row["height"]), int(row["width"]), int(row["channels"])
        place = memory[: h * w * c].reshape(h, w, c)
        if pixels is None:
            try:
                simplejpeg.decode_jpeg(view, "GRAY" if c == 1 else "RGB", buffer=place)
            except ValueError:  # strict: libjpeg warned. Pillow knows which warnings leave the image whole
                pixels, _ = self._pillow(view)
            else:
                self.count("simplejpeg")
                return
        if pixels.shape[:2] != (h, w):
            raise DecodeError(f"Expected {h}x{w} pixels as the header says, got {pixels.shape[0]}x{pixels.shape[1]}")
        place[:] = pixels if pixels.shape[2] == c else pixels[:, :, :1]

    def _pillow(self, view: Any) -> tuple[NDArray[np.uint8], int]:
        """(u8[H, W, 1 or 3], EXIF orientation still to be applied) of anything Pillow reads; first frame only."""
        try:
            with pillow.open(io.BytesIO(view), formats=_formats()) as image:
                expect_size(image.height, image.width, self._max_pixels)
                image.load()
                orientation = _exif_orientation(image)
                pixels = _to_uint8(image)
        except DecodeError:
            raise
        except UnidentifiedImageError:
            got = f"{len(view)} bytes starting {bytes(view[:4]).hex()}"
            raise DecodeError(f"Expected {_whole(view)}, got {got}") from None
        except (pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
            own = pillow.MAX_IMAGE_PIXELS or 0  # for what Pillow reads its own limit holds too, twice this
            limit = f"{self._max_pixels} pixels (max_pixels)"
            limit = limit if self._max_pixels <= own else f"{2 * own} pixels (2 * PIL.Image.MAX_IMAGE_PIXELS)"
            raise DecodeError(f"Expected at most {limit}, got more: {error}") from error
        except Exception as error:  # Pillow's plugins raise nearly anything on broken files
            raise DecodeError(f"Expected {_whole(view)}, got {len(view)} bytes that broke: {error}") from error
        self.count("pillow")
        return pixels, orientation


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
