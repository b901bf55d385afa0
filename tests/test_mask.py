"""Masks move with the pixels of the image they name, and keep their labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lance
import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
import torch
from making import encode, jpeg, picture

from gpuload import ConfigError, DecodeError, Image, LanceDataset, Mask

pytestmark = pytest.mark.filterwarnings("ignore::gpuload.BadRowWarning")

CROP = Image((40, 56), crop="random", scale=(0.3, 1.0), flip=0.5, dtype=torch.uint8)
LABELS = [0, 3, 200, 255]


def regions(height: int, width: int, seed: int, labels: list[int] = LABELS) -> np.ndarray[Any, Any]:
    """A label image of rectangles, no symmetry: [height, width]."""
    found, generator = np.zeros((height, width), np.uint16), np.random.default_rng(seed)
    for k in range(9):
        y, x = generator.integers(0, height), generator.integers(0, width)
        found[y : y + 1 + height // 3, x : x + 1 + width // 4] = labels[k % len(labels)]
    return found


def file(labels: Any, mode: str, orientation: int = 1) -> bytes:
    if mode == "I;16":
        return encode(PIL.Image.fromarray(labels.astype(np.uint16)), "PNG", orientation)
    image = PIL.Image.fromarray(labels.astype(np.uint8))
    if mode == "P":
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
    return encode(image if mode == "P" else image.convert(mode), "PNG", orientation)


def written(folder: Path, images: list[bytes], masks: list[bytes | None]) -> str:
    path = str(folder / "masks.lance")
    lance.write_dataset(pa.table({"image": images, "mask": pa.array(masks, pa.binary())}), path)
    return path


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_a_mask_moves_as_its_image_does(tmp_path: Path, mode: str, views: int, device: str) -> None:
    """The image is painted from the labels, stored alike, with an orientation: both must come out alike."""
    labels = LABELS if mode != "I;16" else [0, 3, 200, 255, 40_000, 65_535]
    stored = [regions(70 + i, 90 - i, i, labels) for i in range(16)]
    as_pixels = [np.repeat((mask % 256).astype(np.uint8)[..., None], 3, axis=2) for mask in stored]
    images = [encode(PIL.Image.fromarray(pixels), "PNG", 1 + i % 8) for i, pixels in enumerate(as_pixels)]
    uri = written(tmp_path, images, [file(mask, mode) for mask in stored])
    image = Image(**{**CROP.__dict__, "views": views})
    transforms = {"image": image, "mask": Mask("image")}
    with LanceDataset(uri, 6, transforms=transforms, device=device) as dataset:
        batches = list(dataset)
    agreeing = []
    for batch in batches:
        many = (batch.size, views) if views > 1 else (batch.size,)
        assert (batch["mask"].dtype, tuple(batch["mask"].shape)) == (torch.int64, (*many, 40, 56))
        assert batch["mask"].device.type == device
        assert set(batch["mask"].unique().tolist()) <= set(labels), "no label is mixed from two"
        pixels = batch["image"].cpu().reshape(-1, 3, 40, 56)[:, 0].long()
        near = (pixels - batch["mask"].cpu().reshape(-1, 40, 56) % 256).abs() <= 24
        agreeing += near.float().mean((1, 2)).tolist()
    assert np.mean(agreeing) > 0.9  # all but the edges, which the image blurs
    assert min(agreeing) > 0.75


def test_labels_are_those_of_the_nearest_pixel(tmp_path: Path) -> None:
    stored = regions(60, 80, 1)
    uri = written(tmp_path, [jpeg(60, 80)], [file(stored, "P")])
    for size in ((60, 80), (30, 40), (120, 160), (17, 23)):
        transforms = {"image": Image(size, crop="none"), "mask": Mask("image")}
        (batch,) = LanceDataset(uri, 1, transforms=transforms, device="cpu")
        want = torch.nn.functional.interpolate(
            torch.from_numpy(stored.astype(np.float64))[None, None], size, mode="nearest-exact"
        )
        assert torch.equal(batch["mask"], want[0].long())


def test_a_mask_has_its_own_orientation_or_its_images(tmp_path: Path) -> None:
    seen = regions(60, 80, 2)
    sideways = np.rot90(seen)  # orientation 6 turns it back, clockwise
    image = encode(picture(80, 60), "JPEG", 6)  # 60 x 80 as it is seen
    masks = [file(sideways, "L"), file(sideways, "L", 6), file(seen, "L")]
    uri = written(tmp_path, [image] * 3, list(masks))
    transforms = {"image": Image((60, 80), crop="none"), "mask": Mask("image")}
    (batch,) = LanceDataset(uri, 3, transforms=transforms, device="cpu")
    for mask in batch["mask"]:
        np.testing.assert_array_equal(mask.numpy(), seen)


def test_a_mask_may_be_a_part_of_its_images_size_and_of_no_other_shape(tmp_path: Path) -> None:
    small = regions(15, 20, 3)
    uri = written(tmp_path, [jpeg(60, 80)] * 2, [file(small, "L"), file(regions(20, 20, 0), "L")])
    transforms = {"image": Image((15, 20), crop="none"), "mask": Mask("image")}
    batches = list(LanceDataset(uri, 2, transforms=transforms, device="cpu", on_error="mask"))
    np.testing.assert_array_equal(batches[0]["mask"][0].numpy(), small)
    assert batches[0].valid.tolist() == [True, False]
    with pytest.raises(DecodeError, match="mask of its image's shape, 60x80, got 20x20") as caught:
        list(LanceDataset(uri, 2, transforms=transforms, device="cpu"))
    assert (caught.value.row, caught.value.column) == (1, "mask")


@pytest.mark.parametrize(
    ("mask", "message"),
    [(None, "a null"), (b"", "0 bytes"), (b"nonsense", "an image"), (jpeg(60, 80), "one channel"),
     (file(regions(60, 80, 0), "L")[:90], "broke|whole PNG")],
)  # fmt: skip
def test_a_bad_mask_is_its_rows_error(tmp_path: Path, mask: bytes | None, message: str) -> None:
    good = file(regions(60, 80, 0), "L")
    uri = written(tmp_path, [jpeg(60, 80)] * 3, [good, mask, good])
    transforms = {"image": Image(24), "mask": Mask("image")}
    with pytest.raises(DecodeError, match=message):
        list(LanceDataset(uri, 3, transforms=transforms, device="cpu"))
    (batch,) = LanceDataset(uri, 3, transforms=transforms, device="cpu", on_error="mask")
    assert batch.valid.tolist() == [True, False, True]
    assert not batch["mask"][1].any()
    assert torch.equal(batch["mask"][0], batch["mask"][2]) or CROP.flip  # same file, same centre crop
    assert batch["mask"][0].any()


def test_masks_of_pictures_that_keep_their_size(tmp_path: Path) -> None:
    stored = [regions(60, 80, 0), regions(50, 40, 1)]
    uri = written(tmp_path, [jpeg(60, 80), jpeg(50, 40)], [file(mask, "L") for mask in stored])
    transforms = {"image": Image(None, flip=1.0), "mask": Mask("image")}
    (batch,) = LanceDataset(uri, 2, transforms=transforms, device="cpu")
    for got, want in zip(batch["mask"], stored, strict=True):
        np.testing.assert_array_equal(got.numpy(), want[:, ::-1])


def test_bits_are_zero_and_one(tmp_path: Path) -> None:
    stored = regions(60, 80, 0, [0, 255])
    uri = written(tmp_path, [jpeg(60, 80)], [file(stored, "1")])
    (batch,) = LanceDataset(
        uri, 1, transforms={"image": Image((60, 80), crop="none"), "mask": Mask("image")}, device="cpu"
    )
    np.testing.assert_array_equal(batch["mask"][0].numpy(), stored // 255)


def test_what_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    uri = written(tmp_path, [jpeg(60, 80)], [file(regions(60, 80, 0), "L")])
    with pytest.raises(ConfigError, match="to move with, got 'mask'"):
        list(LanceDataset(uri, 1, transforms={"mask": Mask("mask")}, device="cpu"))
    with pytest.raises(ConfigError, match="Mask"):
        Mask("")


@pytest.mark.parametrize("orientation", [2, 3, 6])
def test_an_image_that_is_left_as_it_lies_leaves_its_mask_so(tmp_path: Path, orientation: int) -> None:
    labels = regions(30, 40, 1)
    images = [encode(picture(30, 40, 0), "PNG", orientation)] * 2
    uri = written(tmp_path, images, [file(labels, "L", orientation), file(labels, "L")])
    for image in (Image(None, orient=False), Image((30, 40), crop="none", orient=False)):
        (batch,) = LanceDataset(uri, 2, transforms={"image": image, "mask": Mask("image")}, device="cpu")
        assert (batch["mask"].numpy() == labels).all()


def test_a_mask_of_one_pixel_is_one(tmp_path: Path) -> None:
    """It is no sign of a missing mask, beside others of other sizes either."""
    sizes = [(1, 1), (3, 5), (3, 5)]
    images = [encode(picture(*size), "PNG") for size in sizes]
    masks: list[bytes | None] = [file(np.full(size, 7), "L") for size in sizes]
    transforms = {"image": Image(None), "mask": Mask("image")}
    (batch,) = LanceDataset(written(tmp_path, images, masks), 3, transforms=transforms, device="cpu")
    assert [mask.tolist() for mask in batch["mask"]] == [np.full(size, 7).tolist() for size in sizes]
