"""What is stored and cannot be read: one line that names dataset, file and rows, and says what to do."""

from __future__ import annotations

import datetime
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

from gpuload import ConfigError, GpuloadError, LanceDataset, ReadError
from gpuload.tables import reading


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """200 rows of `id` and `data` (300 bytes) in fragments of 100."""
    data = [np.random.default_rng(i).bytes(300) for i in range(200)]
    path = str(tmp_path / "rows.lance")
    lance.write_dataset(pa.table({"id": range(200), "data": data}), path, max_rows_per_file=100)
    return path


def second(path: str) -> Path:
    """The data file of the second fragment."""
    (file,) = lance.dataset(path).get_fragments()[1].data_files()
    return Path(path) / "data" / file.path


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def scramble(file: Path) -> None:
    file.write_bytes(np.random.default_rng(0).bytes(file.stat().st_size))


def scramble_start(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(np.random.default_rng(0).bytes(len(data) - 3000) + data[-3000:])


def scramble_footer(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-300:-40] = np.random.default_rng(0).bytes(260)
    file.write_bytes(data)


def newer(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-8:-4] = (9).to_bytes(2, "little") + (7).to_bytes(2, "little")
    file.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (os.remove, "got no such file"),
    "cut": (cut, "as it was written, got it cut short"),
    "empty": (empty, "as it was written, got it cut short"),
    "scrambled": (scramble, "as it was written, got it damaged"),
    "start": (scramble_start, "as it was written, got it damaged"),
    "footer": (scramble_footer, "as it was written, got it damaged"),
    "newer": (newer, "a storage version that pylance [0-9.]+ reads.*Upgrade pylance"),
}


def check_line(error: BaseException) -> None:
    text = str(error)
    assert "\n" not in text
    assert not re.search(r"\.rs:\d|LanceError|External error|/home/runner|/rustc", text)
    assert error.__suppress_context__ or isinstance(error, ConfigError)


def take_all(batches: Any, taken: list[int]) -> None:
    for batch in batches:
        taken += batch.rows.tolist()


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("words", [{}, {"shuffle": True}, {"columns": {"id": "id + 0", "data": "data"}}], ids=str)
def test_a_broken_file_is_named_with_the_rows_of_the_batch(rows: str, kind: str, words: dict[str, Any]) -> None:
    damage, message = DAMAGE[kind]
    file = second(rows)
    damage(file)  # before it is opened: of a file that was looked at, Lance keeps the footer
    dataset = LanceDataset(rows, 50, device="cpu", **{"columns": ["id", "data"], **words})
    taken: list[int] = []
    with pytest.raises(ReadError, match=message) as caught:
        take_all(dataset, taken)
    error = caught.value
    check_line(error)
    assert file.name in str(error)
    assert rows in str(error)
    assert error.uri == rows
    assert len(error.rows) == 50
    assert max(error.rows) >= 100
    assert not set(taken) & set(error.rows)
    assert isinstance(error, OSError)
    if not words:
        assert sorted(taken) == list(range(100))
        assert "rows 100, 101, 102, 103, ... (50) of" in str(error)


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("command", ["bench", "inspect", "view"])
def test_commands_say_it_in_one_line(rows: str, kind: str, command: str, capfd: pytest.CaptureFixture[str]) -> None:
    from gpuload.tools import cli

    for fragment in lance.dataset(rows).get_fragments():
        DAMAGE[kind][0](Path(rows) / "data" / fragment.data_files()[0].path)
    options = {"bench": ["--seconds", "0.1"], "inspect": [], "view": ["-o", "sheet.png", "--image", "data"]}[command]
    try:
        code = cli.app([command, rows, *options], standalone_mode=False)
    except SystemExit as ended:
        code = ended.code
    out = capfd.readouterr()
    assert "Traceback" not in out.err + out.out
    assert ".rs:" not in out.err + out.out
    if command == "inspect" and code in (0, None):
        return  # it could do without the rows
    lines = [line for line in out.err.splitlines() if line.startswith("gpuload: ")]
    assert len(lines) == 1
    assert rows in lines[0]


def test_a_version_that_is_cleaned_up_in_the_middle_of_an_epoch(rows: str) -> None:
    dataset = LanceDataset(rows, 20, columns=["id"], batch_readahead=1, device="cpu")
    batches = iter(dataset)
    next(batches)
    lance.write_dataset(pa.table({"id": range(10), "data": [b"x"] * 10}), rows, mode="overwrite")
    lance.dataset(rows).cleanup_old_versions(older_than=datetime.timedelta(0), delete_unverified=True)
    with pytest.raises(ReadError, match=r"Expected version 1 .* cleaned up .*tags.create\('training', 1\)") as caught:
        list(batches)
    check_line(caught.value)
    with pytest.raises(ConfigError, match=r"Version 1 was cleaned up or never written; there are 2 to 2\. Tags keep"):
        LanceDataset(rows, 20, dataset_options={"version": 1})
    with pytest.raises(ConfigError, match=r"tag training does not exist\. Its tags are \[\]"):
        LanceDataset(rows, 20, dataset_options={"version": "training"})


