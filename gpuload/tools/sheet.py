"""A contact sheet: the images of a batch as tiles with their captions, one picture to look at.

Enter: image tensors (uint8 or float, any sizes) and texts. Leave: a Pillow image.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gpuload.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
PAPER, INK, FAINT, TILE, BROKEN = (255, 255, 255), (32, 33, 36), (150, 153, 158), (238, 239, 241), (190, 30, 45)
FONTS = ("NotoSansCJK-Regular.ttc", "DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf")  # for what Pillow's own lacks
GAP, TEXT_SIZE, LINES = 12, 14, 4


def contact_sheet(
    images: Tensor | Sequence[Tensor],
    captions: Sequence[str | None] | None = None,
    *,
    valid: Sequence[bool] | Tensor | None = None,
    columns: int | None = None,
    tile: int = 224,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    title: str = "",
) -> Image.Image:
    """Tiles of `tile` pixels, images letterboxed and never enlarged beyond them, captions below in up to four lines.

    Parameters
    ----------
    images : Tensor [B, C, H, W] or sequence of Tensor [C, H, W]
        C is 1 or 3, on any device. uint8 0..255; float 0..1, or normalised by `mean` and `std`.
    captions : sequence of str or None, optional
        None is written as "no caption".
    valid : bool[B], optional
        False marks the tile as a row that could not be read.
    columns : int, optional
        Tiles side by side; by default about twice as many as one below the other.
    mean, std : sequence of float, optional
        What `Image` was given, to be undone.
    """
    count = len(images)
    texts: list[str | None] = list(captions) if captions is not None else [""] * count
    good = [bool(v) for v in valid] if valid is not None else [True] * count
    if not count == len(texts) == len(good):
        raise ConfigError(f"Expected one caption and one mark an image, got {len(texts)}, {len(good)} for {count}.")
    columns = columns or _columns(count)
    line, head = TEXT_SIZE + 4, 34 if title else 0
    said = [_say(text) for text in texts]
    fonts = [_font(text, TEXT_SIZE) for text in said]
    wrapped = [_wrap(text, tile, font) for text, font in zip(said, fonts, strict=True)]
    rows = [range(first, min(first + columns, count)) for first in range(0, count, columns)]
    heights = [tile + 4 + line * max(len(wrapped[i]) for i in row) + GAP for row in rows]
    sheet = Image.new("RGB", (GAP + columns * (tile + GAP), GAP + head + sum(heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((GAP, GAP), title, INK, _font(title, TEXT_SIZE + 4))
    top = GAP + head
    for row, height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            left = GAP + column * (tile + GAP)
            sheet.paste(_tile(_pixels(images[i], mean, std), tile) if good[i] else _broken(tile), (left, top))
            for number, text in enumerate(wrapped[i]):
                place = (left, top + tile + 4 + number * line)
                draw.text(place, text, FAINT if texts[i] is None else INK, fonts[i])
        top += height
    return sheet


def _columns(count: int) -> int:
    """About twice as many columns as rows, and few places empty in the last row."""
    wide = max(1, min(count, round((2 * count) ** 0.5)))
    return min(range(max(1, wide - 2), wide + 3), key=lambda columns: (-count % columns, abs(columns - wide)))


def _pixels(image: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Image.Image:
    """A tensor [C, H, W] as an RGB picture, normalisation undone."""
    image = image.detach().cpu()
    if image.ndim != 3 or image.shape[0] not in (1, 3) or 0 in image.shape:
        raise ConfigError(f"Expected images [C, H, W] with C of 1 or 3, got {tuple(image.shape)}.")
    if image.is_floating_point():
        values = image.float().numpy()  # f32[C, H, W]
        if std is not None:
            values = values * np.asarray(std, np.float32).reshape(-1, 1, 1)
        if mean is not None:
            values = values + np.asarray(mean, np.float32).reshape(-1, 1, 1)
        values = np.nan_to_num(values).clip(0, 1) * 255 + 0.5
        array = values.astype(np.uint8)
    else:
        array = image.numpy().astype(np.uint8)
    array = np.ascontiguousarray(np.broadcast_to(array, (3, *array.shape[1:])).transpose(1, 2, 0))  # u8[H, W, 3]
    return Image.fromarray(array)


def _tile(image: Image.Image, side: int) -> Image.Image:
    """The whole picture in the middle of a square."""
    square = Image.new("RGB", (side, side), TILE)
    scale = min(side / image.width, side / image.height, 1)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    small = image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)
    square.paste(small, ((side - size[0]) // 2, (side - size[1]) // 2))
    return square


def _broken(side: int) -> Image.Image:
    """The tile of a row without an image: crossed out, in words as well."""
    square = Image.new("RGB", (side, side), (252, 232, 234))
    draw = ImageDraw.Draw(square)
    draw.line((0, 0, side, side), BROKEN, 2)
    draw.line((0, side, side, 0), BROKEN, 2)
    draw.rectangle((0, 0, side - 1, side - 1), outline=BROKEN, width=3)
    text, font = "not readable", _font("", TEXT_SIZE + 2)
    half = font.getlength(text) / 2 + 8
    draw.rectangle((side / 2 - half, side / 2 - 14, side / 2 + half, side / 2 + 14), fill=BROKEN)
    draw.text((side / 2, side / 2), text, PAPER, font, anchor="mm")
    return square


def _say(text: str | None) -> str:
    """One line of printable characters."""
    if text is None:
        return "no caption"
    return " ".join("".join(c if c.isprintable() else " " for c in text[:1000]).split())


def _wrap(text: str, width: int, font: Font) -> list[str]:
    """Lines that fit `width` pixels, broken at spaces where there are any, the last one cut with an ellipsis."""
    lines: list[str] = []
    line = ""
    for word in text.split(" "):
        if len(lines) > LINES:
            break
        longer = f"{line} {word}" if line else word
        if font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        while len(word) > 1 and font.getlength(word) > width:  # no space to break at
            cut = max(1, bisect_right(range(len(word)), width, key=lambda n: math.ceil(font.getlength(word[:n]))) - 1)
            lines.append(word[:cut])
            word = word[cut:]
        line = word
    lines += [line] if line else []
    if len(lines) > LINES:  # the rest is cut off
        last = lines[LINES - 1]
        while last and font.getlength(f"{last}…") > width:
            last = last[:-1]
        lines = [*lines[: LINES - 1], f"{last.rstrip()}…"]
    return lines


def _font(text: str, size: int) -> Font:
    """A font that has the letters of `text`, as far as this machine has one."""
    return _load(size, not text.isascii())


@lru_cache
def _load(size: int, wide: bool) -> Font:
    for name in FONTS if wide else ():
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)
