"""Image columns: found, decoded to Pillow's pixels, turned upright, cropped and resized as Pillow would."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import lance.arrow
import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
import simplejpeg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from making import by_pillow, by_row, claiming, encode, jpeg, picture, png

from gpuload import Image, LanceDataset
from gpuload.images.decode.libjpeg import library
from gpuload.images.views import regions as regions_of
from gpuload.order.draws import Draws

Store = Callable[..., str]
LEVELS = 1.01 / 255  # Pillow rounds to 8 bits after each of its two passes, gpuload once at the end
GPU_LEVELS = 0.05  # another inverse DCT and another upsampling of the colours before the resize


def deep(height: int, width: int, channels: int) -> bytes:
    """Big-endian 16-bit samples that differ in both bytes."""
    return np.random.default_rng(0).integers(0, 2**16, (height, width, channels)).astype(">u2").tobytes()


def moving(kind: str) -> bytes:
    frames = [picture(16, 20, seed=i) for i in range(3)]
    return encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)


def transparent_palette() -> bytes:
    image = picture(16, 20).quantize(17)
    return encode(image, "PNG", transparency=bytes(range(0, 255, 15)))


def progressive_cmyk() -> bytes:
    return encode(picture(16, 20, mode="CMYK"), "JPEG", progressive=True)


FILES: dict[str, Callable[[], bytes]] = {
    "jpeg_444": lambda: jpeg(17, 23, subsampling="4:4:4"),
    "jpeg_422": lambda: jpeg(17, 23, subsampling="4:2:2"),
    "jpeg_420": lambda: jpeg(17, 23, subsampling="4:2:0"),
    "jpeg_progressive": lambda: jpeg(17, 23, progressive=True),
    "jpeg_gray": lambda: encode(picture(17, 23, mode="L"), "JPEG"),
    "jpeg_cmyk": lambda: encode(picture(17, 23, mode="CMYK"), "JPEG"),
    "jpeg_cmyk_progressive": progressive_cmyk,
    "jpeg_rgb": lambda: jpeg(17, 23, keep_rgb=True),
    "jpeg_1x1": lambda: jpeg(1, 1),
    "jpeg_and_more": lambda: jpeg(17, 23) + bytes(range(99)),
    "jpeg_short_of_rows": lambda: claiming(jpeg(16, 24), 48, 24),  # Pillow takes it, the missing rows gray
    "png_rgb": lambda: encode(picture(16, 20), "PNG"),
    "png_palette": lambda: encode(picture(16, 20).quantize(40), "PNG"),
    "png_palette_transparent": transparent_palette,
    "png_rgba": lambda: encode(picture(16, 20, mode="RGBA"), "PNG"),
    "png_gray": lambda: encode(picture(16, 20, mode="L"), "PNG"),
    "png_gray_alpha": lambda: encode(picture(16, 20, mode="LA"), "PNG"),
    "png_1_bit": lambda: encode(picture(16, 20, mode="1"), "PNG"),
    "png_rgb16": lambda: png(9, 7, 16, 2, deep(9, 7, 3)),
    "png_rgba16": lambda: png(9, 7, 16, 6, deep(9, 7, 4)),
    "webp_lossy": lambda: encode(picture(16, 20), "WEBP", quality=70),
    "webp_lossless_alpha": lambda: encode(picture(16, 20, mode="RGBA"), "WEBP", lossless=True),
    "webp_moving": lambda: moving("WEBP"),
    "gif": lambda: encode(picture(16, 20), "GIF"),
    "gif_moving": lambda: moving("GIF"),
    "tiff": lambda: encode(picture(16, 20), "TIFF"),
    "tiff_lzw": lambda: encode(picture(16, 20), "TIFF", compression="tiff_lzw"),
    "tiff_float": lambda: encode(picture(16, 20, mode="F"), "TIFF"),
    "avif": lambda: encode(picture(16, 20), "AVIF"),
    "bmp": lambda: encode(picture(16, 20), "BMP"),
    "jpeg2000": lambda: encode(picture(16, 20), "JPEG2000"),
    "qoi": lambda: encode(picture(16, 20), "QOI"),
    "ppm": lambda: encode(picture(16, 20), "PPM"),
}


@pytest.mark.parametrize("kind", FILES)
def test_every_format_gives_exactly_the_pixels_of_pillow(kind: str, store: Store) -> None:
    data = FILES[kind]()
    path = store({"image": [data, data]})
    (batch,) = LanceDataset(path, 2, device="cpu")
    assert batch["image"].dtype == torch.uint8
    for pixels in batch["image"]:
        np.testing.assert_array_equal(pixels.numpy(), by_pillow(data))


@pytest.mark.parametrize("kind", ["jpeg_420", "jpeg_gray", "png_rgb", "png_gray_alpha", "png_palette", "gif"])
def test_mode_l_at_the_own_size_is_pillows_luma(kind: str, store: Store) -> None:
    data = FILES[kind]()
    path = store({"image": [data]})
    (batch,) = LanceDataset(path, 1, transforms={"image": Image(None, mode="L", dtype=torch.uint8)}, device="cpu")
    with PIL.Image.open(io.BytesIO(data)) as image:
        if kind == "jpeg_gray" or image.mode == "LA":
            expected = np.asarray(image.convert("L"))
        else:
            expected = np.asarray(image.convert("RGB").convert("L"))
    np.testing.assert_array_equal(batch["image"][0, 0].numpy(), expected)


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_16_bit_gray_keeps_the_high_byte_where_pillow_clips(kind: str, store: Store) -> None:
    samples = np.random.default_rng(0).integers(0, 2**16, (9, 7)).astype(np.uint16)
    data = png(9, 7, 16, 0, samples.astype(">u2").tobytes())
    if kind == "tiff":
        data = encode(PIL.Image.fromarray(samples), "TIFF")
    (batch,) = LanceDataset(store({"image": [data]}), 1, device="cpu")
    np.testing.assert_array_equal(batch["image"][0].numpy(), np.stack([samples >> 8] * 3))


def test_formats_and_sizes_mix_in_one_batch(store: Store, device: str) -> None:
    files = [make() for make in FILES.values()]
    path = store({"image": files})
    (batch,) = LanceDataset(path, len(files), device=device)
    assert isinstance(batch["image"], list)
    for pixels, data in zip(batch["image"], files, strict=True):
        assert pixels.device.type == device
        assert pixels.shape == by_pillow(data).shape
        if device == "cpu":
            np.testing.assert_array_equal(pixels.numpy(), by_pillow(data))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_picture_upright(kind: str, orientation: int, store: Store) -> None:
    data = encode(picture(17, 23), kind, orientation)
    path = store({"image": [data]})
    (batch,) = LanceDataset(path, 1, device="cpu")
    expected = by_pillow(data)
    np.testing.assert_array_equal(batch["image"][0].numpy(), expected)
    assert expected.shape == ((3, 23, 17) if orientation >= 5 else (3, 17, 23))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_before_the_crop(kind: str, orientation: int, store: Store, device: str) -> None:
    data = encode(picture(40, 64), kind, orientation, **({"quality": 95} if kind == "JPEG" else {}))
    upright = encode(PIL.Image.fromarray(by_pillow(data).transpose(1, 2, 0)), "PNG")
    image = Image((11, 9), crop="random", flip=0.5)
    (turned,) = LanceDataset(store({"image": [data]}), 1, transforms={"image": image}, device=device)
    (plain,) = LanceDataset(store({"image": [upright]}), 1, transforms={"image": image}, device=device)
    atol = 1e-5 if device == "cpu" else GPU_LEVELS
    torch.testing.assert_close(turned["image"], plain["image"], atol=atol, rtol=0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_orient_false_leaves_the_picture_as_it_is_stored(kind: str, store: Store) -> None:
    data = encode(picture(17, 23), kind, orientation=6)
    transforms = {"image": Image(None, orient=False, dtype=torch.uint8)}
    (batch,) = LanceDataset(store({"image": [data]}), 1, transforms=transforms, device="cpu")
    np.testing.assert_array_equal(batch["image"][0].numpy(), by_pillow(data, orient=False))


# -- one size ------------------------------------------------------------------------------------------------------

SHAPES = [(24, 32), (61, 17), (200, 150), (8, 8), (1, 40)]


def sized(image: Image, pixels: PIL.Image.Image, region: Any, flip: bool) -> np.ndarray[Any, Any]:
    """f64[C, H, W] in 0..255: what Pillow makes of the same region."""
    assert image.shape is not None
    x, y, w, h = region
    box = (x, y, min(x + w, pixels.width), min(y + h, pixels.height))
    out = np.asarray(pixels.convert(image.mode).resize(image.shape[:0:-1], PIL.Image.Resampling.BILINEAR, box=box))
    out = np.atleast_3d(out).transpose(2, 0, 1).astype(np.float64)
    return out[:, :, ::-1] if flip else out


CROPS = {
    "center": Image(32),
    "center_whole": Image(32, crop_ratio=1.0),
    "center_tall": Image((40, 12), crop_ratio=0.5),
    "center_wide": Image((12, 40)),
    "random": Image(32, crop="random"),
    "random_flip": Image((20, 30), crop="random", scale=(0.3, 0.9), ratio=(0.5, 2), flip=0.5),
    "none": Image((19, 37), crop="none"),
    "none_mirrored": Image((19, 37), crop="none", flip=1.0),
    "gray": Image(32, mode="L"),
}


@pytest.mark.parametrize("name", CROPS)
def test_resized_pixels_are_pillows_of_the_same_region(name: str, store: Store, device: str) -> None:
    image = CROPS[name]
    pictures = [picture(h, w, seed=i) for i, (h, w) in enumerate(SHAPES * 3)]
    path = store({"image": [encode(p, "PNG") for p in pictures]})
    dataset = LanceDataset(path, len(pictures), transforms={"image": image}, seed=5, device=device)
    dataset.set_epoch(2)
    (batch,) = dataset
    assert batch["image"].shape == (len(pictures), *image.shape)
    heights, widths = np.array([p.height for p in pictures]), np.array([p.width for p in pictures])
    regions, flips = regions_of(image, heights, widths, Draws(5, 2, np.arange(len(pictures))))
    for pixels, original, region, flip in zip(batch["image"], pictures, regions, flips, strict=True):
        expected = sized(image, original, region, flip) / 255
        got = pixels.double().cpu().numpy()
        limit = LEVELS if image.mode == "RGB" else 2 * LEVELS  # Pillow also rounds when it makes the luma
        assert np.abs(got - expected).max() <= limit
    if image.flip == 0.5:
        assert 0 < flips.sum() < len(flips)


@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float32, 0), (torch.float16, 2**-12), (torch.bfloat16, 2**-9), (torch.uint8, 0.5 / 255)],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_dtype_and_layout_do_not_change_the_pixels(
    dtype: torch.dtype, rounding: float, channels_last: bool, photos: str, device: str
) -> None:
    first = next(iter(LanceDataset(photos, 8, transforms={"image": Image(24)}, device=device)))
    image = Image(24, dtype=dtype, channels_last=channels_last)
    pixels = next(iter(LanceDataset(photos, 8, transforms={"image": image}, device=device)))["image"]
    assert pixels.dtype == dtype
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert pixels.is_contiguous(memory_format=layout)
    unit = pixels.double() / (255 if dtype == torch.uint8 else 1)
    torch.testing.assert_close(unit, first["image"].double(), atol=rounding + 1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore::gpuload.BadRowWarning")
def test_channels_last_survives_a_skipped_row(store: Store) -> None:
    path = store({"image": [jpeg(), None, jpeg(seed=1)]})
    image = Image(16, channels_last=True)
    (batch,) = LanceDataset(path, 3, transforms={"image": image}, on_error="skip", device="cpu")
    assert batch["image"].shape == (2, 3, 16, 16)
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)


def test_mean_and_std_are_those_of_torchvision(photos: str, device: str) -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    plain = next(iter(LanceDataset(photos, 8, transforms={"image": Image(24)}, device=device)))["image"]
    image = Image(24, mean=mean, std=std)
    normal = next(iter(LanceDataset(photos, 8, transforms={"image": image}, device=device)))["image"]
    expected = (plain.cpu() - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(normal.cpu(), expected, atol=1e-5, rtol=0)


def test_mean_and_std_apply_at_the_own_size_too(store: Store) -> None:
    data = jpeg(17, 23)
    transforms = {"image": Image(None, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5))}
    (batch,) = LanceDataset(store({"image": [data]}), 1, transforms=transforms, device="cpu")
    expected = (by_pillow(data) / 255 - np.array([[[0.5]], [[0.4]], [[0.3]]])) / np.array([[[0.2]], [[0.25]], [[0.5]]])
    np.testing.assert_allclose(batch["image"][0].numpy(), expected, atol=1e-5)


def test_flip_mirrors_at_the_own_size_too(store: Store) -> None:
    data = jpeg(17, 23)
    transforms = {"image": Image(None, flip=1.0, dtype=torch.uint8)}
    (batch,) = LanceDataset(store({"image": [data]}), 1, transforms=transforms, device="cpu")
    np.testing.assert_array_equal(batch["image"][0].numpy(), by_pillow(data)[:, :, ::-1])


# -- per-row randomness --------------------------------------------------------------------------------------------

RANDOM = {"image": Image(16, crop="random", flip=0.5)}


@pytest.fixture(scope="module")
def drawn(photos: str) -> dict[int, torch.Tensor]:
    """Row → pixels: one thread, one rank, from the start, in order."""
    return by_row(LanceDataset(photos, 8, transforms=RANDOM, seed=3, num_threads=1, device="cpu"), "image")


def assert_same(found: dict[int, torch.Tensor], expected: dict[int, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [row for row in expected if not torch.equal(found[row], expected[row])]
    assert not different, f"other pixels in rows {different}"


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_pixels_do_not_depend_on_the_threads(threads: int, photos: str, drawn: dict[int, torch.Tensor]) -> None:
    dataset = LanceDataset(photos, 8, transforms=RANDOM, seed=3, num_threads=threads, device="cpu")
    assert_same(by_row(dataset, "image"), drawn)


@pytest.mark.parametrize("batch_size", [1, 5, 50, 64])
def test_pixels_do_not_depend_on_the_batch_size(batch_size: int, photos: str, drawn: dict[int, torch.Tensor]) -> None:
    assert_same(by_row(LanceDataset(photos, batch_size, transforms=RANDOM, seed=3, device="cpu"), "image"), drawn)


@pytest.mark.parametrize("world", [2, 3])
def test_pixels_do_not_depend_on_the_ranks(world: int, photos: str, drawn: dict[int, torch.Tensor]) -> None:
    found: dict[int, torch.Tensor] = {}
    for rank in range(world):
        dataset = LanceDataset(photos, 8, transforms=RANDOM, seed=3, rank=rank, world_size=world, device="cpu")
        found.update(by_row(dataset, "image"))
    assert_same(found, drawn)


@pytest.mark.parametrize("shuffle", ["row", "block", "batch"])
def test_pixels_do_not_depend_on_the_order(shuffle: Any, photos: str, drawn: dict[int, torch.Tensor]) -> None:
    dataset = LanceDataset(photos, 8, transforms=RANDOM, seed=3, shuffle=shuffle, device="cpu")
    assert_same(by_row(dataset, "image"), drawn)


def test_pixels_do_not_depend_on_a_filter(photos: str, drawn: dict[int, torch.Tensor]) -> None:
    dataset = LanceDataset(photos, 8, filter="number % 3 = 1", transforms=RANDOM, seed=3, device="cpu")
    assert_same(by_row(dataset, "image"), {row: pixels for row, pixels in drawn.items() if row % 3 == 1})


def test_pixels_do_not_depend_on_a_resume(photos: str, drawn: dict[int, torch.Tensor]) -> None:
    stopped = LanceDataset(photos, 8, transforms=RANDOM, seed=3, device="cpu")
    before = []
    for batch in stopped:
        before.append(batch)
        if len(before) == 3:
            break
    resumed = LanceDataset(photos, 8, transforms=RANDOM, seed=3, device="cpu")
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert_same(by_row([*before, *resumed], "image"), drawn)


@pytest.mark.parametrize(("seed", "epoch"), [(3, 1), (4, 0)])
def test_another_epoch_or_seed_draws_other_pixels(
    seed: int, epoch: int, photos: str, drawn: dict[int, torch.Tensor]
) -> None:
    dataset = LanceDataset(photos, 8, transforms=RANDOM, seed=seed, device="cpu")
    dataset.set_epoch(epoch)
    found = by_row(dataset, "image")
    same = sum(torch.equal(found[row], drawn[row]) for row in drawn)
    assert same == 0


def test_two_image_columns_of_a_row_get_the_same_region(store: Store) -> None:
    files = [jpeg(40, 50, seed=i) for i in range(6)]
    path = store({"image": files, "mask": files})
    image = Image(16, crop="random", flip=0.5)
    (batch,) = LanceDataset(path, 6, transforms={"image": image, "mask": image}, device="cpu")
    assert torch.equal(batch["image"], batch["mask"])


# -- the regions themselves ----------------------------------------------------------------------------------------


def kolmogorov(values: np.ndarray[Any, Any]) -> float:
    """Distance of the values' distribution from the uniform one on 0..1."""
    ordered = np.sort(values)
    steps = np.arange(len(ordered) + 1) / len(ordered)
    return float(max(np.abs(steps[1:] - ordered).max(), np.abs(steps[:-1] - ordered).max()))


