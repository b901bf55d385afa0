"""Runs pytest and writes what it finds as it goes: arguments enter, a JSON file that a time limit cannot take leaves.

python benchmarks/gpu_tests.py correct.json -m gpu tests/test_gpu.py
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import reports


class Report:
    """A pytest plugin: the outcome of each test, its seconds, and the PSNR lines that it printed."""

    def __init__(self, path: Path) -> None:
        self.path, self.started = path, time.monotonic()
        self.found: dict[str, Any] = {"benchmark": "tests", "status": None, "seconds": 0.0}
        self.found |= {"collected": 0, "passed": 0, "skipped": 0, "failed": {}, "printed": [], "slowest": {}}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.found["collected"] = len(session.items)
        self.write()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.found["failed"][report.nodeid] = str(report.longrepr)[-300:]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.found["failed"][report.nodeid] = f"{report.when}: {report.longreprtext[-300:]}"
        elif report.skipped:
            self.found["skipped"] += 1
        elif report.when == "call":
            self.found["passed"] += 1
        if report.when == "call":
            self.found["printed"] += [line for line in report.capstdout.splitlines() if "PSNR" in line]
            times = {**self.found["slowest"], report.nodeid: round(report.duration, 2)}
            self.found["slowest"] = dict(sorted(times.items(), key=lambda item: -item[1])[:5])
        self.write()

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        self.found["status"] = int(exitstatus)
        self.write()

    def write(self) -> None:
        self.found["seconds"] = round(time.monotonic() - self.started, 1)
        reports.write(self.path, self.found)


if __name__ == "__main__":
    sys.exit(pytest.main(sys.argv[2:], plugins=[Report(Path(sys.argv[1]))]))
