"""Several views of an image, and what a batch says of where they lie in the original."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import lance
import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
import torch
from making import by_pillow, by_row, encode, picture

from gpuload import ConfigError, Image, LanceDataset

CROP = Image((20, 24), crop="random", flip=0.5, dtype=torch.uint8)


def views_of(image: Image, count: int) -> Image:
    return Image(**{**image.__dict__, "views": count})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    """30 pictures of many sizes and all orientations, one broken."""
    files = [
        encode(picture(60 + 3 * (i % 9), 80 - 5 * (i % 7), seed=i), "PNG" if i % 8 == 5 else "JPEG", 1 + i % 8)
        for i in range(30)
    ]
    files[7] = files[7][:200]
    path = str(tmp_path_factory.mktemp("views") / "pictures.lance")
    lance.write_dataset(pa.table({"image": files, "other": files}), path)
    return path


def rows(pictures: str, batch_size: int, image: Image, device: str, **options: Any) -> dict[int, torch.Tensor]:
    with LanceDataset(
        pictures, batch_size, columns=["image"], transforms={"image": image}, device=device, on_error="mask", **options
    ) as dataset:
        return by_row(dataset, "image")


def test_views_are_drawn_independently_and_the_first_is_that_of_one(pictures: str, device: str) -> None:
    one, three = rows(pictures, 7, CROP, device), rows(pictures, 7, views_of(CROP, 3), device)
    assert one.keys() == three.keys() == set(range(30)) - {7}
    for row, image in three.items():
        assert image.shape == (3, 3, 20, 24)
        assert torch.equal(image[0], one[row])
        assert not any(torch.equal(image[a], image[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_views_do_not_depend_on_batches_or_threads_and_more_begin_with_fewer(pictures: str) -> None:
    some = rows(pictures, 4, views_of(CROP, 2), "cpu", num_threads=1)
    more = rows(pictures, 13, views_of(CROP, 5), "cpu", num_threads=3, shuffle=True)
    assert all(torch.equal(more[row][:2], image) for row, image in some.items())


def test_an_image_is_decoded_once_however_many_views_it_has(pictures: str) -> None:
    columns = {"global": "image", "local": "image"}
    transforms = {"global": views_of(CROP, 2), "local": views_of(Image(9, crop="random", scale=(0.05, 0.4)), 8)}
    with LanceDataset(pictures, 8, columns=columns, transforms=transforms, on_error="mask", device="cpu") as dataset:
        batch = next(iter(dataset))
        assert batch["global"].shape == (8, 2, 3, 20, 24)
        assert batch["local"].shape == (8, 8, 3, 9, 9)
        assert "float32[B, 8, 3, 9, 9]" in repr(dataset)
        for _ in dataset:
            pass
        decoded = dataset.stats()["images"]
    assert sum(decoded.values()) <= 30 + 8 + 24  # what the first, left early, had under way


def test_different_columns_of_a_row_stay_paired_in_every_view(pictures: str) -> None:
    transforms = dict.fromkeys(("image", "other"), views_of(CROP, 3))
    for batch in LanceDataset(pictures, 8, transforms=transforms, on_error="mask", device="cpu"):
        assert torch.equal(batch["image"], batch["other"])


def test_views_may_be_channels_last_and_normalised(pictures: str) -> None:
    wanted = Image(16, crop="random", views=2, mean=0.5, std=0.5)
    plain, last = (rows(pictures, 8, Image(**{**wanted.__dict__, "channels_last": c}), "cpu") for c in (False, True))
    assert all(torch.equal(plain[row], last[row]) for row in plain)


@pytest.mark.parametrize("image", [CROP, views_of(CROP, 3), Image(24), Image(24, crop="none", flip=1.0), Image(None)])
def test_regions_say_what_became_the_pixels(pictures: str, image: Image) -> None:
    files = lance.dataset(pictures).to_table(columns=["image"]).column("image").to_pylist()
    transforms = {"image": Image(**{**image.__dict__, "flip": 0.0, "dtype": torch.uint8})}
    for batch in LanceDataset(
        pictures, 8, columns=["image"], transforms=transforms, on_error="mask", device="cpu", seed=3
    ):
        regions, sizes = batch.regions["image"], batch.original_sizes["image"]
        shape = (batch.size, 4) if image.views == 1 else (batch.size, image.views, 4)
        assert (regions.dtype, tuple(regions.shape)) == (torch.float64, shape)
        assert (sizes.dtype, tuple(sizes.shape)) == (torch.int64, (batch.size, 2))
        for i, row in enumerate(batch.rows.tolist()):
            if not batch.valid[i]:
                continue
            whole = by_pillow(files[row])
            assert sizes[i].tolist() == list(whole.shape[1:])
            pixels = batch["image"][i] if image.views > 1 else batch["image"][i][None]
            for region, got in zip(regions[i].reshape(-1, 4).tolist(), pixels, strict=True):
                x, y, w, h = region
                resized = PIL.Image.fromarray(whole.transpose(1, 2, 0)).resize(
                    (got.shape[2], got.shape[1]), PIL.Image.Resampling.BILINEAR, box=(x, y, x + w, y + h)
                )
                assert np.abs(np.asarray(resized).transpose(2, 0, 1).astype(int) - got.numpy()).max() <= 1


def test_a_batch_keeps_what_it_knows(pictures: str) -> None:
    dataset = LanceDataset(pictures, 30, transforms={"image": CROP, "other": CROP}, on_error="skip", device="cpu")
    (batch,) = dataset
    assert batch.size == 29
    assert batch.regions["image"].shape == (29, 4)
    assert 7 not in batch.rows
    for other in (pickle.loads(pickle.dumps(batch)), batch.to("cpu")):
        assert torch.equal(other.regions["other"], batch.regions["other"])
        assert torch.equal(other.original_sizes["image"], batch.original_sizes["image"])


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "2"])
def test_views_are_a_positive_number(count: Any) -> None:
    with pytest.raises(ConfigError, match="views"):
        Image(24, views=count)


def test_views_need_a_size() -> None:
    with pytest.raises(ConfigError, match=r"Image\(views=\.\.\.\) beside a size"):
        Image(None, views=2)


def test_resuming_goes_on_with_the_same_views(pictures: str, tmp_path: Path) -> None:
    def made() -> LanceDataset:
        transforms = {"image": views_of(CROP, 2)}
        return LanceDataset(pictures, 8, columns=["image"], transforms=transforms, on_error="mask", shuffle=True)

    whole = list(made())
    stopped = made()
    running = iter(stopped)
    next(running), next(running)
    resumed = made()
    resumed.load_state_dict(stopped.state_dict())
    running.close()
    for got, want in zip(resumed, whole[2:], strict=True):
        assert torch.equal(got["image"], want["image"])
