"""Resize at the surface the dataset uses: `resize_normalize` and `native`, on whatever implementation is installed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuload import HEADER, DecodeError, Ragged, kernels
from gpuload.images import PIXELS, VIEW, views
from gpuload.images.resize import cpu_implementation, native, resize_normalize, resize_twin
from gpuload.images.transform import Image
from gpuload.order.draws import Draws

FLOAT = 2e-5  # of the value range: float32 weights, some hundred terms
PILLOW = 1.01  # grey levels: Pillow rounds to 8 bits after each of its two passes

implementations = pytest.mark.parametrize("resize", [resize_normalize, resize_twin], ids=["chosen", "twin"])
sides = st.integers(1, 90)
shapes = st.tuples(sides, sides, st.sampled_from([1, 3]))
sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))
orientations = st.integers(1, 8)
seeds = st.integers(0, 2**32 - 1)
examples = settings(max_examples=40, deadline=None)


def ragged_of(images: list[np.ndarray], orientation: int | list[int] = 1) -> Ragged:
    ragged = Ragged.of(images)
    ragged.table["orientation"] = orientation
    return ragged


def views_of(ragged: Ragged, image: Image, seed: int = 0) -> np.ndarray:
    """VIEW[N]: a view of every image."""
    return views.views(image, ragged.table, Draws(seed, 0, np.arange(len(ragged))))


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def resized(ragged: Ragged, image: Image, seed: int = 0, flip: bool = False, resize=resize_normalize) -> torch.Tensor:
    wanted = views_of(ragged, image, seed)
    wanted["flip"] ^= flip
    out = torch.full((len(ragged), *image.shape), 7).to(image.dtype)
    out = out.contiguous(memory_format=torch.channels_last if image.channels_last else torch.contiguous_format)
    resize(ragged, wanted, image, out)
    return out


def transposed(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pillow's opinion of the orientation."""
    picture = PIL.Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    picture.getexif()[0x0112] = orientation
    turned = np.asarray(PIL.ImageOps.exif_transpose(picture))
    return np.ascontiguousarray(turned.reshape(*turned.shape[:2], -1))


def test_the_installation_has_the_compiled_resize() -> None:
    assert cpu_implementation() == "compiled", "Expected the CPU library, got none. Do: install with a C++ compiler"


def test_without_the_library_the_twin_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ragged, image = ragged_of([noise(0, 30, 40, 3)]), Image(16, dtype=torch.uint8, mode="L")
    compiled, exact = resized(ragged, image), native(ragged, 0, True, image)
    monkeypatch.setattr(kernels, "cpu_library", lambda: None)
    assert cpu_implementation() == "torch"
    assert (resized(ragged, image).int() - compiled.int()).abs().max() <= 1  # halves may round either way
    assert torch.equal(native(ragged, 0, True, image), exact)


@implementations
@pytest.mark.parametrize("orientation", range(1, 9))
def test_equals_pillow_after_exif_transpose(resize, orientation: int) -> None:
    pixels = noise(orientation, 83, 61, 3)
    got = resized(ragged_of([pixels], orientation), Image((20, 30), crop="none"), flip=True, resize=resize)[0]
    upright = PIL.Image.fromarray(transposed(pixels, orientation))
    expected = np.asarray(upright.resize((30, 20), PIL.Image.Resampling.BILINEAR))[:, ::-1]
    assert np.abs(got.permute(1, 2, 0).numpy() * 255 - expected).max() <= PILLOW


@implementations
def test_shorter_side_then_centre_crop_is_one_region(resize) -> None:
    pixels = noise(0, 300, 400, 3)
    got = resized(ragged_of([pixels]), Image(28, crop="center", crop_ratio=28 / 32), resize=resize)[0]
    small = np.asarray(PIL.Image.fromarray(pixels).resize((42, 32), PIL.Image.Resampling.BILINEAR), np.float32)
    whole = resized(ragged_of([pixels]), Image((32, 42), crop="none"), resize=resize)[0] * 255
    assert np.abs(whole.permute(1, 2, 0).numpy() - small).max() <= PILLOW
    square = PIL.Image.fromarray(pixels[:, 50:350])  # the crop's region, 262.5 pixels wide, is inside
    box = (18.75, 18.75, 281.25, 281.25)
    expected = np.asarray(square.resize((28, 28), PIL.Image.Resampling.BILINEAR, box=box))
    assert np.abs(got.permute(1, 2, 0).numpy() * 255 - expected).max() <= PILLOW


