"""Images: Arrow columns of encoded images enter, tensors of pixels leave.

One field a stored column: its outputs share what is read, the headers and what is decoded; each has views of its own.

Arrow ─▶ Encoded ─▶ HEADER, judged ─▶ VIEW of each output ─▶ windows ║ decode ─▶ Ragged ─▶ resize, into the batch
                    one native call a batch                          ║ in slices, on threads; on the CPU the two are
                                                                     ║ one native call a slice
"""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from gpuload.device import Streams, span
from gpuload.errors import ConfigError
from gpuload.fields import Column, Fails, Field, Geometry, Known, Looked, Parts, Taken, stacked, storage_type
from gpuload.images import Encoded, Ragged, augment, encoded, headers, pillow, resize, sizes, views
from gpuload.images.decode import libjpeg, room
from gpuload.images.decode.cpu import CpuDecoder
from gpuload.images.decode.line import Target
from gpuload.images.encoded import is_encoded
from gpuload.images.transform import Image
from gpuload.order.draws import Draws, Named
from gpuload.tables import Selection

_NATIVE = Image(size=None, dtype=torch.uint8)


class ImageField:
    """The outputs of one stored column of images, all with the same `orient` and `fast`."""

    transform: type | None = Image

    def __init__(self, columns: list[Column], firsts: list[bool], parts: Parts) -> None:
        self.columns, self._firsts, self._parts = columns, firsts, parts
        self._images: list[Image] = [column.transform or _NATIVE for column in columns]

    @classmethod
    def column(cls, field: pa.Field, transform: Any, known: Known) -> Column | None:
        if transform is None:
            if not is_image(field, known):
                return None
            form = "uint8[B, 3, H, W], a list where sizes differ" + _found(field.name, known)
        elif not isinstance(transform, Image):
            return None
        elif not is_encoded(field.type):
            got = f"{field.name!r}: {field.type}"
            raise ConfigError(f"Expected a binary or struct<bytes, path> column for Image, got {got}.")
        else:
            form = _form(transform)
        return Column(field.name, field.type, "image", form, transform, cls.make, decodes=True)

    @classmethod
    def make(cls, columns: list[Column], parts: Parts) -> list[Field]:
        groups: dict[tuple[str, bool, bool], list[Column]] = {}
        firsts, seen = dict[str, bool](), set[str]()
        for column in columns:
            image, origin = column.transform or _NATIVE, parts.origin(column.name)
            groups.setdefault((origin, image.orient, image.fast), []).append(column)
            firsts[column.name] = origin not in seen
            seen.add(origin)
        return [cls(group, [firsts[column.name] for column in group], parts) for group in groups.values()]

    def take(self, rows: Selection, draws: Draws, geometry: Mapping[str, Geometry]) -> Taken:
        found, errors, read = encoded.from_arrow(rows.table.column(self.columns[0].name), rows.index)
        table = headers.read(found)
        headers.judge(found, table, self._parts.max_pixels, errors)
        pillow.open_rest(found, table, self._parts.max_pixels, errors)
        if errors:
            table["height"][list(errors)] = 0  # nobody decodes them
        if not self._images[0].orient:
            table["orientation"] = 1
        images = [image.sized(rows.bucket) for image in self._images]
        outputs = [
            _Output.of(column.name, image, table, draws, first)
            for column, image, first in zip(self.columns, images, self._firsts, strict=True)
        ]
        seen, turned = np.stack(sizes(table), axis=1), table["orientation"]
        geometry = {
            o.name: Geometry(o.views, o.image.views, seen, turned, o.image.size, o.image.orient)  # type: ignore[arg-type]
            for o in outputs
        }
        fails: Fails = [(i, output.name, error) for output in outputs for i, error in errors.items()]
        work = _Work(found, table, outputs, self._parts)
        return Taken(fails=fails, work=work, read=read, refused=len(errors), geometry=geometry)


@dataclass
class _Output:
    """One output of a batch: what is wanted, and where it goes."""

    name: str
    wanted: Image
    image: Image  # what the resize makes: with augmentations, pixels of 0..1
    views: NDArray[np.void]  # VIEW[N * V]
    made: Any = None  # Tensor[N * V, C, H, W], or a list of N where images keep sizes that differ
    draws: tuple[Named, ...] = ()  # one an augmentation
    event: Any = None  # after its memory was allocated
    shape: tuple[int, ...] | None = None  # of each image, None where sizes differ
    missing: set[int] = field(default_factory=set)  # images that were not decoded, where `made` has a place for them

    @classmethod
    def of(cls, name: str, image: Image, table: NDArray[np.void], draws: Draws, first: bool) -> _Output:
        found = views.of_all(image, table, draws, name, first)
        if not image.augment:
            return cls(name, image, image, found)
        plain = replace(image, mean=None, std=None, dtype=torch.float32, augment=())
        streams = views.streams(image, name, first)
        named = (Named(draws, tuple(f"{stream}/augment{k}" for stream in streams)) for k in range(len(image.augment)))
        return cls(name, image, plain, found, draws=tuple(named))

    def part(self, lo: int, hi: int) -> slice:
        """The views of images lo to hi."""
        return slice(lo * self.image.views, hi * self.image.views)


