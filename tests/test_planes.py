"""From stored planes to Pillow's bytes: no byte differs, whatever the sampling and the size."""

from __future__ import annotations

import ctypes
import io
import struct
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from making import by_pillow, encode, jpeg, picture

from gpuload import kernels
from gpuload.images.decode import libjpeg
from gpuload.images.planes import PLANES, ycc_to_rgb, ycc_to_rgb_twin

pytestmark = pytest.mark.skipif(libjpeg.library() is None, reason="needs Pillow's own libjpeg")
# Luma samples to one of chroma, across and down: what cameras and programs write, and all else that eight blocks allow.
COMMON = [(1, 1), (2, 1), (2, 2), (1, 2), (4, 1), (1, 4)]
RARE = [(4, 2), (2, 4), (3, 1), (1, 3), (3, 2), (2, 3)]
SIDES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 40]
Convert = Callable[[np.ndarray], None]


def of_sampling(h: int, v: int, height: int, width: int, seed: int) -> bytes:
    """A JPEG file of noise with these factors, which few encoders write.

    It is a gray file with another header: its blocks are dealt out to the three components, which share one Huffman
    table. So their levels wander, up to both ends of the range.
    """
    blocks, mcus = h * v + 2, -(-width // (8 * h)) * -(-height // (8 * v))
    noise = np.random.default_rng(seed).integers(0, 256, (8 * mcus, 8 * blocks), dtype=np.uint8)
    gray = encode(PIL.Image.fromarray(noise), "JPEG", quality=90)
    frame, scan = gray.index(b"\xff\xc0"), gray.index(b"\xff\xda")
    components = b"".join(struct.pack(">BBB", i, (h << 4 | v) if i == 1 else 0x11, 0) for i in (1, 2, 3))
    head = struct.pack(">HHBHHB", 0xFFC0, 17, 8, height, width, 3) + components
    start = struct.pack(">HHB", 0xFFDA, 12, 3) + b"\1\0\2\0\3\0" + b"\0\x3f\0"
    return gray[:frame] + head + gray[frame + 13 : scan] + start + gray[scan + 10 :]


@pytest.fixture(scope="module")
def planes_of(build: Callable[..., Path]) -> Callable[[list[bytes]], tuple[np.ndarray, list[np.ndarray], Any]]:
    """files → PLANES[N], the outputs, u8[height, width, 3] each, that they lead to, and what keeps the memory."""
    library = ctypes.CDLL(str(build(Path(__file__).parent / "jpeg_planes.cpp")))
    (pillows,) = (Path(PIL.__file__).parent.parent / "pillow.libs").glob("libjpeg-*.so*")
    assert library.gpuload_jpeg_open(str(pillows).encode()) == 0

    def read(files: list[bytes]) -> tuple[np.ndarray, list[np.ndarray], Any]:
        table, outs, memory = np.zeros(len(files), PLANES), [], []
        for row, file in zip(table, files, strict=True):
            data, info = np.frombuffer(file, np.uint8), np.zeros(16, np.int32)
            with PIL.Image.open(io.BytesIO(file)) as image:
                width, height = image.size
            out = np.full(3 * (width + 128) * (height + 128), 77, np.uint8)
            pointers = (ctypes.c_void_p(a.ctypes.data) for a in (data, out, info))
            at, to, found = pointers
            assert library.jpeg_planes(at, ctypes.c_int64(len(data)), to, ctypes.c_int64(out.size), found) == 0
            parts = info[1:].reshape(3, 5)[: info[0]].tolist()
            row["y"], row["pitch_y"], row["height"], row["width"] = out.ctypes.data + parts[0][0], *parts[0][1:4]
            assert (row["height"], row["width"]) == (height, width)
            row["h"], row["v"] = (divmod(parts[0][4], 256)) if len(parts) == 3 else (1, 1)
            if len(parts) == 3:
                (row["cb"], row["cr"]), row["pitch_c"] = (out.ctypes.data + p[0] for p in parts[1:]), parts[1][1]
                assert parts[1][2:4] == parts[2][2:4] == [-(-height // row["v"]), -(-width // row["h"])]
            pitch = 3 * width + len(outs) % 5  # every alignment
            pixels = np.full(height * pitch + 8, 99, np.uint8)
            row["out"], row["out_pitch"] = pixels.ctypes.data, pitch
            outs.append(np.lib.stride_tricks.as_strided(pixels, (height, width, 3), (pitch, 3, 1)))
            memory.append((out, pixels))
        return table, outs, memory

    return read


@pytest.fixture(params=["chosen", "source", "twin", pytest.param("cuda", marks=pytest.mark.gpu)])
def convert(request: pytest.FixtureRequest, build: Callable[..., Path]) -> Convert:
    """What the installation runs; the source as it is now; NumPy."""
    if request.param == "twin":
        return ycc_to_rgb_twin
    if request.param == "chosen":
        return lambda planes: ycc_to_rgb(planes, None)
    if request.param == "cuda":
        return on_the_gpu
    library = kernels.load_ycc(ctypes.CDLL(str(build(Path(kernels.__file__).parent / "ycc_cpu.cpp"))))
    return lambda planes: kernels.run_ycc_cpu(library, planes)


def on_the_gpu(planes: np.ndarray) -> None:
    """Host planes there and back, on a stream that is not the default one."""
    moved, stream = planes.copy(), torch.cuda.Stream()
    sizes = {"y": planes["pitch_y"] * planes["height"], "out": planes["out_pitch"] * planes["height"]}
    rows = -(-planes["height"] // np.maximum(planes["v"], 1))
    sizes["cb"] = sizes["cr"] = planes["pitch_c"] * rows
    kept = []
    for name, of in sizes.items():
        for i, size in enumerate(of.tolist()):
            if planes[name][i]:
                source = (ctypes.c_uint8 * size).from_address(int(planes[name][i]))
                there = torch.frombuffer(source, dtype=torch.uint8).cuda()
                moved[name][i] = there.data_ptr()
                kept.append((name, source, there))
    torch.cuda.synchronize()
    ycc_to_rgb(moved, stream)
    stream.synchronize()
    for name, source, there in kept:
        if name == "out":
            torch.frombuffer(source, dtype=torch.uint8).copy_(there)


def differing(files: list[bytes], planes_of: Any, convert: Convert) -> int:
    """Bytes that differ from Pillow's, of all files together."""
    planes, outs, _memory = planes_of(files)
    convert(planes)
    return sum(int((out != by_pillow(file).transpose(1, 2, 0)).sum()) for out, file in zip(outs, files, strict=True))


@pytest.mark.parametrize(("h", "v"), [*COMMON, *RARE])
def test_no_byte_differs_from_pillow(h: int, v: int, planes_of: Any, convert: Convert) -> None:
    """Odd sizes, single rows and columns, planes of one, two and three columns."""
    edges = [(a, b) for a in SIDES[:6] for b in SIDES[:6]] + [(a, SIDES[-1 - i]) for i, a in enumerate(SIDES)]
    files = [of_sampling(h, v, height, width, seed=i) for i, (height, width) in enumerate(edges)]
    assert differing(files, planes_of, convert) == 0


def test_pictures_as_encoders_write_them(planes_of: Any, convert: Convert) -> None:
    """One batch of all samplings, gray, progressive and restart markers; one of them larger than a few blocks."""
    files = [jpeg(37, 53, i, subsampling=i % 3, quality=30 + 10 * i) for i in range(6)]
    files += [
        jpeg(190, 243, 7, subsampling=2),
        jpeg(33, 29, 8, progressive=True),
        jpeg(40, 70, 9, restart_marker_rows=1),
    ]
    files += [encode(picture(31, 45, 10, "L"), "JPEG"), encode(picture(1, 1, 11, "L"), "JPEG"), jpeg(1, 1, 12)]
    assert differing(files, planes_of, convert) == 0


@pytest.mark.slow
def test_thousands_of_files(planes_of: Any) -> None:
    rng, wrong = np.random.default_rng(0), 0
    for i in range(6000):
        h, v = (*COMMON, *COMMON, *RARE)[i % 18]
        height, width = (int(side) for side in rng.integers(1, 120, 2))
        file = of_sampling(h, v, height, width, i) if i % 4 else jpeg(height, width, i, subsampling=i // 4 % 3)
        wrong += differing([file], planes_of, lambda planes: ycc_to_rgb(planes, None))
    assert wrong == 0


def test_nothing_outside_the_images_is_written_and_missing_ones_are_left_out(planes_of: Any, convert: Convert) -> None:
    files = [jpeg(9, 7, i, subsampling=2) for i in range(3)]
    planes, outs, memory = planes_of(files)
    planes[1] = np.zeros((), PLANES)
    planes["out_pitch"][2] = 3 * 7 + 2
    whole = memory[2][1][: 9 * 23].reshape(9, 23)
    convert(planes)
    assert (outs[1] == 99).all()
    assert (whole[:, 21:] == 99).all()
    assert np.array_equal(whole[:, :21].reshape(9, 7, 3), by_pillow(files[2]).transpose(1, 2, 0))
    assert (memory[2][1][9 * 23 :] == 99).all()
    convert(planes[:0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("height", -1),
        ("width", 1 << 17),
        ("h", 0),
        ("v", 5),
        ("pitch_y", 4),
        ("pitch_c", 2),
        ("out_pitch", 20),
        ("cr", 0),
    ],
)
def test_what_cannot_be_is_refused(name: str, value: int, planes_of: Any) -> None:
    planes, outs, _memory = planes_of([jpeg(9, 7, subsampling=2)])
    planes[name] = value
    with pytest.raises(ValueError, match="Expected sizes up to 65536, factors from 1 to 4"):
        ycc_to_rgb(planes, None)
    assert (outs[0] == 99).all()
    with pytest.raises(ValueError, match=r"Expected PLANES\[N\], got"):
        ycc_to_rgb(np.zeros(2, np.int64), None)


def test_without_the_library_the_twin_runs(planes_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "cpu_library", lambda: None)
    assert differing([jpeg(20, 31, subsampling=2)], planes_of, lambda planes: ycc_to_rgb(planes, None)) == 0


@pytest.mark.parametrize("threads", [1, 7])
def test_the_launch_on_a_device(planes_of: Any, build: Any, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """All but the GPU: the table that goes up, the addresses, the grid; blocks of many threads, one after the other."""
    library = ctypes.CDLL(str(build(Path(__file__).parent / "planes_blocks.cpp")))
    launches = []

    def launch(grid: tuple[int, ...], block: tuple[int, ...], arguments: tuple[np.generic, ...]) -> None:
        launches.append((grid, block))
        assert [type(argument) for argument in arguments] == [np.uint64, np.uint64, np.int64]
        table, first, count = (ctypes.c_void_p(int(a)) for a in arguments)
        library.launch(min(grid[0], threads), threads, table, first, ctypes.c_int64(count.value or 0))

    def raw_kernel(code: str, name: str, options: tuple[str, ...]) -> Any:
        assert (code, name, options) == (kernels.source("ycc_to_rgb"), "ycc_to_rgb", kernels.flags.NVRTC)
        return launch

    cupy = ModuleType("cupy")
    stream = SimpleNamespace(from_external=lambda stream: nullcontext(stream.__cuda_stream__()))
    cupy.RawKernel, cupy.cuda = raw_kernel, SimpleNamespace(Device=lambda index: nullcontext(), Stream=stream)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    there: Any = SimpleNamespace(device=torch.device("cpu"), cuda_stream=0)
    files = [jpeg(70, 90, 0, subsampling=2), jpeg(5, 5, 1), encode(picture(99, 101, 2, "L"), "JPEG")]
    assert differing(files, planes_of, lambda planes: ycc_to_rgb(planes, there)) == 0
    units = [70 * 23, 5 * 2, 99 * 26]
    assert launches == [((sum(-(-n // 1024) for n in units), 1, 1), (256, 1, 1))]
    ycc_to_rgb(np.zeros(0, PLANES), there)
    assert len(launches) == 1
