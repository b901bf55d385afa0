"""The kernels: what compiles, loads and launches the sources in this folder. A table of `ROW` enters, `out` is filled.

CuPy is imported at the first launch on a GPU, and only here; NVRTC compiles then, once per device, and CuPy keeps
the binary on disk. The CPU libraries are built when the package is installed; without a compiler there are none.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpuload.errors import DeviceError, install

from . import flags

ROW = np.dtype(  # struct Row of resize_normalize.cu
    [
        ("pixels", np.uint64),
        ("pitch", np.int64),
        ("region", np.float64, (4,)),
        ("height", np.int32),
        ("width", np.int32),
        ("channels", np.int32),
        ("orientation", np.int32),
        ("flip", np.int32),
        ("left", np.int32),
        ("top", np.int32),
        ("down_first", np.int32),
    ]
)
OUTPUT = np.dtype(  # struct Output of slice_cpu.cpp
    [
        ("views", np.uint64),
        ("count", np.int64),
        ("out", np.uint64),
        ("affine", np.float32, (6,)),
        ("type", np.int32),
        ("height", np.int32),
        ("width", np.int32),
        ("channels", np.int32),
        ("channels_last", np.int32),
        ("filter", np.int32),
        ("chooses", np.int32),
        ("reserved", np.int32),
    ]
)
CROP = np.dtype(  # struct Crop of views.cpp
    [
        ("scale", np.float64, (2,)),
        ("ratio", np.float64, (2,)),
        ("crop_ratio", np.float64),
        ("flip", np.float64),
        ("out_height", np.float64),
        ("out_width", np.float64),
        ("mode", np.int32),
        ("last", np.int32),
    ]
)
TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.uint8: "u8"}
_NUMBERS = {dtype: number for number, dtype in enumerate(TYPES)}
FILTERS = {"bilinear": 0, "bicubic": 1, "nearest": 2}  # Filter of resize_normalize.cu
VARIANTS = {  # of resize_normalize.cu: BAND, and how it is compiled; benchmarks/bench_kernel.py compares them
    "stream": (8, ("-DBAND=8", "-DCHUNK=256", "-DSTREAM=1")),
    "rows": (8, ("-DBAND=8", "-DCHUNK=256", "-DSTREAM=0")),
    "tall": (16, ("-DBAND=16", "-DCHUNK=128", "-DSTREAM=1")),
}
VARIANT = "stream"  # predicted to be the fastest (benchmarks/NOTES.md), not measured yet
_THREADS = 256  # of a block
_WIDE, _UNITS = 4, 1024  # of ycc_to_rgb.cu
_SHORT = 2048  # items: some 50 µs at most
_FOLDER = Path(__file__).parent


def source(name: str) -> str:
    """Text of ``<name>.cu``."""
    return (_FOLDER / f"{name}.cu").read_text()


def load(path: Path) -> ctypes.CDLL:
    """A library built from resize_cpu.cpp. Calls release the GIL and may run at the same time."""
    library = ctypes.CDLL(str(path))
    for name in ("gpuload_resize", "gpuload_resize_literal"):
        pointer, number = ctypes.c_void_p, ctypes.c_int
        getattr(library, name).argtypes = [pointer, pointer, ctypes.c_int64, *[number] * 6, pointer]
    return library


@cache
def cpu_library() -> ctypes.CDLL | None:
    """The CPU build that came with the installation, None if there is none: decoding, resize, and both in one call."""
    found = sorted(_FOLDER.glob("_cpu*.so"))
    if not found:
        return None
    library, pointer, number = load(found[0]), ctypes.c_void_p, ctypes.c_int64
    library.gpuload_fill.argtypes = [pointer, number, number, pointer, number, pointer]
    library.gpuload_jpeg_open.argtypes = [ctypes.c_char_p]
    library.gpuload_jpeg_read.argtypes = [pointer, number]
    library.gpuload_jpeg_stored.argtypes = [pointer, number]
    return load_ycc(library)


def load_ycc(library: ctypes.CDLL) -> ctypes.CDLL:
    """The same library, which holds ycc_cpu.cpp, ready for `run_ycc_cpu`."""
    library.gpuload_ycc_to_rgb.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    library.gpuload_ycc_to_rgb.restype = None
    return library


def load_tables(path: Path) -> ctypes.CDLL:
    """A library built from headers.cpp, order.cpp and views.cpp. Its calls may run at once, and release the GIL.

    Its attribute ``held`` has the same functions with the GIL held: for what takes some microseconds. Releasing it
    costs a thread the way back, up to the switch interval of 5 ms where another one runs Python, and a hand-over.
    """
    library, held = ctypes.CDLL(str(path)), ctypes.PyDLL(str(path))
    pointer, number, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    words = [ctypes.c_uint32, ctypes.c_uint64]
    for one in (library, held):
        one.gpuload_headers.argtypes = [pointer, pointer, number, pointer]
        one.gpuload_uniform.argtypes = [pointer, number, number, *words, pointer]
        one.gpuload_permute.argtypes = [pointer, number, ctypes.c_uint64, small, small, pointer, small, small, pointer]
        one.gpuload_windows.argtypes = [pointer, number, pointer, number, small, small, small, pointer, pointer]
        one.gpuload_pointers.argtypes = [pointer, small, number, ctypes.c_uint64, pointer, pointer]
        one.gpuload_views.argtypes = [pointer, number, *[pointer] * 2, number, pointer, *[number] * 2, pointer, number]
        one.gpuload_views.argtypes += [pointer, pointer]
        one.gpuload_rows.argtypes = [pointer, number, pointer, number, ctypes.c_uint64, pointer]
        one.gpuload_wrong.argtypes = [pointer, pointer, pointer, number, number]
        one.gpuload_turns.argtypes = [pointer, number, number, number, pointer, pointer, pointer, pointer]
        for name in ("headers", "uniform", "permute", "windows", "pointers", "turns"):
            getattr(one, f"gpuload_{name}").restype = None
        for name in ("views", "rows", "wrong"):
            getattr(one, f"gpuload_{name}").restype = number
    library.held = held  # type: ignore[attr-defined, unused-ignore]
    return library


def _for(library: Any, count: int) -> Any:
    """The library for a call of `count` items of some nanoseconds."""
    return library.held if count <= _SHORT else library


@cache
def tables_library() -> ctypes.CDLL | None:
    """What fills tables, as it came with the installation, None if it did not."""
    found = sorted(_FOLDER.glob("_tables*.so"))
    return load_tables(found[0]) if found else None


def run_headers(library: ctypes.CDLL, at: NDArray[np.uint64], size: NDArray[np.int64], out: NDArray[np.void]) -> None:
    """Read the headers of N files in memory into `out`, HEADER[N], on the calling thread.

    Parameters
    ----------
    library : CDLL
        From `tables_library` or `load_tables`.
    at : u64[N]
        Where each file begins, 0 for none; nothing outside its bytes is read.
    size : i64[N]
        Its bytes.
    """
    at, size = np.ascontiguousarray(at, np.uint64), np.ascontiguousarray(size, np.int64)
    library.gpuload_headers(at.ctypes.data, size.ctypes.data, len(out), out.ctypes.data)


def run_uniform(
    library: ctypes.CDLL, rows: NDArray[np.int64], n: int, epoch: int, key: int, out: NDArray[np.float64]
) -> None:
    """Fill `out`, f64[rows, n], with the numbers of `gpuload.order.philox.uniform`; `epoch` has 32 bits, `key` 64."""
    _for(library, len(rows)).gpuload_uniform(rows.ctypes.data, len(rows), n, epoch, key, out.ctypes.data)


def run_permute(
    library: ctypes.CDLL,
    index: NDArray[np.int64],
    n: int,
    bits: tuple[int, int],
    keys: NDArray[np.uint64],
    backwards: bool,
    out: NDArray[np.int64],
) -> None:
    """Fill `out`, i64[N], with what `gpuload.order.permutation` makes of `index`, i64[N] in range(n); `bits` are those
    of the low and the high half, `keys` one a round."""
    _for(library, len(index)).gpuload_permute(
        index.ctypes.data, len(index), n, *bits, keys.ctypes.data, len(keys), backwards, out.ctypes.data
    )


def run_views(
    library: ctypes.CDLL,
    headers: NDArray[np.void],
    crop: NDArray[np.void],
    drawn: NDArray[np.float64],
    ratios: NDArray[np.float64],
    first: int,
    which: NDArray[np.int64] | None,
    out: NDArray[np.void],
) -> NDArray[np.int64]:
    """Fill `out`, VIEW[N], with one view of each of the images `which`, or of all N; see `gpuload.images.views.views`.

    Parameters
    ----------
    library : CDLL
    headers : HEADER[N]
    crop : CROP[]
    drawn : f64[N, n]
        Uniforms of each image: flip, x, y, then area and ratio of each try.
    ratios : f64[M, tries]
        Of each of the M images that are asked for, from try `first` on.

    Returns
    -------
    i64[left]
        The images that no try fits, unless ``crop["last"]``.
    """
    headers, ratios = np.ascontiguousarray(headers), np.ascontiguousarray(ratios)
    left = np.empty(len(headers), np.int64)
    some, count = (None, 0) if which is None else (which.ctypes.data, len(which))
    without = _for(library, len(headers)).gpuload_views(
        headers.ctypes.data, len(headers), crop.ctypes.data, drawn.ctypes.data, drawn.shape[1], ratios.ctypes.data,
        first, ratios.shape[1], some, count, out.ctypes.data, left.ctypes.data,
    )  # fmt: skip
    return left[:without]


def run_rows(
    library: ctypes.CDLL, pixels: NDArray[np.void], views: NDArray[np.void], base: int, out: NDArray[np.void]
) -> int:
    """Fill `out`, ROW[M], for VIEW[M] of PIXELS[N] in an arena at address `base`; returns M, or the first view that is
    of none of the images."""
    pixels, views = np.ascontiguousarray(pixels), np.ascontiguousarray(views)
    made: int = _for(library, len(views)).gpuload_rows(
        pixels.ctypes.data, len(pixels), views.ctypes.data, len(views), base, out.ctypes.data
    )
    return made


def run_wrong(
    library: ctypes.CDLL, at: NDArray[np.uint64], size: NDArray[np.int64], headers: NDArray[np.void], max_pixels: int
) -> int:
    """How many of N images `gpuload.images.headers.judge` finds wrong."""
    at, size, headers = np.ascontiguousarray(at), np.ascontiguousarray(size), np.ascontiguousarray(headers)
    wrong: int = _for(library, len(at)).gpuload_wrong(
        at.ctypes.data, size.ctypes.data, headers.ctypes.data, len(at), min(max_pixels, 2**63 - 1)
    )
    return wrong


def run_turns(
    library: ctypes.CDLL,
    shares: NDArray[np.int64],
    lag: NDArray[np.int64],
    taken: NDArray[np.int64],
    source: NDArray[np.uint16],
    index: NDArray[np.int64],
) -> None:
    """Fill `source` and `index`, u16[N] and i64[N], with the turns that follow the state `lag` and `taken`, i64[S]: it
    moves on. See `gpuload.order.turns`."""
    library.gpuload_turns(
        shares.ctypes.data, len(shares), int(shares.sum()), len(source), lag.ctypes.data, taken.ctypes.data,
        source.ctypes.data, index.ctypes.data,
    )  # fmt: skip


def run_windows(
    library: ctypes.CDLL,
    views: NDArray[np.void],
    headers: NDArray[np.void],
    size: tuple[int, int],
    scales: NDArray[np.int64] | None,
    radius: int,
    out: NDArray[np.int64],
) -> None:
    """Fill `out`, i64[N, 4], with the windows of VIEW[M] of HEADER[N] for outputs of `size` (height, width) and a
    filter of `radius`; see `gpuload.images.views.windows`."""
    views, headers = np.ascontiguousarray(views), np.ascontiguousarray(headers)
    scales = None if scales is None else np.ascontiguousarray(scales, np.int64)
    eighths = None if scales is None else scales.ctypes.data
    _for(library, len(views)).gpuload_windows(
        views.ctypes.data, len(views), headers.ctypes.data, len(headers), *size, radius, eighths, out.ctypes.data
    )


def run_pointers(
    library: ctypes.CDLL, offsets: int, width: int, base: int, at: NDArray[np.uint64], size: NDArray[np.int64]
) -> None:
    """Addresses u64[N] and sizes i64[N] of the values of an Arrow array: `offsets` is the address of N + 1 of them, of
    `width` bytes each, `base` that of the values."""
    _for(library, len(at)).gpuload_pointers(offsets, width, len(at), base, at.ctypes.data, size.ctypes.data)


def run_cpu(
    library: ctypes.CDLL,
    rows: NDArray[np.void],
    out: torch.Tensor,
    affine: NDArray[np.float32],
    interpolation: str = "bilinear",
    literal: bool = False,
) -> None:
    """Fill `out` on the calling thread.

    Parameters
    ----------
    library : CDLL
        From `cpu_library` or `load`.
    rows : ROW[N]
        Pixels at host addresses.
    out : Tensor[N, C, H, W]
        On the CPU, contiguous or channels-last, float32, float16, bfloat16 or uint8.
    affine : f32[6]
        Scale of three channels, shift of three channels.
    interpolation : {"bilinear", "bicubic", "nearest"}
    literal : bool
        Run the GPU's source block by block instead of the fast loops.

    Raises
    ------
    MemoryError
    """
    n, channels, height, width = out.shape
    function = library.gpuload_resize_literal if literal else library.gpuload_resize
    last, kinds = not out.is_contiguous(), (_NUMBERS[out.dtype], FILTERS[interpolation])
    code = function(rows.ctypes.data, out.data_ptr(), n, *kinds, height, width, channels, last, affine.ctypes.data)
    if code:
        raise MemoryError(f"Expected memory for the resize of {n} images, got none.")


def output(
    views: NDArray[np.void], out: torch.Tensor, affine: NDArray[np.float32], interpolation: str, chooses: bool
) -> tuple[Any, ...]:
    """A row of OUTPUT: where the pixels of M views go, for `run_fill`.

    Parameters
    ----------
    views : VIEW[M]
        Contiguous.
    out, affine, interpolation
        As for `run_cpu`.
    chooses : bool
        Whether Pillow chooses which pass of bicubic comes first: `gpuload.images.pillow.chooses_first_pass`.
    """
    n, channels, height, width = out.shape
    last, number, kind = not out.is_contiguous(), _NUMBERS[out.dtype], FILTERS[interpolation]
    return views.ctypes.data, n, out.data_ptr(), affine, number, height, width, channels, last, kind, chooses, 0


def run_fill(
    library: ctypes.CDLL, parts: NDArray[np.void], first: int, outputs: NDArray[np.void]
) -> tuple[int, int, float]:
    """Decode N JPEG files, and resize the views of each at once, on the calling thread.

    Parameters
    ----------
    library : CDLL
        From `cpu_library`, opened on Pillow's libjpeg.
    parts : PART[N]
        Contiguous; `status` says what to do, and then what was done: see slice_cpu.cpp.
    first : int
        Number that the views have for the first of these images.
    outputs : OUTPUT[K]

    Returns
    -------
    (int, int, float)
        Images decoded, images left to others, seconds spent on resizing.

    Raises
    ------
    ValueError
        A view is of none of these images.
    MemoryError
    """
    tally = np.zeros(3, np.int64)
    code = library.gpuload_fill(
        parts.ctypes.data, len(parts), first, outputs.ctypes.data, len(outputs), tally.ctypes.data
    )
    if code == 2:
        raise ValueError(f"Expected views of the images {first} to {first + len(parts) - 1}, got another.")
    if code:
        raise MemoryError(f"Expected memory for decoding and resizing {len(parts)} images, got none.")
    decoded, left, nanoseconds = tally.tolist()
    return decoded, left, nanoseconds / 1e9


def run_cuda(
    rows: NDArray[np.void],
    out: torch.Tensor,
    affine: NDArray[np.float32],
    interpolation: str = "bilinear",
    variant: str = VARIANT,
) -> None:
    """Fill `out` on torch's current stream of its device; nothing here waits for the device.

    Parameters are those of `run_cpu`, with pixels at addresses of the device; `variant` is one of VARIANTS.
    The table goes up through pinned
    memory; both its copies belong to torch's allocators, which keep them until the stream has passed. The same holds
    for `out` and the pixels only if they were allocated on that stream or are recorded for it: the caller's part.
    """
    cp = _cupy()
    n, channels, height, width = out.shape
    if not out.numel():
        return
    band, options = VARIANTS[variant]
    grid = (-(-(max(height, width) if (rows["orientation"] >= 5).any() else height) // band), min(n, 65535), 1)
    plane = height * width
    strides = (channels * plane, plane, width, 1)
    if not out.is_contiguous():
        strides = (channels * plane, 1, channels * width, channels)
    stream = _Stream(torch.cuda.current_stream(out.device))
    table = torch.from_numpy(rows.view(np.uint8)).pin_memory().to(out.device, non_blocking=True)
    arguments = (
        np.uint64(table.data_ptr()),
        np.uint64(out.data_ptr()),
        np.int64(n),
        *(np.int32(v) for v in (height, width, channels)),
        *(np.int64(v) for v in strides),
        *affine,
    )
    with cp.cuda.Device(out.device.index), cp.cuda.Stream.from_external(stream):
        name = f"resize_normalize_{TYPES[out.dtype]}"
        defined = (f"-DFILTER={interpolation.upper()}", *options)
        _kernel(cp, "resize_normalize", name, defined)(grid, (_THREADS, 1, 1), arguments)


def run_ycc_cpu(library: ctypes.CDLL, planes: NDArray[np.void]) -> None:
    """Fill `out` of PLANES[N], in host memory, on the calling thread."""
    first = _ycc_blocks(planes)
    library.gpuload_ycc_to_rgb(planes.ctypes.data, first.ctypes.data, len(planes))


def run_ycc_cuda(planes: NDArray[np.void], stream: torch.cuda.Stream) -> None:
    """Fill `out` of PLANES[N], in a device's memory, on a stream; nothing here waits for the device."""
    first = _ycc_blocks(planes)
    if not first[-1]:
        return
    cp = _cupy()
    with torch.cuda.stream(stream):
        both = torch.from_numpy(np.concatenate([planes.view(np.uint8), first.view(np.uint8)])).pin_memory()
        table = both.to(stream.device, non_blocking=True)
        grid = (int(min(first[-1], 2**31 - 1)), 1, 1)
        arguments = (np.uint64(table.data_ptr()), np.uint64(table.data_ptr() + planes.nbytes), np.int64(len(planes)))
        with cp.cuda.Device(stream.device.index), cp.cuda.Stream.from_external(_Stream(stream)):
            _kernel(cp, "ycc_to_rgb", "ycc_to_rgb")(grid, (_THREADS, 1, 1), arguments)


def _ycc_blocks(planes: NDArray[np.void]) -> NDArray[np.int64]:
    """Blocks before each image, and of all: i64[N + 1]."""
    units = planes["height"].astype(np.int64) * -(-planes["width"].astype(np.int64) // _WIDE)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(-(-units // _UNITS))])


class _Stream:
    """A torch stream under the protocol that CuPy reads; torch has it itself only in newer releases."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.stream.cuda_stream


@cache
def _kernel(cp: Any, file: str, name: str, options: tuple[str, ...] = ()) -> Any:
    """cupy.RawKernel: compiles at its first call on each device."""
    return cp.RawKernel(source(file), name, options=(*flags.NVRTC, *options))


def _cupy() -> Any:
    try:
        import cupy  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as error:
        raise DeviceError(f"Expected CuPy to launch kernels on the GPU, got {error}. Do: {install('cuda')}") from error
    return cupy
