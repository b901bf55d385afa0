"""The GPU benchmark and the script around it, at toy size on the CPU: arguments, cases, what is missing, the JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
TOY = ["--rows", "8", "--batch-sizes", "4,2", "--megapixels", "0.1,0.3", "--rounds", "1", "--seconds", "2"]
RUNS = [
    "limit: decode",
    "limit: decode, one call",
    "limit: decode and kernel",
    "gpuload nvimgcodec",
    "gpuload nvimgcodec shuffle=row",
    "gpuload nvimgcodec:parity",
    "gpuload dali",
    "gpuload cpu",
    "dali pipeline 0.65",
]
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the benchmarks beside the tests")


def test_the_script_writes_figures_for_every_case_and_says_what_is_missing(tmp_path: Path) -> None:
    options = [*TOY, "--work", str(tmp_path / "work"), "--cases", ";".join([*RUNS, "torchvision decode_jpeg"])]
    hidden = "import sys; sys.modules['torchvision'] = None"
    (tmp_path / "sitecustomize.py").write_text(hidden)  # a peer that is missing leaves a line
    environment = {**os.environ, "PYTHON": sys.executable, "DEVICE": "cpu", "PYTHONPATH": str(tmp_path)}
    environment |= {"PYTEST_ADDOPTS": "--collect-only --ignore-glob=*_[a-h]*"}  # not all tests once more
    command = ["bash", str(FOLDER / "gpu_all.sh"), str(tmp_path / "out"), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert "torchvision decode_jpeg: left out" in done.stdout, done.stdout + done.stderr
    report = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert list(report["groups"]) == ["0.1 MP, batch 4", "0.1 MP, batch 2", "0.3 MP, batch 4"]
    for found in report["groups"].values():
        assert list(found["cases"]) == RUNS, (tmp_path / "out" / "bench.err").read_text()
        assert all(case["rows_per_s"] > 0 for case in found["cases"].values())
        assert found["kernel"].keys() == {"kernel_gb_s", "copy_gb_s"}
    assert report["machine"]["torch"]
    assert done.stdout.rstrip().endswith("┘")
