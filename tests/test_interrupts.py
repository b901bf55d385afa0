"""Signals and ends at random moments: one line or KeyboardInterrupt, the right status, nothing left, no abort."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest
from making import encode, picture

from gpuload import LanceDataset, signals
from gpuload.tables.write import write_stream

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C as in a terminal: what a shell starts in the background ignores it, and so would what the tests start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(arguments: list[str], tmp: Path) -> subprocess.Popen[str]:
    """A program whose temporary files lie in `tmp`."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp)},
    )


def listening(process: subprocess.Popen[str]) -> None:
    """Wait until the program is the command line's, and no longer Python's own beginning."""
    status, caught = Path(f"/proc/{process.pid}/status"), 0
    while process.poll() is None and not caught >> (signal.SIGTERM - 1) & 1:
        caught = int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16)  # type: ignore[index]
        time.sleep(0.001)


def stop(process: subprocess.Popen[str], number: int, after: float) -> tuple[int, str]:
    """Send the signal; the status and what was said on stderr."""
    time.sleep(after)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with many pictures: enough for some seconds."""
    folder, data = tmp_path / "in", encode(picture(400, 400), "PNG")
    folder.mkdir()
    for number in range(1500):
        (folder / f"{number:04}.png").write_bytes(data)
    return folder


@pytest.fixture
def tmp(tmp_path: Path) -> Path:
    (tmp_path / "tmp").mkdir()
    return tmp_path / "tmp"


def check_commands(pictures: Path, tmp: Path, trials: list[tuple[str, int, float]]) -> None:
    """Each ends with 128 + the number and one line, or had ended before; no half of a dataset stays."""
    for command, number, after in trials:
        target = tmp / "out" / "shapes.lance"
        words = ["demo", "--out", str(target.parent), "--rows", "3000"]
        if command == "ingest":
            words = ["ingest", str(pictures), str(target)]
        process = start(["-m", "gpuload", *words], tmp)
        listening(process)
        status, errors = stop(process, number, after)
        where = f"{command}, {WORDS[number]} after {after:.2f} s"
        if status:
            assert (status, errors.splitlines()[-1]) == (128 + number, f"gpuload: {WORDS[number]}"), where
            assert errors.count("\n") == 1 or command == "ingest", where  # its progress is on stderr
            assert not target.exists() or lance.dataset(str(target)).count_rows() in (3000, 1500), where
        shutil.rmtree(tmp / "out", ignore_errors=True)
        assert not list(tmp.iterdir()), where


def test_a_command_ends_with_its_status_and_one_line(pictures: Path, tmp: Path) -> None:
    trials = [("demo", signal.SIGINT, 0), ("ingest", signal.SIGTERM, 3.0), ("demo", signal.SIGINT, 4.0)]
    check_commands(pictures, tmp, trials)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_commands_end_so_at_any_moment(pictures: Path, tmp: Path) -> None:
    draw = random.Random(0)
    trials = [(draw.choice(["demo", "ingest"]), draw.choice(list(WORDS)), draw.uniform(0, 8)) for _ in range(40)]
    check_commands(pictures, tmp, trials)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    """300 MB, whose copying can be interrupted."""
    path, part = str(tmp_path_factory.mktemp("large") / "x.lance"), os.urandom(100_000)
    lance.write_dataset(pa.table({"b": [part] * 3000, "n": range(3000)}), path)
    return path


CACHE = """
    import sys, time
    from gpuload import LanceDataset
    print("ready", flush=True)
    dataset = LanceDataset(sys.argv[1], 64, cache=True)  # Python swallows what is raised while an object is collected
    for batch in dataset:
        print("batch", flush=True)
    time.sleep(60)