@examples
@given(st.lists(shapes, min_size=1, max_size=5), sizes, seeds, st.data())
def test_slices_equal_the_whole(stored, size, seed, data) -> None:
    turns = [data.draw(orientations) for _ in stored]
    ragged = ragged_of([noise(seed + i, *shape) for i, shape in enumerate(stored)], turns)
    image = Image(size, crop="random", flip=0.5, channels_last=data.draw(st.booleans()))
    wanted, whole = views_of(ragged, image, seed), resized(ragged, image, seed)
    parts, cut = torch.empty_like(whole), data.draw(st.integers(0, len(stored)))
    for lo, hi in ((0, cut), (cut, len(stored))):
        piece, mine = Ragged(ragged.arena, ragged.table[lo:hi]), wanted[lo:hi].copy()
        mine["image"] -= lo
        resize_normalize(piece, mine, image, parts[lo:hi])
    assert torch.equal(parts, whole)


@implementations
@examples
@given(st.lists(shapes, min_size=1, max_size=4), st.lists(st.integers(0, 3), max_size=9), sizes, seeds, st.data())
def test_many_views_of_few_images_are_each_what_they_are_alone(resize, stored, which, size, seed, data) -> None:
    ragged = ragged_of([noise(seed + i, *shape) for i, shape in enumerate(stored)], data.draw(orientations))
    image = Image(size, crop="random", flip=0.5)
    wanted = np.zeros(len(which), VIEW)
    for m, i in enumerate(which):
        wanted[m] = views_of(ragged, image, seed + m)[i % len(stored)]
    out = torch.empty(len(which), 3, *size)
    resize(ragged, wanted, image, out)
    for m, view in enumerate(wanted):
        alone, one = torch.empty(1, 3, *size), view.reshape(1).copy()
        one["image"] = 0
        resize(Ragged(ragged.arena, ragged.table[view["image"]].reshape(1)), one, image, alone)
        assert torch.equal(out[m : m + 1], alone)


@implementations
@examples
@given(st.lists(shapes, min_size=1, max_size=3), sizes, seeds, st.data())
def test_what_lies_outside_the_windows_is_never_looked_at(resize, stored, size, seed, data) -> None:
    """Every view of an image from its window alone, wherever the decoder put it, equals that from the whole."""
    turns = [data.draw(orientations) for _ in stored]
    whole = ragged_of([noise(seed + i, *shape) for i, shape in enumerate(stored)], turns)
    image = Image(size, crop="random", flip=0.5)
    wanted = np.concatenate([views_of(whole, image, seed + k) for k in range(data.draw(st.integers(1, 3)))])
    headers = np.zeros(len(stored), HEADER)
    for name in ("height", "width", "orientation"):
        headers[name] = whole.table[name]
    needed = views.windows(wanted, headers, size)
    with pytest.raises(ValueError, match=r"Expected VIEW\[M\] and HEADER\[N\]"):
        views.windows(wanted, whole.table, size)
    cut = Ragged(whole.arena, whole.table.copy())
    for row, (x, y, w, h) in zip(cut.table, needed, strict=True):
        row["offset"] += y * row["pitch"] + x * row["channels"]
        row["x"], row["y"], row["width"], row["height"] = x, y, w, h
    outs = [torch.empty(len(wanted), 3, *size) for _ in range(2)]
    resize(whole, wanted, image, outs[0])
    resize(cut, wanted, image, outs[1])
    assert (outs[0] - outs[1]).abs().max() <= 2e-6  # float32 weights of shifted coordinates


@examples
@given(shapes, sizes, seeds, st.integers(0, 255), orientations, st.sampled_from(["RGB", "L"]))
def test_a_constant_image_stays_constant(shape, size, seed, value, orientation, mode) -> None:
    ragged = ragged_of([np.full(shape, value, np.uint8)], orientation)
    got = resized(ragged, Image(size, crop="random", mode=mode, dtype=torch.uint8), seed)
    assert (got == value).all()  # the weights' sum is within 2^-20 of 1, far from the half level that rounds away


