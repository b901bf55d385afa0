"""crop="pad": the whole picture in the middle of its output, gray around it; boxes and masks lie with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lance
import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
import torch
from making import by_pillow, encode, picture

from gpuload import Boxes, ConfigError, Image, LanceDataset, Mask

GRAY = 114
SIZES = [(60, 90), (90, 60), (50, 50), (7, 200), (61, 90), (200, 3)]


def letterbox(file: bytes, height: int, width: int, filter: Any) -> np.ndarray[Any, Any]:
    """What Pillow makes of it: u8[3, height, width]."""
    whole = PIL.Image.fromarray(by_pillow(file).transpose(1, 2, 0))
    scale = min(height / whole.height, width / whole.width)
    tall, wide = max(1, round(whole.height * scale)), max(1, round(whole.width * scale))
    sheet = PIL.Image.new("RGB", (width, height), (GRAY,) * 3)
    sheet.paste(whole.resize((wide, tall), filter), ((width - wide) // 2, (height - tall) // 2))
    return np.asarray(sheet).transpose(2, 0, 1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    files = [encode(picture(*size, seed=i), "JPEG", 1 + i) for i, size in enumerate(SIZES)]
    shapes = [by_pillow(file).shape[1:] for file in files]
    boxes = [[[0.0, 0.0, w, h], [w / 4, h / 2, w / 2, h]] for h, w in shapes]
    masks = [encode(PIL.Image.fromarray(np.full(size, 7, np.uint8)), "PNG") for size in SIZES]
    path = str(tmp_path_factory.mktemp("pad") / "pad.lance")
    lance.write_dataset(pa.table({"image": files, "boxes": boxes, "mask": masks}), path)
    return path


@pytest.mark.parametrize("name", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("size", [(64, 64), (33, 80)])
def test_pictures_are_pillows_with_gray_around(pictures: str, size: Any, name: Any, device: str) -> None:
    files = lance.dataset(pictures).to_table().column("image").to_pylist()
    image = Image(size, crop="pad", interpolation=name, dtype=torch.uint8)
    with LanceDataset(pictures, 4, columns=["image"], transforms={"image": image}, device=device) as dataset:
        pixels = torch.cat([batch["image"].cpu() for batch in dataset])
    for got, file in zip(pixels.numpy(), files, strict=True):
        want = letterbox(file, *size, getattr(PIL.Image.Resampling, name.upper()))
        assert np.abs(got.astype(int) - want).max() <= 1


def test_flips_mirror_the_whole_output_and_gray_is_normalised(pictures: str) -> None:
    def batch(flip: float, **words: Any) -> torch.Tensor:
        image = Image((32, 81), crop="pad", flip=flip, **words)
        (found,) = LanceDataset(pictures, 6, columns=["image"], transforms={"image": image}, device="cpu")
        pixels: torch.Tensor = found["image"]
        return pixels

    torch.testing.assert_close(batch(1.0), batch(0.0).flip(3), atol=1e-5, rtol=0)
    gray = (GRAY / 255 - 0.5) / 0.25
    assert torch.allclose(batch(0.0, mean=0.5, std=0.25)[1, :, :, 0], torch.full((3, 32), gray))
    last = batch(0.0, channels_last=True)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, batch(0.0))


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_boxes_and_masks_lie_with_the_picture(pictures: str, flip: float) -> None:
    transforms = {"image": Image((48, 75), crop="pad", flip=flip), "boxes": Boxes("image"), "mask": Mask("image")}
    for batch in LanceDataset(pictures, 3, transforms=transforms, device="cpu"):
        for boxes, mask in zip(batch["boxes"], batch["mask"], strict=True):
            y, x = np.nonzero(mask.numpy())
            assert set(mask.unique().tolist()) <= {0, 7}
            np.testing.assert_allclose(boxes[0], [x.min(), y.min(), x.max() + 1, y.max() + 1], atol=1e-3)
            assert boxes[1, 1] > boxes[0, 1]


def test_a_broken_picture_is_zeros(tmp_path: Path) -> None:
    whole = encode(picture(40, 60), "JPEG")
    lance.write_dataset(pa.table({"image": [whole, whole[:200], whole]}), str(tmp_path / "x.lance"))
    with pytest.warns(UserWarning, match="row 1"):
        (batch,) = LanceDataset(
            str(tmp_path / "x.lance"), 3, transforms={"image": Image(32, crop="pad")}, on_error="mask", device="cpu"
        )
    assert not batch["image"][1].any()
    assert torch.equal(batch["image"][0], batch["image"][2])


def test_a_letterbox_cannot_be_fast() -> None:
    with pytest.raises(ConfigError, match='another crop than "pad" beside Image\\(fast=True\\)'):
        Image(32, crop="pad", fast=True)
