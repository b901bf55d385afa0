"""`gpuload doctor` says what is there, what works and how far it is from Pillow, with and without a GPU."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from making import by_pillow
from typer.testing import CliRunner

from gpuload import ConfigError, LanceDataset, Ragged
from gpuload.images.decode.choose import make_decoder
from gpuload.tools import doctor
from gpuload.tools.cli import app


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SECONDS", 0.01)
    monkeypatch.setenv("COLUMNS", "200")


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["doctor", *words], catch_exceptions=False)
    return result.exit_code, result.stdout


def test_the_cpus_decoder_has_pillows_pixels() -> None:
    status, text = run("--json", "--decoder", "cpu")
    found = json.loads(text)
    assert (status, found["ok"]) == (0, True)
    (trial,) = (trial for trial in found["trials"] if trial["device"] == "cpu")
    assert set(trial["pictures"]) == {"4:4:4", "4:2:0", "gray", "progressive", "PNG"}
    assert all(off == {"largest": 0, "mean": 0} for off in trial["pictures"].values())
    assert trial["rate"] > 0


def test_the_pictures_are_what_they_say() -> None:
    files = doctor.pictures()
    assert all(by_pillow(file).shape == (3, 448, 448) for file in files.values())
    assert files["PNG"].startswith(b"\x89PNG")
    assert b"\xff\xc2" in files["progressive"]
    assert files == doctor.pictures()


def test_parts_are_named_with_the_line_that_installs_them() -> None:
    found = {part.name: part for part in doctor.parts()}
    for name in ("GPU", "driver", "CuPy", "nvJPEG", "nvImageCodec", "DALI", "resize on the CPU", "JPEG on the CPU"):
        assert name in found
    for name in ("CuPy", "nvJPEG", "nvImageCodec", "DALI"):
        extra = "dali" if name == "DALI" else "cuda"
        assert found[name].found != "not installed" or f'pip install "gpuload[{extra}' in found[name].advice


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said without a GPU")
def test_without_a_gpu_its_decoder_is_no_fault_until_it_is_asked_for() -> None:
    trial = doctor.try_decoder("nvjpeg", "cpu")
    assert (trial.works, trial.missing, trial.why) == (False, True, "needs a GPU with a JPEG engine")
    status, text = run("--decoder", "nvjpeg", "--decoder", "cpu")
    assert status == 1
    assert "needs a GPU with a JPEG engine" in text
    assert "Not all of it works." in text
    assert doctor.Diagnosis([], [trial, doctor.Trial("cpu", "cpu", works=True)], ["cpu"]).ok
    assert doctor.Diagnosis([], [trial], []).ok
    assert not doctor.Diagnosis([], [trial], ["nvjpeg"]).ok


def test_a_decoder_that_nobody_knows_is_one_line() -> None:
    result = CliRunner().invoke(app, ["doctor", "--decoder", "nvjpg"])
    assert result.exit_code == 1
    assert result.stderr.startswith("gpuload: Expected decoders among ['cpu'")
    assert result.stderr.count("\n") == 1


class Wrong:
    """Decodes to something else, or not at all."""

    name, device = "wrong", torch.device("cpu")

    def __init__(self, breaks: bool) -> None:
        self._breaks = breaks

    def decode(self, encoded: Any, headers: Any, windows: Any) -> Ragged:
        if self._breaks:
            raise RuntimeError("no such engine\nat all")
        return Ragged.of([np.full((448, 448, 3), 255, np.uint8) for _ in range(len(encoded))], headers)

    def counts(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("breaks", "why"), [(True, "RuntimeError: no such engine"), (False, "far from Pillow's pixels")]
)
def test_a_decoder_that_is_there_and_does_not_work_is_a_fault(
    breaks: bool, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(word: str, *rest: Any) -> Any:
        return Wrong(breaks) if word == "dali" else make_decoder(word, *rest)

    monkeypatch.setattr(doctor, "make_decoder", make)
    trial = doctor.try_decoder("dali", "cpu")
    assert not trial.works
    assert not trial.missing
    assert trial.why.startswith(why)
    monkeypatch.setattr(doctor, "DECODERS", ("auto", "cpu", "dali"))
    status, text = run()
    assert status == 1
    assert "BROKEN" in text


def test_the_engines_decoder_on_the_cpu_is_refused_when_the_dataset_is_made(photos: str) -> None:
    with pytest.raises(ConfigError, match="for decoder='nvjpeg', whose JPEG engine is part of a GPU"):
        LanceDataset(photos, 4, decoder="nvjpeg", device="cpu")
