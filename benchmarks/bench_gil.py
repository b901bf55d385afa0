"""How much of the GIL the line takes from a training loop: 4,000 rows/s of photos, in batches of 128, as on a GPU.

A thread runs pure Python and counts, first alone, then while the line delivers to a decoder that takes no time (whole
batches a call, as a GPU's). What is left of its speed is what a training loop keeps, which needs the GIL to launch
kernels. Then, without that thread, py-spy says where the GIL is held: milliseconds a batch, by place in the code.

Counting wants a core for itself: the line has the others to itself where there are two or more, and `cores` says how
many it kept busy. On a machine whose cores are busy with something else the figure means nothing; `alone` is measured
before and after, and `steady` is the lower of them over the higher.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import data
import harness
import reports

CASES = ("image", "image, shuffle=row", "image and caption")
SAMPLES = 500  # a second


class Blank:
    """A decoder for whole batches that takes no time: every image is the same pixel."""

    name, whole_batches = "blank", True

    def __init__(self) -> None:
        import torch

        self.device = torch.device("cpu")
        self._pixel = torch.full((3,), 128, dtype=torch.uint8)

    def decode(self, encoded: Any, headers: Any, windows: Any) -> Any:
        import numpy as np

        from gpuload.images import PIXELS, Ragged, put_whole

        table = np.zeros(len(encoded), PIXELS)
        put_whole(table, 1, 1, 3, 1)
        return Ragged(self._pixel, table)

    def counts(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        pass


def line(settings: Any, case: str) -> Iterator[int]:
    """The sizes of the line's batches, at most `rate` rows a second, for `seconds`."""
    from gpuload import Image, LanceDataset, Text

    transforms: dict[str, Any] = {"image": Image(8, crop="random", flip=0.5)}
    if case.endswith("caption"):
        transforms["caption"] = Text(data.tokenizer(settings), max_length=77, padding="max_length")
    dataset = LanceDataset(
        data.dataset(settings), settings.batch_size, columns=list(transforms), transforms=transforms, device="cpu",
        decoder=Blank(), shuffle="row" if "shuffle" in case else False, drop_last=True,
    )  # fmt: skip
    for _ in dataset:  # files, threads, first batches
        pass
    began, rows = time.perf_counter(), 0
    with dataset:
        while time.perf_counter() - began < settings.seconds:
            for batch in dataset:
                yield batch.size
                rows += batch.size
                time.sleep(max(0.0, began + rows / settings.rate - time.perf_counter()))
                if time.perf_counter() - began >= settings.seconds:
                    break


class Counting:
    """A thread that does nothing but pure Python."""

    def __init__(self) -> None:
        self._stop, self.count, self.cpu = False, 0, 0.0
        self._thread = threading.Thread(target=self._run, name="counting")

    def _run(self) -> None:
        began = time.thread_time()
        while not self._stop:
            for _ in range(1000):
                pass
            self.count += 1000
        self.cpu = time.thread_time() - began

    def __enter__(self) -> Counting:
        self._began = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop = True
        self._thread.join()
        self.rate = self.count / (time.perf_counter() - self._began)


def alone(seconds: float) -> float:
    with Counting() as counting:
        time.sleep(seconds)
    return counting.rate


def share_left(settings: Any, case: str) -> dict[str, float]:
    """What the counting thread keeps of its speed."""
    batches = line(settings, case)
    next(batches)
    before = alone(settings.seconds / 2)
    used, began, rows = time.process_time(), time.perf_counter(), 0
    with Counting() as counting:
        for size in batches:
            rows += size
    seconds, used = time.perf_counter() - began, time.process_time() - used
    after = alone(settings.seconds / 2)
    return {
        "left": counting.rate * 2 / (before + after),
        "rows_per_s": rows / seconds,
        "cores": (used - counting.cpu) / seconds,
        "steady": min(before, after) / max(before, after),
    }


def held(settings: Any, case: str) -> dict[str, Any]:
    """Milliseconds a batch with the GIL held, by place in the code, as py-spy samples them."""
    spy = shutil.which("py-spy") or str(Path(sys.executable).with_name("py-spy"))
    if not os.path.exists(spy):
        return {}
    child = [sys.executable, *sys.argv, "--only", case]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(child, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) as ran,
    ):
        out = Path(folder, "stacks.txt")
        assert ran.stdout is not None
        ran.stdout.readline()  # the imports are over, and the first epoch
        seconds = max(1, int(settings.seconds) - 1)
        options = f"--gil --threads --nonblocking --rate {SAMPLES} --duration {seconds} --format raw --output {out}"
        subprocess.run([spy, "record", *options.split(), "--pid", str(ran.pid)], check=True, capture_output=True)
        batches_per_s = json.loads(ran.stdout.readline())
        stacks = [line.rpartition(" ") for line in out.read_text().splitlines()]
    places: Counter[str] = Counter()
    for frames, _, count in stacks:
        places[_place(frames.split(";"))] += int(count)
    each = {place: 1000 * n / SAMPLES / seconds / batches_per_s for place, n in places.most_common()}
    return {
        "gil_ms_a_batch": sum(each.values()),
        "places": {name: round(ms, 4) for name, ms in list(each.items())[:20]},
    }


def _place(frames: list[str]) -> str:
    """The innermost function of gpuload's own, or of Lance's, on a stack."""
    inner = [frame for frame in frames if "gpuload/" in frame or "kernels/" in frame]
    return inner[-1].split(":")[0] if inner else frames[-1]


def main() -> None:
    options = {**data.ARGUMENTS, "rows": 3072, "batch_size": 128, "rate": 4000.0, "seconds": 6.0}
    settings = harness.arguments(options)
    if settings.only:  # what py-spy watches: the line alone
        batches = line(settings, settings.only)
        next(batches)
        print("ready", flush=True)
        began = time.perf_counter()
        print(sum(1 for _ in batches) / (time.perf_counter() - began), flush=True)
        return
    data.dataset(settings)
    data.tokenizer(settings)
    found = {}
    for case in CASES:
        runs = [share_left(settings, case) for _ in range(settings.repeats)]
        middle = sorted(run["left"] for run in runs)
        found[case] = {
            "left": middle[len(middle) // 2],
            "lowest": middle[0],
            "highest": middle[-1],
            **{name: min(run[name] for run in runs) for name in ("rows_per_s", "steady")},
            "cores": max(run["cores"] for run in runs),
            **held(settings, case),
        }
        print(case, json.dumps(found[case], indent=1))
    report = {"benchmark": "gil", "machine": harness.machine(), "settings": {"rate": settings.rate}, "cases": found}
    reports.write(Path(settings.out or harness.RESULTS / "gil.json"), report)


if __name__ == "__main__":
    main()
