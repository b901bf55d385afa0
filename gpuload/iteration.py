"""One iteration over an epoch: a place enters; its batches leave, one by one, and the place moves with them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

from gpuload import ending
from gpuload.batch import Batch
from gpuload.errors import stopped
from gpuload.order.epochs import Epochs
from gpuload.order.state import Position

Start = Callable[[Position], tuple[int | None, Iterator[Any]]]


class Batches(Iterator[Any]):
    """What ``iter(dataset)`` gives: the batches of this rank from one place of an epoch to its end.

    Its place is its own: another iteration beside it, begun before or after, does not move it. Nothing runs before the
    first batch is asked for, and nothing after the last, an error, `close` or the end of its life.

    Parameters
    ----------
    epochs : Epochs
        Says where it begins, and is told where it ends.
    random : bool
        Whether each epoch has an order of its own.
    start : callable
        A place → how many steps there are from where its run began (None where nobody knows), and the batches.
    save : callable
        A place → a state.
    """

    _running: Iterator[Any] | None = None
    _closed = True  # until it has begun

    def __init__(self, epochs: Epochs, random: bool, start: Start, save: Callable[[Position], dict[str, Any]]) -> None:
        self._epochs, self._start, self._save = epochs, start, save
        self._place = epochs.begin(random)
        self._times = epochs.times
        self._steps: int | None = None
        self._left = self._closed = False
        self._lock = threading.RLock()  # one thread at a time: a generator runs in no two

    @property
    def alive(self) -> bool:
        """Whether a batch may follow."""
        return not self._left

    def state_dict(self) -> dict[str, Any]:
        """The place after the last batch that was taken from this iterator: a few scalars, ready for JSON.

        Raises
        ------
        TypeError
            The sampler is a foreign one.
        """
        return self._save(self._place)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Any:
        with ending.inside(), self._lock:
            try:
                made = _END if self._closed else self._advance()
            except StopIteration as error:  # of a sampler's or a decoder's
                raise stopped("LanceDataset") from error
        if made is _END:
            raise StopIteration
        return made

    def _advance(self) -> Any:
        """The next batch, `_END` after the last."""
        try:
            if self._running is None:
                self._steps, self._running = self._start(self._place)
                _running.add(self._running)
            made: Any = next(self._running, _END)
        except BaseException:
            self.close()
            raise
        if made is _END:
            if self._steps is not None and self.alive:  # the last rows may have been left out as bad ones
                self._place = self._place.after(self._place.before + self._steps - 1)
            self._leave(ended=True)
            self.close()
            return _END
        step, batch = (made.step, made) if isinstance(made, Batch) else made
        del made
        self._place = self._place.after(step)
        if self._place.taken == self._steps:  # the last one is the end, whether another is asked for or not
            self._leave(ended=True)
        return batch

    def close(self) -> None:
        """End what runs, once a batch that another thread is waiting for is there. No batch follows."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        running, self._running = self._running, None
        try:
            if running is not None:
                running.close()  # type: ignore[attr-defined]  # a generator
        finally:
            _running.discard(running)
            self._leave(ended=False)

    def __del__(self) -> None:
        if threading.current_thread().name.startswith("gpuload-"):  # a cycle may be collected in any thread,
            threading.Thread(target=self.close, name="gpuload-close").start()  # and none can wait for its own end
        else:
            self.close()

    def _leave(self, ended: bool) -> None:
        if not self._left:
            self._left = True
            self._epochs.leave(self._place, ended, self._times)


_END = object()
_running: set[Any] = set()  # held here, so that the garbage collector closes none of them in the thread it runs in
