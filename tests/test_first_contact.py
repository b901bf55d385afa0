"""The first day: the first command makes what the first snippet reads, and whatever is not ours is left alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import lance
import pyarrow as pa
import pytest
from making import jpeg
from PIL import Image
from typer.testing import CliRunner, Result

from gpuload.tools.cli import app

README = (Path(__file__).parent.parent / "README.md").read_text()
Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    return lambda *words: runner.invoke(app, [str(word) for word in words], catch_exceptions=False)


def refused(result: Result, text: str) -> None:
    assert result.exit_code == 1
    assert text in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_first_snippet_runs_after_the_first_command(run: Run, tmp_path: Path) -> None:
    result = run("demo", "--rows", 150)
    assert result.exit_code == 0
    for what in ("drawing", "loading"):
        assert re.search(rf"{what}.*100%.*rows/s", result.stderr)
    snippet = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert snippet is not None
    exec(compile(snippet[1], "README.md", "exec"), {})
    assert run("demo", "--rows", 20).exit_code == 0
    assert lance.dataset("shapes.lance").count_rows() == 20
    assert (tmp_path / "sheet.png").exists()


def test_demo_leaves_alone_what_is_not_its_own(run: Run, tmp_path: Path) -> None:
    lance.write_dataset(pa.table({"n": [1]}), "shapes.lance")
    refused(run("demo", "--rows", 8), "Expected a new place or a dataset of an earlier demo")
    refused(run("demo", "--rows", 8, "--out", "shapes.lance"), "inside the Lance dataset")
    refused(run("demo", "--rows", 8, "--out", "shapes.lance/data/deep"), "inside the Lance dataset")
    assert lance.dataset("shapes.lance").to_table().to_pydict() == {"n": [1]}
    (tmp_path / "other").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "other" / "sheet.png")
    before = (tmp_path / "other" / "sheet.png").read_bytes()
    refused(run("demo", "--rows", 8, "--out", "other"), "no demo's")
    assert (tmp_path / "other" / "sheet.png").read_bytes() == before
    assert not (tmp_path / "other" / "shapes.lance").exists()


def test_demo_does_not_replace_its_dataset_once_rows_were_added(run: Run) -> None:
    assert run("demo", "--rows", 8).exit_code == 0
    lance.write_dataset(lance.dataset("shapes.lance").to_table(), "shapes.lance", mode="append")
    refused(run("demo", "--rows", 8), "which is no demo's alone")
    assert lance.dataset("shapes.lance").count_rows() == 16


@pytest.mark.parametrize("command", [["inspect"], ["view", "-o", "x.png"], ["bench", "--seconds", "0"]])
def test_a_folder_of_pictures_points_to_ingest(run: Run, tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "my photos").mkdir()
    (tmp_path / "my photos" / "1.jpg").write_bytes(jpeg())
    result = run(*command, "my photos")
    refused(result, "gpuload ingest 'my photos' 'my photos.lance'")


def test_bench_shows_progress(run: Run) -> None:
    table = pa.table({"image": [jpeg(seed=i) for i in range(20)], "caption": ["a"] * 20})
    lance.write_dataset(table, "x.lance")
    result = run("bench", "x.lance", "--seconds", "0.2")
    assert result.exit_code == 0
    assert re.search(r"loading.*100%.*rows/s", result.stderr)
    assert run("bench", "x.lance", "--seconds", "0", "--no-progress").stderr == ""
    assert re.search(r"caption +string +strings +list\[str\]", run("inspect", "x.lance").stdout)


def test_view_takes_captions_from_texts_alone(run: Run) -> None:
    columns = {"image": [jpeg()] * 3, "n": [1, 2, 3], "vector": [[1.0, 2.0]] * 3}
    lance.write_dataset(pa.table(columns), "x.lance")
    assert "captions from None" in run("view", "x.lance", "-o", "x.png").stdout
    for name in ("n", "vector", "image"):
        refused(run("view", "x.lance", "-o", "x.png", "--caption", name), "Expected captions from a column of texts")
    several = pa.table({**columns, "said": [["one", "two"], None, []]})
    lance.write_dataset(several, "y.lance")
    assert "captions from said" in run("view", "y.lance", "-o", "y.png").stdout


def test_ingest_names_the_column_of_captions(run: Run, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.jpg").write_bytes(jpeg())
    (tmp_path / "in" / "metadata.csv").write_text("file_name,title\n1.jpg,words\n")
    assert run("ingest", "in", "x.lance", "--caption-from", "title").exit_code == 0
    assert lance.dataset("x.lance").to_table(columns=["caption"]).to_pylist() == [{"caption": "words"}]


@pytest.mark.parametrize("words", [["-h"], ["demo", "-h"], ["doctor", "-h"]])
def test_help_is_also_short(run: Run, words: list[str]) -> None:
    result = run(*words)
    assert result.exit_code == 0
    assert "Usage" in result.stdout
