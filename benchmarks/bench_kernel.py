"""The GPU kernels alone: planes to RGB, resize by variant, and both together; GB/s beside a copy, one JSON.

    python benchmarks/bench_kernel.py --out kernel.json

GB/s count what has to be read and written once: planes and RGB; the pixels of every image and the output. Each figure
is the median of interleaved rounds, as is the copy's. ``--device cpu`` runs the CPU builds, to try this file.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np
import reports
import torch

from gpuload import Image, Ragged, kernels
from gpuload.images import PIXELS, lay_out, put_whole, views
from gpuload.images.planes import PLANES, ycc_to_rgb
from gpuload.images.resize import affine, resize_normalize, rows
from gpuload.order.draws import Draws

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SAMPLINGS = {"444": (1, 1), "420": (2, 2)}
Job = tuple[Callable[[], Any], int]  # what to time, and the bytes it has to move


class Batch:
    """So many images of one size: planes, RGB and outputs on one device."""

    def __init__(self, megapixels: float, count: int, device: torch.device) -> None:
        self.count, self.device = count, device
        self.height = int((megapixels * 1e6 / 1.5) ** 0.5)
        self.width = self.height * 3 // 2
        self.table = np.zeros(count, PIXELS)
        put_whole(self.table, self.height, self.width, 3, 1)
        size = lay_out(self.table, range(count))
        self.arena = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
        self.beside, self.ragged = torch.empty_like(self.arena), Ragged(self.arena, self.table)
        self.stored = torch.randint(0, 256, (count * 3 * self.height * self.width,), dtype=torch.uint8, device=device)

    def copy(self) -> Job:
        return lambda: self.beside.copy_(self.arena), 2 * self.arena.nbytes

    def convert(self, sampling: str) -> Job:
        """`ycc_to_rgb` into the arena."""
        h, v = SAMPLINGS[sampling]
        planes, pixels = np.zeros(self.count, PLANES), self.height * self.width
        tall, wide = -(-self.height // v), -(-self.width // h)
        start = self.stored.data_ptr() + np.arange(self.count, dtype=np.uint64) * np.uint64(3 * pixels)
        planes["y"], planes["cb"] = start, start + np.uint64(pixels)
        planes["cr"] = start + np.uint64(pixels + tall * wide)
        planes["pitch_y"], planes["pitch_c"], planes["h"], planes["v"] = self.width, wide, h, v
        planes["height"], planes["width"] = self.height, self.width
        planes["out"], planes["out_pitch"] = self.table["offset"] + self.arena.data_ptr(), self.table["pitch"]
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        return lambda: ycc_to_rgb(planes, stream), self.count * (4 * pixels + 2 * tall * wide)

    def resize(self, size: int, interpolation: str, channels_last: bool, variant: str) -> Job:
        """One variant of the kernel, whole images, float16."""
        options: dict[str, Any] = {"channels_last": channels_last, "interpolation": interpolation}
        image = Image(size, crop="none", mean=MEAN, std=STD, dtype=torch.float16, **options)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        shape = (self.count, 3, size, size)
        out = torch.empty(shape, dtype=image.dtype, device=self.device, memory_format=layout)
        wanted = views.views(image, self.table, Draws(0, 0, np.arange(self.count)))
        table = rows(self.ragged, wanted, image, (size, size))

        def run() -> None:
            if self.device.type == "cuda":
                kernels.run_cuda(table, out, affine(image), interpolation, variant)
            else:
                resize_normalize(self.ragged, wanted, image, out)

        return run, self.count * self.height * self.width * 3 + out.nbytes


def jobs(batch: Batch, size: int, variants: list[str]) -> dict[str, Job]:
    """What is timed, the copy first."""
    found = {"copy": batch.copy()} | {f"convert {name}": batch.convert(name) for name in SAMPLINGS}
    for variant in variants:
        for layout in (False, True):
            name = f"bilinear {'channels-last' if layout else 'contiguous'} {variant}"
            found[name] = batch.resize(size, "bilinear", layout, variant)
    for filtered in ("bicubic", "nearest"):
        found[f"{filtered} contiguous"] = batch.resize(size, filtered, False, kernels.VARIANT)
    (convert, read), (resize, written) = found["convert 420"], batch.resize(size, "bilinear", False, kernels.VARIANT)
    found["convert 420, bilinear"] = (lambda: (convert(), resize()), read + written)
    return found


def seconds(job: Callable[[], Any], device: torch.device, least: float) -> float:
    """Of one call, of as many in a row as take `least` seconds; on a GPU between two events."""
    count = 1
    while True:
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
        started = time.perf_counter()
        for _ in range(count):
            job()
        if device.type == "cuda":
            end.record()
            torch.cuda.synchronize(device)
        took = begin.elapsed_time(end) / 1e3 if device.type == "cuda" else time.perf_counter() - started
        if took >= least or count >= 1000:
            return took / count
        count *= 2


def measure(batch: Batch, settings: Any) -> dict[str, dict[str, float]]:
    """Name → microseconds, GB/s, and the share of the copy's."""
    device, wanted = batch.device, jobs(batch, settings.size, settings.variants.split(","))
    times: dict[str, list[float]] = {name: [] for name in wanted}
    for job, _ in wanted.values():
        job()  # compiles
    for _ in range(settings.rounds):
        for name, (job, _) in wanted.items():
            times[name].append(seconds(job, device, settings.seconds))
    rates = {name: wanted[name][1] / statistics.median(taken) / 1e9 for name, taken in times.items()}
    return {
        name: {
            "us": round(statistics.median(times[name]) * 1e6, 1),
            "gb_s": round(rate, 1),
            "of_copy": round(rate / rates["copy"], 3),
        }
        for name, rate in rates.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megapixels", default="0.2,1,12")
    parser.add_argument("--counts", default="128,128,32", help="images of each size")
    parser.add_argument("--size", type=int, default=224, help="of the output, pixels")
    parser.add_argument("--variants", default=",".join(kernels.VARIANTS), help="of the resize kernel")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.03, help="of one measurement, at least")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", default=str(harness.RESULTS / "kernel.json"))
    settings = parser.parse_args()
    device = torch.device(settings.device, 0) if settings.device == "cuda" else torch.device("cpu")
    report: dict[str, Any] = {"benchmark": "kernel", "machine": harness.machine(), "groups": {}}
    if device.type == "cuda":
        report["machine"] |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    for size, count in zip(settings.megapixels.split(","), settings.counts.split(","), strict=True):
        found = measure(Batch(float(size), int(count), device), settings)
        report["groups"][f"{size} MP, batch {count}"] = found
        reports.write(Path(settings.out), report)  # what is there survives a time limit
        for name, figures in found.items():
            rate = f"{figures['gb_s']:8,.1f} GB/s {figures['of_copy']:6.3f}"
            print(f"{size:>4} MP  {name:36} {figures['us']:10,.1f} us {rate}")


if __name__ == "__main__":
    main()
