"""What a binary column is: found in more than one row, said in words, the same on every rank, and the user's to say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from making import jpeg
from typer.testing import CliRunner

from gpuload import BadRowWarning, ConfigError, Image, LanceDataset
from gpuload.tables.lance import LanceTable
from gpuload.tools.cli import app

Store = Callable[..., str]
GOOD = jpeg(20, 24)


def mixed(store: Store, share: int, rows: int = 64, first: bytes = b"no image") -> str:
    """Every `share`-th row is an image, the first row is not."""
    files = [GOOD if row % share == share - 1 else b"no image" for row in range(rows)]
    return store({"image": pa.array([first, *files[1:]], pa.binary()), "id": range(rows)}, max_rows_per_file=20)


def dataset(path: str, **options: Any) -> LanceDataset:
    return LanceDataset(path, 16, device="cpu", **options)


def test_a_first_value_that_is_no_image_does_not_decide(store: Store) -> None:
    path = store({"image": pa.array([b"no image", *[GOOD] * 40], pa.binary())})
    with dataset(path, on_error="skip") as found:
        assert "15 of 16 values looked at start like an image" in repr(found)
        with pytest.warns(BadRowWarning, match="row 0, column `image`"):
            assert sum(batch.size for batch in found) == 40
    result = CliRunner().invoke(app, ["inspect", path])
    assert " ".join(result.stdout.split()).count("15 of 16 values") == 1


def test_a_column_with_few_images_is_taken_as_images_with_a_warning(store: Store) -> None:
    path = mixed(store, 5)
    with pytest.warns(UserWarning, match=r"Column 'image': \d of 16 values.*Image\(None\)} says so.*bytes} leaves it"):
        assert "start like an image" in repr(dataset(path))
    assert "like an image" not in repr(dataset(path, transforms={"image": Image(None)}))  # and no warning


def test_a_column_without_images_is_bytes_and_says_what_was_looked_at(store: Store) -> None:
    path = store({"x": pa.array([b"a", None, b"", b"BM"[:1], b"xyz"], pa.binary())})
    found = dataset(path)
    assert "x: list[bytes]; none of 3 values looked at starts like an image" in repr(found)
    (batch,) = found
    assert batch["x"] == [b"a", None, b"", b"B", b"xyz"]


def test_the_role_is_the_same_for_every_rank_seed_and_sample(store: Store) -> None:
    path = store({"image": pa.array([b"no image"] * 30 + [GOOD] * 34, pa.binary())})
    forms = {
        repr(dataset(path, rank=rank, world_size=4, samples=samples, seed=seed)).split("columns=")[1]
        for rank in range(4)
        for samples, seed in ((0, 0), (5, 0), (5, 7), (5, 8))
    }
    assert len(forms) == 1


def test_what_is_looked_at_is_what_the_filter_leaves(store: Store) -> None:
    path = store({"image": pa.array([b"no image"] * 60 + [GOOD] * 2, pa.binary()), "id": range(62)})
    (batch,) = dataset(path, filter="id >= 60")
    assert batch["image"].shape == (2, 3, 20, 24)
    assert "values looked at" not in repr(dataset(path, filter="id >= 60"))


def test_one_value_is_read_where_it_is_an_image(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    path, asked, real = store({"image": [GOOD] * 40}), [], LanceTable.values

    def values(table: Any, name: str) -> Any:
        for value in real(table, name):
            asked.append(name)
            yield value

    monkeypatch.setattr(LanceTable, "values", values)
    assert "image: uint8" in repr(dataset(path))
    assert asked == ["image"]


FORMS = {
    "binary": lambda files: pa.array(files, pa.binary()),
    "large": lambda files: pa.array(files, pa.large_binary()),
    "struct": lambda files: pa.array([{"bytes": file, "path": "x.jpg"} for file in files]),
}


@pytest.mark.parametrize("form", FORMS)
def test_bytes_are_given_on_request(form: str, store: Store) -> None:
    files = [GOOD, b"no image", b"", jpeg(9, 9)]
    path = store({"image": FORMS[form](files)})
    found = dataset(path, transforms={"image": bytes}, shuffle=True)
    assert "image: list[bytes]" in repr(found)
    (batch,) = found
    assert batch["image"] == [files[row] for row in batch.rows.tolist()]
    assert batch.valid.all()


def test_bytes_and_pixels_of_one_column(store: Store) -> None:
    path = store({"image": [GOOD, None]})
    columns = {"file": "image", "image": "image"}
    with pytest.warns(BadRowWarning):
        (batch,) = dataset(path, columns=columns, transforms={"file": bytes, "image": Image(8)}, on_error="mask")
    assert batch["file"] == [GOOD, None]
    assert batch["image"].shape == (2, 3, 8, 8)


@pytest.mark.parametrize("transform", [None, "bytes", int, b""])
def test_other_words_are_refused(transform: Any, store: Store) -> None:
    with pytest.raises(
        ConfigError, match=r"gpuload.Image or gpuload.Text for column 'image', got .*The type bytes leaves"
    ):
        repr(dataset(store({"image": [GOOD]}), transforms={"image": transform}))


def test_bytes_of_numbers_are_refused(store: Store) -> None:
    with pytest.raises(ConfigError, match="binary or struct<bytes, path> column for bytes, got 'x': int64"):
        repr(dataset(store({"x": [1]}), transforms={"x": bytes}))