class _Work:
    """The pixels of one batch and one stored column."""

    def __init__(self, found: Encoded, table: NDArray[np.void], outputs: list[_Output], parts: Parts) -> None:
        self._encoded: Encoded | None = found
        self._headers, self._outputs, self._parts = table, outputs, parts
        self._lock, self._left = threading.Lock(), len(found)
        self._events: list[Any] = []
        self._failed = set[int]()  # of the images that were to be decoded
        self._windows, self._scales = self._plan()
        self._line = None
        pads = any(output.image.crop == "pad" for output in outputs)
        if self._windows is not None and not pads and type(parts.decoder) is CpuDecoder:  # a subclass has its own way
            self._line = parts.decoder.line(found, table, self._windows, self._scales)
        self.cost, self.room = found.size, room.decoding(table, found.size, self._windows)
        self.size = sum(_bytes(output.wanted, table) for output in outputs)
        for output in outputs:
            output.shape = output.image.shape or _common(output.image, table)
            if output.shape is None:
                output.made = [None] * len(found)
            elif not len(found):
                self._room(output)

    def run(self, lo: int, hi: int) -> tuple[Fails, Any]:
        fails, event = self._run(lo, hi)
        with self._lock:
            self._left -= hi - lo
            last = not self._left
            self._events.append(event)
            self._failed.update(i for i, _, _ in fails)
        if last:
            self._encoded = self._line = None  # the encoded bytes may go, while the batch waits to be taken
            if any(output.wanted.augment for output in self._outputs):
                event = self._augment()
        return fails, event

    def _augment(self) -> Any:
        """All outputs, once every slice has its pixels, on a stream of the calling thread's; the event after it."""
        streams: Streams = self._parts.streams
        with streams.own(), span("gpuload.augment"):
            for event in self._events:
                streams.after(event)
            for output in self._outputs:
                if output.wanted.augment:
                    streams.keep({output.name: output.made})
                    output.made = augment.finish(output.made, output.wanted, output.draws)
                    self._blank(output)
            return streams.mark()

    def _blank(self, output: _Output) -> None:
        """Zeros where there is no image, whatever the augmentations made of them."""
        missing = self._failed.union(np.flatnonzero(self._headers["height"] == 0).tolist())
        if missing:
            count = output.image.views
            rows = torch.tensor(sorted(missing))[:, None] * count + torch.arange(count)
            output.made.index_fill_(0, rows.reshape(-1).to(output.made.device, non_blocking=True), 0)

    def _run(self, lo: int, hi: int) -> tuple[Fails, Any]:
        assert self._encoded is not None
        if self._line is not None:
            targets = [Target(o.views[o.part(lo, hi)], o.image, self._room(o)[o.part(lo, hi)]) for o in self._outputs]
            filled = self._line.fill(lo, hi, targets)
            self._parts.resize.worked(time.perf_counter() - filled.resized)  # added up, and drawn at the slice's end
            return [(i, o.name, error) for o in self._outputs for i, error in filled.errors.items()], None
        decoder, part = self._parts.decoder, slice(lo, hi)
        windows = None if self._windows is None else self._windows[part]
        with decoder.decode(self._encoded[part], self._headers[part], windows) as ragged:
            for output in self._outputs:
                self._resize(ragged, output, lo, hi)
            event = self._parts.streams.mark()
        fails: Fails = [(lo + i, o.name, error) for o in self._outputs for i, error in ragged.errors.items()]
        return fails, event

    def finish(self) -> dict[str, Any]:
        streams, values = self._parts.streams, dict[str, Any]()
        for output in self._outputs:
            values[output.name] = output.made
            if output.image.views > 1:
                values[output.name] = output.made.unflatten(0, (-1, output.image.views))
            if output.missing and output.made is not None:
                output.made[sorted(output.missing)] = 0
            if output.made is None or isinstance(output.made, list):
                images = output.made or [None] * len(output.views)  # none was decoded
                streams.keep({output.name: images})
                blank = torch.zeros((output.image.channels, 1, 1), dtype=output.image.dtype, device=streams.device)
                values[output.name] = stacked(images, blank)
        return values

    def _plan(self) -> tuple[NDArray[np.int64] | None, NDArray[np.int64] | None]:
        """The windows that all outputs together look at, and the scales for `fast`; None for whole images."""
        bounds, scales = None, None
        if any(output.image.size is None for output in self._outputs):
            return None, None
        if self._outputs[0].image.fast:
            each = [libjpeg.scales(o.views, len(self._headers), o.image.shape[1:]) for o in self._outputs]  # type: ignore[index]
            scales = np.max(each, axis=0)
        for output in self._outputs:
            size, radius = output.image.shape[1:], output.image.radius  # type: ignore[index]
            found = views.windows(output.views, self._headers, size, scales, radius)
            bounds = found if bounds is None else views.union(bounds, found)
        return bounds, scales

    def _room(self, output: _Output) -> torch.Tensor:
        """Where the pixels of an output go: allocated by the slice that comes first, on its stream."""
        streams: Streams = self._parts.streams
        with self._lock:
            if output.made is None:
                layout = torch.channels_last if output.image.channels_last else torch.contiguous_format
                shape = (len(output.views), *(output.shape or ()))
                output.made = torch.empty(shape, dtype=output.image.dtype, memory_format=layout, device=streams.device)
                output.event = streams.mark()
            made: torch.Tensor = output.made
            streams.share(made, output.event)
            return made

    def _resize(self, ragged: Ragged, output: _Output, lo: int, hi: int) -> None:
        """From the decoder's memory into the batch's, on the thread's current stream."""
        part = output.part(lo, hi)
        wanted = output.views[part].copy()
        wanted["image"] -= lo
        if output.image.shape is not None:
            out = self._room(output)
            with self._parts.resize.timed(), span("gpuload.resize"):
                resized = resize.resize_padded if output.image.crop == "pad" else resize.resize_normalize
                resized(ragged, wanted, output.image, out[part])
            return
        decoded = ragged.table["height"] > 0
        for i in np.flatnonzero(decoded).tolist():
            pixels = resize.native(ragged, i, bool(wanted["flip"][i]), output.image)
            if output.shape is None:
                output.made[lo + i] = pixels
            else:  # at once to its place: a batch of large images would be there twice
                self._room(output)[lo + i] = pixels
        if output.shape is not None:
            output.missing.update((lo + np.flatnonzero(~decoded)).tolist())