@examples
@given(shapes, sizes, seeds, orientations)
def test_flipping_mirrors_the_output(shape, size, seed, orientation) -> None:
    ragged = ragged_of([noise(seed, *shape)], orientation)
    image = Image(size, crop="random", flip=0.5)
    assert torch.equal(resized(ragged, image, seed).flip(3), resized(ragged, image, seed, flip=True))


@examples
@given(shapes, sizes, seeds, orientations, st.sampled_from(["RGB", "L"]))
def test_orientation_equals_exif_transpose_first(shape, size, seed, orientation, mode) -> None:
    pixels = noise(seed, *shape)
    image = Image(size, crop="random", flip=0.5, mode=mode)
    upright = resized(ragged_of([transposed(pixels, orientation)]), image, seed)
    assert (resized(ragged_of([pixels], orientation), image, seed) - upright).abs().max() <= FLOAT


@examples
@given(shapes, sizes, seeds, orientations, st.sampled_from(["RGB", "L"]))
def test_the_chosen_implementation_equals_the_twin(shape, size, seed, orientation, mode) -> None:
    ragged, image = ragged_of([noise(seed, *shape)], orientation), Image(size, crop="random", flip=0.5, mode=mode)
    twin = resized(ragged, image, seed, resize=resize_twin)
    assert (resized(ragged, image, seed) - twin).abs().max() <= FLOAT


@implementations
def test_extreme_shapes(resize) -> None:
    one = noise(0, 1, 1, 3)
    got = resized(ragged_of([one]), Image((3, 4), dtype=torch.uint8), resize=resize)
    assert (got[0] == torch.from_numpy(one).view(3, 1, 1)).all()
    for shape in ((4000, 3, 3), (3, 4000, 1)):
        pixels = noise(1, *shape)
        got = resized(ragged_of([pixels]), Image((9, 8), crop="none"), resize=resize)[0]
        picture = PIL.Image.fromarray(pixels.squeeze(2) if shape[2] == 1 else pixels).convert("RGB")
        expected = np.asarray(picture.resize((8, 9), PIL.Image.Resampling.BILINEAR))
        assert np.abs(got.permute(1, 2, 0).numpy() * 255 - expected).max() <= PILLOW


@implementations
def test_a_missing_image_is_zeros_and_no_images_is_nothing(resize) -> None:
    ragged, image = ragged_of([noise(0, 8, 8, 3)] * 3), Image(4, mean=0.5, std=0.5)
    ragged.table[1] = np.zeros((), PIXELS)
    got = resized(ragged, image, resize=resize)
    assert (got[1] == 0).all()
    assert torch.equal(got[0], got[2])
    resize(Ragged(ragged.arena, ragged.table[:0]), np.zeros(0, VIEW), image, torch.empty(0, 3, 4, 4))
    resize(ragged, np.zeros(0, VIEW), image, torch.empty(0, 3, 4, 4))


