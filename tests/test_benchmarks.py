"""Every benchmark runs, at toy size, in this process; peers that are not installed are left out."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the benchmarks beside the tests")
_ROWS = 24


@pytest.fixture(scope="module", autouse=True)
def importable() -> Any:
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    work = str(tmp_path_factory.mktemp("bench"))
    return SimpleNamespace(images=None, rows=_ROWS, work=work, batch_size=8, version="2.2", task="captions")


def load(name: str) -> Any:
    return importlib.import_module(name)


@pytest.mark.parametrize("task", ["pixels", "captions", "training"])
@pytest.mark.parametrize("case", ["bare loop (the limit)", "gpuload", "gpuload, shuffle=row"])
def test_the_limit_and_gpuload_do_the_task(settings: Any, task: str, case: str) -> None:
    job = load("bench_cpu").CASES[case](SimpleNamespace(**{**vars(settings), "task": task}))
    assert list(job()) == [8, 8, 8]


def test_the_first_batch_by_hand(settings: Any) -> None:
    assert list(load("bench_cpu").CASES["one batch by hand"](settings)()) == [8]


@pytest.mark.filterwarnings("ignore")  # those of other packages
@pytest.mark.parametrize(
    ("peer", "case"),
    [
        ("lance_torch", "lance.torch.data"),
        ("lancedb_torch", "lancedb StreamingDataset"),
        ("dali_cpu", "DALI on the CPU, files"),
        ("dali_cpu", "DALI on the CPU, from Lance"),
        ("spdl_threads", "SPDL, its own decoder"),
        ("spdl_threads", "SPDL, simplejpeg"),
        ("grain_threads", "Grain"),
    ],
)
def test_peers_that_need_no_worker_do_the_task(settings: Any, peer: str, case: str) -> None:
    try:
        assert sum(load(f"peers.{peer}").CASES[case](settings)()) == _ROWS
    except ImportError as error:
        pytest.skip(f"{error.name} is not installed")


def test_every_peer_is_in_the_benchmark() -> None:
    bench = load("bench_cpu")
    assert sorted(bench.PEERS) == sorted(path.stem for path in (FOLDER / "peers").glob("[a-z]*.py"))


@pytest.mark.parametrize("case", ["upstream scan", "gpuload in order", "gpuload shuffle=row"])
def test_raw_reading(settings: Any, case: str) -> None:
    assert sum(load("bench_read").CASES[case](settings)()) == _ROWS


@pytest.mark.parametrize(
    "case", ["8 B, 10 fragments: shuffle=row", "1 KB, 100 fragments: shuffle=block", "100 KB, 1 fragments: in order"]
)
def test_fragments_and_row_sizes(settings: Any, case: str) -> None:
    assert sum(load("bench_fragments").CASES[case](settings)()) >= _ROWS


@pytest.mark.parametrize("how", ["take", "take_scan"])
def test_runs_of_rows(settings: Any, how: str) -> None:
    assert sum(load("bench_runs").CASES[f"4 rows a run: {how}"](settings)()) == _ROWS


@pytest.mark.parametrize("case", ["in order, in pieces", "rows, alone", "rows, 4 together"])
def test_batches_read_together(settings: Any, case: str) -> None:
    assert list(load("bench_together").CASES[case](settings)()) == [8, 8, 8]


@pytest.mark.parametrize(
    ("case", "rows"),
    [("decode calls", 128), ("decode calls, EXIF", 128), ("captions", 128), ("line, 2 threads", _ROWS)],
)
def test_the_hosts_part(settings: Any, case: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpuload.pipeline._SLICE_ROWS", 8)  # restored afterwards
    assert sum(load("bench_host").CASES[case](settings)()) == rows


@pytest.mark.parametrize(
    "case",
    [
        "threads: 2", "batch: 1", "image: 1.0 megapixels", "rows: 10,000, shuffle=row", "fragments: 100",
        "source: local disk, cold",
    ],
)  # fmt: skip
def test_scaling(settings: Any, case: str) -> None:
    job = load("bench_scaling").CASES[case](settings)
    assert sum(job()) >= 8
    assert job.note


def test_the_object_store_serves_a_dataset(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store, bench = load("object_store"), load("bench_scaling")
    with store.serving(settings.work) as port:
        monkeypatch.setenv("GPULOAD_BENCH_PORT", str(port))
        assert sum(bench.CASES["source: object store, 5 ms"](settings)()) == _ROWS


def test_one_command_writes_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    harness, out = load("harness"), tmp_path / "toy.json"
    cases = {"slow": lambda _: lambda: iter([1, 1]), "fast": lambda _: lambda: iter([2, 2])}
    monkeypatch.setattr(sys, "argv", ["toy.py", "--repeats", "2", "--no-memory", "--out", str(out)])
    times = {"first_s": 0.5, "cpu_s": 1.0}
    runs = {"slow": {"rows": 2, "seconds": 2.0, **times}, "fast": {"rows": 4, "seconds": 1.0, **times}}
    monkeypatch.setattr(harness, "_child", lambda case, memory: {"note": "", **runs[case]})
    harness.main("toy", cases, {"rows": 4}, lambda settings: None)
    report = json.loads(out.read_text())
    assert report["cases"]["fast"]["ratio"] == 4
    assert report["cases"]["slow"]["rows_per_s"] == 1
    assert report["settings"]["repeats"] == 2
    assert "slow" in capsys.readouterr().out


def test_memory_counts_the_children() -> None:
    harness = load("harness")
    assert harness.pss(1 << 30) == 0
    own = harness.pss(__import__("os").getpid())
    assert own == 0 or own > 20  # MB; 0 where smaps_rollup may not be read


def test_the_readme_gets_figures_and_a_picture(tmp_path: Path) -> None:
    figures = load("figures")
    case = {"ratio": 1.1, "ratio_lowest": 0.2, "ratio_highest": 1.2, "first_s": 0.1, "peak_mb": 300}
    names = ["bare loop (the limit)", "gpuload", "one batch by hand", "lance.torch.data", "other"]
    report = {
        "machine": {"cores": 2, "processor": "a processor", "torch": "2"},
        "settings": {"rows": 10, "batch_size": 5},
        "cases": {name: {**case, "ratio": 1.1 - i / 10} for i, name in enumerate(names)},
    }
    reports, readme = {"pixels": report, "training": report}, tmp_path / "README.md"
    readme.write_text(f"before\n{figures.BEGIN}\nold\n{figures.END}\nafter\n")
    figures.write_readme(reports, readme)
    once = readme.read_text()
    figures.write_readme(reports, readme)
    assert readme.read_text() == once
    assert once.startswith("before\n")
    assert once.endswith("\nafter\n")
    assert "old" not in once
    assert "**gpuload**" in once
    corners = {**report, "cases": {"threads: 1": {**case, "rows_per_s": 9.0, "cpu_ms": 1.0, "limits": "decode-bound"}}}
    assert "| threads: 1 | 9 | 1.10 | 1.00 | 100 | decode-bound |" in figures.scaling(corners)
    pytest.importorskip("matplotlib")
    figures.draw(reports, tmp_path / "cpu.png")
    assert (tmp_path / "cpu.png").stat().st_size > 1000


@pytest.mark.parametrize("case", ["image", "image and caption"])
def test_the_gil_is_measured(settings: Any, case: str) -> None:
    bench_gil = load("bench_gil")
    toy = SimpleNamespace(**{**vars(settings), "seconds": 0.4, "rate": 4000.0, "batch_size": 8})
    found = bench_gil.share_left(toy, case)
    assert found["rows_per_s"] > 0
    assert 0 < found["left"] < 3
    assert 0 < found["steady"] <= 1


def test_the_kernels_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "kernel.json"
    toy = "--device cpu --megapixels 0.01 --counts 2 --rounds 1 --seconds 0 --size 16"
    monkeypatch.setattr(sys, "argv", ["bench_kernel.py", *toy.split(), "--out", str(out)])
    load("bench_kernel").main()
    (found,) = json.loads(out.read_text())["groups"].values()
    names = ["copy", "convert 444", "convert 420", "convert 420, bilinear", "bicubic contiguous", "nearest contiguous"]
    assert {*names, "bilinear contiguous rows", "bilinear channels-last tall"} <= set(found)
    assert all(figures["us"] > 0 for figures in found.values())