def test_random_crops_are_uniform_in_area_ratio_and_place() -> None:
    n = 20_000
    image = Image(8, crop="random", scale=(0.2, 0.5), flip=0.3)  # every draw fits a square picture
    side = np.full(n, 1000)
    regions, flips = regions_of(image, side, side, Draws(0, 0, np.arange(n)))
    x, y, w, h = regions.T
    limit = 1.95 / math.sqrt(n)  # passed by chance with 99.9 %; the seed is fixed
    assert kolmogorov((w * h / 1e6 - 0.2) / 0.3) < limit
    assert kolmogorov((np.log(w / h) - math.log(3 / 4)) / math.log(16 / 9)) < limit
    assert kolmogorov(x / (1000 - w)) < limit
    assert kolmogorov(y / (1000 - h)) < limit
    assert abs(flips.mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / n)
    for a, b in ((x / (1000 - w), y / (1000 - h)), (w * h, w / h), (w * h, flips), (x / (1000 - w), w * h)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(n)


sides = st.integers(1, 3000)
shares = st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(lambda pair: tuple(sorted(pair)))
ratios = st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)).map(lambda pair: tuple(sorted(pair)))


@given(sides, sides, shares, ratios, st.integers(0, 2**63), st.integers(0, 2**31), st.integers(0, 2**62))
@settings(deadline=None)
def test_random_crops_lie_inside_the_image_and_the_limits(
    height: int, width: int, scale: Any, ratio: Any, seed: int, epoch: int, row: int
) -> None:
    image = Image(8, crop="random", scale=scale, ratio=ratio)
    rows = np.arange(row, row + 20)
    regions, _ = regions_of(image, np.full(20, height), np.full(20, width), Draws(seed, epoch, rows))
    x, y, w, h = regions.T
    assert ((x >= 0) & (y >= 0) & (w > 0) & (h > 0)).all()
    assert (x + w <= width * (1 + 1e-9)).all()
    assert (y + h <= height * (1 + 1e-9)).all()
    share, shape = w * h / (height * width), w / h
    assert ((shape >= ratio[0] * (1 - 1e-9)) & (shape <= ratio[1] * (1 + 1e-9))).all()
    inside = (share >= scale[0] * (1 - 1e-9)) & (share <= scale[1] * (1 + 1e-9))
    fills = np.isclose(w, width) | np.isclose(h, height)  # no draw of ten fitted: as much as the ratio allows
    assert (inside | fills).all()


