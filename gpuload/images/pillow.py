"""What only Pillow can read: an image is opened once, for what its header does not tell, and loaded when it is decoded.

One Python object an image, so nothing that has a way of its own comes here: plain JPEG and PNG headers do not.
"""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as pillow
from PIL import UnidentifiedImageError

from gpuload.errors import DecodeError
from gpuload.images import KINDS, Encoded

_NOT_IMAGES = {"EPS", "WMF"}  # these run other programs, or draw
_SIZED = {  # formats whose size and orientation are known as they are opened; others are loaded at once
    "JPEG", "MPO", "PNG", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "WEBP", "AVIF", "PPM", "QOI", "TGA",
}  # fmt: skip
_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)
_TURNS: dict[Any, int] = {turn: turn for turn in range(1, 9)}  # looked up as `exif_transpose` does: 6.0 and 6/1 are 6


def open_rest(encoded: Encoded, headers: NDArray[np.void], max_pixels: int, errors: dict[int, DecodeError]) -> None:
    """What HEADER's `ask` asks for, written into `headers`; what cannot be opened goes into `errors` and has height 0.

    The images are kept in ``encoded.opened`` until they are loaded; those whose size was known already are not.
    """
    if not headers["ask"].any():
        return
    for i in np.flatnonzero(headers["ask"] & (encoded.size > 0)).tolist():
        if i in errors:
            continue
        header = headers[i]
        sized = bool(header["height"])
        try:
            image = _open(encoded.view(i), int(header["kind"]), max_pixels)
        except DecodeError as error:
            if not sized:  # else who decodes it has the last word
                errors[i] = error
            continue
        orientation = _orientation(image)
        header["orientation"] = orientation or 1
        if not sized:
            header["height"], header["width"] = _stored(image)
            header["channels"] = channels(image)
            header["precision"] = 16 if image.mode.startswith("I") else 0 if image.mode == "F" else 8
            # who is loaded by now would hold its pixels for the whole batch, and who broke at it would not break again
            if image.format in _SIZED and image.format != "PNG" and orientation is not None:
                encoded.opened[i] = image


def load(encoded: Encoded, i: int, header: Any, max_pixels: int) -> NDArray[np.uint8]:
    """Pixels of image i, u8[height, width, 1 or 3], as they are stored; of the first frame.

    Raises
    ------
    DecodeError
        It is broken, or not of the size that `header` (a row of HEADER) says.
    """
    view, kind = encoded.view(i), int(header["kind"])
    with encoded.opened.pop(i, None) or _open(view, kind, max_pixels) as image:
        try:
            turned = _orientation(image) if image.format == "TIFF" else 1
            image.load()
            pixels = _turned_back(to_uint8(image), turned)
        except Exception as error:  # Pillow's plugins raise nearly anything on broken files
            raise _broken(view, kind, error) from error
    wanted = (int(header["height"]), int(header["width"]))
    if pixels.shape[:2] != wanted:
        got = f"{pixels.shape[0]}x{pixels.shape[1]}"
        raise DecodeError(f"Expected {wanted[0]}x{wanted[1]} pixels as the header says, got {got}")
    return pixels


def labels(encoded: Encoded, i: int, header: Any, max_pixels: int) -> tuple[NDArray[Any], int | None]:
    """Image i as integers, [height, width], as they are stored (indices of a palette, gray levels of any depth), and
    the EXIF orientation that is still to be applied, None where the file names none.

    Raises
    ------
    DecodeError
        It is broken, or has more than one channel.
    """
    view, kind = encoded.view(i), int(header["kind"])
    with _open(view, kind, max_pixels) as image:
        mode = image.mode
        if mode not in ("1", "L", "P") and not mode.startswith("I"):
            raise DecodeError(f"Expected a label image with one channel (1, L, P, I or I;16), got mode {mode}")
        try:
            tagged = _ORIENTATION in image.getexif()
            own = _orientation(image) if tagged else None  # before it is loaded: Pillow turns TIFF files, and forgets
            image.load()
            return np.asarray(image), own
        except Exception as error:  # Pillow's plugins raise nearly anything on broken files
            raise _broken(view, kind, error) from error


