"""All CPU benchmarks, one after the other, each with its cases interleaved; then the README's figures.

``python benchmarks/run_all.py [--images FOLDER] [--rows N] [--repeats N] [--only cpu,read,runs,scaling,host]``
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import data
import figures
from task import TASKS

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", default=None, help="a folder of photos; generated pictures without it")
    parser.add_argument("--rows", type=int, default=data.ARGUMENTS["rows"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", default=data.ARGUMENTS["work"], help="where the data is made, once")
    parser.add_argument("--only", default="cpu,read,runs,scaling,host")
    settings = parser.parse_args()
    common = ["--rows", str(settings.rows), "--work", settings.work]
    common += ["--images", settings.images] if settings.images else []
    chosen = settings.only.split(",")
    runs = [["bench_cpu.py", "--task", task] for task in TASKS] if "cpu" in chosen else []
    runs += [["bench_read.py", "--version", version] for version in ("2.0", "2.1", "2.2")] if "read" in chosen else []
    runs += [["bench_runs.py", "--no-memory"]] if "runs" in chosen else []
    runs += [["bench_scaling.py", "--no-memory"]] if "scaling" in chosen else []
    runs += [["bench_host.py", "--no-memory", "--rows", "40960"]] if "host" in chosen else []  # small ones
    for name, *options in runs:
        repeats = ["--repeats", str(settings.repeats)]
        subprocess.run([sys.executable, str(HERE / name), *common, *repeats, *options], check=True)
    figures.main()


if __name__ == "__main__":
    main()
