"""An ingest that is killed, or that finds no room: what it leaves is known, and the next run makes it whole."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import lance
import pyarrow as pa
import pytest
from making import encode, jpeg, picture
from typer.testing import CliRunner

import gpuload.errors
from gpuload import LanceDataset
from gpuload.errors import ConfigError
from gpuload.tools.cli import app
from gpuload.tools.ingest import IngestReport, ingest

PACKAGE = str(Path(gpuload.errors.__file__).parent)

# An ingest that kills itself: in the middle of writing, or right behind the commit.
KILLED = f"""
    import os, signal, sys, types
    package = sys.modules["gpuload"] = types.ModuleType("gpuload")
    package.__path__ = [{PACKAGE!r}]  # without torch, which takes its time
    from gpuload.tables import write
    from gpuload.tools import claim, ingest
    ingest.BATCH_BYTES = 100_000
    source, target, mode, when = sys.argv[1:]
    die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    if when == "behind":
        claim.Claim.release = die
    else:
        rows_of = ingest.rows_of
        def some(*args):
            for number, row in enumerate(rows_of(*args)):
                if number == 25:
                    die()
                yield row
        ingest.rows_of = some
    ingest.ingest(source, target, progress=False, fragment_rows=5, **({{mode: True}} if mode else {{}}))
"""


def kill(source: Path, target: Path, mode: str = "", when: str = "midway") -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(source), str(target), mode, when],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def run(source: Path, target: Path, **options: bool) -> IngestReport:
    return ingest(source, target, progress=False, **options)


def paths(target: Path) -> Counter[str]:
    return Counter(lance.dataset(str(target)).to_table(columns=["path"])["path"].to_pylist())


def files(target: Path) -> set[str]:
    """The data files on disk, and the note."""
    return {path.name for path in target.rglob("*") if path.is_file() and path.parent.name in ("data", target.name)}


def used(target: Path) -> set[str]:
    """The data files of all versions."""
    dataset = lance.dataset(str(target))
    versions = [lance.dataset(str(target), version=version["version"]) for version in dataset.versions()]
    return {f.path for version in versions for part in version.get_fragments() for f in part.data_files()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """40 pictures of 120 kB, each of its own."""
    (tmp_path / "in").mkdir()
    for number in range(40):
        (tmp_path / "in" / f"{number:02}.png").write_bytes(encode(picture(180, 220, seed=number), "PNG"))
    return tmp_path / "in"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out.lance"


NAMES = Counter(f"{number:02}.png" for number in range(40))


@pytest.mark.parametrize("option", ["", "overwrite", "resume"])
def test_what_a_killed_first_run_left_is_taken_away(source: Path, target: Path, option: str) -> None:
    kill(source, target)
    assert any(name.startswith(".tmp") for name in files(target))
    run(source, target, **({option: True} if option else {}))
    assert paths(target) == NAMES
    assert files(target) == used(target)


def test_append_says_that_there_is_nothing_to_append_to_and_cleans(source: Path, target: Path) -> None:
    kill(source, target)
    with pytest.raises(ConfigError, match=r"to append to, got .* which is none\. Leave --append away"):
        run(source, target, append=True)
    assert not target.exists()


@pytest.mark.parametrize(("mode", "option"), [("append", "overwrite"), ("append", "append"), ("overwrite", "resume")])
def test_a_killed_later_run_leaves_the_old_rows_and_nothing_else(
    source: Path, target: Path, tmp_path: Path, mode: str, option: str
) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "00.png").write_bytes(jpeg())
    run(tmp_path / "first", target)
    kill(source, target, mode)
    assert paths(target) == Counter(["00.png"])
    assert files(target) > used(target)
    run(source, target, **{option: True})
    assert paths(target) == NAMES if option == "overwrite" else NAMES + Counter(["00.png"])
    assert files(target) == used(target)


@pytest.mark.parametrize("mode", ["", "append"])
def test_a_run_that_was_killed_behind_its_commit_is_not_repeated(source: Path, target: Path, mode: str) -> None:
    if mode:
        other = source.parent / "other"
        other.mkdir()
        (other / "00.png").write_bytes(jpeg())
        run(other, target)
    kill(source, target, mode, "behind")
    expected = paths(target)
    assert expected == NAMES + Counter(["00.png"] if mode == "append" else [])
    for options in ({}, {"append": True}):
        with pytest.raises(ConfigError, match=r"killed after its rows were there: 4[01] rows in all. --resume"):
            run(source, target, **options)
    assert paths(target) == expected
    report = run(source, target, resume=True)
    assert (report.rows, report.there, report.total) == (0, 40, sum(expected.values()))
    assert paths(target) == expected
    assert files(target) == used(target)


def test_resume_adds_what_is_new_by_source_and_path(source: Path, target: Path, tmp_path: Path) -> None:
    run(source, target, resume=True)
    (source / "new.jpg").write_bytes(jpeg())
    report = run(source, target, resume=True)
    assert (report.rows, report.there, report.total) == (1, 40, 41)
    other = tmp_path / "other"
    other.mkdir()
    (other / "00.png").write_bytes(jpeg())
    assert run(other, target, resume=True).total == 42
    assert run(other, target, resume=True).total == 42
    assert paths(target) == NAMES + Counter(["new.jpg", "00.png"])


def test_resume_says_what_it_cannot_know(source: Path, target: Path) -> None:
    run(source, target)
    dataset = lance.dataset(str(target))
    lance.write_dataset(dataset.to_table(), str(target), mode="overwrite")
    with pytest.raises(ConfigError, match=r"row '00\.png' from who knows where"):
        run(source, target, resume=True)
    assert paths(target) == NAMES


def test_append_says_that_rows_come_twice_and_how_many_there_are(source: Path, target: Path) -> None:
    runner = CliRunner()
    runner.invoke(app, ["ingest", str(source), str(target), "--no-progress"])
    result = runner.invoke(app, ["ingest", str(source), str(target), "--no-progress", "--append"])
    assert "40 of these files were in" in result.stderr
    assert "80 rows in all" in result.stdout
    result = runner.invoke(app, ["ingest", str(source), str(target), "--no-progress", "--resume"])
    assert "0 rows" in result.stdout
    assert "40 were there; 80 rows in all" in result.stdout


def test_a_target_that_is_being_written_is_refused(source: Path, target: Path) -> None:
    run(source, target)
    program = """
        import sys, time, types
        package = sys.modules["gpuload"] = types.ModuleType("gpuload")
        package.__path__ = [sys.argv[2]]
        from gpuload.tools.claim import Claim, Run
        claim = Claim(sys.argv[1], Run("elsewhere", "append"))
        print("ready", flush=True)
        time.sleep(60)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(target), PACKAGE], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(ConfigError, match=f"which process {other.pid} on .* is writing"):
            run(source, target, append=True)
        other.kill()
    assert run(source, target, append=True).total == 80


