"""Fixtures: the device to test on, Lance datasets made on disk, and a watch on threads that stay behind."""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a network, and none may wait for one

import lance
import pyarrow as pa
import pytest
import torch
from making import captions, encode, picture
from standin import SOURCE, StandIn

from gpuload import kernels

FOR_A_GPU = re.compile(r"mark\.gpu|\bdevice: str")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``-m gpu`` files without such tests are not imported: a GPU machine may lack what the others need."""
    if config.option.markexpr != "gpu" or not collection_path.name.startswith("test_"):
        return None
    return None if FOR_A_GPU.search(collection_path.read_text()) else True


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test marked `gpu` is skipped without one, and fails instead where GPULOAD_REQUIRE_GPU=1."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        reason = f"needs a CUDA device, torch {torch.__version__} sees none"
        if os.environ.get("GPULOAD_REQUIRE_GPU") == "1":
            pytest.fail(f"GPULOAD_REQUIRE_GPU=1, but this test {reason}", pytrace=False)
        pytest.skip(reason)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The device a `LanceDataset` is asked for, one after the other."""
    return str(request.param)


def gpuload_threads() -> set[threading.Thread]:
    """The threads that gpuload started and that are still there."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("gpuload-")}


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    """Whatever a test does to a dataset, its threads end with it."""
    before = gpuload_threads()  # of a failed test, whose traceback keeps its iterators
    yield
    end = time.monotonic() + 5
    while gpuload_threads() - before and time.monotonic() < end:
        time.sleep(0.01)
    assert not gpuload_threads() - before, "gpuload's threads outlived the test"


@pytest.fixture
def store(tmp_path: Path) -> Callable[..., str]:
    """``store(columns, **lance_options) -> path``: a table, or a dict of column → values, as a Lance dataset."""
    made = 0

    def write(columns: pa.Table | dict[str, Any], **options: Any) -> str:
        nonlocal made
        made += 1
        table = columns if isinstance(columns, pa.Table) else pa.table(columns)
        path = str(tmp_path / f"{made}.lance")
        lance.write_dataset(table, path, **options)
        return path

    return write


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of 50 JPEG pictures of many sizes, their captions and numbers, in fragments of 7 rows.

    Columns: image (binary), prompt (string), number (int64, the row's position).
    """
    pictures = [picture(24 + 5 * (i % 7), 20 + 3 * (i % 11), seed=i) for i in range(50)]
    table = pa.table(
        {"image": [encode(p, "JPEG", quality=90) for p in pictures], "prompt": captions(50), "number": range(50)}
    )
    path = str(tmp_path_factory.mktemp("photos") / "photos.lance")
    lance.write_dataset(table, path, max_rows_per_file=7)
    return path


@pytest.fixture(scope="session")
def quick() -> Any:
    """A forkserver that has imported gpuload: DataLoader workers start at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gpuload"])
    return context


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds a library from the sources as they are now, with the flags of the installation and some more."""
    compiler, folder = shutil.which(os.environ.get("CXX", "g++")), Path(kernels.__file__).parent
    assert compiler, "Expected a C++ compiler to test the kernel source with, got none. Do: apt install g++, or set CXX"

    @cache
    def compiled(path: Path, *more: str) -> Path:
        target = tmp_path_factory.mktemp("build") / f"{path.stem}.so"
        command = [compiler, *kernels.flags.CXX, *more, f"-I{folder}", "-fPIC", "-shared", "-o", str(target)]
        built = subprocess.run([*command, str(path)], capture_output=True, text=True)
        assert built.returncode == 0, built.stderr
        return target

    return compiled


@pytest.fixture(scope="session")
def standin(build: Callable[..., Path]) -> StandIn:
    """The stand-in for libnvjpeg, compiled."""
    return StandIn(build(SOURCE, "-O1"))


@pytest.fixture
def card(standin: StandIn) -> Iterator[StandIn]:
    """A card with seven engines. Whatever a test does to it, the library's rules are kept, and nothing stays."""
    standin.library.standin_reset()
    yield standin
    assert not standin.broken()
    gc.collect()
    assert standin.count("alive") == 0
