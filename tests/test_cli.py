"""The command line on real files: what it writes, what it prints, and how it says no."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import gpuload.errors
from gpuload.tools.cli import app
from gpuload.tools.demo import BACKGROUNDS, pictures
from gpuload.tools.sheet import GAP

Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "160")
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def jpeg(colour: tuple[int, int, int], size: tuple[int, int] = (40, 30)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "JPEG", quality=95)
    return stream.getvalue()


COLOURS = {"blue": (20, 30, 200), "green": (30, 160, 40), "red": (220, 30, 20)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two of each colour as classes, a caption for every first one, and a file that is no image."""
    for name, colour in COLOURS.items():
        (tmp_path / "in" / name).mkdir(parents=True)
        for number in range(2):
            (tmp_path / "in" / name / f"{number}.jpg").write_bytes(jpeg(colour, (40 + 10 * number, 30)))
        (tmp_path / "in" / name / "0.txt").write_text(f"plain {name}")
    (tmp_path / "in" / "red" / "broken.jpg").write_bytes(b"<html>")
    return tmp_path / "in"


@pytest.fixture
def dataset(folder: Path, run: Run) -> Path:
    assert run("ingest", folder, folder.parent / "x.lance").exit_code == 0
    return folder.parent / "x.lance"


def test_ingest_reports_on_stderr_and_sums_up_on_stdout(folder: Path, run: Run) -> None:
    result = run("ingest", folder, folder.parent / "x.lance", "--report", folder.parent / "report.csv")
    assert result.exit_code == 0
    assert "left out: red/broken.jpg: not an image: 6 bytes starting 3c68746d6c3e" in result.stderr
    assert "7/7 files" in result.stderr
    assert re.search(r"x\.lance: 6 rows, .*; 3 classes; 3 with a caption, 3 without; files left out: 1$", result.stdout)
    assert (folder.parent / "report.csv").read_text().splitlines() == [
        "what,path,why",
        "left out,red/broken.jpg,not an image: 6 bytes starting 3c68746d6c3e",
    ]


def test_many_broken_files_are_counted_and_not_all_printed(tmp_path: Path, run: Run) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.jpg").write_bytes(jpeg((1, 2, 3)))
    for number in range(30):
        (tmp_path / "in" / f"{number}.jpg").write_bytes(b"")
    result = run("ingest", tmp_path / "in", tmp_path / "x.lance", "--no-progress")
    assert result.stderr.count("empty file") == 20
    assert "left out: 10 more; --report FILE lists them all" in result.stderr


def test_an_existing_dataset_needs_a_word(folder: Path, dataset: Path, run: Run) -> None:
    result = run("ingest", folder, dataset)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    assert "exists. Use --overwrite or --append." in result.stderr
    assert run("ingest", folder, dataset, "--append").exit_code == 0
    assert lance.dataset(str(dataset)).count_rows() == 12
    assert run("ingest", folder, dataset, "--overwrite", "--fragment-rows", 2).exit_code == 0
    assert [fragment.count_rows() for fragment in lance.dataset(str(dataset)).get_fragments()] == [2, 2, 2]


@pytest.mark.parametrize("command", [["inspect"], ["view", "-o", "x.png"]])
def test_a_missing_dataset_is_one_line(tmp_path: Path, run: Run, command: list[str]) -> None:
    result = run(*command, tmp_path / "nothing.lance")
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.match(r"gpuload: Expected a Lance dataset at '.*nothing\.lance'", result.stderr)
    assert result.stderr.count("\n") == 1


def test_inspect_shows_columns_rows_and_formats(dataset: Path, run: Run) -> None:
    text = run("inspect", dataset).stdout
    for pattern in (
        r"rows +6\b",
        r"fragments +1 of 6 rows",
        r"storage format +2\.\d",
        r"image +struct<bytes: binary, path: string> +image +uint8\[B, 3, H, W\]",
        r"label +int64 +tensor +int64\[B\]; 3 classes: blue, green, red",
        r"caption +string +strings +list\[str\]",
        r"formats +JPEG 6",
        r"width +40 to 50 pixels",
    ):
        assert re.search(pattern, text), f"{pattern}\n{text}"


def test_inspect_takes_nulls_deletions_and_no_rows(tmp_path: Path, run: Run) -> None:
    values = [None, jpeg((1, 2, 3)), b"", b"\xff\xd8\xffbroken", jpeg((1, 2, 3)), None]
    table = pa.table({"picture": pa.array(values, pa.binary()), "n": [1, 2, None, 4, 5, 6], "v": [[1.0]] * 6})
    target = str(tmp_path / "odd.lance")
    lance.write_dataset(table, target, max_rows_per_file=4)
    lance.dataset(target).delete("n = 5")
    text = run("inspect", target).stdout
    for pattern in (r"rows +5\b", r"deleted rows +1\b", r"fragments +2 of 1 to 4 rows", r"picture +binary +image"):
        assert re.search(pattern, text), f"{pattern}\n{text}"
    assert re.search(r"formats +null or empty 3, (JPEG 1, no image 1|no image 1, JPEG 1|broken 1, JPEG 1)", text)
    lance.write_dataset(table.slice(0, 0), str(tmp_path / "none.lance"))
    assert re.search(r"rows +0\b", run("inspect", tmp_path / "none.lance").stdout)


