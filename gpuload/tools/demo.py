"""Generated pictures whose captions say exactly what is in them, for a first look without any data at hand.

Enter: a number and a seed. Leave: pictures with captions, or a Lance dataset of them.

A picture holds two shapes on a background; size, filling, colour and kind of both, how they stand to each other and
the background are drawn at random and all named. No caption speaks of left and right: a mirrored picture keeps it.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import random
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from PIL.PngImagePlugin import PngInfo

from gpuload.errors import ConfigError
from gpuload.stages import ordered_map

COLOURS = {
    "red": (222, 49, 60),
    "orange": (245, 140, 32),
    "yellow": (250, 208, 44),
    "green": (46, 164, 79),
    "blue": (38, 104, 220),
    "purple": (136, 66, 190),
    "pink": (246, 122, 176),
    "brown": (128, 78, 44),
    "black": (36, 36, 42),
}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "gray": (178, 182, 190),
    "beige": (238, 222, 190),
    "pale blue": (190, 220, 244),
    "pale green": (200, 232, 196),
    "navy": (40, 60, 128),
}
CORNERS = {"triangle": 3, "square": 4, "pentagon": 5, "hexagon": 6}
KINDS = ("circle", "ring", "heart", "star", "cross", *CORNERS)
FILLINGS = ("", "striped ", "dotted ")
SIZES = {"large": 0.22, "small": 0.13}  # radius as a share of the shorter side
PLACES = ("above", "below", "beside")
_ORIGIN = "gpuload demo"  # what the versions of a dataset say of where they come from
_FINE = 2  # drawn so many times larger, then reduced: smooth edges


@dataclass(frozen=True)
class _Shape:
    size: str
    filling: str
    colour: str
    kind: str

    def __str__(self) -> str:
        return f"a {self.size} {self.filling}{self.colour} {self.kind}"


_Plan = tuple[random.Random, _Shape, _Shape, str, str]  # a generator of its own, two shapes, place, background
_In = TypeVar("_In")
_Out = TypeVar("_Out")


def pictures(n: int, seed: int = 0) -> Iterator[tuple[Image.Image, str]]:
    """`n` RGB pictures of 256 to 512 pixels a side, each with its caption; no two captions are equal.

    Picture i is a function of (seed, i) but for its caption being new, so a longer run begins as a shorter one.
    """

    def draw(plan: _Plan) -> tuple[Image.Image, str]:
        return _draw(*plan), _caption(*plan[1:])

    yield from _on_threads(draw, _plans(n, seed))


def write_demo(
    target: str | os.PathLike[str],
    rows: int = 512,
    seed: int = 0,
    show: Callable[[float, int], None] = lambda done, rows: None,
) -> None:
    """A Lance dataset of `pictures`, encoded as JPEG and here and there PNG, in four fragments.

    One of an earlier run is replaced. `show` is told how many pictures are made, after each.

    Raises
    ------
    ConfigError
        Something else is there.
    """
    from gpuload.tools.folder import Row
    from gpuload.tools.ingest import image_schema, origins, write

    uri = os.fspath(target)
    written_by = origins(uri)
    if written_by and set(written_by) != {_ORIGIN}:
        raise ConfigError(
            f"Expected a new place or a dataset of an earlier demo, got {uri!r}, which is no demo's alone."
        )

    def encode(numbered: tuple[int, _Plan]) -> Row:
        index, plan = numbered
        kind, ending = ("PNG", "png") if index % 16 == 7 else ("JPEG", "jpg")
        stream = io.BytesIO()
        _draw(*plan).save(stream, kind, quality=90)
        return Row(f"{index:06}.{ending}", stream.getvalue(), _caption(*plan[1:]))

    def encoded() -> Iterator[Row]:
        for done, row in enumerate(_on_threads(encode, enumerate(_plans(rows, seed))), 1):
            show(done, done)
            yield row

    mode: Literal["create", "overwrite"] = "overwrite" if written_by else "create"
    schema = image_schema(None, captioned=True)
    write(encoded(), uri, schema, mode, fragment_rows=max(1, math.ceil(rows / 4)), source=_ORIGIN)


def demo_places(out: Path) -> tuple[Path, Path]:
    """Where the dataset and the contact sheet go, under `out`.

    Raises
    ------
    ConfigError
        That is inside a dataset, or there is a sheet.png that is not a demo's.
    """
    for folder in (out.resolve(), *out.resolve().parents):
        if (folder / "_versions").is_dir():
            raise ConfigError(
                f"Expected a folder of its own, got {str(out)!r}, inside the Lance dataset {str(folder)!r}."
            )
    sheet = out / "sheet.png"
    if sheet.exists():
        with suppress(OSError), Image.open(sheet) as old:
            if old.info.get("Software") == _ORIGIN:
                return out / "shapes.lance", sheet
        raise ConfigError(
            f"Expected a new place for a contact sheet, got {str(sheet)!r}, which is no demo's. Use --out."
        )
    return out / "shapes.lance", sheet


def demo_mark() -> PngInfo:
    """What a demo's own sheet is known by."""
    mark = PngInfo()
    mark.add_text("Software", _ORIGIN)
    return mark