@given(sides, sides, st.integers(1, 400), st.integers(1, 400), st.floats(0.05, 1))
@settings(deadline=None)
def test_centre_crops_have_the_outputs_shape_and_the_images_centre(
    height: int, width: int, out_h: int, out_w: int, share: float
) -> None:
    image = Image((out_h, out_w), crop_ratio=share)
    ((x, y, w, h),), _ = regions_of(image, np.array([height]), np.array([width]), Draws(0, 0, np.array([0])))
    assert math.isclose(w / h, out_w / out_h, rel_tol=1e-9)
    assert math.isclose(x + w / 2, width / 2, rel_tol=1e-9)
    assert math.isclose(y + h / 2, height / 2, rel_tol=1e-9)
    assert math.isclose(max(w / width, h / height), share, rel_tol=1e-9)


# -- which columns are images --------------------------------------------------------------------------------------

FILES_OF_TWO = [jpeg(16, 20, seed=0), jpeg(16, 20, seed=1)]
HF_STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def check_found(path: str) -> None:
    """The column `image` of two rows is decoded."""
    (batch,) = LanceDataset(path, 2, columns=["image"], device="cpu")
    assert isinstance(batch["image"], torch.Tensor)
    for pixels, data in zip(batch["image"], FILES_OF_TWO, strict=True):
        np.testing.assert_array_equal(pixels.numpy(), by_pillow(data))