def test_a_tag_keeps_a_version(rows: str) -> None:
    """What the errors advise."""
    lance.dataset(rows).tags.create("training", 1)
    lance.write_dataset(pa.table({"id": range(10), "data": [b"x"] * 10}), rows, mode="overwrite")
    lance.dataset(rows).cleanup_old_versions(
        older_than=datetime.timedelta(0), delete_unverified=True, error_if_tagged_old_versions=False
    )
    dataset = LanceDataset(rows, 50, columns=["id"], dataset_options={"version": "training"}, device="cpu")
    assert sum(batch.size for batch in dataset) == 200


def test_deletions_that_are_gone(rows: str) -> None:
    lance.dataset(rows).delete("id < 5")
    (file,) = (Path(rows) / "_deletions").iterdir()
    file.unlink()
    with pytest.raises(ReadError, match=rf"Expected _deletions/{file.name}, got no such file") as caught:
        list(LanceDataset(rows, 50, device="cpu"))
    check_line(caught.value)


@pytest.mark.parametrize("words", [{"filter": "id > 3"}, {"filter": "id > 3", "columns": ["id"]}], ids=str)
def test_a_filter_on_a_broken_file_is_no_fault_of_the_filter(rows: str, words: dict[str, Any]) -> None:
    os.remove(second(rows))
    with pytest.raises(ReadError, match=rf"data/{second(rows).name}, got no such file") as caught:
        LanceDataset(rows, 50, **words)
    check_line(caught.value)
    with pytest.raises(ConfigError, match="Lance refused filter='id >'") as refused:
        LanceDataset(rows, 50, filter="id >")
    check_line(refused.value)


def test_a_manifest_of_another_storage_version(rows: str) -> None:
    manifest = min((Path(rows) / "_versions").iterdir())
    data = manifest.read_bytes()
    manifest.write_bytes(data.replace(b"2.2", b"9.7"))
    with pytest.raises(ConfigError, match=r"Unknown Lance storage version: 9\.7\. .* upgrade pylance") as caught:
        LanceDataset(rows, 50)
    check_line(caught.value)


def test_ingest_refuses_an_unknown_storage_version_in_one_line(tmp_path: Path) -> None:
    from making import jpeg

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(jpeg())
    command = [sys.executable, "-m", "gpuload.tools.cli", "ingest", str(tmp_path / "in"), str(tmp_path / "out.lance")]
    done = subprocess.run([*command, "--storage-version", "9.9"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert ".rs:" not in done.stderr
    assert "9.9" in done.stderr


def test_values_above_2_gib_are_named(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def take(*args: Any, **options: Any) -> Any:
        raise OSError("LanceError(Arrow): Offset overflow error: 2147483648, /home/lance/take.rs:617:22")

    dataset = LanceDataset(rows, 1, columns=["id"], shuffle=True, device="cpu", batch_readahead=1)
    monkeypatch.setattr(lance.LanceDataset, "take", take)
    with pytest.raises(ReadError, match=r"at most 2 GiB together, got more: Offset overflow .*large_binary") as caught:
        list(dataset)
    check_line(caught.value)


def test_a_panic_of_lances_is_an_error_like_any_other(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """Rust's: no Exception."""

    def take(*args: Any, **options: Any) -> Any:
        raise PanicException("index out of bounds: the len is 3 but the index is 7")

    dataset = LanceDataset(rows, 10, columns=["id"], shuffle=True, device="cpu")
    monkeypatch.setattr(lance.LanceDataset, "take", take)
    with pytest.raises(ReadError, match="got it damaged: index out of bounds"):
        list(dataset)


def test_interrupts_pass() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reading.patiently(interrupted, "s3://bucket/x.lance")


def test_a_read_error_survives_pickling() -> None:
    error = ReadError("Expected a, got b", "/x.lance", (1, 2, 3, 4, 5), "Do c.", 2.5)
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) == "Expected a, got b - reading rows 1, 2, 3, 4, ... (5) of /x.lance. Do c."
    assert (copy.rows, copy.uri, copy.waited, copy.cause) == (error.rows, error.uri, 2.5, "Expected a, got b")
    assert str(error.at((7,))) == "Expected a, got b - reading row 7 of /x.lance. Do c."
    assert issubclass(ReadError, GpuloadError)
