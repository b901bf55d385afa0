"""The training scripts of benchmarks/, at toy size: DDP under torchrun, killed and resumed; pictures find captions."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(script: str, out: Path, *options: Any, torchrun: bool = False) -> subprocess.CompletedProcess[str]:
    command = [*(TORCHRUN if torchrun else [sys.executable]), str(BENCHMARKS / script), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *map(str, options)], capture_output=True, text=True, env=environment, timeout=500)


def losses(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]


def test_two_ranks_killed_and_resumed_have_the_losses_of_an_unbroken_run(tmp_path: Path) -> None:
    options = ("--rows", 192, "--epochs", 2, "--batch-size", 16, "--size", 32, "--depth", 2, "--checkpoint-every", 2)
    unbroken = run("train_classifier.py", tmp_path / "unbroken", *options, torchrun=True)
    assert unbroken.returncode == 0, unbroken.stderr
    expected = losses(tmp_path / "unbroken")
    assert [(line["epoch"], line["step"]) for line in expected] == [(e, s) for e in range(2) for s in range(6)]

    killed = run("train_classifier.py", tmp_path / "broken", *options, "--kill-at", 9, torchrun=True)
    assert "exitcode: -9" in killed.stderr, killed.stderr
    assert losses(tmp_path / "broken") == expected[:9]
    resumed = run("train_classifier.py", tmp_path / "broken", *options, torchrun=True)
    assert resumed.returncode == 0, resumed.stderr
    assert losses(tmp_path / "broken")[9:] == expected[8:], "the last checkpoint was written after step 8"
    (line,) = [line for line in unbroken.stdout.splitlines() if line.startswith("accuracy")]
    assert line in resumed.stdout.splitlines(), "once, by rank 0"


def toy(script: str, out: Path, monkeypatch: pytest.MonkeyPatch, *options: Any) -> None:
    """The script in this process: no start-up to wait for."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", [script, "--out", str(out), *map(str, options)])
    runpy.run_path(str(BENCHMARKS / script), run_name="__main__")


def test_classifier_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--rows", 192, "--epochs", 5, "--batch-size", 16, "--size", 32, "--depth", 2)
    toy("train_classifier.py", tmp_path / "run", monkeypatch, *options)
    lines = losses(tmp_path / "run")
    assert sum(line["loss"] for line in lines[-5:]) < 0.6 * sum(line["loss"] for line in lines[:5])
    assert float(capsys.readouterr().out.split("accuracy ")[1]) > 0.5  # of six backgrounds


def test_clip_at_toy_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--rows", 192, "--epochs", 6, "--batch-size", 16, "--size", 32, "--gallery", 32)
    toy("train_clip.py", tmp_path / "run", monkeypatch, *options)
    assert losses(tmp_path / "run")[-1]["loss"] < 1.8  # ln 16 = 2.77 is guessing
    assert float(capsys.readouterr().out.split("retrieval ")[1].split()[0]) > 5 / 32


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_pictures_and_prompts_belong_together(tmp_path: Path) -> None:
    """About a minute on two cores, and half of one to draw the pictures."""
    done = run("train_clip.py", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("retrieval ")[1].split()[0]) > 0.9