def test_threads_fill_disjoint_slices() -> None:
    ragged = ragged_of([noise(i, 40 + i, 90 - i, 3) for i in range(32)], [1 + i % 8 for i in range(32)])
    image = Image(24, crop="random", flip=0.5, dtype=torch.uint8, channels_last=True)
    wanted = views_of(ragged, image)
    expected, out = resized(ragged, image), resized(ragged, image).fill_(9)

    def fill(i: int) -> None:
        resize_normalize(ragged, wanted[i : i + 1], image, out[i : i + 1])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(fill, range(32)))
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("count", "out", "message"),
    [
        (2, torch.empty(1, 3, 4, 4), r"Expected VIEW\[2\] and out \[2, 3, H, W\]"),
        (1, torch.empty(1, 1, 4, 4), r"out \[1, 3, H, W\]"),
        (1, torch.empty(1, 3, 4, 4, dtype=torch.float16), "torch.float32 on cpu"),
        (1, torch.empty(1, 3, 4, 8)[..., ::2], "contiguous or channels-last"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(count: int, out: torch.Tensor, message: str) -> None:
    wanted = np.zeros(count, VIEW)
    wanted["region"] = 1
    with pytest.raises(ValueError, match=message):
        resize_normalize(ragged_of([noise(0, 5, 5, 3)]), wanted, Image(4), out)


@pytest.mark.parametrize("which", [-1, 2])
def test_a_view_of_an_image_that_is_not_there_is_refused(which: int) -> None:
    wanted = np.zeros(2, VIEW)
    wanted["region"], wanted["image"][1] = (0, 0, 5, 5), which
    with pytest.raises(ValueError, match=rf"Expected views of 2 images, got one of image {which}"):
        resize_normalize(ragged_of([noise(0, 5, 5, 3)] * 2), wanted, Image(4), torch.empty(2, 3, 4, 4))


@examples
@given(shapes, seeds, orientations, st.booleans())
def test_native_is_exact(shape, seed, orientation, flip) -> None:
    pixels = noise(seed, *shape)
    ragged, upright = ragged_of([pixels], orientation), transposed(pixels, orientation)
    upright = upright[:, ::-1] if flip else upright
    picture = PIL.Image.fromarray(upright.squeeze(2) if shape[2] == 1 else np.ascontiguousarray(upright))
    for mode in ("RGB", "L"):
        expected = np.asarray(picture.convert(mode)).reshape(*upright.shape[:2], -1)
        got = native(ragged, 0, flip, Image(None, mode=mode, dtype=torch.uint8))
        assert got.is_contiguous()
        assert np.array_equal(got.permute(1, 2, 0), expected)
        mean, std = (0.1, 0.2, 0.3)[: len(got)], (0.5, 0.6, 0.7)[: len(got)]
        got = native(ragged, 0, flip, Image(None, mode=mode, mean=mean, std=std))
        normal = (expected / 255 - mean) / std  # float64
        assert np.abs(got.permute(1, 2, 0).numpy() - normal).max() <= 1e-6  # float32 of values below 2


def test_native_owns_its_memory_and_takes_every_dtype() -> None:
    ragged = ragged_of([noise(0, 6, 5, 3)] * 2)
    ragged.table[1] = np.zeros((), PIXELS)
    for dtype in (torch.uint8, torch.float16, torch.bfloat16, torch.float32):
        for mode in ("RGB", "L"):
            image = Image(None, dtype=dtype, mode=mode)
            got, gone = native(ragged, 0, False, image), native(ragged, 1, False, image)
            assert (got.dtype, got.shape, gone.dtype, gone.shape) == (
                dtype,
                (image.channels, 6, 5),
                dtype,
                (image.channels, 0, 0),
            )
    got = native(ragged, 0, False, Image(None, dtype=torch.uint8))
    before = got.clone()
    ragged.arena.zero_()
    assert torch.equal(got, before)


def test_pixels_right_behind_the_arena_are_another_memorys() -> None:
    """An arena that ends where its allocation ends, and another library's memory that begins there."""
    memory, pixels = np.zeros(100 + 60, np.uint8), noise(0, 4, 5, 3)
    memory[100:] = pixels.reshape(-1)
    ragged = Ragged(torch.from_numpy(memory[:100]), ragged_of([pixels]).table)
    ragged.table["offset"] = ragged.arena.numel()
    assert torch.equal(ragged.pixels(0), torch.from_numpy(pixels))
    image = Image((4, 5), crop="none", dtype=torch.uint8)
    for resize in (resize_normalize, resize_twin):
        assert torch.equal(resized(ragged, image, resize=resize)[0], torch.from_numpy(pixels).movedim(2, 0))


def test_ragged_of_takes_what_a_decoder_has_and_refuses_the_rest() -> None:
    gray, colour, broken = noise(0, 4, 5), torch.from_numpy(noise(1, 6, 3, 3)), DecodeError("Expected, got")
    headers = np.zeros(4, HEADER)
    headers["orientation"] = (1, 6, 1, 3)
    ragged = Ragged.of([gray, colour, broken, noise(2, 2, 2, 1)], headers)
    assert ragged.errors == {2: broken}
    assert ragged.table["height"].tolist() == [4, 6, 0, 2]
    assert ragged.table["orientation"].tolist() == [1, 6, 0, 3]
    assert torch.equal(ragged.pixels(0)[..., 0], torch.from_numpy(gray))
    assert torch.equal(ragged.pixels(1), colour)
    assert len(Ragged.of([])) == 0
    for wrong in (noise(0, 4, 5, 4), np.zeros((4, 5, 3), np.float32), np.zeros(5, np.uint8)):
        with pytest.raises(ValueError, match=r"Expected image 1 as uint8 \[height, width, 1 or 3\], got torch"):
            Ragged.of([gray, wrong])