def _on_threads(fn: Callable[[_In], _Out], items: Iterator[_In]) -> Iterator[_Out]:
    """`fn` of every item, in order, on as many threads as there are cores: Pillow draws without the GIL."""
    with closing(ordered_map(fn, items, threads=os.cpu_count() or 1, ahead=64, name="demo")) as done:
        yield from done


def _plans(n: int, seed: int) -> Iterator[_Plan]:
    seen: set[str] = set()
    for index in range(n):
        for attempt in itertools.count():
            rng = random.Random(f"{seed}/{index}/{attempt}")
            background = rng.choice(list(BACKGROUNDS))
            first, second = (
                _Shape(rng.choice(list(SIZES)), rng.choice(FILLINGS), colour, rng.choice(KINDS))
                for colour in rng.sample(list(COLOURS), 2)
            )
            place = rng.choice(PLACES)
            caption = _caption(first, second, place, background)
            if caption not in seen or attempt > 20:
                break
        seen.add(caption)
        yield rng, first, second, place, background


def _caption(first: _Shape, second: _Shape, place: str, background: str) -> str:
    return f"{first} {place} {second} on a {background} background"


def _draw(rng: random.Random, first: _Shape, second: _Shape, place: str, background: str) -> Image.Image:
    width, height = rng.randrange(256, 513, 8), rng.randrange(256, 513, 8)
    side = min(width, height)
    picture = _paper(rng, width, height, BACKGROUNDS[background])
    radii = [SIZES[shape.size] * side * rng.uniform(0.92, 1.08) for shape in (first, second)]
    gap = sum(radii) / 2 + side * 0.02  # half the distance of the two centres
    angle = rng.uniform(-0.35, 0.35) + (0 if place == "beside" else math.pi / 2)
    turn = {"above": -1, "below": 1, "beside": rng.choice((-1, 1))}[place]
    dx, dy = math.cos(angle) * gap * turn, math.sin(angle) * gap * turn
    left, right = min(dx - radii[0], -dx - radii[1]), max(dx + radii[0], -dx + radii[1])
    top, bottom = min(dy - radii[0], -dy - radii[1]), max(dy + radii[0], -dy + radii[1])
    x = rng.triangular(-left + 4, max(width - right - 4, -left + 4))  # rather in the middle: crops keep more of it
    y = rng.triangular(-top + 4, max(height - bottom - 4, -top + 4))
    for shape, radius, sign in zip((first, second), radii, (1, -1), strict=True):
        _put(rng, picture, shape, (x + sign * dx, y + sign * dy), radius)
    return picture


