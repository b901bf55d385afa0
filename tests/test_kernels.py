"""The kernel source: it compiles for every GPU, and its two CPU builds do what the torch twin and Pillow do."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from gpuload import kernels
from gpuload.images import PIXELS, Ragged, put_whole, views
from gpuload.images.resize import affine, resize_normalize, resize_twin, rows
from gpuload.images.transform import IMAGE_DTYPES, Image
from gpuload.order.draws import Draws

# Against the twin, in units of the value range: both compute in float32 with weights of 2^-24 relative precision,
# some hundred terms each; then one unit in the last place of the type, because either may round the other way.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-5 + 2**-10, torch.bfloat16: 2e-5 + 2**-7, torch.uint8: 1.0}
# Against Pillow, in grey levels: it rounds to 8 bits after each of its two passes, half a level each, and its weights
# to 22 bits.
PILLOW = 1.01
Resize = Callable[[Ragged, np.ndarray, Image, torch.Tensor], None]
FOLDER = Path(kernels.__file__).parent
QUICK = ("-O1", "-DGPULOAD_BASELINE")  # to compile: a fifth of the time, where only the GPU's source is looked at
MISSING = 5  # of the images of `case`
KERNELS = {
    "resize_normalize": [f"resize_normalize_{name}" for name in kernels.TYPES.values()],
    "ycc_to_rgb": ["ycc_to_rgb"],
}


def ragged_of(images: list[np.ndarray], orientations: list[int]) -> Ragged:
    """Images u8[h, w, c] back to back, with pitches that are no multiple of anything."""
    table, parts, offset = np.zeros(len(images), PIXELS), [], 0
    for i, (pixels, orientation) in enumerate(zip(images, orientations, strict=True)):
        h, w, c = pixels.shape
        pitch = w * c + 5
        padded = np.full((h, pitch), 255, np.uint8)
        padded[:, : w * c] = pixels.reshape(h, w * c)
        put_whole(table[i : i + 1], h, w, c, orientation)
        table["offset"][i], table["pitch"][i] = offset, pitch
        parts.append(padded.reshape(-1))
        offset += padded.size
    return Ragged(torch.from_numpy(np.concatenate(parts)), table)


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def empty(n: int, image: Image, fill: float = 7) -> torch.Tensor:
    layout = torch.channels_last if image.channels_last else torch.contiguous_format
    return torch.full((n, *image.shape), fill).to(image.dtype).contiguous(memory_format=layout)


def views_of(ragged: Ragged, image: Image, seed: int = 0) -> np.ndarray:
    """VIEW[N]: a view of every image."""
    return views.views(image, ragged.table, Draws(seed, 0, np.arange(len(ragged))))


def case(seed: int, image: Image) -> tuple[Ragged, np.ndarray]:
    """Twelve images: odd sizes, gray and RGB, all orientations, one that is missing, one of which only a window is
    there, at half its size; VIEW[16]: random regions and flips, of some images two."""
    rng = np.random.default_rng(seed)
    sizes = [(1, 1), (1, 9), (9, 1), (37, 53), (240, 131), (64, 64), (3, 1500), (700, 2), (17, 300), (99, 98), (8, 8)]
    images = [noise(seed + i, h, w, 1 if i % 3 == 2 else 3) for i, (h, w) in enumerate([*sizes, (5, 6)])]
    ragged = ragged_of(images, [*rng.permutation(np.arange(1, 9)), *rng.integers(1, 9, 4)])
    wanted = np.concatenate([views_of(ragged, image, seed), views_of(ragged, image, seed + 99)[::-1][6:10]])
    ragged.table["height"][MISSING] = 0
    part, looks = ragged.table[4:5], wanted["image"] == 4  # 240 x 131 pixels are there, of 500 x 300 as stored
    turned = part["orientation"].repeat(looks.sum())
    stored = views.to_stored(wanted["region"][looks], turned, part["height"], part["width"])
    part["x"], part["y"], part["scale"], part["whole_height"], part["whole_width"] = 10, 5, 0.5, 500, 300
    whole = (stored + np.array([10, 5, 0, 0])) / 0.5
    wanted["region"][looks] = views.to_seen(whole, turned, part["whole_height"], part["whole_width"])
    return ragged, wanted


def missing(wanted: np.ndarray) -> torch.Tensor:
    """bool[M]: the views of the image that is not there."""
    return torch.from_numpy(wanted["image"] == MISSING)


@pytest.fixture(params=["literal", "fast", "baseline"])
def resize(request: pytest.FixtureRequest, build: Callable[..., Path]) -> Resize:
    """The GPU's source on the CPU; the loops for this CPU; the loops for any CPU."""
    library = kernels.load(build(FOLDER / "resize_cpu.cpp", *["-DGPULOAD_BASELINE"] * (request.param == "baseline")))

    def run(ragged: Ragged, wanted: np.ndarray, image: Image, out: torch.Tensor) -> None:
        table, how = rows(ragged, wanted, image, out.shape[2:]), request.param == "literal"
        kernels.run_cpu(library, table, out, affine(image), image.interpolation, how)

    return run


