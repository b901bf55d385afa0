"""The GPU benchmark and the script around it, at toy size on the CPU: arguments, cases, what is missing, the JSON."""

from __future__ import annotations

import json
import os
import subprocess
import venv
from pathlib import Path

import pytest
import torch
from conftest import FOR_A_GPU

FOLDER = Path(__file__).parent.parent / "benchmarks"
TOY = ["--rows", "8", "--batch-sizes", "4,2", "--megapixels", "0.1,0.3", "--rounds", "1", "--seconds", "2"]
RUNS = [
    "limit: decode",
    "limit: decode, one call",
    "limit: decode and kernel",
    "limit: all but decoding",
    "gpuload nvimgcodec",
    "gpuload nvimgcodec shuffle=row",
    "gpuload nvimgcodec:parity",
    "gpuload dali",
    "gpuload cpu",
    "dali pipeline 0.65",
]
KEY = ["limit: decode", "limit: decode and kernel", "gpuload nvimgcodec", "dali pipeline 0.65"]  # for other batch sizes
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the benchmarks beside the tests")


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """The environment of a rented machine: the packages in a folder on PYTHONPATH, gpuload not among them."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in Path(torch.__file__).parent.parent.iterdir():
        if not entry.name.startswith(("gpuload", "__editable__", "_distutils_hack")):
            (packages / entry.name).symlink_to(entry)
    (packages / "sitecustomize.py").write_text("import sys; sys.modules['torchvision'] = None")  # a peer is missing
    venv.create(tmp_path / "venv", symlinks=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    return {**os.environ, "PYTHON": python, "DEVICE": "cpu", "PYTHONPATH": str(packages)}


@pytest.mark.slow
def test_the_script_writes_figures_for_every_case_and_says_what_is_missing(
    tmp_path: Path, bare: dict[str, str]
) -> None:
    options = [*TOY, "--work", str(tmp_path / "work"), "--cases", ";".join([*RUNS, "torchvision decode_jpeg"])]
    bare["PYTEST_ADDOPTS"] = "-k test_columns"  # not all tests once more
    command = ["bash", str(FOLDER / "gpu_all.sh"), "out", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=bare, timeout=200, cwd=tmp_path)
    assert done.stdout.startswith("gpuload is not installed"), done.stdout + done.stderr
    assert "not compiled" not in done.stdout
    tests = {name: (tmp_path / "out" / f"tests-{name}.txt").read_text() for name in ("first", "rest", "errors")}
    assert "skipped" in tests["rest"].splitlines()[-1], tests
    assert all("deselected" in text.splitlines()[-1] for text in tests.values()), tests
    assert all("error" not in text.splitlines()[-1] for text in tests.values()), tests
    assert "torchvision decode_jpeg: left out" in done.stdout, done.stdout + done.stderr
    report = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert list(report["groups"]) == ["0.1 MP, batch 4", "0.3 MP, batch 4", "0.1 MP, batch 2"]
    for name, found in report["groups"].items():
        runs = [case for case in RUNS if case in KEY] if name.endswith("batch 2") else RUNS
        assert list(found["cases"]) == runs, (tmp_path / "out" / "bench.err").read_text()
        assert all(case["rows_per_s"] > 0 for case in found["cases"].values())
        assert found["kernel"].keys() == {"kernel_gb_s", "copy_gb_s"}
    assert report["machine"]["torch"]
    assert done.stdout.rstrip().endswith("┘")


def test_no_gpu_test_is_in_a_file_that_dash_m_gpu_leaves_out(request: pytest.FixtureRequest) -> None:
    found = {item.path for item in request.session.items if item.get_closest_marker("gpu")}
    assert [path.name for path in found if not FOR_A_GPU.search(path.read_text())] == []
