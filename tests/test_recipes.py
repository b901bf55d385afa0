"""The recipes of benchmarks/recipes: each runs, and its pixels are those of Pillow for the same region."""

from __future__ import annotations

import dataclasses
import importlib
import runpy
import sys
from pathlib import Path
from typing import Any

import lance
import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
import torch
from making import by_pillow, captions, encode, picture

from gpuload import Batch, Image

RECIPES = Path(__file__).parent.parent / "benchmarks" / "recipes"
ROWS = 24


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pictures with everything that a recipe reads."""
    sizes = [(90 + 7 * (i % 5), 60 + 11 * (i % 7)) for i in range(ROWS)]
    files = [encode(picture(*size, seed=i), "JPEG") for i, size in enumerate(sizes)]
    boxes = [[[5.0, 5.0, w / 2, h / 2], [w / 2, h / 2, w, h]][: i % 3] for i, (h, w) in enumerate(sizes)]
    masks = [
        encode(PIL.Image.fromarray((np.indices(size).sum(0) // 40 % 150).astype(np.uint8)), "PNG") for size in sizes
    ]
    table = {
        "image": files,
        "label": np.arange(ROWS) * 37 % 1000,
        "caption": captions(ROWS),
        "boxes": pa.array(boxes, pa.list_(pa.list_(pa.float32()))),
        "labels": pa.array([list(range(len(row))) for row in boxes], pa.list_(pa.int64())),
        "mask": masks,
        "height": pa.array([h for h, _ in sizes], pa.int32()),
        "width": pa.array([w for _, w in sizes], pa.int32()),
    }
    path = str(tmp_path_factory.mktemp("recipes") / "all.lance")
    lance.write_dataset(pa.table(table), path)
    return path


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(RECIPES)
    return importlib.import_module


def equals_pillow(batch: Batch, column: str, image: Image, uri: str) -> int:
    """How many views were compared with what Pillow makes of their regions, mirrored or not."""
    files = lance.dataset(uri).to_table(columns=["image"]).column("image").to_pylist()
    filter = getattr(PIL.Image.Resampling, image.interpolation.upper())
    scale, shift = (torch.tensor(v).view(-1, 1, 1) for v in image.scale_shift())
    pixels = batch[column] if image.views > 1 else batch[column][:, None]
    regions = batch.regions[column].reshape(batch.size, -1, 4)
    compared = 0
    for row, views, places in zip(batch.rows.tolist(), pixels, regions.tolist(), strict=True):
        whole = PIL.Image.fromarray(by_pillow(files[row]).transpose(1, 2, 0))
        for got, (x, y, w, h) in zip(views, places, strict=True):
            resized = whole.resize(got.shape[:0:-1], filter, box=(x, y, x + w, y + h))
            want = torch.from_numpy(np.asarray(resized).transpose(2, 0, 1).copy()) * scale + shift
            off = [float(((got - each) / scale).abs().max()) for each in (want, want.flip(2))]
            assert min(off) <= 1.01
            compared += 1
    return compared


def plain(image: Image) -> Image:
    """Without what changes pixels after the resize, which tests/test_augment.py compares with torchvision."""
    return dataclasses.replace(image, augment=())


@pytest.mark.parametrize(
    ("name", "images"),
    [("imagenet", {"image": "TRAIN"}), ("clip", {"image": "TRAIN"}), ("detection", {"image": "TRAIN"}),
     ("segmentation", {"image": "TRAIN"}), ("dino", {"first": "FIRST", "second": "SECOND", "local": "LOCAL"})],
)  # fmt: skip
def test_pixels_are_pillows(name: str, images: dict[str, str], uri: str, recipe: Any, monkeypatch: Any) -> None:
    module = recipe(name)
    small = {"FIRST": 40, "SECOND": 40, "LOCAL": 16}
    for word in images.values():
        image = plain(getattr(module, word))
        size = small.get(word, 48)
        monkeypatch.setattr(module, word, dataclasses.replace(image, size=(size, size + 3)))
    options = {"image": module.TRAIN} if name == "detection" else {}
    batch = next(iter(module.dataset(uri, 8, device="cpu", **options, **({"after": []} if name == "imagenet" else {}))))
    for column, word in images.items():
        image = getattr(module, word)
        assert equals_pillow(batch, column, image, uri) == 8 * image.views


@pytest.mark.parametrize("name", ["imagenet", "clip", "dino", "detection", "segmentation"])
def test_each_runs_as_a_program(name: str, uri: str, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.syspath_prepend(RECIPES)
    monkeypatch.setattr(sys, "argv", [name, uri, "--batch-size", "8", "--steps", "2", "--device", "cpu"])
    runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
    assert "rows/s" in capsys.readouterr().out


def test_a_mix_runs_as_a_program(uri: str, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.syspath_prepend(RECIPES)
    monkeypatch.setattr(sys, "argv", ["mix", uri, uri, "--batch-size", "8", "--steps", "2", "--device", "cpu"])
    runpy.run_path(str(RECIPES / "mix.py"), run_name="__main__")
    assert "rows/s" in capsys.readouterr().out


def test_a_mix_has_its_weights(uri: str, recipe: Any) -> None:
    sources = [batch.source for batch in recipe("mix").dataset([uri, uri], 10, device="cpu")]
    assert (torch.cat(sources)[:30] == 1).sum() == 9  # 0.3 of 30


def test_buckets_say_what_sdxl_is_told(uri: str, recipe: Any) -> None:
    module = recipe("sdxl")
    sizes = [(64, 64), (96, 48), (80, 56)]
    seen = set()
    for batch in module.dataset(uri, 4, sizes=sizes, device="cpu", drop_last=False):
        seen.add(tuple(batch["image"].shape[2:]))
        told = module.conditioning(batch)
        assert told.shape == (batch.size, 6)
        assert torch.equal(told[:, :2], batch.original_sizes["image"])
        assert (told[:, 4:] == torch.tensor(batch["image"].shape[2:])).all()
        assert equals_pillow(batch, "image", module.IMAGE, uri) == batch.size
        assert torch.isfinite(module.loss(batch))
    assert seen <= set(sizes)
    assert len(seen) > 1


def test_detections_targets_are_the_boxes_with_area_left(uri: str, recipe: Any) -> None:
    module = recipe("detection")
    for image in (module.TRAIN, module.VALID):
        for batch in module.dataset(uri, 8, image=image, device="cpu"):
            for target in module.targets(batch):
                assert len(target["boxes"]) == len(target["labels"])
                assert ((target["boxes"][:, 2:] - target["boxes"][:, :2]) > 0).all()
