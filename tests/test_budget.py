"""Readahead bounded by bytes: counted, not timed."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from making import claiming, encode, jpeg, judged, picture

from gpuload import ConfigError, DecodeError, Image, LanceDataset, Ragged
from gpuload.images.decode import room
from gpuload.images.decode.arena import Slot
from gpuload.images.decode.cpu import CpuDecoder
from gpuload.stages import Budget, Room, ordered_map

pytestmark = pytest.mark.filterwarnings("ignore::gpuload.BadRowWarning")  # met on purpose in some tests here


def read_ahead(path: str, readahead_bytes: int, **options: Any) -> int:
    """The most batches under way beyond those the loop has taken, with time enough to get further."""
    with LanceDataset(path, 5, batch_readahead=6, readahead_bytes=readahead_bytes, device="cpu", **options) as dataset:
        most = 0
        for taken, _ in enumerate(dataset, 1):
            time.sleep(0.03)
            most = max(most, int(dataset.stats()["stages"]["read"]["items"]) - taken)
        return most


@pytest.fixture
def pictures(store: Callable[..., str]) -> str:
    return store({"image": [encode(picture(60, 80, seed=i), "JPEG") for i in range(60)]})


@pytest.mark.parametrize(
    ("options", "batch"),
    [
        ({"transforms": {"image": Image(100, dtype=torch.float32)}}, 5 * 3 * 100 * 100 * 4),
        ({}, 5 * 3 * 60 * 80),  # at their own size: known once the first is decoded
        ({"to_tensor_fn": None}, 5 * 1500),  # less than the files take
    ],
)
def test_batches_under_way_fit_the_bytes(pictures: str, options: dict[str, Any], batch: int) -> None:
    assert read_ahead(pictures, 1, **options) <= 1
    assert read_ahead(pictures, 3 * batch, **options) <= 3
    assert read_ahead(pictures, 1 << 30, **options) >= 4


def test_the_same_batches_whatever_the_bytes(pictures: str) -> None:
    def rows(readahead_bytes: int) -> list[torch.Tensor]:
        options: dict[str, Any] = {"transforms": {"image": Image(16)}, "shuffle": True}
        return [batch["image"] for batch in LanceDataset(pictures, 7, readahead_bytes=readahead_bytes, **options)]

    for one, other in zip(rows(1), rows(1 << 30), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_largest_item_counts() -> None:
    budget = Budget(iter(range(100)), 100)
    assert budget.limit() == 1
    next(budget)
    budget.weigh(20)
    assert budget.limit() == 2  # the first is not out yet
    budget.leave()
    assert budget.limit() == 5
    budget.weigh(50)
    budget.weigh(10)
    assert budget.limit() == 2
    budget.weigh(1000)
    assert budget.limit() == 1


def test_a_budget_never_stops_the_line() -> None:
    budget: Budget[int] = Budget(range(50), 1)

    def work(i: int) -> int:
        budget.weigh(1000)
        return i

    got = []
    for i in ordered_map(work, budget, threads=3, ahead=9, name="read"):
        budget.leave()
        got.append(i)
    assert got == list(range(50))


def busiest(path: str, readahead_bytes: int, **options: Any) -> tuple[int, int]:
    """The most images, and the most of their pixels, that were decoded at the same time."""

    class Counting(CpuDecoder):
        """Decodes nothing and takes its time."""

        def decode(self, encoded: Any, headers: Any, windows: Any = None, scales: Any = None) -> Ragged:
            pixels = (headers["height"].astype(np.int64) * headers["width"]).sum()
            with lock:
                now.append((len(headers), int(pixels)))
                most.append(tuple(np.sum(now, axis=0).tolist()))
            time.sleep(0.02)
            with lock:
                now.remove((len(headers), int(pixels)))
            return Ragged.of([DecodeError("none")] * len(headers))

    lock, now, most = threading.Lock(), list[tuple[int, int]](), list[tuple[int, ...]]()
    decoder: Any = Counting()
    options |= {"device": "cpu", "decoder": decoder, "num_threads": 4, "on_error": "mask"}
    assert list(LanceDataset(path, 16, readahead_bytes=readahead_bytes, **options))
    images, pixels = np.max(most, axis=0).tolist()
    return images, pixels


@pytest.mark.parametrize("size", [8, None])
def test_what_is_decoded_at_once_fits_the_bytes_by_its_pixels(store: Callable[..., str], size: int | None) -> None:
    """2 KB each, of which the header says 9 million pixels: Pillow would take 14 bytes for each."""
    path = store({"image": [claiming(jpeg(40, 40), 3000, 3000)] * 16})
    options: dict[str, Any] = {"transforms": {"image": Image(size)}}
    assert busiest(path, 100 << 20, **options)[0] == 1, "one above the bytes is decoded alone"
    most = 1 << 30
    assert 2 <= busiest(path, most, **options)[1] <= most // 14


def test_small_images_are_decoded_on_all_threads_in_whole_slices(
    pictures: str,
) -> None:
    images, _ = busiest(pictures, 1 << 30, transforms={"image": Image(8)})
    assert images == 4 * 2  # of batches of 16, an eighth a slice


def test_images_that_a_row_holds_as_paths_count(store: Callable[..., str], tmp_path: Path) -> None:
    rows = []
    for i in range(30):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(200, 200, i, quality=100))
        rows.append({"bytes": None, "path": str(tmp_path / f"{i}.jpg")})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    path = store(pa.table({"image": pa.array(rows, kind)}))
    options: dict[str, Any] = {"transforms": {"image": Image(8)}}
    assert read_ahead(path, 5 * 60_000, **options) <= 1
    assert read_ahead(path, 1 << 30, **options) >= 3


def test_work_waits_for_room_and_what_is_larger_than_all_runs_alone() -> None:
    room, at_once, most, lock = Room(lambda: 100), [0], [0], threading.Lock()

    def work(size: int) -> None:
        with room.of(size):
            with lock:
                at_once[0] += size
                most[0] = max(most[0], at_once[0])
                assert at_once[0] <= 100 or at_once[0] == size
            time.sleep(0.002)
            with lock:
                at_once[0] -= size

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [30, 30, 30, 500, 30, 100, 0, 30, 200, 70] * 4))
    assert most[0] == 500
    assert at_once == [0]


@pytest.mark.parametrize(
    ("make", "a_pixel"),
    [
        (lambda: jpeg(400, 400), (3, 4)),  # a row of blocks more
        (lambda: encode(picture(400, 400, mode="L"), "JPEG"), (1, 1.2)),
        (lambda: jpeg(400, 400, progressive=True), (9, 10)),
        (lambda: claiming(jpeg(40, 40), 4000, 4000), (14, 22)),  # libjpeg warns, Pillow decodes
        (lambda: encode(picture(400, 400), "PNG"), (14, 22)),
        (lambda: encode(picture(400, 400), "WEBP"), (22, 30)),
        (lambda: b"no image", (0, 0)),
    ],
)
def test_headers_say_what_decoding_takes(make: Callable[[], bytes], a_pixel: tuple[float, float]) -> None:
    encoded, headers, _ = judged([make(), None], max_pixels=1 << 30)
    pixels = int(headers["height"][0]) * int(headers["width"][0])
    found = room.decoding(headers, encoded.size, None)
    assert found[1] == 0
    assert a_pixel[0] * pixels <= found[0] <= a_pixel[1] * pixels


def test_on_a_gpu_slices_are_parts_of_the_bytes_and_whole_batches_where_they_fit(store: Callable[..., str]) -> None:
    seen: list[int] = []

    class Batches(CpuDecoder):
        whole_batches = True

        def decode(self, encoded: Any, headers: Any, windows: Any = None, scales: Any = None) -> Ragged:
            seen.append(len(headers))
            return super().decode(encoded, headers, windows, scales)

    decoder: Any = Batches()
    path = store({"image": [jpeg(100, 100, i) for i in range(16)]})
    for readahead_bytes, slices in ((1 << 30, [16]), (16 * 100 * 132 * 3 * 4, [8] * 2), (8 * 100 * 132 * 3, [1] * 16)):
        seen.clear()
        options: dict[str, Any] = {"device": "cpu", "decoder": decoder, "readahead_bytes": readahead_bytes}
        list(LanceDataset(path, 16, **options))
        assert len(seen) >= len(slices)
        assert max(seen) <= slices[0]


_PEAK = """
import sys, torch
from gpuload import Image, LanceDataset
def status(word):
    return next(int(line.split()[1]) >> 10 for line in open("/proc/self/status") if line.startswith(word))
