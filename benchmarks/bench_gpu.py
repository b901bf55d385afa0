"""Decoded batches on a GPU: limits, gpuload, peers and training steps; rows/s, one process a case, interleaved.

    python benchmarks/bench_gpu.py rates --images photos/ --out rates.json

All cases do the same work on the same photos: JPEG bytes to float16 [B, 3, 224, 224], random-resized crop, flip,
normalised. A stage (gpu_cases.STAGES) is measured in rounds, the most valuable case first, until its --limit is near;
a process makes one unmeasured pass and --passes measured ones, each of --rows rows or what --seconds allow. The JSON
is written after each process. Ratios refer to the first case of a group (image size and batch size), those of training
to the step on synthetic images, within a round. With --device cpu and few rows it runs anywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import data
import harness
import numpy as np
import reports
import torch
from gpu_cases import CASES, STAGES, Group
from gpu_setup import Pass, Setup
from rich.console import Console
from rich.table import Table

from gpuload import Encoded
from gpuload.images import headers

Run = dict[str, Any]  # what a process says: rates and first_s, or why it was left out


def measure(case: Pass, setup: Setup) -> float:
    """Rows/s of one pass, or of the part of it that fits, from the fourth batch on: the first ones fill the line, and
    those of DALI were made before."""
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


def once(name: str, group: Group, settings: Any) -> Run:
    """One case, in this process: a pass to warm up, and the measured ones."""
    try:
        setup = Setup(settings, group.megapixels, group.batch_size)
        torch.zeros(1, device=setup.device)  # CUDA's own start is nobody's
        setup.synchronize()
        opened = time.perf_counter()
        case = CASES[name](setup)
        batches = iter(case())
        next(batches)
        setup.synchronize()
        first = time.perf_counter() - opened
        getattr(batches, "close", lambda: None)()
        measure(case, setup)
        rates = [round(measure(case, setup), 1) for _ in range(settings.passes)]
        return {"rates": rates, "first_s": round(first, 4)}
    except ImportError as error:
        return {"left_out": f"{error.name} is not installed"}
    except Exception as error:  # a peer that fails leaves a line, and the others go on
        return {"left_out": f"{type(error).__name__}: {str(error)[:300]}"}


def in_a_process(name: str, group: Group, seconds: float) -> Run:
    """`once` in a process of its own, which is ended with all it started after so many seconds."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, *sys.argv, "--only", name, "--group", f"{group.megapixels:g},{group.batch_size}"]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen(command, start_new_session=True, **options) as process:
        try:
            out, err = process.communicate(timeout=max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            return {"left_out": f"it was not done after {seconds:.0f} s"}
        finally:
            with contextlib.suppress(ProcessLookupError):  # it and its workers
                os.killpg(process.pid, signal.SIGKILL)
    try:
        found: Run = json.loads(out.splitlines()[-1])
    except (IndexError, ValueError):
        last = next((line for line in reversed(err.splitlines()) if line.strip()), "")
        return {"left_out": f"the process ended with {process.returncode}: {last[:300]}"}
    return found


def planned(groups: list[Group], rounds: int) -> list[tuple[int, Group, str]]:
    """(round, group, case), in the order they run: by value in the first round, in another order in each later one."""
    slots = itertools.zip_longest(*([(group, case) for case in group.cases] for group in groups))
    first = [slot for several in slots for slot in several if slot is not None]
    orders = (first if k == 0 else random.Random(k).sample(first, len(first)) for k in range(rounds))
    return [(k, group, case) for k, order in enumerate(orders) for group, case in order]


def base_of(case: str, cases: tuple[str, ...]) -> str:
    """What a case's ratio refers to."""
    kind, colon, _ = case.partition(":")
    return f"{kind}{colon} synthetic" if case.startswith("training") else cases[0]


def summary(group: Group, runs: dict[tuple[int, str], Run]) -> dict[str, Any]:
    """Figures of a group, of the processes that are done; ``ratio`` is None where there is nothing to refer to."""
    cases: dict[str, Any] = {}
    for name in group.cases:
        found = {k: run for (k, case), run in runs.items() if case == name and "rates" in run}
        if not found:
            continue
        rates = list(itertools.chain.from_iterable(run["rates"] for run in found.values()))
        others = {k: runs.get((k, base_of(name, group.cases)), {}).get("rates") for k in found}
        ratios = [statistics.median(found[k]["rates"]) / statistics.median(of) for k, of in others.items() if of]
        cases[name] = {
            "rows_per_s": round(statistics.median(rates), 1),
            "lowest": min(rates),
            "highest": max(rates),
            "ratio": round(statistics.median(ratios), 3) if ratios else None,
            "first_s": min(run["first_s"] for run in found.values()),
            "processes": len(found),
        }
    left_out = {case: run["left_out"] for (_, case), run in runs.items() if "left_out" in run}
    return {"cases": cases, "left_out": left_out}


def prepared(settings: Any, groups: list[Group]) -> dict[str, Any]:
    """The report before anything is measured; makes the data that the cases find on disk."""
    hidden = ("only", "group", "out", "work", "images")
    report: dict[str, Any] = {"benchmark": "gpu", "stage": settings.stage, "date": datetime.date.today().isoformat()}
    report |= {"commit": commit(), "machine": machine(settings.device)}
    report |= {"settings": {key: value for key, value in vars(settings).items() if key not in hidden}, "groups": {}}
    for group in groups:
        setup = Setup(settings, group.megapixels, group.batch_size)
        setup.lance()
        table = headers.read(Encoded.of(setup.unique))
        pixels = table["height"].astype(np.int64) * table["width"]
        report["groups"][group.name] = {"rows": setup.rows, "pixels_per_image": round(float(pixels.mean()))}
    return report


def run(settings: Any, groups: list[Group], console: Console) -> dict[str, Any]:
    """The stage; the report so far is in the file whenever a process has ended."""
    started, longest = time.monotonic(), 0.0
    report = prepared(settings, groups)
    runs: dict[Group, dict[tuple[int, str], Run]] = {group: {} for group in groups}
    for k, group, case in planned(groups, settings.rounds):
        if "left_out" in runs[group].get((0, case), {}):
            continue
        began = time.monotonic()
        left = settings.limit - (began - started)
        if left > 1.1 * longest:
            found = in_a_process(case, group, min(left, settings.process_limit))
            if "rates" in found:  # one that hung says nothing about the others
                longest = max(longest, time.monotonic() - began)
        elif k == 0:
            found = {"left_out": "the stage had no time left"}
        else:
            continue
        runs[group][k, case] = found
        if "left_out" in found:
            console.print(f"{case}: left out, {found['left_out']}", markup=False)
        report["groups"][group.name] |= summary(group, runs[group])
        reports.write(Path(settings.out), report)
    for group in groups:
        report["groups"][group.name] |= summary(group, runs[group])
    reports.write(Path(settings.out), report)
    return report


def commit() -> str:
    """Of this checkout, as git or the variable GPULOAD_COMMIT says; where neither does, ''."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    with contextlib.suppress(OSError):
        found = subprocess.run(command, capture_output=True, text=True)
        if found.returncode == 0:
            return found.stdout.strip()
    return os.environ.get("GPULOAD_COMMIT", "")


def machine(device: str) -> dict[str, Any]:
    found = harness.machine()
    if device == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def show(report: dict[str, Any]) -> None:
    for title, found in report["groups"].items():
        table = Table(title=f"{report['stage']}, {title}: rows/s, median of passes")
        for heading in ("case", "rows/s", "lowest", "highest", "ratio", "first s"):
            table.add_column(heading, justify="left" if heading == "case" else "right")
        for case, figures in found["cases"].items():
            numbers = [f"{figures[key]:,.0f}" for key in ("rows_per_s", "lowest", "highest")]
            ratio = "" if figures["ratio"] is None else f"{figures['ratio']:.3f}"
            table.add_row(case, *numbers, ratio, f"{figures['first_s']:.2f}")
        Console(width=110).print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--images", default=None, help="a folder of photos; generated pictures without it")
    parser.add_argument("--work", default=data.ARGUMENTS["work"], help="where the data is made")
    parser.add_argument("--rows", type=int, default=16384, help="of a pass over photos of 0.2 megapixels")
    parser.add_argument("--megapixels", default="", help="instead of the stage's, a number for each of its groups")
    parser.add_argument("--batch-sizes", default="", help="instead of the stage's, a number for each of its groups")
    parser.add_argument("--rounds", type=int, default=3, help="at most")
    parser.add_argument("--passes", type=int, default=2, help="measured, of each process")
    parser.add_argument("--seconds", type=float, default=1.2, help="longest pass")
    parser.add_argument(
        "--limit", type=float, default=105, help="seconds of the stage: no process begins that may not end"
    )
    parser.add_argument("--process-limit", type=float, default=45, help="seconds of one process")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--cases", default="", help="of the stage's, separated by semicolons; all by default")
    parser.add_argument("--out", default="", help="benchmarks/results/gpu/<stage>.json by default")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--group", help=argparse.SUPPRESS)
    return parser.parse_args()


def chosen(settings: Any) -> list[Group]:
    """The groups of the stage, with the sizes and cases that were asked for."""
    groups = list(STAGES[settings.stage])
    for name, values in (("megapixels", settings.megapixels), ("batch_size", settings.batch_sizes)):
        if values:
            kind = float if name == "megapixels" else int
            groups = [g._replace(**{name: kind(v)}) for g, v in zip(groups, values.split(","), strict=True)]
    wanted = settings.cases.split(";")
    if settings.cases:
        groups = [group._replace(cases=tuple(case for case in group.cases if case in wanted)) for group in groups]
    return groups


def main() -> None:
    settings = arguments()
    if settings.only:
        megapixels, batch_size = settings.group.split(",")
        print(json.dumps(once(settings.only, Group(float(megapixels), int(batch_size), ()), settings)))
        return
    settings.out = settings.out or str(harness.RESULTS / "gpu" / f"{settings.stage}.json")
    show(run(settings, chosen(settings), Console(stderr=True)))


if __name__ == "__main__":
    main()
