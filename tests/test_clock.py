"""Where the time goes: the figures by stage, the sentence on what limits, the timeline, and what measuring costs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from gpuload import Image, LanceDataset, Text
from gpuload.clock import Clock, bottleneck, clocks, share
from gpuload.stages import ordered_map
from gpuload.tools.bench import advice
from gpuload.tools.cli import app
from gpuload.tools.trace import Trace


def loaded(photos: str, pause: float = 0.0, **options: Any) -> dict[str, Any]:
    transforms = {"image": Image(32, dtype=torch.uint8), "prompt": Text("bytes", max_length=8)}
    with LanceDataset(photos, 10, transforms=transforms, device="cpu", **options) as dataset:
        for _ in dataset:
            time.sleep(pause)
        return dataset.stats()


def test_every_stage_counts_its_items_bytes_and_seconds(photos: str) -> None:
    stages = loaded(photos, num_threads=2)["stages"]
    assert list(stages) == ["read", "tokenize", "decode", "resize"]
    assert [stages[name]["items"] for name in ("read", "tokenize")] == [5, 5]
    assert stages["decode"]["items"] == stages["resize"]["items"] >= 5
    assert 0 < stages["decode"]["bytes"] < stages["read"]["bytes"]
    for stage in stages.values():
        assert stage["busy_s"] > 0
        assert 0 <= share(stage) <= 1
    assert stages["resize"]["busy_s"] < stages["decode"]["busy_s"]


def test_a_slow_loop_is_named(photos: str) -> None:
    assert loaded(photos, pause=0.1)["bottleneck"].startswith("loop-bound")


@pytest.mark.parametrize(("slow", "words"), [("read", "read-bound"), ("decode", "decode-bound")])
def test_a_slow_stage_is_named(slow: str, words: str) -> None:
    found = clocks(2, 2)

    def run(name: str, items: Any) -> Any:
        return ordered_map(
            lambda i: time.sleep(0.03 if name == slow else 0.001), items, threads=2, ahead=4, name=name,
            clock=found[name],
        )  # fmt: skip

    list(run("decode", run("read", range(20))))
    figures = {name: clock.read() for name, clock in found.items()}
    assert bottleneck(figures).startswith(words)
    assert "2 threads busy" in bottleneck(figures)


def test_nothing_loaded_has_no_bottleneck(photos: str) -> None:
    assert LanceDataset(photos, 10).stats()["bottleneck"] == "nothing was loaded yet"


def test_advice_fits_the_bottleneck(photos: str) -> None:
    stats = loaded(photos, num_threads=1)
    for limit, word in (
        ("loop", "keeps up"),
        ("read", "storage"),
        ("tokenize", "token ids"),
        ("decode", "num_threads=7"),
    ):
        assert word in " ".join(advice({**stats, "bottleneck": f"{limit}-bound: x"}, cores=7))
    assert "GPU" in " ".join(advice({**stats, "bottleneck": "decode-bound: x"}, cores=1))


def test_the_timeline_is_well_formed_and_has_a_track_for_every_thread(photos: str, tmp_path: Path) -> None:
    trace, path = Trace(), tmp_path / "trace.json"
    with LanceDataset(photos, 10, columns=["image"], transforms={"image": Image(32)}, num_threads=2) as dataset:
        trace.watch(dataset.clocks.values())
        assert sum(batch.size for batch in dataset) == 50
        stats = dataset.stats()
    written = trace.write(path)
    found = json.loads(path.read_text())
    events = found["traceEvents"]
    assert len(events) == written
    tracks = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    for event in events:  # what Perfetto's JSON importer needs
        assert event["ph"] in "MXC"
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        if event["ph"] != "M":
            assert event["ts"] >= 0
            assert event["tid"] in tracks
        if event["ph"] == "X":
            assert event["dur"] >= 0
    spans = [e for e in events if e["ph"] == "X"]
    decoding = [e for e in spans if e["name"] == "decode"]
    assert len(decoding) == stats["stages"]["decode"]["items"]
    assert sum(e["dur"] for e in decoding) / 1e6 == pytest.approx(stats["stages"]["decode"]["busy_s"], rel=1e-3)
    assert {tracks[e["tid"]].rpartition("_")[0] for e in decoding} == {"gpuload-decode"}
    assert {"read", "resize", "wait for decode"} <= {e["name"] for e in spans}
    for track in tracks:  # a thread does one thing at a time: its spans nest or follow each other
        ordered = sorted((e["ts"], -e["dur"]) for e in spans if e["tid"] == track)
        ends: list[float] = []
        for start, minus in ordered:
            while ends and ends[-1] <= start + 2e-3:
                ends.pop()
            assert not ends or start - minus <= ends[-1] + 2e-3  # microseconds, rounded to nanoseconds
            ends.append(start - minus)


def test_measuring_costs_less_than_a_hundredth_of_a_slice() -> None:
    clock, rounds = Clock(2, "decode"), 2000
    best = 1.0
    for _ in range(3):
        began = time.thread_time()
        for _ in range(rounds):
            clock.worked(time.perf_counter(), 1)  # decode
            with clock.timed():  # resize
                pass
            clock.stood(time.perf_counter(), 1)
        best = min(best, (time.thread_time() - began) / rounds)
    assert best < 8e-5  # seconds; a slice is eight decodes of about a millisecond, so 1 % is 8e-5


def test_the_command_prints_stages_advice_and_writes_a_timeline(photos: str, tmp_path: Path) -> None:
    trace = tmp_path / "t.json"
    done = CliRunner().invoke(app, ["bench", photos, "--seconds", "0.2", "--size", "32", "--trace", str(trace)])
    assert done.exit_code == 0, done.output
    assert "rows/s" in done.output
    assert "decode" in done.output
    assert json.loads(trace.read_text())["traceEvents"]
    assert CliRunner().invoke(app, ["bench", photos, "--seconds", "0", "--trace", str(tmp_path / "no" / "t")]).exit_code
