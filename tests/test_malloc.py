"""The allocator's setting: freed blocks are kept for the next batch, and a switch leaves the allocator alone."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from gpuload.tables import malloc

_COUNT = """
import resource
import numpy as np
from gpuload.tables import malloc

print(malloc.tune(), malloc.tune())
np.ones(4 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.ones(4 << 20)  # 32 MiB each
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def count(setting: str | None) -> tuple[str, int]:
    """What `tune` answers twice, and the page faults of 20 blocks of 32 MiB, in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("GPULOAD_MALLOC", "MALLOC_"))}
    environment |= {"GPULOAD_MALLOC": setting} if setting else {}
    run = subprocess.run([sys.executable, "-c", _COUNT], env=environment, capture_output=True, text=True, check=True)
    answer, faults = run.stdout.splitlines()
    return answer, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_freed_blocks_are_kept_for_the_next_batch() -> None:
    answer, faults = count(None)
    assert answer == "True True"
    assert faults < 2_000  # one block is 8,192 pages of 4 KiB


def test_the_switch_leaves_the_allocator_alone() -> None:
    answer, _ = count("default")
    assert answer == "False False"


class Glibc:
    """A mallopt that takes no more than `most` for M_MMAP_THRESHOLD (-3); what it took."""

    def __init__(self, most: int) -> None:
        self.most, self.taken = most, dict[int, int]()

    def __call__(self, option: int, value: int) -> int:
        if option == -3 and value > self.most:
            return 0
        self.taken[option] = value
        return 1


def test_where_the_first_answer_is_no_nothing_is_set() -> None:
    """glibc up to 2.34: any other setting would end the adaptation of its thresholds."""
    old, new = Glibc(32 << 20), Glibc(2**62)
    assert not malloc.set_thresholds(old)
    assert old.taken == {}
    assert malloc.set_thresholds(new)
    assert new.taken == {-3: 1 << 30, -1: 2**31 - 1, -8: 2}