def structs(paths: list[str | None] | None = None, data: Any = FILES_OF_TWO) -> pa.Array:
    return pa.array([{"bytes": b, "path": p} for b, p in zip(data, paths or [None, "x.jpg"], strict=True)], HF_STRUCT)


@pytest.mark.filterwarnings("ignore::gpuload.BadRowWarning")
def test_hugging_face_image_is_found_by_its_metadata(store: Store) -> None:
    field = pa.field("image", pa.binary())
    features = {"info": {"features": {"image": {"_type": "Image"}}}}
    schema = pa.schema([field], metadata={"huggingface": json.dumps(features)})
    nulls = pa.table([pa.array([None] * 40, pa.binary())], schema=schema)  # nothing but the metadata says so
    dataset = LanceDataset(store(nulls), 40, on_error="mask", device="cpu")
    assert "image: uint8[B, 3, H, W]" in repr(dataset)


def test_hugging_face_says_that_a_column_is_no_image(store: Store) -> None:
    features = {"info": {"features": {"image": {"dtype": "binary", "_type": "Value"}}}}
    schema = pa.schema([pa.field("image", pa.binary())], metadata={"huggingface": json.dumps(features)})
    path = store(pa.table([pa.array(FILES_OF_TWO)], schema=schema))
    (batch,) = LanceDataset(path, 2, device="cpu")
    assert batch["image"] == FILES_OF_TWO


