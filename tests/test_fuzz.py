"""Damaged images through whole datasets, in child processes with limits: `benchmarks/fuzz.py`, 500 of them here."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the benchmarks beside the tests")


@pytest.fixture(scope="module")
def fuzz() -> Any:
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("fuzz")
    sys.path.remove(str(FOLDER))


def test_500_damaged_images_harm_nobody_and_are_pillows(fuzz: Any) -> None:
    report = fuzz.run(500, 1, list(fuzz.DECODERS))
    assert report["wrong"] == []
    assert report["images"] == 500
    assert 50 < report["read by Pillow"] < 450, "damage that nobody notices, or nobody survives, tries nothing"
    assert {name for name, value in report.items() if isinstance(value, dict)} == {
        "cpu, whole", "nvimgcodec, whole", "dali, whole", "cpu, crops",
    }  # fmt: skip


@pytest.mark.slow
def test_5000_more(fuzz: Any) -> None:
    assert fuzz.run(5000, 2, list(fuzz.DECODERS))["wrong"] == []


def test_the_same_number_is_the_same_image(fuzz: Any) -> None:
    files = fuzz.whole_files()
    made = [fuzz.damaged(5, index, files) for index in range(60)]
    assert made == [fuzz.damaged(5, index, files) for index in range(60)]
    assert len(set(made)) > 55


def test_a_child_that_hangs_or_dies_is_a_line_of_the_report(fuzz: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fuzz.child(0, 0, 4, ["cpu"], seconds=0.05)["wrong"] == ["images 0 to 4: not done after 0.05 s"]
    (line,) = fuzz.child(0, 0, 4, ["no such decoder"])["wrong"]
    assert line.startswith("images 0 to 4: the child ended with 1")
    monkeypatch.setattr(fuzz, "BYTES", 1 << 20)
    (line,) = fuzz.child(0, 0, 4, ["cpu"])["wrong"]
    assert "the child ended with" in line


def test_what_differs_is_counted_and_what_may_not_is_listed(fuzz: Any) -> None:
    some, other = np.zeros((3, 2, 2), np.uint8), np.ones((3, 2, 2), np.uint8)
    found: dict[str, Any] = {"wrong": []}
    wanted, got = [some, some, some, None], [some, other, None, some]
    fuzz.compare(found, "dali", wanted, got, strict=False, first=7)
    assert found["dali"] == {"other pixels": 1, "refused": 1, "read, where Pillow does not": 1}
    assert found["wrong"] == ["dali: the whole file before image 8: refused"]
    fuzz.compare(found, "cpu", wanted, got, strict=True, first=7)
    assert found["wrong"][1:] == [
        "cpu: image 7: other pixels",
        "cpu: the whole file before image 8: refused",
        "cpu: image 8: read, where Pillow does not",
    ]