options = dict(transforms={"image": Image(8)}, device="cpu", num_threads=4, on_error="mask", max_pixels=10**8)
for path in sys.argv[1:]:
    before = status("VmRSS")
    for batch in LanceDataset(path, 16, readahead_bytes=100 << 20, **options):
        assert batch.valid.all()
    print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_batch_of_large_images_takes_the_memory_of_one(store: Callable[..., str]) -> None:
    """16 files of 2 KB that claim 9 million pixels each, for crops of 8: 1.2 GB if all of them were there at once."""
    small = store({"image": [jpeg(40, 40)] * 16})
    large = store({"image": [claiming(jpeg(40, 40), 3000, 3000)] * 16})
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, small, large], capture_output=True, text=True, timeout=120, check=True
    )
    assert int(done.stdout.split()[1]) < 400  # MiB; 14 bytes a pixel are 120


def test_large_memory_goes_back_when_small_images_follow() -> None:
    slot = Slot(torch.device("cpu"), None)
    assert len(slot.arena(300 << 20)) >= 300 << 20
    assert len(slot.arena(100 << 20)) >= 300 << 20, "batches vary"
    assert len(slot.arena(1 << 20)) < 64 << 20
    decoder = CpuDecoder(1 << 30)
    for file, least, most in ((claiming(jpeg(40, 40), 4000, 4000), 48_000_000, 1 << 30), (jpeg(40, 40), 0, 2 << 20)):
        encoded, headers, _ = judged([file], max_pixels=1 << 30)
        assert least <= len(decoder.decode(encoded, headers).arena) <= most


def test_the_default_is_a_gibibyte_and_more_on_a_large_gpu(pictures: str, device: str) -> None:
    found = LanceDataset(pictures, 5, device=device).readahead_bytes
    assert found == 1 << 30 if device == "cpu" else found >= 1 << 30


@pytest.mark.parametrize("value", [0, -1, True, 1.5])
def test_readahead_bytes_is_checked(pictures: str, value: Any) -> None:
    with pytest.raises(ConfigError, match="readahead_bytes"):
        LanceDataset(pictures, 5, readahead_bytes=value)