def test_struct_of_bytes_and_path_is_found_without_metadata(store: Store) -> None:
    check_found(store({"image": structs()}))


def test_encoded_image_of_lance_is_found(store: Store) -> None:
    kind = lance.arrow.EncodedImageType()
    check_found(store({"image": pa.ExtensionArray.from_storage(kind, pa.array(FILES_OF_TWO, kind.storage_type))}))
    empty = pa.ExtensionArray.from_storage(kind, pa.array([None, b"broken"], kind.storage_type))
    assert "image: uint8[B, 3, H, W]" in repr(LanceDataset(store({"image": empty}), 2))  # its type alone says so


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_binary_with_image_bytes_is_found(kind: pa.DataType, store: Store) -> None:
    check_found(store({"image": pa.array(FILES_OF_TWO, kind)}))


@pytest.mark.filterwarnings("ignore::gpuload.BadRowWarning")
@pytest.mark.parametrize("nulls", [1, 15, 16, 17, 300])
def test_binary_is_found_behind_nulls(nulls: int, store: Store) -> None:
    path = store({"image": [None] * nulls + FILES_OF_TWO}, max_rows_per_file=50)
    batches = list(LanceDataset(path, 8, on_error="skip", device="cpu"))
    pixels = [image for batch in batches for image in batch["image"]]
    assert len(pixels) == 2
    for image, data in zip(pixels, FILES_OF_TWO, strict=True):
        np.testing.assert_array_equal(image.numpy(), by_pillow(data))


