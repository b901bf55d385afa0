"""How every benchmark here runs: named cases, one process each, interleaved; median and spread; one JSON file.

A benchmark file defines cases, name → function(settings) → job, and calls `main`. The function imports and prepares;
only the job counts: it yields the number of rows of each batch. Each run is a process of its own, so that no case
inherits another's allocator, threads or caches but the page cache, into which its data is read first. The order of the
cases changes from round to round, so that it is not always the same one that finds a library's code forgotten. Peak
memory comes from one more run, in which the shares (PSS) of the process and all its children are added up ten times a
second.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import data
import reports
from rich.console import Console
from rich.progress import track
from rich.table import Table

Job = Callable[[], Iterable[int]]
Case = Callable[[Any], Job]
RESULTS = Path(__file__).parent / "results"
_PACKAGES = (
    "gpuload", "torch", "torchvision", "pylance", "pyarrow", "numpy", "pillow", "simplejpeg", "tokenizers", "lancedb",
    "cupy-cuda13x", "nvidia-nvjpeg", "nvidia-nvimgcodec-cu13", "nvidia-dali-cuda130", "spdl", "webdataset",
    "mosaicml-streaming", "datasets", "grain",
)  # fmt: skip


def main(name: str, cases: dict[str, Case], options: dict[str, Any], prepare: Callable[[Any], None]) -> None:
    """Command line of one benchmark.

    Parameters
    ----------
    name : str
        The result is ``benchmarks/results/<name>.json`` unless --out says otherwise; ``{task}`` is filled in.
    cases : dict
        The first one is what the ratios refer to; where names are "group: case", the first of each group.
    options : dict
        Option → default; booleans become flags, None a string.
    prepare : callable
        Makes the data, once, before anything is timed.
    """
    settings = arguments(options)
    if settings.only:
        print(json.dumps(_once(cases[settings.only], settings)))
        return
    prepare(settings)
    name = name.format(**vars(settings))
    chosen = [case for case in cases if not settings.cases or case in settings.cases.split(";")]
    runs: dict[str, list[dict[str, Any]]] = {case: [] for case in chosen}
    console = Console(stderr=True)
    order = [(case, False) for k in range(settings.repeats) for case in random.Random(k).sample(chosen, len(chosen))]
    order += [(case, True) for case in chosen if settings.memory]
    missing: set[str] = set()
    for case, memory in track(order, name, console=console, disable=not console.is_terminal):
        if case in missing:
            continue
        run = _child(case, memory)
        if "missing" in run:
            console.print(f"{case}: left out, {run['missing']}", markup=False)
            missing.add(case)
        runs[case].append(run)
    report = _report(name, settings, runs)
    _show(report)
    reports.write(Path(settings.out or RESULTS / f"{name}.json"), report)


def arguments(options: dict[str, Any]) -> Any:
    """The command line, parsed."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    for option, default in options.items():
        kind: dict[str, Any] = {"action": "store_true"} if default is False else {"type": type(default or "")}
        parser.add_argument(f"--{option.replace('_', '-')}", default=default, **kind)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", default="")
    parser.add_argument("--cases", default="", help="separated by semicolons; all by default")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    return parser.parse_args()


def _once(case: Case, settings: Any) -> dict[str, Any]:
    try:
        job = case(settings)
        if not getattr(job, "cold", False):
            data.warm()
        gc.collect()  # a full collection of what the imports left takes 0.1 s, in one case's first batch or another's
        before = sum(os.times()[:4])
        started, first, rows = time.perf_counter(), 0.0, 0
        for batch in job():
            first = first or time.perf_counter() - started
            rows += batch
        seconds = time.perf_counter() - started
        used = sum(os.times()[:4]) - before  # with the workers, which have ended
        return {"rows": rows, "seconds": seconds, "first_s": first, "cpu_s": used, "note": getattr(job, "note", "")}
    except ImportError as error:
        return {"missing": f"{error.name} is not installed"}


def _child(case: str, memory: bool = False) -> dict[str, Any]:
    """One run; with `memory`, its peak instead of its speed is what counts."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, *sys.argv, "--only", case]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as run:
        peak = 0.0
        while memory and run.poll() is None:
            peak = max(peak, sum(pss(pid) for pid in _family(run.pid)))
            time.sleep(0.1)
        out, err = run.communicate()
    if run.returncode:
        raise SystemExit(f"{case} failed:\n{err[-4000:]}")
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    if not found.get("rows", 1):
        raise SystemExit(f"{case} yielded no rows:\n{err[-4000:]}")
    return {"peak_mb": peak, **({"missing": found["missing"]} if "missing" in found else {})} if memory else found


def _family(pid: int) -> list[int]:
    """A process and all below it (Linux)."""
    found = [pid]
    for one in found:
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{one}/task"):
                text = Path(f"/proc/{one}/task/{thread}/children").read_text()
                found += [int(child) for child in text.split()]
    return found


def pss(pid: int) -> float:
    """MB of a process's memory; what it shares with n others counts one n-th."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps_rollup") as file:
        for line in file:
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0


def _report(name: str, settings: Any, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    cases: dict[str, Any] = {}
    bases: dict[str, list[float]] = {}
    for case, all_of_it in runs.items():
        good = [run for run in all_of_it if "rows" in run]
        if not good:
            continue
        rates = [run["rows"] / run["seconds"] for run in good]
        base = bases.setdefault(case.rpartition(":")[0], rates)
        paired = [rate / other for rate, other in zip(rates, base, strict=False)]  # of the same round
        cases[case] = {
            "rows_per_s": round(statistics.median(rates), 1),
            "lowest": round(min(rates), 1),
            "highest": round(max(rates), 1),
            "ratio": round(statistics.median(paired), 3),
            "ratio_lowest": round(min(paired), 3),
            "ratio_highest": round(max(paired), 3),
            "cpu_ms": round(statistics.median(run["cpu_s"] / run["rows"] for run in good) * 1000, 3),
            "first_s": round(statistics.median(run["first_s"] for run in good), 4),
            "peak_mb": round(max((run.get("peak_mb", 0.0) for run in all_of_it), default=0.0)),
            "runs": len(good),
            **({"limits": good[-1]["note"]} if good[-1]["note"] else {}),
        }
    hidden = ("only", "out", "cases", "work", "images", "memory")
    return {
        "benchmark": name,
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "settings": {key: value for key, value in vars(settings).items() if key not in hidden},
        "cases": cases,
    }


def machine() -> dict[str, Any]:
    """Processor, cores, memory, GPU if there is one, and the versions that matter."""
    found: dict[str, Any] = {"processor": _processor(), "cores": len(os.sched_getaffinity(0))}
    found["python"] = platform.python_version()
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _show(report: dict[str, Any]) -> None:
    table = Table(title=f"{report['benchmark']}: median of interleaved runs, ratios within a round")
    for heading in ("case", "rows/s", "lowest", "highest", "ratio", "spread", "cpu ms", "first s", "peak MB"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for case, figures in report["cases"].items():
        numbers = [f"{figures[key]:,.0f}" for key in ("rows_per_s", "lowest", "highest")]
        spread = f"{figures['ratio_lowest']:.2f}-{figures['ratio_highest']:.2f}"
        rest = [
            f"{figures['ratio']:.2f}",
            spread,
            f"{figures['cpu_ms']:.2f}",
            f"{figures['first_s']:.3f}",
            f"{figures['peak_mb']:,}",
        ]
        table.add_row(case, *numbers, *rest)
    Console(width=120).print(table)