@pytest.fixture(scope="session")
def nvrtc() -> ctypes.CDLL:
    for name in ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"):
        try:
            paths = [Path(file.locate()) for file in files(name) or [] if file.name.startswith("libnvrtc.so")]
        except PackageNotFoundError:
            continue
        if paths:
            return ctypes.CDLL(str(paths[0]))
    pytest.fail("Expected NVRTC to compile the kernels with, got none. Do: pip install nvidia-cuda-nvrtc")


_COMPILED = [(path.stem, arch, ()) for path in FOLDER.glob("*.cu") for arch in ("sm_75", "sm_80", "sm_100", "sm_120")]
_COMPILED += [("ycc_to_rgb", "sm_90", ())]
_COMPILED += [
    ("resize_normalize", "sm_90", (f"-DFILTER={name.upper()}", *kernels.VARIANTS[variant][1]))
    for name, variant in (
        *((name, kernels.VARIANT) for name in kernels.FILTERS),
        ("bilinear", "rows"),
        ("bilinear", "tall"),
    )
]


@pytest.mark.parametrize(("name", "arch", "more"), sorted(_COMPILED), ids=str)
def test_every_source_compiles_for_every_gpu(nvrtc: ctypes.CDLL, name: str, arch: str, more: tuple[str, ...]) -> None:
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    text, options = kernels.source(name).encode(), [o.encode() for o in (*kernels.flags.NVRTC, f"-arch={arch}", *more)]
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, f"{name}.cu".encode(), 0, None, None) == 0
    status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert status == 0, log.value.decode()
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    assert all(entry.encode() in cubin.raw for entry in KERNELS[name])
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("dtype", IMAGE_DTYPES, ids=str)
def test_cpu_builds_equal_the_twin(resize: Resize, dtype: torch.dtype, mode: str, channels_last: bool) -> None:
    for seed, size in enumerate([(31, 40), (7, 300), (1, 1), (130, 5)]):  # 130 and 300 are more than one tile
        image = Image(size, crop="random", flip=0.5, dtype=dtype, mode=mode, channels_last=channels_last)
        ragged, wanted = case(seed, image)
        expected, got = empty(len(wanted), image), empty(len(wanted), image, fill=9)
        resize_twin(ragged, wanted, image, expected)
        resize(ragged, wanted, image, got)
        assert (got[missing(wanted)] == 0).all()  # the missing image
        assert (got.float() - expected.float()).abs().max() <= TOLERANCE[dtype], (seed, size)


def test_cpu_builds_normalise(resize: Resize) -> None:
    image = Image((20, 33), crop="random", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), channels_last=True)
    ragged, wanted = case(3, image)
    expected, got = empty(len(wanted), image), empty(len(wanted), image, fill=9)
    resize_twin(ragged, wanted, image, expected)
    resize(ragged, wanted, image, got)
    assert (got[missing(wanted)] == 0).all()
    assert (got - expected).abs().max() <= TOLERANCE[torch.float32] / 0.2  # the value range is 1 / std


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
def test_cpu_builds_equal_pillow(resize: Resize, dtype: torch.dtype) -> None:
    image = Image((48, 60), dtype=dtype)
    sizes = [(375, 500), (61, 47), (48, 60), (2, 2), (1000, 30)]
    stored = [noise(i, h, w, 3) for i, (h, w) in enumerate(sizes)]
    ragged = ragged_of(stored, [1] * len(stored))
    shares = np.random.default_rng(0).uniform([0, 0, 0.3, 0.3], [0.3, 0.3, 0.7, 0.7], (len(stored), 4))
    regions = np.float32(shares * np.array([(w, h, w, h) for h, w in sizes])).astype(np.float64)  # Pillow's precision
    got = empty(len(stored), image)
    resize(ragged, views.of_regions(regions, np.zeros(len(stored), bool)), image, got)
    for i, (x, y, w, h) in enumerate(regions):
        box = (x, y, x + w, y + h)
        expected = np.asarray(PIL.Image.fromarray(stored[i]).resize((60, 48), PIL.Image.Resampling.BILINEAR, box=box))
        levels = got[i].float() * (1 if dtype == torch.uint8 else 255)
        assert np.abs(levels.permute(1, 2, 0).numpy() - expected).max() <= PILLOW