def test_blob_of_the_first_kind_is_found(store: Store) -> None:
    field = pa.field("image", pa.large_binary(), metadata={"lance-encoding:blob": "true"})
    table = pa.table([pa.array(FILES_OF_TWO, pa.large_binary())], schema=pa.schema([field]))
    check_found(store(table, data_storage_version="2.1"))


def test_blob_of_the_second_kind_is_found(store: Store) -> None:
    field = lance.blob_field("image")
    table = pa.table([lance.blob_array(FILES_OF_TWO)], schema=pa.schema([field]))
    check_found(store(table))


@pytest.mark.filterwarnings("ignore::gpuload.BadRowWarning")
@pytest.mark.parametrize("version", ["2.1", "stable"])
def test_blobs_are_found_behind_nulls(version: str, store: Store) -> None:
    field = pa.field("image", pa.large_binary(), metadata={"lance-encoding:blob": "true"})
    table = pa.table([pa.array([None] * 40 + FILES_OF_TWO, pa.large_binary())], schema=pa.schema([field]))
    batches = list(LanceDataset(store(table, data_storage_version=version), 8, on_error="skip", device="cpu"))
    assert sum(batch.size for batch in batches) == 2


@pytest.mark.parametrize("version", ["2.1", "stable"])
def test_blobs_are_shuffled_cropped_and_filtered_like_other_columns(version: str, store: Store) -> None:
    files = [jpeg(30, 40, seed=i) for i in range(20)]
    field = pa.field("image", pa.large_binary(), metadata={"lance-encoding:blob": "true"})
    numbers = pa.field("number", pa.int64())
    table = pa.table([pa.array(files, pa.large_binary()), range(20)], schema=pa.schema([field, numbers]))
    blobs = store(table, data_storage_version=version, max_rows_per_file=6)
    plain = store({"image": files, "number": range(20)})
    options: dict[str, Any] = {"transforms": RANDOM, "shuffle": True, "filter": "number > 4", "device": "cpu"}
    assert_same(by_row(LanceDataset(blobs, 4, **options), "image"), by_row(LanceDataset(plain, 4, **options), "image"))


