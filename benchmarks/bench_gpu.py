"""Decoded batches on a GPU: limits, gpuload, peers and a training step; rows/s, in interleaved rounds.

All cases do the same work on the same photos: JPEG bytes to float16 [B, 3, 224, 224], random-resized crop, flip,
normalised. One process, so that the rounds are short; every case runs once unmeasured. A pass is `--rows` rows, or
what `--seconds` allow. Ratios refer to the first case of a group (image size and batch size), within a round.
With --device cpu and few rows it runs anywhere, which is how it is tested.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import data
import harness
import torch
from gpu_cases import CASES, SWEEP, Pass, Setup, kernel_bandwidth
from rich.console import Console
from rich.table import Table

# of all cases, those for every batch size, and those in the first group alone
KEY = ("limit: decode", "limit: decode and kernel", "gpuload nvimgcodec", "dali pipeline 0.65", "dali pipeline 0.9")
ONCE = ("lance.torch.data, workers", "training: synthetic", "training: fed", *SWEEP)


def measure(case: Pass, setup: Setup) -> float:
    """Rows/s of one pass, or of the part of it that fits, from the fourth batch on: the first ones fill the line, and
    those of DALI were made while other cases ran."""
    setup.synchronize()
    skipped = min(3, setup.rows // setup.batch_size // 4)
    started, rows, whole = time.perf_counter(), 0, True
    batches = case()
    for i, size in enumerate(batches):
        if i < skipped:
            started = time.perf_counter()
            continue
        rows += size
        if time.perf_counter() - started > setup.settings.seconds:
            whole = False  # as many are under way as when the clock started
            break
    if whole:
        setup.synchronize()
    seconds = time.perf_counter() - started
    getattr(batches, "close", lambda: None)()
    if not rows:
        raise RuntimeError("it yielded no rows")
    return rows / seconds


def group(setup: Setup, chosen: list[str], console: Console) -> dict[str, Any]:
    """Every case of one image size and batch size."""
    passes: dict[str, Pass] = {}
    for name in chosen:
        try:
            passes[name] = {**CASES, **SWEEP}[name](setup)
            measure(passes[name], setup)
        except Exception as error:  # a peer that is missing or fails leaves a line, and the others go on
            passes.pop(name, None)
            console.print(f"{name}: left out, {type(error).__name__}: {str(error)[:300]}", markup=False)
    rates: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(setup.settings.rounds):
        for name in list(passes):
            try:
                rates[name].append(measure(passes[name], setup))
            except Exception as error:
                del passes[name], rates[name]
                console.print(f"{name}: left out, {type(error).__name__}: {str(error)[:300]}", markup=False)
    base = next(iter(rates.values()), [])
    return {
        name: {
            "rows_per_s": round(statistics.median(found), 1),
            "lowest": round(min(found), 1),
            "highest": round(max(found), 1),
            "ratio": round(statistics.median(a / b for a, b in zip(found, base, strict=True)), 3),
        }
        for name, found in rates.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", default=None, help="a folder of photos; generated pictures without it")
    parser.add_argument("--work", default=data.ARGUMENTS["work"])
    parser.add_argument("--rows", type=int, default=16384, help="of a pass over photos of 0.2 megapixels")
    parser.add_argument("--megapixels", default="0.2,12,1")
    parser.add_argument(
        "--batch-sizes", default="128,64,256", help="the first one alone for larger photos, 32 at most for 12"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of the first group; 2 at most of the others")
    parser.add_argument(
        "--seconds", type=float, default=1.5, help="longest pass of the first group; 1 at most of the others"
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--cases", default="", help="semicolon-separated; all by default")
    parser.add_argument("--sweep", action="store_true", help="shares of the JPEG engine, too")
    parser.add_argument("--out", default=str(harness.RESULTS / "gpu.json"))
    settings = parser.parse_args()
    Path(settings.work).mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    every = [*CASES, *(SWEEP if settings.sweep else ())]
    chosen = [name for name in every if not settings.cases or name in settings.cases.split(";")]
    report: dict[str, Any] = {"benchmark": "gpu", "date": datetime.date.today().isoformat()}
    report |= {"machine": machine(settings.device), "settings": dict(vars(settings)), "groups": {}}
    sizes, batch_sizes = [float(v) for v in settings.megapixels.split(",")], settings.batch_sizes.split(",")
    first, rest, key = chosen, [n for n in chosen if n not in ONCE], [n for n in chosen if n in KEY]
    plan = [(size, int(batch_sizes[0]), rest if i else first) for i, size in enumerate(sizes)]
    plan = [(size, min(batch, 32) if size > 4 else batch, names) for size, batch, names in plan]
    plan += [(sizes[0], int(batch), key) for batch in batch_sizes[1:]]
    for i, (megapixels, batch_size, names) in enumerate(plan):
        setup = Setup(settings, megapixels, batch_size)
        if i == 1:
            settings.rounds, settings.seconds = min(settings.rounds, 2), min(settings.seconds, 1.0)
        cases = group(setup, names, console)
        gc.collect()
        if settings.device == "cuda":
            torch.cuda.empty_cache()
        found = {"rows": setup.rows, "cases": cases, "kernel": kernel_bandwidth(setup)}
        report["groups"][f"{megapixels:g} MP, batch {batch_size}"] = found
        Path(settings.out).write_text(json.dumps(report, indent=1) + "\n")  # what is there survives a time limit
        show(f"{megapixels:g} MP, batch {batch_size}", found)


def machine(device: str) -> dict[str, Any]:
    found = harness.machine()
    if device == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def show(title: str, found: dict[str, Any]) -> None:
    table = Table(title=f"{title}: rows/s, median of interleaved rounds; kernel {found['kernel']}")
    for heading in ("case", "rows/s", "lowest", "highest", "ratio"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for case, figures in found["cases"].items():
        numbers = [f"{figures[key]:,.0f}" for key in ("rows_per_s", "lowest", "highest")]
        table.add_row(case, *numbers, f"{figures['ratio']:.3f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
