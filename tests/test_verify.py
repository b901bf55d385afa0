"""Bad rows can be found: before training by `gpuload verify`, in training by `bad_rows` and one warning."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest
from making import encode, jpeg, picture
from typer.testing import CliRunner

import gpuload.tools.verify
from gpuload import BadRow, BadRowWarning, ConfigError, Image, LanceDataset, Text
from gpuload.badrows import BadRows
from gpuload.errors import DecodeError
from gpuload.tools.bench import measure, prepare
from gpuload.tools.cli import app
from gpuload.tools.ingest import ingest
from gpuload.tools.verify import verify

Store = Callable[..., str]
ROWS = 200
BAD = {7: b"not an image", 70: None, 130: jpeg(40, 40)[:-200], 199: b""}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where notes are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gpuload" / "verify"


@pytest.fixture
def path(store: Store) -> str:
    good = [jpeg(20, 24), encode(picture(9, 9), "PNG"), encode(picture(9, 9), "WEBP")]
    files = [BAD.get(row, good[row % 3]) for row in range(ROWS)]
    other = [good[0] if row not in (7, 20) else b"no" for row in range(ROWS)]
    columns = {"image": pa.array(files, pa.binary()), "other": pa.array(other, pa.binary()), "id": range(ROWS)}
    return store(columns, max_rows_per_file=64)


def run(*words: Any) -> Any:
    return CliRunner().invoke(app, ["verify", *map(str, words)])


# -- gpuload verify ------------------------------------------------------------------------------------------------

FOUND = [(7, "image"), (7, "other"), (20, "other"), (70, "image"), (130, "image"), (199, "image")]


@pytest.mark.parametrize("threads", [1, 3])
def test_every_bad_image_of_every_column_is_found(threads: int, path: str) -> None:
    done = verify(path, num_threads=threads, progress=False)
    assert [(bad.row, bad.column) for bad in done.bad] == FOUND
    assert done.bad_rows == [7, 20, 70, 130, 199]
    reasons = {(bad.row, bad.column): (bad.reason, bad.decoder) for bad in done.bad}
    assert reasons[70, "image"] == ("Expected an encoded image, got a null", "header")
    assert reasons[130, "image"][0].startswith("Expected a whole JPEG file")
    assert reasons[130, "image"][1] == "cpu"
    assert (done.rows, done.images, done.columns) == (ROWS, 2 * ROWS, ["image", "other"])


def test_what_it_finds_is_what_training_meets(path: str) -> None:
    with LanceDataset(path, 32, on_error="mask", shuffle=True, device="cpu") as dataset:
        with pytest.warns(BadRowWarning):
            list(dataset)
        met = {(bad.row, bad.column): bad.reason for bad in dataset.bad_rows}
    assert met == {(bad.row, bad.column): bad.reason for bad in verify(path, progress=False).bad}


def test_a_column_that_is_named_may_hold_no_image_at_all(store: Store) -> None:
    path = store({"image": pa.array([b"bad", b"worse", None], pa.binary()), "id": range(3)})
    with pytest.raises(ConfigError, match="a column of images"):
        verify(path, progress=False)
    assert verify(path, images=["image"], progress=False).bad_rows == [0, 1, 2]
    done = run(path, "--image", "image", "--no-progress")
    assert done.exit_code == 1
    assert "3 bad" in done.stdout
    assert run(path, "--image", "id", "--no-progress").exit_code == 2


def test_it_says_so_in_a_table_and_by_its_status(path: str, store: Store) -> None:
    result = run(path)
    assert result.exit_code == 1
    assert re.search(r"130 +image +Expected a whole JPEG file.* cpu *\n", result.stdout)
    assert "400 images in 200 rows of version 1; 6 bad; 5 rows with one" in result.stdout
    good = run(store({"image": [jpeg()] * 3}), "--no-progress")
    assert (good.exit_code, good.stderr) == (0, "")
    assert "3 images in 3 rows of version 1; 0 bad" in good.stdout


def test_json_is_all_that_is_on_stdout(path: str) -> None:
    result = run(path, "--json", "--image", "other")
    found = json.loads(result.stdout)
    assert result.exit_code == 1
    assert [(bad["row"], bad["column"], bad["decoder"]) for bad in found["bad"]] == [
        (7, "other", "header"),
        (20, "other", "header"),
    ]
    assert (found["rows"], found["images"], found["bad_rows"], found["fixed_version"]) == (ROWS, ROWS, [7, 20], None)


@pytest.mark.parametrize("ending", ["jsonl", "lance"])
def test_a_report_is_a_file_or_a_dataset(ending: str, path: str, tmp_path: Path) -> None:
    out = tmp_path / f"bad.{ending}"
    assert run(path, "--out", out).exit_code == 1
    if ending == "jsonl":
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    else:
        rows = lance.dataset(str(out)).to_table().to_pylist()
    assert [(row["row"], row["column"]) for row in rows] == FOUND
    assert set(rows[0]) == {"row", "column", "reason", "decoder"}


def test_fix_writes_a_new_version_without_the_bad_rows(path: str) -> None:
    lance.dataset(path).delete("id = 3")  # positions and row ids differ from here on
    result = run(path, "--fix")
    assert result.exit_code == 0
    assert "version 3 is without them" in result.stdout
    left = lance.dataset(path).to_table(columns=["id"])["id"].to_pylist()
    assert left == [row for row in range(ROWS) if row not in (3, 7, 20, 70, 130, 199)]
    assert lance.dataset(path, version=2).count_rows() == ROWS - 1
    again = run(path, "--fix")
    assert (again.exit_code, lance.dataset(path).version) == (0, 3)


@pytest.mark.parametrize("restart", [False, True])
def test_an_interrupted_run_goes_on(restart: bool, path: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = gpuload.tools.verify.LanceTable.read

    def read(source: Any, ranges: Any) -> Any:
        if ranges[0].tolist() == [128, 192]:
            raise KeyboardInterrupt
        return real(source, ranges)

    with monkeypatch.context() as broken:
        broken.setattr(gpuload.tools.verify.LanceTable, "read", read)
        with pytest.raises(KeyboardInterrupt):
            verify(path, images=["image", "other"], num_threads=1, progress=False)
    assert len(list(cache.iterdir())) == 1
    options = ["--restart"] * restart
    result = run(path, "--json", "--image", "image", "--image", "other", *options)
    done = json.loads(result.stdout)
    assert [(bad["row"], bad["column"]) for bad in done["bad"]] == FOUND
    assert (done["begun_at"] > 0) == (not restart)
    assert ("went on at row" in result.stderr) == (not restart)
    assert list(cache.iterdir()) == []


def test_notes_of_another_version_are_not_used(path: str, cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / "anything.jsonl").write_text('{"done": 128}\n')
    lance.dataset(path).delete("id = 0")
    assert verify(path, progress=False).begun_at == 0


def test_a_cache_folder_that_cannot_be_written_is_no_reason_to_fail(path: str, cache: Path) -> None:
    cache.parent.parent.write_text("a file in the way")
    assert len(verify(path, progress=False).bad) == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["/nowhere/x.lance"], "Expected a Lance dataset at"),
        (["--image", "id"], "'id' as a column of images"),
        (["--out", "bad.csv"], "report as .jsonl or .lance"),
        (["--out", "/nowhere/bad.jsonl"], "Expected a folder for the report"),
    ],
)
def test_what_cannot_be_verified_is_status_2_and_one_line(words: list[str], message: str, path: str) -> None:
    result = run(*words) if words[0].startswith("/") else run(path, *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_dataset_without_images_cannot_be_verified(store: Store) -> None:
    result = run(store({"x": [1]}))
    assert result.exit_code == 2
    assert "Expected a column of images" in result.stderr


# -- while training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["skip", "mask"])
def test_the_first_bad_row_is_a_warning_once_a_dataset(policy: Any, path: str) -> None:
    dataset = LanceDataset(path, 32, columns=["image"], on_error=policy, device="cpu")
    with pytest.warns(BadRowWarning) as caught:
        list(dataset)
    list(dataset)  # a second warning would be an error here
    assert len(caught) == 1
    text = str(caught[0].message)
    assert text.startswith("row 7, column `image`: Expected an image, got 12 bytes")
    assert f'on_error="{policy}"' in text
    assert issubclass(BadRowWarning, UserWarning)


def test_bad_rows_are_listed_once_with_the_epoch_in_which_they_were_met(path: str) -> None:
    dataset = LanceDataset(path, 32, columns={"photo": "image"}, on_error="mask", filter="id > 60", device="cpu")
    assert dataset.bad_rows == []
    dataset.set_epoch(4)
    with pytest.warns(BadRowWarning):
        list(dataset)
    found = dataset.bad_rows
    assert [(bad.row, bad.column, bad.epoch, bad.source) for bad in found] == [
        (row, "photo", 4, None) for row in (70, 130, 199)
    ]
    assert found[0].reason == "Expected an encoded image, got a null"
    assert isinstance(found[0], BadRow)
    list(dataset)
    assert dataset.bad_rows == found
    assert dataset.stats()["rows_masked"] == 6
    assert pickle.loads(pickle.dumps(found)) == found


def test_both_bad_columns_of_a_row_are_listed_and_texts_too(store: Store) -> None:
    path = store({"image": pa.array([jpeg(), b"x"], pa.binary()), "prompt": ["a", "abc"]})
    transforms = {"image": Image(8), "prompt": Text("bytes", max_length=2, truncation=False)}
    dataset = LanceDataset(path, 2, transforms=transforms, on_error="skip", device="cpu")
    with pytest.warns(BadRowWarning, match="row 1, column `image`"):
        list(dataset)
    assert [(bad.row, bad.column) for bad in dataset.bad_rows] == [(1, "image"), (1, "prompt")]
    assert dataset.stats()["rows_skipped"] == 1


def test_the_row_that_raises_is_listed_without_a_warning(path: str) -> None:
    dataset = LanceDataset(path, 32, columns=["image"], device="cpu")
    with pytest.raises(DecodeError):
        list(dataset)
    assert [bad.row for bad in dataset.bad_rows] == [7]


def test_the_list_is_bounded() -> None:
    found = BadRows(most=3)
    for row in range(5):
        found.add(row, "image", DecodeError("Expected a, got b"), 0)
    assert [bad.row for bad in found.listed()] == [0, 1, 2]


def test_a_row_that_fills_up_a_rank_is_listed_by_one(store: Store) -> None:
    path = store({"image": pa.array([None, *[jpeg()] * 4], pa.binary())})
    listed = []
    for rank in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BadRowWarning)
            dataset = LanceDataset(path, 2, on_error="mask", rank=rank, world_size=2, device="cpu")
            list(dataset)
        listed += [bad.row for bad in dataset.bad_rows]
    assert listed == [0]


# -- the other commands --------------------------------------------------------------------------------------------


def test_bench_counts_and_names_bad_rows(path: str) -> None:
    done = measure(prepare(path, 32, 16, 1, None), seconds=0)
    assert [(bad.row, bad.column) for bad in done.bad_rows] == [(7, "image"), (7, "other"), (20, "other")]
    result = CliRunner().invoke(app, ["bench", path, "--seconds", "0", "--size", "16"])
    assert result.exit_code == 0
    assert "3 bad rows, masked while measuring" in result.stdout
    assert "bad row: 7, column image: Expected an image, got 12 bytes" in result.stderr


def test_ingest_reports_a_file_that_was_cut_instead_of_storing_it(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    whole = {kind: encode(picture(64, 64), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")}
    for kind, data in whole.items():
        (folder / f"whole.{kind.lower()}").write_bytes(data)
        (folder / f"cut.{kind.lower()}").write_bytes(data[: len(data) * 3 // 4])
    (folder / "more.jpeg").write_bytes(whole["JPEG"] + b"appended")  # Pillow and we read it
    done = ingest(folder, tmp_path / "photos.lance", progress=False)
    assert sorted(path for path, _ in done.left_out) == [f"cut.{kind.lower()}" for kind in sorted(whole)]
    assert "cut JPEG file" in dict(done.left_out)["cut.jpeg"]
    assert done.rows == 7
    assert verify(str(tmp_path / "photos.lance"), progress=False).bad == []