def test_files_of_somebody_else_in_a_leftover_stay(source: Path, target: Path) -> None:
    kill(source, target)
    (target / "precious").write_text("data")
    with pytest.raises(ConfigError, match=r"something else: a folder with precious\. Nothing there was touched"):
        run(source, target, overwrite=True)
    assert (target / "precious").read_text() == "data"


@pytest.fixture
def full() -> Iterator[None]:
    """No file may grow beyond 300 kB: the system then says so as it does when a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("old", [False, True])
def test_no_room_is_one_line_and_leaves_nothing(
    source: Path, target: Path, old: bool, request: pytest.FixtureRequest
) -> None:
    if old:
        run(source, target)
    before = files(target)
    words = ["ingest", str(source), str(target), "--no-progress", *(["--append"] if old else [])]
    request.getfixturevalue("full")
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 1
    assert result.stderr == f"gpuload: Expected room for a dataset, got {str(target)!r}: File too large.\n"
    assert files(target) == before
    assert target.exists() is old


def test_a_cache_without_room_is_one_error(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    lance.write_dataset(pa.table({"b": [os.urandom(1000) for _ in range(1000)]}), str(tmp_path / "x.lance"))
    (tmp_path / "cache").mkdir()
    dataset = LanceDataset(tmp_path / "x.lance", 8, cache=tmp_path / "cache")
    request.getfixturevalue("full")
    with pytest.raises(ConfigError, match="File too large"):
        next(iter(dataset))
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("place", ["/proc/out.lance", "/sys/out.lance", "/dev/null/out.lance"])
def test_a_place_that_cannot_be_written_to_is_one_line(source: Path, place: str) -> None:
    result = CliRunner().invoke(app, ["ingest", str(source), place, "--no-progress"])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"gpuload: Expected a place for a new dataset, got {place!r}: ")
    assert result.stderr.count("\n") == 1
