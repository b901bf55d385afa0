"""Which of how many processes this is: explicit numbers, torch.distributed or torchrun's environment enter."""

from __future__ import annotations

import os
import sys
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


_DEPTH = 16  # frames from a loader's loop down to iter(dataset)
_FRAMEWORKS = ("accelerate.", "transformers.")


def check_wrappers(world_size: int) -> None:
    """Raise if the loop that has just called ``iter(dataset)`` would divide its batches among the ranks again.

    Accelerate, and transformers with it, wrap a loader of any IterableDataset: ``DataLoaderDispatcher`` reads on rank
    0 alone and cuts its batches up, ``IterableDatasetShard`` keeps every n-th batch of what is this rank's already.
    Neither tells the dataset; they are on the stack.

    Raises
    ------
    ConfigError
    """
    frame = sys._getframe(1)
    for _ in range(_DEPTH):
        if frame.f_back is None:
            return
        frame = frame.f_back
        if not frame.f_globals.get("__name__", "").startswith(_FRAMEWORKS):
            continue
        wrapper = frame.f_locals.get("self")
        kind = getattr(type(wrapper), "__name__", "")
        ranks = getattr(wrapper, "num_processes", 1)
        if kind == "DataLoaderDispatcher" or (kind == "IterableDatasetShard" and ranks > 1 and world_size > 1):
            what = "read on rank 0 and cut up" if kind == "DataLoaderDispatcher" else f"divided by {ranks} once more"
            raise ConfigError(
                f"Expected LanceDataset as the loader itself, got it inside {kind}: its batches, which are this rank's "
                f"own, would be {what}. Leave it out of accelerator.prepare(...); in a transformers.Trainer return it "
                "from get_train_dataloader(). See the README, Frameworks."
            )