@pytest.mark.parametrize(("shape", "size"), [((3, 9000, 3), (3, 5)), ((2600, 4, 1), (2, 2)), ((500, 2500, 3), (9, 7))])
def test_windows_wider_than_shared_memory(resize: Resize, shape: tuple[int, int, int], size: tuple[int, int]) -> None:
    image = Image(size, crop="none")
    ragged = ragged_of([noise(1, *shape)], [1])
    wanted, expected, got = views_of(ragged, image), empty(1, image), empty(1, image)
    resize_twin(ragged, wanted, image, expected)
    resize(ragged, wanted, image, got)
    assert (got - expected).abs().max() <= TOLERANCE[torch.float32]


def test_a_region_outside_the_image_reads_nothing_outside(resize: Resize) -> None:
    image = Image((4, 5))
    ragged = ragged_of([noise(0, 6, 7, 3)] * 5, [1] * 5)
    regions = np.array([[-50, -60, 9, 9], [900, 900, 9, 9], [1, 1, 0, 0], [-3, -3, 40, 40], [np.nan, 0, np.nan, 1]])
    got = empty(5, image)
    resize(ragged, views.of_regions(regions, np.zeros(5, bool)), image, got)
    finite = got[torch.tensor([0, 1, 2, 3])]
    assert ((finite >= 0) & (finite <= 1)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_to_half_is_torchs(resize: Resize, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    special = [0, 1, 1 + 2**-11, 1 + 3 * 2**-11, 65504, 65519.99, 65520, 1e9, 2**-24, 2**-25, 3 * 2**-26, 6.1e-5, 1e-39]
    values = np.concatenate([special, rng.standard_normal(99) * 10.0 ** rng.uniform(-9, 5, 99)]).astype(np.float32)
    values = np.concatenate([values, -values])
    ragged = ragged_of([np.zeros((1, 1, 1), np.uint8)], [1])
    wanted = views.of_regions(np.array([[0.0, 0, 1, 1]]), np.zeros(1, bool))
    for value in values.tolist():
        image = Image((1, 16), dtype=dtype, mode="L", mean=-value, std=1)  # 0 * scale + value
        got = empty(1, image)
        resize(ragged, wanted, image, got)
        assert torch.equal(got, torch.full(got.shape, value).to(dtype)), value


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("interpolation", ["bicubic", "nearest"])
def test_cpu_builds_equal_the_twin_with_every_filter(resize: Resize, interpolation: str, mode: str) -> None:
    for seed, size in enumerate([(31, 40), (7, 300), (1, 1), (130, 5)]):
        for dtype in (torch.float32, torch.uint8):
            options: dict[str, Any] = {"channels_last": seed % 2 == 0, "mode": mode, "interpolation": interpolation}
            image = Image(size, crop="random", flip=0.5, dtype=dtype, **options)
            ragged, wanted = case(seed, image)
            expected, got = empty(len(wanted), image), empty(len(wanted), image, fill=9)
            resize_twin(ragged, wanted, image, expected)
            resize(ragged, wanted, image, got)
            assert (got[missing(wanted)] == 0).all()
            assert (got.float() - expected.float()).abs().max() <= TOLERANCE[dtype], (seed, size)


@pytest.mark.parametrize("turned", [1, 6])
@pytest.mark.parametrize(("shape", "size"), [((3, 9000, 3), (3, 5)), ((2600, 4, 1), (2, 2)), ((2500, 9, 3), (2, 20))])
def test_cubic_windows_wider_than_shared_memory(
    resize: Resize, shape: tuple[int, int, int], size: tuple[int, int], turned: int
) -> None:
    image = Image(size, crop="none", interpolation="bicubic")
    ragged = ragged_of([noise(1, *shape)], [turned])
    wanted, expected, got = views_of(ragged, image), empty(1, image), empty(1, image)
    resize_twin(ragged, wanted, image, expected)
    resize(ragged, wanted, image, got)
    assert (got - expected).abs().max() <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("variant", ["rows", "tall"])
def test_every_variant_equals_the_twin(build: Callable[..., Path], variant: str) -> None:
    """The one that is chosen is "literal" above."""
    library = kernels.load(build(FOLDER / "resize_cpu.cpp", *QUICK, *kernels.VARIANTS[variant][1]))
    for seed, (size, interpolation) in enumerate(
        [((31, 40), "bilinear"), ((130, 5), "bilinear"), ((40, 31), "bicubic")]
    ):
        image = Image(size, crop="random", flip=0.5, interpolation=interpolation)
        ragged, wanted = case(seed, image)
        expected, got = empty(len(wanted), image), empty(len(wanted), image, fill=9)
        resize_twin(ragged, wanted, image, expected)
        kernels.run_cpu(library, rows(ragged, wanted, image, size), got, affine(image), interpolation, True)
        assert (got - expected).abs().max() <= TOLERANCE[torch.float32]


Launch = Callable[[str, tuple[int, ...], tuple[int, ...], tuple[np.generic, ...]], None]


def stand_in(monkeypatch: pytest.MonkeyPatch, launch: Launch, *wanted: str) -> None:
    """Puts `launch` (name of the kernel, grid, block, arguments) in the place of CuPy and the GPU; the kernel is
    compiled with the options `wanted`."""

    def raw_kernel(code: str, name: str, options: tuple[str, ...]) -> Callable[..., None]:
        assert (code, options) == (kernels.source("resize_normalize"), (*kernels.flags.NVRTC, *wanted))
        return partial(launch, name)

    stream = SimpleNamespace(from_external=lambda stream: nullcontext(stream.__cuda_stream__()))
    cuda = SimpleNamespace(Device=lambda index: nullcontext(), Stream=stream)
    cupy = ModuleType("cupy")
    cupy.RawKernel, cupy.cuda = raw_kernel, cuda  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_launch_passes_what_the_kernel_declares(monkeypatch: pytest.MonkeyPatch, channels_last: bool) -> None:
    """The types, the table that is uploaded, the grid."""
    image = Image((7, 300), dtype=torch.float16, channels_last=channels_last)
    ragged, wanted = case(0, image)
    table_of, out, launches = rows(ragged, wanted, image, image.size), empty(len(wanted), image), []

    def note(name: str, grid: tuple[int, ...], block: tuple[int, ...], arguments: tuple[np.generic, ...]) -> None:
        launches.append((name, grid, block, arguments, ctypes.string_at(int(arguments[0]), table_of.nbytes)))

    stand_in(monkeypatch, note, "-DFILTER=BICUBIC", "-DBAND=16", "-DCHUNK=128", "-DSTREAM=1")
    kernels.run_cuda(table_of, out, affine(image), "bicubic", "tall")

    ((name, grid, block, arguments, table),) = launches
    declared = re.search(r"__global__ void name\((.*?)\)", kernels.source("resize_normalize"), re.DOTALL)
    assert declared is not None
    types = [part.replace("\\", " ").rsplit(None, 1)[0].strip() for part in declared[1].split(",")]
    sizes = {"const Row*": np.uint64, "T*": np.uint64, "i64": np.int64, "int": np.int32, "float": np.float32}
    assert [type(argument) for argument in arguments] == [sizes[name] for name in types]
    assert (name, grid, block) == (
        "resize_normalize_f16",
        (19, len(wanted), 1),
        (256, 1, 1),
    )  # turned: 300 rows, 16 a block
    assert table == table_of.tobytes()
    n, c, h, w = out.shape
    strides = (c * h * w, 1, c * w, c) if channels_last else (c * h * w, h * w, w, 1)
    assert arguments[1:10] == (out.data_ptr(), n, h, w, c, *strides)


@pytest.mark.parametrize("order", ["ascending", "descending", "shuffled"])
@pytest.mark.parametrize(
    ("dtype", "interpolation", "variant"),
    [
        (torch.float32, "bilinear", "stream"),
        (torch.float16, "bilinear", "rows"),
        (torch.bfloat16, "bilinear", "tall"),
        (torch.uint8, "bicubic", "stream"),
        (torch.float32, "nearest", "stream"),
    ],
    ids=str,
)
def test_blocks_of_many_threads_do_what_a_block_of_one_does(
    monkeypatch: pytest.MonkeyPatch,
    build: Callable[..., Path],
    dtype: torch.dtype,
    interpolation: str,
    variant: str,
    order: str,
) -> None:
    """The whole launch but the GPU: 256 threads a block, taken in an order that shows where a barrier is missing."""
    flags = (f"-DFILTER={interpolation.upper()}", *kernels.VARIANTS[variant][1])
    blocks = ctypes.CDLL(str(build(Path(__file__).parent / "kernel_blocks.cpp", *QUICK, *flags)))

    def launch(name: str, grid: tuple[int, ...], block: tuple[int, ...], arguments: tuple[np.generic, ...]) -> None:
        table, out, count, height, width, channels, *strides = (int(argument) for argument in arguments[:10])
        factors = (ctypes.c_float * 6)(*arguments[10:])
        pointer, i64 = ctypes.c_void_p, ctypes.c_int64
        shape = (pointer(table), pointer(out), i64(count), height, width, channels, *map(i64, strides))
        how = ["ascending", "descending", "shuffled"].index(order)
        images = min(grid[1], 5)  # fewer than there are: a block goes on to another image
        assert blocks.launch(name.encode(), grid[0], images, block[0], how, *shape, factors) == 0

    stand_in(monkeypatch, launch, *flags)
    library = kernels.load(build(FOLDER / "resize_cpu.cpp", *QUICK, *kernels.VARIANTS[variant][1]))
    options: dict[str, Any]
    for seed, (size, crop, options) in enumerate(
        [
            ((5, 7), "random", {}),
            ((1, 270), "random", {"mode": "L", "channels_last": True}),  # two tiles a row
            ((20, 1), "none", {"channels_last": True}),  # two bands; windows wider than a tile
        ]
    ):
        image = Image(size, crop=crop, flip=0.5, dtype=dtype, interpolation=interpolation, **options)
        ragged, wanted = case(seed, image)
        table, expected, got = (
            rows(ragged, wanted, image, size),
            empty(len(wanted), image),
            empty(len(wanted), image, 9),
        )
        kernels.run_cpu(library, table, expected, affine(image), interpolation, True)
        kernels.run_cuda(table, got, affine(image), interpolation, variant)
        assert torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("dtype", IMAGE_DTYPES, ids=str)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_cuda_equals_the_twin(interpolation: str, dtype: torch.dtype, mode: str, channels_last: bool) -> None:
    if not torch.cuda.is_available():
        refuse = pytest.fail if os.environ.get("GPULOAD_REQUIRE_GPU") == "1" else pytest.skip
        refuse("no CUDA device: the same source runs through g++ in test_cpu_builds_equal_the_twin")
    for seed, size in enumerate([(31, 40), (7, 300), (1, 1), (130, 5)]):
        options: dict[str, Any] = {"channels_last": channels_last, "interpolation": interpolation}
        image = Image(size, crop="random", flip=0.5, dtype=dtype, mode=mode, **options)
        ragged, wanted = case(seed, image)
        expected = empty(len(wanted), image)
        resize_twin(ragged, wanted, image, expected)
        ragged.arena = ragged.arena.cuda()
        batch = empty(2 * len(wanted), image).cuda()
        with torch.cuda.stream(torch.cuda.Stream()) as _:
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            resize_normalize(ragged, wanted, image, batch[len(wanted) :])
            torch.cuda.current_stream().synchronize()
        assert (batch[: len(wanted)] == 7).all()  # a slice leaves the rest alone
        got = batch[len(wanted) :].cpu()
        assert (got[missing(wanted)] == 0).all()
        assert (got.float() - expected.float()).abs().max() <= TOLERANCE[dtype], (seed, size)
