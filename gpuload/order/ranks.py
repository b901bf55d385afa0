"""Which of how many processes this is: explicit numbers, torch.distributed or torchrun's environment enter."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch.distributed

from gpuload.errors import ConfigError, expect_int


@dataclass(frozen=True)
class Ranks:
    """Where rank and world size come from.

    Attributes
    ----------
    rank, world_size : int or None
        Explicit ones come first.
    detect : bool
        Otherwise ask torch.distributed if it is initialised, else RANK and WORLD_SIZE, which torchrun sets. Without
        either, or with False, this is the only process.
    """

    rank: int | None = None
    world_size: int | None = None
    detect: bool = True

    def __post_init__(self) -> None:
        if (self.rank is None) != (self.world_size is None):
            raise ConfigError(f"Expected rank and world_size, or neither; got {self.rank} and {self.world_size}.")
        if self.rank is None or self.world_size is None:
            return
        expect_int(rank=self.rank, world_size=self.world_size)
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"Expected 0 <= rank < world_size, got rank={self.rank}, world_size={self.world_size}.")

    def __reduce__(self) -> tuple[type[Ranks], tuple[int, int, bool]]:
        """What leaves the process keeps its numbers: a DataLoader worker has no process group of its own."""
        return Ranks, (*self.resolve(), False)

    def resolve(self) -> tuple[int, int]:
        """(rank, world size) of this process, now."""
        if self.rank is not None and self.world_size is not None:
            return int(self.rank), int(self.world_size)
        if not self.detect:
            return 0, 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        found = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
        if found[0] is None or found[1] is None:
            return 0, 1
        try:
            return int(found[0]), int(found[1])
        except ValueError:
            raise ConfigError(f"Expected RANK and WORLD_SIZE as integers in the environment, got {found}.") from None