@pytest.mark.parametrize("first", [b"hello", b"", b"<html>", b"\x00" * 40])
def test_binary_that_is_no_image_stays_bytes(first: bytes, store: Store) -> None:
    values = [None, first, b"more"]
    (batch,) = LanceDataset(store({"blob": pa.array(values, pa.binary())}), 3, device="cpu")
    assert batch["blob"] == values


def test_binary_that_is_all_null_stays_bytes(store: Store) -> None:
    path = store({"blob": pa.array([None] * 40, pa.binary())})
    assert next(iter(LanceDataset(path, 40, device="cpu")))["blob"] == [None] * 40


def test_a_path_alone_is_read_from_its_file(store: Store, tmp_path: Path) -> None:
    files = []
    for i, data in enumerate(FILES_OF_TWO):
        files.append(tmp_path / f"{i}.jpg")
        files[-1].write_bytes(data)
    check_found(store({"image": structs([str(file) for file in files], [None, None])}))


@pytest.mark.filterwarnings("ignore::gpuload.BadRowWarning")
def test_a_path_to_a_missing_file_is_an_error_of_its_row(store: Store, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.jpg")
    path = store({"image": structs(["also-missing-but-has-bytes.jpg", missing], [FILES_OF_TWO[0], None])})
    with pytest.raises(ValueError, match=r"existing file.*missing\.jpg.*row 1, column `image`"):
        list(LanceDataset(path, 2, device="cpu"))
    (batch,) = LanceDataset(path, 2, on_error="mask", device="cpu")
    assert batch.valid.tolist() == [True, False]
    np.testing.assert_array_equal(batch["image"][0].numpy(), by_pillow(FILES_OF_TWO[0]))


def test_a_struct_field_can_be_read_as_a_column(store: Store) -> None:
    path = store({"photo": structs()})
    dataset = LanceDataset(path, 2, columns={"image": "photo.bytes"}, device="cpu")
    (batch,) = dataset
    np.testing.assert_array_equal(batch["image"][1].numpy(), by_pillow(FILES_OF_TWO[1]))


@pytest.mark.filterwarnings("ignore::gpuload.BadRowWarning")
def test_stats_count_the_images_by_the_library_that_read_them(store: Store) -> None:
    path = store({"image": [jpeg(), jpeg(seed=1), encode(picture(24, 32), "PNG"), b"\xff\xd8\xff broken"]})
    dataset = LanceDataset(path, 4, on_error="skip", device="cpu")
    list(dataset)
    jpegs = "simplejpeg" if library() is None else "libjpeg-turbo"
    assert dataset.stats()["images"] == {"simplejpeg": 0, jpegs: 2, "pillow": 1, "failed": 1}


@pytest.mark.parametrize("sampling", ["444", "422", "420", "440", "411", "441"])
def test_every_sampling_is_decoded_as_by_pillow(sampling: str, store: Store) -> None:
    """4:4:1 is a 4:1:1 picture that was turned without loss; here its factors are exchanged in the header."""
    pixels = np.ascontiguousarray(np.asarray(picture(64, 64)))
    data = simplejpeg.encode_jpeg(pixels, quality=90, colorsubsampling="411" if sampling == "441" else sampling)
    if sampling == "441":
        at = data.index(b"\x01\x41", data.index(b"\xff\xc0"))
        data = data[:at] + b"\x01\x14" + data[at + 2 :]
    (batch,) = LanceDataset(store({"image": [data]}), 1, device="cpu")
    np.testing.assert_array_equal(batch["image"][0].numpy(), by_pillow(data))