def _bytes(image: Image, table: NDArray[np.void]) -> int:
    """Bytes of a finished output."""
    if image.shape is not None:
        return len(table) * image.views * image.dtype.itemsize * math.prod(image.shape)
    pixels = int((table["height"].astype(np.int64) * table["width"]).sum())
    return pixels * image.channels * image.dtype.itemsize


def _common(image: Image, table: NDArray[np.void]) -> tuple[int, int, int] | None:
    """(C, H, W) of images that keep their sizes, if these agree."""
    tall, wide = sizes(table[table["height"] > 0])
    if not len(tall) or (tall != tall[0]).any() or (wide != wide[0]).any():
        return None
    return image.channels, int(tall[0]), int(wide[0])


def _form(image: Image) -> str:
    dtype = str(image.dtype).removeprefix("torch.")
    if image.size == "bucket":
        return f"{dtype}[B, {image.channels}, H, W], the size of its bucket"
    if image.shape is None:
        return f"{dtype}[B, {image.channels}, H, W], a list where sizes differ"
    shape = (*(image.views,) * (image.views > 1), *image.shape)
    return f"{dtype}[B, {', '.join(map(str, shape))}]" + (" channels_last" if image.channels_last else "")


def is_image(field: pa.Field, known: Known) -> bool:
    """Declared by Hugging Face or Lance, of Hugging Face's shape, or bytes of which any that were looked at start like
    an image."""
    if not is_encoded(field.type):
        return False
    feature = known.features.get(field.name)
    if isinstance(feature, dict) and "_type" in feature:
        return bool(feature["_type"] == "Image")
    if getattr(field.type, "extension_name", "") == "lance.arrow.encoded_image":
        return True
    kind = storage_type(field.type)
    if pa.types.is_struct(kind):
        return {f.name for f in kind} == {"bytes", "path"}
    return look(field.name, known).images > 0


def look(name: str, known: Known) -> Looked:
    """What values of a binary column start like: the first one if it is an image, else up to sixteen."""
    if name not in known.looked:
        images = count = 0
        for value in known.values(name):
            plain = value.value if hasattr(value, "value") else value
            images, count = images + (headers.sniff(plain.as_py()[:16]) is not None), count + 1
            if images == count == 1:  # one is enough to say so; what else there is falls under the policy
                break
        known.looked[name] = Looked(images, count)
    return known.looked[name]


def _found(name: str, known: Known) -> str:
    """What was found in a column of images that nobody declared, where that is not plain; warns where few are some."""
    looked = known.looked.get(name)
    if looked is None or looked.images == looked.count:
        return ""
    what = f"{looked.images} of {looked.count} values looked at start like an image"
    if 2 * looked.images < looked.count:
        warnings.warn(
            f"Column {name!r}: {what}, so it is taken as images. transforms={{{name!r}: Image(None)}} says so, and "
            f"transforms={{{name!r}: bytes}} leaves it as it is.",
            stacklevel=2,
        )
    return f"; {what}"