def turn(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """[h, w, ...] as a person sees it; a view."""
    if orientation in (3, 4, 6, 7):
        pixels = pixels[::-1]
    if orientation in (2, 3, 7, 8):
        pixels = pixels[:, ::-1]
    return pixels.swapaxes(0, 1) if orientation >= 5 else pixels


def channels(image: pillow.Image) -> int:
    """What `to_uint8` will make of it: 1 or 3."""
    return 1 if image.mode in ("L", "1", "F", "LA", "La") or image.mode.startswith("I") else 3


def to_uint8(image: pillow.Image) -> NDArray[np.uint8]:
    """u8[H, W, 1 or 3]. Alpha is dropped, not blended. 16-bit samples keep their high byte, where Pillow clips."""
    if image.mode.startswith("I"):  # I;16 and its byte orders; I is what Pillow makes of 16-bit PGM
        return (np.clip(np.asarray(image, np.int64), 0, 65535) >> 8).astype(np.uint8)[:, :, None]
    if image.mode in ("L", "RGB"):  # not converted, which would be a copy
        return np.asarray(image).reshape(image.height, image.width, -1)
    if channels(image) == 1:
        return np.asarray(image.convert("L"))[:, :, None]
    if image.mode in ("P", "PA") and "transparency" in image.info:
        return np.asarray(image.convert("RGBA"))[:, :, :3]  # the same pixels without Pillow's warning
    return np.asarray(image.convert("RGB"))


def _open(view: Any, kind: int, max_pixels: int) -> pillow.Image:
    try:
        image = pillow.open(io.BytesIO(view), formats=_formats())
        _expect_size(image.height, image.width, max_pixels)
        if image.format not in _SIZED:
            image.load()
        return image
    except DecodeError:
        raise
    except UnidentifiedImageError:
        got = f"{len(view)} bytes starting {bytes(view[:4]).hex()}"
        raise DecodeError(f"Expected {_whole(kind)}, got {got}") from None
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
        own = pillow.MAX_IMAGE_PIXELS or 0  # for what Pillow reads its own limit holds too, twice this
        limit = f"{max_pixels} pixels (max_pixels)"
        limit = limit if max_pixels <= own else f"{2 * own} pixels (2 * pillow.MAX_IMAGE_PIXELS)"
        raise DecodeError(f"Expected at most {limit}, got more: {error}") from error
    except Exception as error:  # Pillow's plugins raise nearly anything on broken files
        raise _broken(view, kind, error) from error


def _expect_size(height: int, width: int, most: int) -> None:
    if height < 1 or width < 1:
        raise DecodeError(f"Expected an image of at least 1x1 pixels, got {height}x{width}")
    if height * width > most:
        raise DecodeError(f"Expected at most {most} pixels (max_pixels), got {height}x{width} = {height * width}")


def _orientation(image: pillow.Image) -> int | None:
    """What `exif_transpose` would turn by, None where Pillow broke at it."""
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION), 1)
    except Exception:  # broken metadata does not make an image unreadable
        return None


def _stored(image: pillow.Image) -> tuple[int, int]:
    """Height and width as stored. Those of a TIFF file are the turned image's, unless XMP data turn it."""
    if image.format == "TIFF" and image.tag_v2.get(_ORIENTATION) in _SIDEWAYS:  # type: ignore[attr-defined]
        return image.width, image.height
    return image.height, image.width


def _turned_back(pixels: NDArray[np.uint8], orientation: int | None) -> NDArray[np.uint8]:
    """As stored: Pillow turns TIFF files, and these alone, as it loads them."""
    if orientation in (6, 8):
        return np.rot90(pixels, 1 if orientation == 6 else -1)
    if orientation in (5, 7):
        pixels = pixels.transpose(1, 0, 2)
    rows = slice(None, None, -1 if orientation in (3, 4, 7) else 1)
    columns = slice(None, None, -1 if orientation in (2, 3, 7) else 1)
    return pixels[rows, columns]


def _broken(view: Any, kind: int, error: Exception) -> DecodeError:
    return DecodeError(f"Expected {_whole(kind)}, got {len(view)} bytes that broke: {error}")


def _whole(kind: int) -> str:
    return f"a whole {KINDS[kind]} file" if kind else "an image"


def _formats() -> list[str]:
    if not pillow.OPEN or "TGA" not in pillow.OPEN:
        pillow.init()
    return [name for name in pillow.ID if name not in _NOT_IMAGES]


@cache
def chooses_first_pass() -> bool:
    """Whether this Pillow resizes down columns first where that shrinks an image more (13.0 does), or always along
    rows first. It rounds and clips in between, so with bicubic the order is seen. Asked once of the library that is
    there."""
    stripes = np.zeros((40, 10), np.uint8)
    stripes[::3, ::2] = stripes[1::3, 1::2] = 255
    one = pillow.fromarray(stripes)
    down_first = one.resize((10, 20), pillow.Resampling.BICUBIC).resize((15, 20), pillow.Resampling.BICUBIC)
    return one.resize((15, 20), pillow.Resampling.BICUBIC).tobytes() == down_first.tobytes()
