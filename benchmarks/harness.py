"""How every benchmark here runs: named cases, one process each, interleaved; median and spread; one JSON file.

A benchmark file defines `CASES`, name → function(settings) → job, and calls `main`. The function imports and prepares;
only the job's time counts, and it returns the number of rows it handled. Each run is a process of its own, so that no
case inherits another's allocator, threads or caches but the page cache.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

Job = Callable[[], int]
Case = Callable[[Any], Job]
_PACKAGES = (
    "gpuload",
    "torch",
    "pylance",
    "pyarrow",
    "numpy",
    "pillow",
    "simplejpeg",
    "lancedb",
    "nvidia-dali-cuda130",
)


def main(name: str, cases: dict[str, Case], arguments: dict[str, Any], prepare: Callable[[Any], None]) -> None:
    """Command line of one benchmark.

    Parameters
    ----------
    name : str
        The result is ``benchmarks/results/<name>.json`` unless --out says otherwise.
    cases : dict
        The first one is what the ratios refer to.
    arguments : dict
        Option → default; booleans become flags, None a string.
    prepare : callable
        Makes the data, once, before anything is timed.
    """
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    for option, default in arguments.items():
        kind: dict[str, Any] = {"action": "store_true"} if default is False else {"type": type(default or "")}
        parser.add_argument(f"--{option.replace('_', '-')}", default=default, **kind)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / f"{name}.json"))
    parser.add_argument("--cases", default="", help="comma-separated; all by default")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.only:
        print(json.dumps(_once(cases[settings.only], settings)))
        return
    prepare(settings)
    chosen = [case for case in cases if not settings.cases or case in settings.cases.split(",")]
    runs: dict[str, list[dict[str, Any]]] = {case: [] for case in chosen}
    console = Console(stderr=True)
    order = [case for _ in range(settings.repeats) for case in chosen]
    for case in track(order, name, console=console, disable=not console.is_terminal):
        run = _child(case)
        if "missing" in run:
            console.print(f"{case}: left out, {run['missing']}", markup=False)
        runs[case].append(run)
    report = _report(name, settings, runs)
    _show(report)
    Path(settings.out).parent.mkdir(parents=True, exist_ok=True)
    Path(settings.out).write_text(json.dumps(report, indent=1) + "\n")


def _once(case: Case, settings: Any) -> dict[str, Any]:
    try:
        job = case(settings)
        started = time.perf_counter()
        rows = job()
        seconds = time.perf_counter() - started
    except ImportError as error:
        return {"missing": f"{error.name} is not installed"}
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "rows": rows,
        "seconds": seconds,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss / 1024,
    }


def _child(case: str) -> dict[str, Any]:
    command = [sys.executable, *sys.argv, "--only", case]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    if done.returncode:
        raise SystemExit(f"{case} failed:\n{done.stderr[-4000:]}")
    run: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return run


def _report(name: str, settings: Any, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    cases = {}
    base: float | None = None
    for case, all_of_it in runs.items():
        good = [run for run in all_of_it if "rows" in run]
        if not good:
            continue
        rates = [run["rows"] / run["seconds"] for run in good]
        base = base or statistics.median(rates)
        cases[case] = {
            "rows_per_s": round(statistics.median(rates), 1),
            "lowest": round(min(rates), 1),
            "highest": round(max(rates), 1),
            "ratio": round(statistics.median(rates) / base, 3),
            "peak_mb": round(statistics.median(run["peak_mb"] for run in good)),
            "runs": len(good),
        }
    hidden = ("only", "out", "cases", "work", "images")
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
    table = Table(title=f"{report['benchmark']}: rows/s, median of interleaved runs")
    for heading in ("case", "rows/s", "lowest", "highest", "ratio", "peak MB"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for case, figures in report["cases"].items():
        numbers = [f"{figures[key]:,.0f}" for key in ("rows_per_s", "lowest", "highest")]
        table.add_row(case, *numbers, f"{figures['ratio']:.2f}", f"{figures['peak_mb']:,}")
    Console(width=110).print(table)
