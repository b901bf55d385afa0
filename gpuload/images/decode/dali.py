"""NVIDIA DALI: byte views enter, pixels in memory of DALI's leave; JPEG on the GPU, PNG, BMP and WebP on its
CPU threads.

One pipeline a lane: external_source without a copy, then decoders.image, "mixed" on CUDA and "cpu" on the CPU. The
images stay where DALI put them: the table's offsets point there, the lane's slot keeps DALI's outputs alive until the
arena ring hands the slot out again, that is, until the kernel that read them has finished.

DALI refuses a whole batch for one bad image, and the pipeline is then no longer valid. So it is built again and the
batch decoded without the image that DALI names; where it names none, each half is tried. The host has the last word.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpuload.errors import DeviceError, install
from gpuload.images import KINDS, RGB, Encoded
from gpuload.images.decode.arena import Lane, Slot, Tool
from gpuload.images.decode.host import plain, with_codes
from gpuload.images.decode.lanes import LaneDecoder, about_images

_ENDS = 2  # HEADER's word for a file that ends with its end marker
_OTHERS = [KINDS.index(kind) for kind in ("PNG", "BMP", "WEBP")]  # it reads more; 16-bit samples it scales, Pillow cuts
_NAMED = re.compile(r"sample #(\d+)")


class DaliDecoder(LaneDecoder):
    """Decodes with DALI.

    Parameters
    ----------
    device, max_pixels, threads
        As `LaneDecoder`. The threads are shared by the calls that run at once.
    parity : bool
        Interpolate chroma as the CPU decoders do, and do not use the JPEG engine.
    calls : int
        Calls at once.

    Raises
    ------
    DeviceError
        DALI is not installed.
    """

    name = library = "dali"

    def __init__(
        self, device: torch.device, max_pixels: int, threads: int = 1, *, parity: bool = False, calls: int = 1
    ) -> None:
        super().__init__(device, max_pixels, threads)
        self._fn, self._types, self._pipeline = _import()
        self.name = "dali:parity" if parity else "dali"
        self._parity, self._workers = parity, max(1, threads // calls)

    def _lane(self) -> Lane[Any]:
        return Lane(self.device, Tool())

    def _build(self, batch_size: int) -> Any:
        """A pipeline for batches of up to `batch_size` images."""
        cuda = self.device.type == "cuda"
        options: dict[str, Any] = {"jpeg_fancy_upsampling": self._parity} if cuda else {}
        if cuda and self._parity:
            options["hw_decoder_load"] = 0.0
        pipeline = self._pipeline(
            batch_size=batch_size,
            num_threads=self._workers,
            device_id=(self.device.index or 0) if cuda else None,
            prefetch_queue_depth=1,
            exec_dynamic=True,  # its outputs belong to whoever holds them, also after the next run
        )
        with pipeline:
            encoded = self._fn.external_source(
                name="encoded", dtype=self._types.UINT8, ndim=1, no_copy=True, batch=True
            )
            pixels = self._fn.decoders.image(
                encoded,
                device="mixed" if cuda else "cpu",
                output_type=self._types.RGB,
                adjust_orientation=False,  # our own table and kernel turn the images
                **options,
            )
            pipeline.set_outputs(pixels)
        pipeline.build()
        return pipeline

    def _claim(self, encoded: Encoded, headers: NDArray[np.void]) -> dict[int, Any]:
        mine = plain(headers) & (headers["end"] == _ENDS) & with_codes(headers)
        mine &= headers["colour"] != RGB  # of RGB it takes planes for YCbCr
        mine |= np.isin(headers["kind"], _OTHERS) & (headers["height"] > 0) & (headers["precision"] <= 8)
        return {i: encoded.view(i) for i in np.flatnonzero(mine).tolist()}

    def _room(self, table: NDArray[np.void], claimed: dict[int, Any]) -> int:
        return 0

    def _run(
        self,
        lane: Lane[Any],
        slot: Slot,
        arena: torch.Tensor,
        encoded: Encoded,
        table: NDArray[np.void],
        claimed: dict[int, Any],
    ) -> list[int]:
        start = arena.data_ptr()
        slot.keep.append(claimed)  # no_copy: DALI reads the encoded bytes where they are
        failed: list[int] = []
        parts = [list(claimed)]
        while parts:
            part = parts.pop()
            self._ready(lane.tool, len(part))
            try:
                images = self._decode_part(lane, [claimed[i] for i in part])
                places = _places(images)
            except Exception as error:
                lane.tool.made = None  # "Current pipeline object is no longer valid"
                if not about_images(error):
                    raise
                bad, *halves = _apart(part, str(error))
                failed += bad
                parts += [half for half in halves if half]
                continue
            slot.keep.append(images)
            for i, (address, shape) in zip(part, places, strict=True):
                if shape != (table["height"][i], table["width"][i], 3):
                    failed.append(i)
                table["offset"][i] = address - start
        return sorted(failed)

    def _ready(self, tool: Tool, images: int) -> None:
        """Give the lane a pipeline for calls of so many images, unless it has one."""
        if tool.made is None or tool.images < images:
            tool.images = max(tool.images, images)
            tool.made = self._build(tool.images)

    def _decode_part(self, lane: Lane[Any], views: list[NDArray[np.uint8]]) -> Any:
        """DALI's list of images, ordered on the lane's stream."""
        pipeline, cuda = lane.tool.made, self.device.type == "cuda"
        pipeline.feed_input("encoded", views)
        (images,) = pipeline.run(lane.stream.cuda_stream) if cuda else pipeline.run()
        return images


def _apart(part: list[int], message: str) -> tuple[list[int], list[int], list[int]]:
    """(what the host shall decode, two lists to try again) of a batch that DALI refused with `message`."""
    named = _NAMED.search(message)
    if len(part) == 1:
        return part, [], []
    if named and int(named[1]) < len(part):
        at = int(named[1])
        return [part[at]], part[:at] + part[at + 1 :], []
    return [], part[: len(part) // 2], part[len(part) // 2 :]


def _places(images: Any) -> list[tuple[int, tuple[int, ...]]]:
    """(address, shape) of each image."""
    return [(image.data_ptr(), tuple(image.shape())) for image in images]


def _import() -> tuple[Any, Any, Any]:
    """DALI's fn, types and Pipeline."""
    try:
        names = ("nvidia.dali.fn", "nvidia.dali.types", "nvidia.dali.pipeline")
        fn, types, pipeline = (importlib.import_module(name) for name in names)
    except ImportError as error:
        line = install("dali")
        raise DeviceError(f'Expected DALI for decoder="dali", got {error}. Do: {line}, or decoder="cpu".') from error
    return fn, types, pipeline.Pipeline
