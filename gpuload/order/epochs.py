"""Which epoch comes next: what was set, loaded and run to its end enters; where an iteration starts leaves."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.utils.data import get_worker_info

from gpuload.order.foreign import follow, told
from gpuload.order.state import Position


class Epochs:
    """The epochs of one dataset in this process.

    An epoch that ran to its end is followed by the next one; one that was left early starts again. `set` decides
    otherwise, and so does `set_epoch` of the sampler that was given. DataLoader workers see what their parent sets, as
    it is in shared memory; they never go on to the next epoch by themselves, because how far the loop came is not
    known to them.

    Parameters
    ----------
    given : lance.sampler.Sampler or None
        A sampler of the user's, which keeps its own epoch as well.
    """

    def __init__(self, given: Any = None) -> None:
        shared = torch.zeros(4, dtype=torch.int64)
        shared.share_memory_()  # type: ignore[no-untyped-call]
        self._epoch = shared[0]
        self._times = shared[1]  # that an epoch was set, in this process or in the parent of this worker
        self._elsewhere = shared[2]  # 1 while workers read this epoch, whose place nobody here knows
        self._read = shared[3]  # 1 + the epoch of which the first worker has read its share to the end
        self._given = given
        heard = told(given)
        self._told = None if heard and any(heard) else heard  # by `given`, when it was last looked at
        self._seen = 0  # `_times`, when what follows was true
        self._here: int | None = None  # the next epoch, where this process knows it better than `_epoch`
        self._loaded: Position | None = None  # where the next iteration starts
        self._after = 0  # an epoch that was set before the loaded place, and comes after it
        self._last = Position()  # where the last iteration stands that is over, or the loaded place
        self._ended = False  # whether that is the end of its epoch

    def now(self) -> int:
        """The epoch of the next iteration."""
        heard = self._heard()
        if heard is not None:
            return heard
        if self._here is not None and int(self._times) == self._seen:
            return self._here
        return int(self._epoch)

    def place(self) -> Position | None:
        """Where the last iteration ended, or the loaded place; the start of an epoch that was set since then. None
        where DataLoader workers read."""
        if int(self._elsewhere) and get_worker_info() is None:
            return None
        if self._changed() and (self._ended or self._last.epoch != self.now()):
            return Position(self.now())
        return self._last

    def set(self, epoch: int) -> None:
        """The epoch of the next iteration. Keeps a place loaded in it."""
        if epoch != self.now():
            self._elsewhere.fill_(0)
        kept = self._loaded is not None and self._loaded.epoch == epoch and not self._changed()
        if not kept and (self._ended or self._loaded is not None):
            self._last, self._ended = Position(epoch), False
        if hasattr(self._given, "set_epoch"):
            self._given.set_epoch(epoch)
            self._told = told(self._given)
        self._write(epoch)
        if kept:
            self._here, self._seen = epoch, int(self._times)
        else:
            self._loaded, self._here, self._after = None, None, 0

    def load(self, place: Position, ended: bool) -> None:
        """Start the next iteration at `place`; where it is the end of its epoch, with the next epoch.

        An epoch that was set before comes after it: torchdata's StatefulDataLoader loads when it is iterated, after the
        loop's `set_epoch`. If that is the very epoch of the place, its rest is what the loop asks for, even if nothing
        is left of it.
        """
        if self._changed():
            self._after = self.now()
            ended = ended and self._after != place.epoch
        elif self._loaded is None:
            self._after = 0
        self._told = told(self._given)  # what it was told before is older than this
        self._here = max(place.epoch + 1, self._after) if ended else place.epoch
        self._loaded, self._last, self._ended = place, place, False
        self._seen = int(self._times)
        self._elsewhere.fill_(0)
        self._read.fill_(0)

    def begin(self, random: bool) -> Position:
        """The place where an iteration starts: the loaded one, once, or the start of the epoch. `random` is whether
        each epoch has an order of its own."""
        worker = get_worker_info()
        epoch, kept = self.now(), not self._changed()
        place = self._loaded if kept and self._loaded is not None and self._loaded.epoch == epoch else Position(epoch)
        if worker and worker.id == 0 and random and int(self._read) == epoch + 1:
            warnings.warn(_AGAIN.format(epoch), stacklevel=4)
        self._told, self._loaded, self._seen = told(self._given), None, int(self._times)
        self._after = self._after if kept else 0
        self._here = max(epoch, self._after) if worker else epoch  # torchdata's workers begin twice after an end
        self._elsewhere.fill_(worker is not None)
        return place

    def leave(self, place: Position, ended: bool, times: int) -> None:
        """An iteration is over at `place`, the end of its epoch or not; `times` is what it was when it began."""
        worker = get_worker_info()
        if self._loaded is None:
            self._last, self._ended = place, ended
        if ended and worker is not None and worker.id == 0:
            self._read.fill_(place.epoch + 1)
        chosen = self._loaded is not None or self._heard() is not None or self.times != times
        if ended and worker is None and not chosen and self.now() == place.epoch:
            self._write(max(place.epoch + 1, self._after))
            self._here, self._after, self._seen = None, 0, self.times
            follow(self._given, int(self._epoch))
            self._told = told(self._given)

    @property
    def times(self) -> int:
        """How often an epoch was set, by anyone."""
        return int(self._times)

    def _write(self, epoch: int) -> None:
        self._epoch.fill_(epoch)
        self._times.add_(1)
        self._read.fill_(0)

    def _changed(self) -> bool:
        """Whether another epoch was set, here or in the parent, or the given sampler was told one."""
        return self.times != self._seen or self._heard() is not None

    def _heard(self) -> int | None:
        """The epoch that the given sampler was told since it was last looked at."""
        heard = told(self._given)
        return None if heard is None or heard == self._told else heard[-1]


_AGAIN = (
    "Epoch {} is read again by DataLoader workers, in the same random order: they do not know when the loop has "
    "finished an epoch. Call dataset.set_epoch(n) before each epoch, or use num_workers=0, where each epoch is "
    "followed by the next one."
)
