"""What columns become: outputs that share a stored column, decoders of the user's own, and a wheel that has it all."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
import torch
from making import by_pillow, by_row, encode, jpeg, picture

import gpuload
from gpuload import ConfigError, DecodeError, Image, LanceDataset, Ragged
from gpuload.images.decode import libjpeg

CROP = Image(24, crop="random", flip=0.5, dtype=torch.uint8)
TWO = {"global": "image", "local": "image"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 pictures of many sizes and orientations, some PNG; the same again as `other`."""
    import lance

    files = [
        encode(picture(40 + 3 * (i % 9), 50 + 2 * (i % 7), seed=i), "PNG" if i % 8 == 5 else "JPEG", 1 + i % 8)
        for i in range(40)
    ]
    path = str(tmp_path_factory.mktemp("pictures") / "pictures.lance")
    lance.write_dataset(pa.table({"image": files, "other": files}), path)
    return path


def test_two_outputs_of_a_column_are_decoded_once_and_drawn_independently(pictures: str, device: str) -> None:
    with LanceDataset(pictures, 8, columns=TWO, transforms=dict.fromkeys(TWO, CROP), device=device) as dataset:
        batches = list(dataset)
        images = dataset.stats()["images"]
    assert list(batches[0]) == ["global", "local"]
    assert sum(images.values()) == 40
    alone = by_row(LanceDataset(pictures, 8, columns=["image"], transforms={"image": CROP}, device=device), "image")
    one, other = by_row(batches, "global"), by_row(batches, "local")
    assert all(torch.equal(one[row], alone[row]) for row in range(40))  # the numbers that runs before had
    assert sum(torch.equal(other[row], one[row]) for row in range(40)) == 0


def test_the_second_output_is_keyed_by_its_name(pictures: str) -> None:
    def drawn(columns: dict[str, str], name: str) -> dict[int, Any]:
        transforms = dict.fromkeys(columns, CROP)
        return by_row(LanceDataset(pictures, 7, columns=columns, transforms=transforms, device="cpu"), name)

    one = drawn({"a": "image", "b": "image"}, "b")
    same, another = drawn({"x": "image", "y": "image", "b": "image"}, "b"), drawn({"a": "image", "c": "image"}, "c")
    assert all(torch.equal(one[row], same[row]) for row in range(40))
    assert sum(torch.equal(one[row], another[row]) for row in range(40)) == 0


def test_different_columns_of_a_row_stay_paired(pictures: str) -> None:
    (batch,) = LanceDataset(pictures, 40, transforms={"image": CROP, "other": CROP}, device="cpu")
    assert torch.equal(batch["image"], batch["other"])


@pytest.mark.parametrize("other", [Image(None, dtype=torch.uint8), Image(16, orient=False), Image(16, fast=True)])
def test_outputs_of_one_column_may_want_anything(pictures: str, other: Image) -> None:
    columns, small = {"a": "image", "b": "image"}, Image(16, dtype=torch.uint8)
    dataset = LanceDataset(pictures, 8, columns=columns, transforms={"a": small, "b": other}, device="cpu")
    both = [(batch["a"], batch["b"]) for batch in dataset]
    for name, image, got in (("image", small, [a for a, _ in both]), ("image", other, [b for _, b in both])):
        alone = LanceDataset(pictures, 8, columns=[name], transforms={name: image}, device="cpu")
        for batch, mine in zip(alone, got, strict=True):
            for x, y in zip(batch[name], mine, strict=True):
                torch.testing.assert_close(y, x, rtol=0, atol=0 if x.dtype == torch.uint8 else 2e-6)


class ByPillow:
    """A decoder as a user would write it: whole images, turned by nobody."""

    name, device = "mine", torch.device("cpu")

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.seen: Counter[str] = Counter()

    def decode(self, encoded: Any, headers: Any, windows: Any) -> Ragged:
        self.calls.append(len(encoded))
        found: list[Any] = []
        for i in range(len(encoded)):
            try:
                with PIL.Image.open(io.BytesIO(encoded.view(i))) as image:
                    found.append(np.array(image.convert("RGB")))
            except (OSError, TypeError) as error:
                found.append(DecodeError(f"Expected an image, got {error}"))
        self.seen["pillow"] += sum(not isinstance(one, DecodeError) for one in found)
        return Ragged.of(found, headers)

    def counts(self) -> dict[str, int]:
        return dict(self.seen)

    def close(self) -> None:
        self.calls.append(0)


def test_a_decoder_of_ones_own_gives_the_same_pixels(pictures: str) -> None:
    decoder = ByPillow()
    transforms = {"image": CROP}
    with LanceDataset(pictures, 8, columns=["image"], transforms=transforms, decoder=decoder, device="cpu") as dataset:
        mine = by_row(dataset, "image")
        assert dataset.stats()["decoder"] == "mine"
        assert dataset.stats()["images"] == {"pillow": 40, "failed": 0}
    assert decoder.calls[-1] == 0
    ours = by_row(LanceDataset(pictures, 8, columns=["image"], transforms=transforms, device="cpu"), "image")
    for row in range(40):
        torch.testing.assert_close(mine[row], ours[row], rtol=0, atol=1)  # a window shifts the weights by a rounding