"""


def check_cache(large: str, tmp: Path, trials: list[tuple[int, float]]) -> None:
    """A program that copies rows, and then reads them, ends as Python ends it, and its copy goes."""
    for number, after in trials:
        process = start(["-c", textwrap.dedent(CACHE), large], tmp)
        assert process.stdout is not None
        process.stdout.readline()
        status, errors = stop(process, number, after)
        assert status == -number, errors
        assert errors.endswith("KeyboardInterrupt\n") if number == signal.SIGINT else errors == "", errors
        assert not list(tmp.iterdir()), f"{signal.Signals(number).name} after {after:.2f} s"


def test_a_cache_goes_with_its_process(large: str, tmp: Path) -> None:
    check_cache(large, tmp, [(signal.SIGINT, 0.2), (signal.SIGTERM, 0.2)])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_cache_goes_with_its_process_at_any_moment(large: str, tmp: Path) -> None:
    draw = random.Random(0)
    check_cache(large, tmp, [(draw.choice(list(WORDS)), draw.uniform(0, 3)) for _ in range(30)])


def test_a_cache_of_a_killed_process_is_taken_away_by_the_next(large: str, tmp: Path) -> None:
    process = start(["-c", textwrap.dedent(CACHE), large], tmp)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "batch\n"]
    assert stop(process, signal.SIGKILL, 0)[0] == -signal.SIGKILL
    assert len(list(tmp.glob("gpuload-cache-*"))) == 1
    with LanceDataset(large, 64, columns=["n"], cache=tmp) as first:
        next(iter(first))
        (mine,) = tmp.glob("gpuload-cache-*")
        with LanceDataset(large, 64, columns=["n"], cache=tmp) as second:
            next(iter(second))
            assert len(list(tmp.glob("gpuload-cache-*"))) == 2
        assert mine.exists()


def test_sigterm_stays_the_programs_own(large: str, tmp: Path) -> None:
    program = """
        import signal, sys, time
        from gpuload import LanceDataset
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
        next(iter(LanceDataset(sys.argv[1], 64, columns=["n"], cache=True)))
        print("ready", flush=True)
        time.sleep(60)
    """
    process = start(["-c", textwrap.dedent(program), large], tmp)
    assert process.stdout is not None
    process.stdout.readline()
    assert stop(process, signal.SIGTERM, 0) == (7, "")
    assert not list(tmp.iterdir())


DAEMON = """
    import sys, threading, time
    from gpuload import LanceDataset
    def loop():
        while True:
            for batch in LanceDataset(sys.argv[1], 16, shuffle=True, **eval(sys.argv[3])):
                pass
    threading.Thread(target=loop, daemon=True).start()
    time.sleep(float(sys.argv[2]))
"""


def check_daemons(large: str, tmp: Path, trials: list[tuple[float, str]]) -> None:
    """A daemon thread that iterates, opens or fills a cache while the interpreter ends is not heard of."""
    for seconds, options in trials:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(DAEMON), large, str(seconds), options],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "TMPDIR": str(tmp)},
        )
        assert (done.returncode, done.stderr) == (0, ""), f"{options} after {seconds:.3f} s"
        assert not list(tmp.iterdir()), f"{options} after {seconds:.3f} s"


def test_a_daemon_thread_may_iterate_while_the_interpreter_ends(large: str, tmp: Path) -> None:
    check_daemons(large, tmp, [(0.3, "{}"), (0.1, "{'cache': True}")])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_daemon_thread_may_iterate_whenever_the_interpreter_ends(large: str, tmp: Path) -> None:
    draw = random.Random(0)
    options = ["{}", "{}", "{'cache': True}", "{'to_tensor_fn': None}"]
    check_daemons(large, tmp, [(draw.uniform(0, 1), draw.choice(options)) for _ in range(30)])


def test_closing_waits_for_a_thread_that_iterates(large: str) -> None:
    dataset, failed = LanceDataset(large, 16, shuffle=True), []

    def loop() -> None:
        try:
            for _ in dataset:
                begun.set()
        except BaseException as error:
            failed.append(error)

    begun, thread = threading.Event(), threading.Thread(target=loop)
    thread.start()
    assert begun.wait(30)
    dataset.close()
    thread.join(30)
    assert not thread.is_alive()
    assert not failed


def test_an_interrupted_write_commits_nothing(tmp_path: Path) -> None:
    schema, made = pa.schema([("n", pa.int64())]), 0

    def endless() -> Iterator[pa.RecordBatch]:
        nonlocal made
        while True:
            made += 1
            if made == 5:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            yield pa.record_batch([pa.array(np.arange(10))], schema=schema)

    with pytest.raises(KeyboardInterrupt):
        write_stream(endless(), schema, str(tmp_path / "x.lance"))
    stopped = made
    assert stopped < 100
    time.sleep(0.1)
    assert made == stopped, "Lance goes on pulling"
    assert not (tmp_path / "x.lance" / "_versions").exists()


def test_help_and_errors_need_nothing_heavy() -> None:
    code = "import sys; sys.argv[0] = '-m'; sys.orig_argv = ['python', '-m', 'gpuload']; import gpuload.tools.cli"
    code += "; print(sorted({'torch', 'lance', 'pyarrow', 'numpy', 'PIL'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")
    for arguments in (["-m", "gpuload", "-h"], [str(Path(sys.executable).with_name("gpuload")), "--help"]):
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0
        assert re.search(r"Usage: gpuload ", done.stdout)


def test_a_program_that_is_called_gpuload_is_no_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, found in (("import gpuload", False), ("from gpuload.tools.cli import main", True)):
        (tmp_path / "gpuload").write_text(text)
        monkeypatch.setattr(sys, "argv", [str(tmp_path / "gpuload"), "demo"])
        assert signals.command_line() is found
