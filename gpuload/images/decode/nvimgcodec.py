"""nvImageCodec: byte views enter, pixels in an arena on the GPU leave; baseline JPEG on the JPEG engine, other JPEG and
JPEG 2000 on CUDA cores, what is left on the host. With device="cpu" the same code decodes on the CPU.

Two modes. The default lets JPEG engine and CUDA cores share the work and repeats chroma samples, as NVIDIA's own
loaders do. Parity (``"nvimgcodec:parity"``) interpolates chroma as the CPU decoders do and leaves the engine out, whose
inverse DCT rounds in another way: slower, and the nearest to the CPU's pixels.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import threading
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as pillow

from gpuload.errors import DeviceError, install
from gpuload.images import KINDS, RGB, Encoded, Memory
from gpuload.images.decode.arena import Lane, Slot, Tool, empty
from gpuload.images.decode.host import plain, with_codes
from gpuload.images.decode.lanes import LaneDecoder, about_images

HARDWARE_LOAD = 0.65  # share of a batch for the JPEG engine to begin with; DALI's default, not measured here yet
_JPEG, _ENDS = KINDS.index("JPEG"), 2  # HEADER's words
_COLOUR = (200, 100, 50)  # of the first pictures
_STEP = 16  # images; a Decoder takes too long to make to have a new one for a few images more
_ON_CPU = ("jpeg", "png", "webp", "bmp", "pnm", "jpeg2k")  # TIFF files Pillow turns as it loads them: its business
_OURS = {"png": "PNG", "webp": "WEBP", "bmp": "BMP", "pnm": "PNM", "jpeg2k": "JPEG2000"}  # its names → KINDS


class NvImageCodecDecoder(LaneDecoder):
    """Decodes through nvJPEG on CUDA, through libjpeg-turbo and libtiff on the CPU.

    Parameters
    ----------
    device, max_pixels, threads
        As `LaneDecoder`. The threads are shared by the calls that run at once.
    parity : bool
        Interpolate chroma, and do not use the JPEG engine.
    hardware_load : float
        In [0, 1]: share of a full batch for the JPEG engine, which gets the largest images.
    calls : int
        Calls at once.
    package : module, optional
        nvidia.nvimgcodec, or what stands for it where it shall be watched or take no time.

    Raises
    ------
    DeviceError
        nvImageCodec is not installed; or, at the first call, finds no nvJPEG or no GPU.
    """

    name = library = "nvimgcodec"

    def __init__(
        self,
        device: torch.device,
        max_pixels: int,
        threads: int = 1,
        *,
        parity: bool = False,
        hardware_load: float = HARDWARE_LOAD,
        calls: int = 1,
        package: Any = None,
    ) -> None:
        super().__init__(device, max_pixels, threads)
        self._nv = package or _import()
        self.name = "nvimgcodec:parity" if parity else "nvimgcodec"
        self._parity, self._load = parity, 0.0 if parity else hardware_load
        self._workers = max(1, min(threads // calls, (os.cpu_count() or 2) - 1))  # more is refused with a warning
        self._codecs: tuple[str, ...] = _ON_CPU
        if device.type == "cuda":
            self._codecs = ("jpeg", "jpeg2k") if importlib.util.find_spec("nvidia.nvjpeg2k") else ("jpeg",)
        self._others = [KINDS.index(_OURS[codec]) for codec in self._codecs if codec in _OURS]
        # Its small objects release the GIL as they are made, and two threads that make them at the same time pass it to
        # and fro for every image: without this lock the host's part of two calls takes 1.3 times as long.
        self._making = threading.Lock()
        self._most = 0  # images a call so far
        # our own table and kernel turn the images; color_spec=SRGB gives gray images three equal channels
        self._params = self._nv.DecodeParams(apply_exif_orientation=False)

    def _lane(self) -> Lane[Any]:
        return Lane(self.device, Tool())

    def _ready(self, lane: Lane[Any], images: int) -> None:
        """Give the lane a Decoder for calls of so many images, unless it has one.

        One for each lane, because two threads must never share one: it then gives wrong pixels, and hangs. Its first
        call fixes, for good, how many images of a call the JPEG engine gets at most; so that call is a full one, and
        all lanes' are of the same size, or the same batch would come out differently.
        """
        tool, cuda = lane.tool, lane.stream is not None
        if not cuda:
            tool.made = tool.made or self._decoder(cuda)
            return
        with self._making:
            images = self._most = max(self._most, -(-images // _STEP) * _STEP)
        if tool.made is not None and tool.images >= images:
            return
        lane.stream.synchronize()
        tool.made, tool.images = self._decoder(cuda), images
        try:
            self._probe(lane, images)
        except BaseException:
            tool.made = None
            raise

    def _decoder(self, cuda: bool) -> Any:
        nv = self._nv
        if not cuda:
            only = [nv.Backend(nv.BackendKind.CPU_ONLY)]
            return nv.Decoder(device_id=nv.NVIMGCODEC_DEVICE_CPU_ONLY, max_num_cpu_threads=1, backends=only)
        kinds = nv.BackendKind  # without CPU_ONLY: a missing libnvjpeg must not become silent decoding on the host
        backends = [nv.Backend(kinds.GPU_ONLY), nv.Backend(kinds.HYBRID_CPU_GPU)]
        if self._load > 0:
            policy = nv.LoadHintPolicy.FIXED  # the same batch again gives the same pixels
            backends.insert(0, nv.Backend(kinds.HW_GPU_ONLY, load_hint=self._load, load_hint_policy=policy))
        options = f":fancy_upsampling={int(self._parity)}"
        index = self.device.index or 0
        return nv.Decoder(device_id=index, max_num_cpu_threads=self._workers, backends=backends, options=options)

    def _probe(self, lane: Lane[Any], images: int) -> None:
        """The first call: small pictures. A libnvjpeg that is missing shows only in its result, and only the pixels
        show that they are where they were asked for."""
        file, size = io.BytesIO(), 64 * 64 * 3
        pillow.new("RGB", (64, 64), _COLOUR).save(file, "JPEG")
        view = np.frombuffer(file.getvalue(), np.uint8)
        with lane.current():
            memory = empty(images * size, lane.device, "the first pictures").zero_()  # it may hold earlier ones
            lane.stream.synchronize()
            places = [(memory.data_ptr() + i * size, (64, 64, 3)) for i in range(images)]
            decoded = self._decode_to(lane, [self._nv.CodeStream(view) for _ in places], places)
            lane.stream.synchronize()
            pixels = memory.view(-1, 3).cpu()
        if any(image is None for image in decoded):
            raise DeviceError(
                f"Expected nvImageCodec to decode a JPEG file on {self.device}, got nothing: nvJPEG is missing or does "
                f'not fit the driver. Do: {install("cuda")}, or decoder="cpu".'
            )
        far = int((pixels.int() - torch.tensor(_COLOUR)).abs().max())
        if far > 8:  # grey levels; a JPEG of one colour is right to 1 or 2
            raise DeviceError(
                f"Expected nvImageCodec to decode a picture of the colour {_COLOUR} to memory of {self.device}, got "
                f"values up to {far} from it: this version does not write where it is told to. Do: "
                f'{install("cuda")}, or decoder="dali" or "cpu".'
            )

    def _claim(self, encoded: Encoded, headers: NDArray[np.void]) -> dict[int, Any]:
        jpeg = headers["kind"] == _JPEG
        mine = plain(headers) & (headers["end"] == _ENDS) & with_codes(headers)
        mine &= headers["colour"] != RGB  # of RGB it takes the planes for YCbCr
        mine |= ~jpeg & (headers["height"] > 0) & np.isin(headers["kind"], self._others)
        with self._making:
            return self._streams(encoded, headers, np.flatnonzero(mine).tolist())

    def _streams(self, encoded: Encoded, headers: NDArray[np.void], which: list[int]) -> dict[int, Any]:
        claimed: dict[int, Any] = {}
        for i in which:
            view = encoded.view(i)
            try:
                stream = self._nv.CodeStream(view)  # no copy: the stream refers to the view's memory
                size = stream.height, stream.width
                good = stream.codec_name in self._codecs and _plain(stream, stream.codec_name)
            except Exception:  # whatever it says of one image's header: not mine
                continue
            if good and size == (headers["height"][i], headers["width"][i]):
                claimed[i] = (stream, view)
        return claimed

    def _run(
        self,
        lane: Lane[Any],
        slot: Slot,
        arena: torch.Tensor,
        encoded: Encoded,
        table: NDArray[np.void],
        claimed: dict[int, Any],
    ) -> list[int]:
        start, rows, which = arena.data_ptr(), table[list(claimed)], list(claimed)
        columns = (rows[name].tolist() for name in ("offset", "height", "width"))
        places = [(start + offset, (height, width, 3)) for offset, height, width in zip(*columns, strict=True)]
        slot.keep.append(claimed)  # the encoded bytes: the engine may read them after the call
        streams = [stream for stream, _ in claimed.values()]
        failed: list[int] = []
        parts = [range(len(streams))]
        while parts:
            part = parts.pop()
            self._ready(lane, len(table))
            try:
                images = self._decode_to(lane, [streams[k] for k in part], [places[k] for k in part])
            except Exception as error:
                lane.tool.made = None  # nobody says what state it is in
                if not about_images(error):
                    raise
                half = len(part) // 2
                parts += [part[:half], part[half:]] if half else []
                failed += [] if half else [which[part[0]]]
                continue
            slot.keep.append(images)
            failed += [which[k] for k, image in zip(part, images, strict=True) if image is None]
        return sorted(failed)

    def _decode_to(self, lane: Lane[Any], streams: list[Any], places: list[tuple[int, Any]]) -> list[Any]:
        """Put on the lane's stream; images or None. A place is (address, (height, width, 3))."""
        images, stream = self._images(lane, places), lane.stream.cuda_stream if lane.stream is not None else 0
        decoded: list[Any] = lane.tool.made.decode(streams, images=images, params=self._params, cuda_stream=stream)
        return decoded

    def _images(self, lane: Lane[Any], places: list[tuple[int, Any]]) -> list[Any]:
        """Its words for memory that is ours."""
        stream, cuda = (lane.stream.cuda_stream, True) if lane.stream is not None else (0, False)
        memory = [Memory(address, shape, None, cuda) for address, shape in places]
        with self._making:
            images: list[Any] = self._nv.as_images(memory, cuda_stream=stream)
        return images


def _plain(stream: Any, codec: str) -> bool:
    """Whether its pixels are eight-bit gray or RGB: of other kinds Pillow has the better, and the only, opinion."""
    if stream.dtype != np.uint8:
        return False
    return codec not in ("jpeg", "jpeg2k") or stream.num_channels in (1, 3)


def _import() -> Any:
    try:
        return importlib.import_module("nvidia.nvimgcodec")
    except ImportError as error:
        raise DeviceError(
            f'Expected nvImageCodec for decoder="nvimgcodec", got {error}. Do: {install("cuda")}, or decoder="cpu".'
        ) from error