def test_a_decoder_that_wants_batches_gets_them(pictures: str) -> None:
    decoder = ByPillow()
    decoder.whole_batches = True  # type: ignore[attr-defined]
    with LanceDataset(pictures, 16, columns=["image"], decoder=decoder, device="cpu") as dataset:
        assert len(list(dataset)) == 3
    assert sorted(decoder.calls) == [0, 8, 16, 16]


@pytest.mark.filterwarnings("ignore::gpuload.BadRowWarning")
def test_its_errors_are_those_of_the_row(store: Callable[..., str]) -> None:
    path = store({"image": [jpeg(), None, b"\xff\xd8\xff broken", jpeg(seed=1)]})
    with LanceDataset(path, 4, on_error="mask", decoder=ByPillow(), device="cpu") as dataset:
        (batch,) = dataset
        assert batch.valid.tolist() == [True, False, False, True]
        assert dataset.stats()["images"]["failed"] == 2
    np.testing.assert_array_equal(batch["image"][3].numpy(), by_pillow(jpeg(seed=1)))


@pytest.mark.parametrize("missing", ["decode", "close"])
def test_what_is_no_decoder_is_refused(pictures: str, missing: str) -> None:
    class Other:
        name, device = "other", torch.device("cpu")

    for member in {"decode", "counts", "close"} - {missing}:
        setattr(Other, member, lambda *arguments: None)
    with pytest.raises(ConfigError, match=rf"members of gpuload.Decoder.*without '{missing}'"):
        LanceDataset(pictures, 4, decoder=Other())


def test_a_decoder_for_another_device_is_refused(pictures: str) -> None:
    decoder = ByPillow()
    decoder.device = torch.device("meta")
    with pytest.raises(ConfigError, match=r"Expected a decoder for cpu, got 'mine', which decodes to meta"):
        list(LanceDataset(pictures, 4, decoder=decoder, device="cpu"))


@pytest.mark.parametrize("own", [False, True])
def test_images_that_were_decoded_are_counted_after_the_end(pictures: str, own: bool) -> None:
    decoder = ByPillow()
    with LanceDataset(pictures, 8, columns=["image"], device="cpu", decoder=decoder if own else "auto") as dataset:
        assert len(list(dataset)) == 5
        before = dataset.stats()["images"]
    assert dataset.stats()["images"] == before
    assert sum(before.values()) == 40
    if own:
        assert decoder.counts() == {"pillow": 40}
    assert len(list(dataset)) == 5
    assert sum(dataset.stats()["images"].values()) == 80


@pytest.mark.skipif(not Path(gpuload.__file__).parents[1].joinpath("setup.py").exists(), reason="no source tree")
def test_a_wheel_has_every_folder(tmp_path: Path) -> None:
    root = Path(gpuload.__file__).parents[1]
    for name in ("gpuload", "kernels"):
        shutil.copytree(root / name, tmp_path / "source" / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path / "source")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(tmp_path), str(tmp_path / "source")]
    nothing = {**os.environ, "CC": "false", "CXX": "false"}  # the compiled parts are optional, and take their time
    subprocess.run(command, check=True, env=nothing, capture_output=True, timeout=200)
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"gpuload/{path.relative_to(root / 'gpuload')}" for path in (root / "gpuload").rglob("*.py")}
    wanted |= {f"gpuload/kernels/{path.name}" for path in (root / "kernels").glob("*.[chp]*") if path.suffix != ".so"}
    assert {name for name in wanted if "__pycache__" not in name} <= inside


def test_without_a_compiler_the_batches_are_the_same(pictures: str, monkeypatch: pytest.MonkeyPatch) -> None:
    transforms = {"a": CROP, "b": Image(20, mean=0.5, std=0.2)}
    options: dict[str, Any] = {"columns": {"a": "image", "b": "image"}, "transforms": transforms, "device": "cpu"}
    compiled = list(LanceDataset(pictures, 7, shuffle=True, **options))
    for name in ("tables_library", "cpu_library"):
        monkeypatch.setattr(f"gpuload.kernels.{name}", lambda: None)
    libjpeg.library.cache_clear()
    try:
        with LanceDataset(pictures, 7, shuffle=True, **options) as dataset:
            for batch, wanted in zip(dataset, compiled, strict=True):
                assert torch.equal(batch.rows, wanted.rows)
                torch.testing.assert_close(batch["a"], wanted["a"], rtol=0, atol=1)  # levels; torch rounds otherwise
                torch.testing.assert_close(batch["b"], wanted["b"], rtol=0, atol=1e-4)
            assert dataset.stats()["images"]["simplejpeg"] == 35
            assert dataset.stats()["resize"] == "torch"
    finally:
        libjpeg.library.cache_clear()
