"""Boxes move with the pixels of the image they name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lance
import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
import torch
from making import encode, picture

from gpuload import Boxes, ConfigError, Image, LanceDataset, RowError
from gpuload.fields.boxes import moved

pytestmark = pytest.mark.filterwarnings("ignore::gpuload.BadRowWarning")

CROP = Image((40, 56), crop="random", scale=(0.3, 1.0), flip=0.5, dtype=torch.uint8)


def painted(boxes: list[list[int]], orientation: int, size: tuple[int, int] = (90, 120)) -> bytes:
    """A black picture, (height, width) as it is seen, with white boxes: x0, y0, x1, y1 as they are seen."""
    pixels = np.zeros((*size, 3), np.uint8)
    for x0, y0, x1, y1 in boxes:
        pixels[y0:y1, x0:x1] = 255
    # stored so that the orientation brings it back
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's transpose methods
    image = PIL.Image.fromarray(pixels)
    image = image if orientation == 1 else image.transpose(PIL.Image.Transpose(back[orientation]))
    return encode(image, "PNG", orientation)


def written(folder: Path, boxes: Any, files: list[bytes], kind: pa.DataType | None = None, **more: Any) -> str:
    path = str(folder / "boxes.lance")
    kind = kind or pa.list_(pa.list_(pa.float32()))
    lance.write_dataset(pa.table({"image": files, "boxes": pa.array(boxes, kind), **more}), path)
    return path


def bounds(pixels: torch.Tensor) -> list[int] | None:
    """x0, y0, x1, y1 around what is white in u8[3, H, W], None without any."""
    y, x = np.nonzero(pixels[0].numpy() > 127)
    return None if not len(x) else [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("kind", [pa.list_(pa.list_(pa.int32())), pa.large_list(pa.list_(pa.float64(), 4))])
def test_boxes_lie_where_their_pixels_went(tmp_path: Path, kind: pa.DataType, views: int, device: str) -> None:
    generator = np.random.default_rng(0)
    boxes = []
    for _ in range(48):
        x, y = generator.integers(0, 80), generator.integers(0, 60)
        boxes.append([int(x), int(y), int(x + generator.integers(8, 40)), int(y + generator.integers(8, 30))])
    files = [painted([box], 1 + i % 8) for i, box in enumerate(boxes)]
    uri = written(tmp_path, [[box] for box in boxes], files, kind)
    image = Image(**{**CROP.__dict__, "views": views})
    seen = 0
    with LanceDataset(uri, 10, transforms={"image": image, "boxes": Boxes("image")}, device=device) as dataset:
        for batch in dataset:
            assert isinstance(batch["boxes"], list)
            for pixels, box, keep in zip(batch["image"].cpu(), batch["boxes"], batch["boxes_keep"], strict=True):
                each = [(pixels, box, keep)] if views == 1 else zip(pixels, box, keep, strict=True)
                for picture_, box_, keep_ in each:
                    assert (box_.dtype, tuple(box_.shape), tuple(keep_.shape)) == (torch.float32, (1, 4), (1,))
                    assert box_.device.type == keep_.device.type == device
                    found = bounds(picture_)
                    if found is None:
                        continue
                    seen += 1
                    assert keep_.tolist() == [True]
                    assert np.abs(np.array(found) - box_[0].cpu().numpy()).max() <= 1.01
    assert seen > 30 * views


def test_all_boxes_stay_clipped_so_that_labels_still_fit(tmp_path: Path) -> None:
    boxes = [[[0, 0, 10, 10], [100, 70, 120, 90], [50, 40, 70, 50]], None, [], [[5, 5, 5, 9]]]
    labels = pa.array([[1, 2, 3], [], [], [4]])
    uri = written(tmp_path, boxes, [painted([], 1)] * 4, label=labels)
    image = Image(24, crop="center", crop_ratio=0.5)
    (batch,) = LanceDataset(uri, 4, transforms={"image": image, "boxes": Boxes("image")}, device="cpu")
    assert [len(row) for row in batch["boxes"]] == [3, 0, 0, 1]
    assert [row.tolist() for row in batch["boxes_keep"]] == [[False, False, True], [], [], [False]]
    assert len(batch["label"][0]) == 3
    corner, far, middle = batch["boxes"][0].tolist()
    assert corner == [0, 0, 0, 0]
    assert far == [24, 24, 24, 24]
    side = 45 / 24  # the crop is 45 x 45 pixels in the middle of 90 x 120
    np.testing.assert_allclose(middle, [(50 - 37.5) / side, (40 - 22.5) / side, (70 - 37.5) / side, (50 - 22.5) / side])
    assert batch.nulls["boxes"].tolist() == [False, True, False, False]


@pytest.mark.parametrize("format", ["xyxy", "xywh", "cxcywh"])
def test_formats_are_kept(tmp_path: Path, format: Any) -> None:
    corners = np.array([[10.0, 20, 50, 60], [-5, 0, 30, 95]])
    middle, extent = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
    stored = {"xyxy": corners, "xywh": np.hstack([corners[:, :2], extent]), "cxcywh": np.hstack([middle, extent])}
    uri = written(tmp_path, [stored[format].tolist()], [painted([], 1)])
    image = Image((45, 60), crop="none", flip=1.0)
    (batch,) = LanceDataset(uri, 1, transforms={"image": image, "boxes": Boxes("image", format=format)}, device="cpu")
    want = np.clip(np.array([[60 - 25, 10, 60 - 5, 30], [60 - 15, 0, 62.5, 47.5]]), 0, [60, 45, 60, 45])
    got = batch["boxes"][0].numpy()
    if format != "xyxy":
        first = got[:, :2] - (got[:, 2:] / 2 if format == "cxcywh" else 0)
        got = np.hstack([first, first + got[:, 2:]])
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("views", [1, 2])
def test_padded_boxes_are_tensors(tmp_path: Path, views: int, device: str) -> None:
    boxes = [[[0, 0, 60, 45], [0, 0, 120, 90]], [], [[60, 0, 120, 45]]]
    uri = written(tmp_path, boxes, [painted([], 1)] * 3)
    transforms = {"image": Image((90, 120), crop="none", views=views), "boxes": Boxes("image", pad=3)}
    with LanceDataset(uri, 3, transforms=transforms, device=device) as dataset:
        (batch,) = dataset
        assert "boxes: float32[B, 3, 4]" in repr(dataset)
    many = (3, views) if views > 1 else (3,)
    assert batch["boxes"].shape == (*many, 3, 4)
    assert batch["boxes_keep"].shape == (*many, 3)
    first = batch["boxes"].reshape(3, views, 3, 4)[:, -1].cpu()
    assert first[0].tolist() == [[0, 0, 60, 45], [0, 0, 120, 90], [0, 0, 0, 0]]
    assert batch["boxes_keep"].reshape(3, views, 3)[:, -1].sum(-1).tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("row", "pad", "message"),
    [
        ([[1, 2, 3]], None, "boxes of 4 numbers, got one of 3 numbers"),
        ([[1, 2, 3, 4], None], None, "boxes of 4 numbers, got one of a null"),
        ([[1, 2, float("nan"), 4]], None, "boxes of 4 finite numbers, got"),
        ([[1, 2, None, 4]], None, "boxes of 4 finite numbers, got"),
        ([[1, 2, 3, 4]] * 3, 2, r"at most 2 boxes \(pad=2\), got 3"),
    ],
)
def test_a_wrong_box_is_its_rows_error(tmp_path: Path, row: Any, pad: int | None, message: str) -> None:
    good = [[10, 10, 20, 20]]
    uri = written(tmp_path, [good, row, good], [painted([], 1)] * 3)
    transforms = {"image": Image((90, 120), crop="none"), "boxes": Boxes("image", pad=pad)}
    with pytest.raises(RowError, match=message) as caught:
        list(LanceDataset(uri, 3, transforms=transforms, device="cpu"))
    assert (caught.value.row, caught.value.column) == (1, "boxes")
    (batch,) = LanceDataset(uri, 3, transforms=transforms, device="cpu", on_error="mask")
    assert batch.valid.tolist() == [True, False, True]
    for i in (0, 2):
        assert batch["boxes"][i][0].tolist() == good[0]
    assert not batch["boxes_keep"][1].any()


def test_boxes_of_a_picture_that_keeps_its_size_stay_but_for_the_flip(tmp_path: Path) -> None:
    uri = written(tmp_path, [[[10, 20, 50, 60]]] * 2, [painted([], 6), painted([], 1, (70, 100))])
    transforms = {"image": Image(None, flip=1.0), "boxes": Boxes("image")}
    (batch,) = LanceDataset(uri, 2, transforms=transforms, device="cpu")
    assert [row.tolist() for row in batch["boxes"]] == [[[70, 20, 110, 60]], [[50, 20, 90, 60]]]


def test_what_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    uri = written(tmp_path, [[[1, 2, 3, 4]]], [painted([], 1)], number=[1], boxes_keep=[True])
    image = {"image": Image(24)}
    for transforms, message in (
        ({"boxes": Boxes("picture")}, "'picture'"),
        ({"boxes": Boxes("number")}, "to move with, got 'number'"),
        ({"number": Boxes("image")}, "list<list>"),
        ({"boxes": Boxes("image")}, "no column 'boxes_keep'"),
    ):
        columns = None if "boxes_keep" in message else ["image", "boxes", "number"]
        with pytest.raises(ConfigError, match=message):
            list(LanceDataset(uri, 1, columns=columns, transforms={**image, **transforms}, device="cpu"))
    for words in ({"of": ""}, {"of": "image", "format": "yxyx"}, {"of": "image", "pad": 0}):
        with pytest.raises(ConfigError):
            Boxes(**words)  # type: ignore[arg-type]


def test_many_boxes_cost_one_call() -> None:
    """The arithmetic is on whole columns: a million boxes are moved in one go."""
    from gpuload.fields import Geometry
    from gpuload.images import VIEW

    views = np.zeros(1000, VIEW)
    views["image"], views["region"] = np.arange(1000), (0, 0, 100, 50)
    seen = Geometry(views, 1, np.full((1000, 2), 100), np.ones(1000, np.uint8), (50, 100))
    boxes = np.tile([10.0, 20, 30, 40], (1_000_000, 1))
    found, keep = moved(boxes, np.full(1000, 1000), seen, "xyxy")
    assert keep.all()
    assert (found[:, 0] == [10, 20, 30, 40]).all()


def test_a_picture_that_is_broken_takes_its_boxes_along(tmp_path: Path) -> None:
    files = [painted([], 1), painted([], 1)[:60], encode(picture(90, 120), "JPEG")]
    uri = written(tmp_path, [[[1, 2, 30, 40]]] * 3, files)
    transforms = {"image": Image((90, 120), crop="none"), "boxes": Boxes("image")}
    (batch,) = LanceDataset(uri, 3, transforms=transforms, device="cpu", on_error="skip")
    assert batch.rows.tolist() == [0, 2]
    assert [row.tolist() for row in batch["boxes"]] == [[[1, 2, 30, 40]]] * 2


@pytest.mark.parametrize(
    ("kind", "box"),
    [
        (pa.int64(), [-(2**63), 2**60 + 1, 2**62, 2**63 - 1]),
        (pa.uint64(), [0, 0, 2**64 - 1, 2**63]),
        (pa.float64(), [-1.7e308, -1.7e308, 1.7e308, 1.7e308]),
    ],
    ids=str,
)
@pytest.mark.parametrize("format", ["xyxy", "xywh", "cxcywh"])
def test_the_largest_numbers_are_clipped(tmp_path: Path, kind: pa.DataType, box: list[Any], format: Any) -> None:
    """No error of Arrow's about a whole batch, and no warning."""
    uri = written(tmp_path, [[box], [[0, 0, 4, 4]]], [encode(picture(20, 20), "PNG")] * 2, pa.list_(pa.list_(kind)))
    transforms = {"image": Image(10), "boxes": Boxes("image", format=format)}
    (batch,) = LanceDataset(uri, 2, transforms=transforms, device="cpu")
    assert all(torch.isfinite(boxes).all() and (boxes >= 0).all() and (boxes <= 10).all() for boxes in batch["boxes"])