def tiles(sheet: Path, count: int, columns: int, side: int = 224) -> list[tuple[int, ...]]:
    """Colour in the middle of each tile of a sheet whose captions take one line."""
    with Image.open(sheet) as opened:
        picture = opened.convert("RGB")
    height = side + 4 + 18 + GAP
    head = picture.height - GAP - height * -(-count // columns)
    where = [(i % columns, i // columns) for i in range(count)]
    return [
        picture.getpixel((GAP + c * (side + GAP) + side // 2, GAP + head - GAP + GAP + r * height + side // 2))
        for c, r in where
    ]


def test_view_draws_the_decoded_rows_in_order(dataset: Path, tmp_path: Path, run: Run) -> None:
    result = run("view", dataset, "-o", tmp_path / "sheet.png", "--columns", 6)
    assert result.exit_code == 0
    assert "rows 0 to 5; column image, captions from caption" in result.stdout
    expected = [colour for colour in COLOURS.values() for _ in range(2)]
    assert np.abs(np.array(tiles(tmp_path / "sheet.png", 6, 6)) - expected).max() <= 6  # JPEG of one colour
    run("view", dataset, "-o", tmp_path / "part.png", "--columns", 6, "--start", 3, "--rows", 2, "--caption", "label")
    assert np.abs(np.array(tiles(tmp_path / "part.png", 2, 6)) - expected[3:5]).max() <= 6


def test_view_marks_broken_rows(tmp_path: Path, run: Run) -> None:
    values = [jpeg((10, 200, 10)), None, b"\xff\xd8\xffbroken", jpeg((10, 200, 10))]
    lance.write_dataset(pa.table({"picture": pa.array(values, pa.binary())}), str(tmp_path / "x.lance"))
    result = run("view", tmp_path / "x.lance", "-o", tmp_path / "new" / "sheet.png")
    assert "2 not readable; column picture, captions from None" in result.stdout
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        assert sheet.width > 224


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "sheet.nothing"], "Expected a place for a picture"),
        (["-o", "sheet.png", "--start", "6"], "Expected --start below the 6 rows"),
        (["-o", "sheet.png", "--image", "imge"], "imge"),
        (["-o", "sheet.png", "--image", "path"], "path"),
    ],
)
def test_view_says_what_cannot_work(
    dataset: Path, run: Run, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("view", dataset, *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr


def test_demo_loads_an_epoch_and_draws_it(tmp_path: Path, run: Run) -> None:
    result = run("demo", "--out", tmp_path / "demo", "--rows", 100)
    assert result.exit_code == 0
    assert re.search(r"image +float32 +\[64, 3, 224, 224\] +(cpu|cuda)", result.stdout)
    assert re.search(r"caption_mask +int64 +\[64, \d+\]", result.stdout)
    assert re.search(r"rows/s +[\d,]+", result.stdout)
    assert lance.dataset(str(tmp_path / "demo" / "shapes.lance")).count_rows() == 100
    with Image.open(tmp_path / "demo" / "sheet.png") as sheet:
        assert sheet.width > 8 * 224


def test_demo_pictures_are_a_function_of_the_seed_with_captions_of_their_own() -> None:
    first, again, other = list(pictures(40, seed=3)), list(pictures(25, seed=3)), list(pictures(40, seed=4))
    assert [text for _, text in first[:25]] == [text for _, text in again]
    assert all(a.tobytes() == b.tobytes() for (a, _), (b, _) in zip(first, again, strict=False))
    assert len({text for _, text in first}) == 40
    assert [text for _, text in first] != [text for _, text in other]
    for picture, text in first:
        assert 256 <= min(picture.size) <= max(picture.size) <= 512
        wanted = BACKGROUNDS[text.split(" on a ")[1].removesuffix(" background")]
        found = np.median(np.asarray(picture).reshape(-1, 3), axis=0)  # the shapes cover less than half
        assert np.abs(found - wanted).max() < 20


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"gpuload {gpuload.__version__}\n"


def test_as_a_program() -> None:
    """The command line itself imports neither torch nor Lance, so that help is there at once."""
    code = """import sys, types
package = sys.modules["gpuload"] = types.ModuleType("gpuload")
package.__path__ = [sys.argv[1]]
from gpuload.tools.cli import app
try: app(["--help"])
except SystemExit: print(sorted({"torch", "lance", "pyarrow", "numpy"} & set(sys.modules)))"""
    folder = str(Path(gpuload.errors.__file__).parent)
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, timeout=60)
    assert "ingest" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    missing = subprocess.run(
        [sys.executable, "-m", "gpuload.tools.cli", "inspect", "/nowhere/x.lance"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (missing.returncode, missing.stdout) == (1, "")
    assert missing.stderr.startswith("gpuload: Expected a Lance dataset at '/nowhere/x.lance'")
    assert "Traceback" not in missing.stderr