def _paper(rng: random.Random, width: int, height: int, colour: tuple[int, int, int]) -> Image.Image:
    """A background that is lighter on one side and grained like paper."""
    angle = rng.uniform(0, 2 * math.pi)
    x, y = np.linspace(-8, 8, width, dtype=np.float32), np.linspace(-8, 8, height, dtype=np.float32)
    light = 160 + math.cos(angle) * x[None, :] + math.sin(angle) * y[:, None]  # f32[H, W], 160 is the colour itself
    grain = np.random.default_rng(rng.getrandbits(64)).integers(-2, 3, (height, width), dtype=np.int8)
    gray = Image.fromarray((light + grain).astype(np.uint8))
    return Image.merge("RGB", [gray.point([min(255, v * c // 160) for v in range(256)]) for c in colour])


def _put(rng: random.Random, picture: Image.Image, shape: _Shape, centre: tuple[float, float], radius: float) -> None:
    """One shape with its filling, a light from the upper left and a soft shadow."""
    margin = 1.15
    box = math.ceil(radius * margin) * 2  # pixels of the picture
    mask = _mask(rng, shape.kind, box * _FINE, radius * _FINE).resize((box, box), Image.Resampling.BOX)
    corner = round(centre[0] - box / 2), round(centre[1] - box / 2)
    shadow = mask.filter(ImageFilter.BoxBlur(radius * 0.08 + 1)).point([v * 2 // 5 for v in range(256)])
    offset = round(radius * 0.07) + 1
    picture.paste((20, 20, 30), (corner[0] + offset, corner[1] + offset), shadow)
    picture.paste(_fill(rng, shape, box), corner, mask)


def _fill(rng: random.Random, shape: _Shape, box: int) -> Image.Image:
    """The colour, shaded; with stripes or dots of a lighter tint."""
    base = np.array(COLOURS[shape.colour], np.float32)
    ramp = np.linspace(0.5, -0.5, box, dtype=np.float32)
    light = 0.14 * (ramp[None, :] + ramp[:, None])  # f32[box, box], lighter in the upper left
    values = base * (1 + light)[..., None] + 40 * np.maximum(light, 0)[..., None]
    if shape.filling:
        values += (_pattern(rng, shape.filling, box)[..., None] * 0.72) * (255 - values)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def _pattern(rng: random.Random, filling: str, box: int) -> NDArray[np.float32]:
    """Where the tint goes, 0..1, f32[box, box], with smooth edges one pixel wide."""
    y, x = np.mgrid[0:box, 0:box].astype(np.float32)
    angle, pitch = rng.uniform(0.2, 1.2), max(box / 7, 9)
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    near_u, near_v = np.abs(u % pitch - pitch / 2), np.abs(v % pitch - pitch / 2)
    away = near_u - pitch * 0.2 if filling == FILLINGS[1] else np.hypot(near_u, near_v) - pitch * 0.27
    tint: NDArray[np.float32] = np.clip(0.5 - away, 0, 1)
    return tint


def _mask(rng: random.Random, kind: str, box: int, radius: float) -> Image.Image:
    """The shape in white on black, L, in the middle of a square of `box` pixels."""
    mask = Image.new("L", (box, box))
    draw, middle = ImageDraw.Draw(mask), box / 2
    around = (middle - radius, middle - radius, middle + radius, middle + radius)
    tilt = rng.uniform(-0.2, 0.2)
    if kind == "circle":
        draw.ellipse(around, 255)
    elif kind == "ring":
        draw.ellipse(around, 255)
        inner = radius * 0.52
        draw.ellipse((middle - inner, middle - inner, middle + inner, middle + inner), 0)
    else:
        draw.polygon([(middle + radius * px, middle + radius * py) for px, py in _outline(kind, tilt)], 255)
    return mask


def _outline(kind: str, tilt: float) -> list[tuple[float, float]]:
    """Corners within the unit circle, y downwards."""
    if kind == "heart":
        t = np.linspace(0, 2 * math.pi, 60, endpoint=False)
        x, y = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        points = [(float(a) / 17.5, -float(b + 2.5) / 17.5) for a, b in zip(x, y, strict=True)]
    elif kind == "star":
        turns = [(math.pi * i / 5 - math.pi / 2, 1.0 if i % 2 == 0 else 0.42) for i in range(10)]
        points = [(r * math.cos(a), r * math.sin(a)) for a, r in turns]
    elif kind == "cross":
        a, b = 0.3, 0.92
        points = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a)]
        points.append((-a, -a))
    else:
        n = CORNERS[kind]
        first = -math.pi / 2 + (math.pi / 4 if kind == "square" else 0)
        points = [(math.cos(first + 2 * math.pi * i / n), math.sin(first + 2 * math.pi * i / n)) for i in range(n)]
    cos, sin = math.cos(tilt), math.sin(tilt)
    return [(x * cos - y * sin, x * sin + y * cos) for x, y in points]
