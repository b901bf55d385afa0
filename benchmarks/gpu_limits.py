"""What no loader can pass on a GPU: the JPEG engine called directly, all but decoding, a copy of the pixels."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from gpu_setup import IMAGE, Pass, Setup, on_threads
from numpy.typing import NDArray

from gpuload import Encoded, LanceDataset, Ragged
from gpuload.images import PIXELS, headers, lay_out, put_whole
from gpuload.images.decode import libnvjpeg
from gpuload.images.decode.nvjpeg import samplings

_LANES = 2  # one handle fills seven engines; a second one spares it the wait between two calls
_RGB_INTERLEAVED = 5  # nvjpegOutputFormat_t
_ALIGN = 256  # bytes
_COPIES = 16  # batches between two waits for the device


class EngineLane:
    """A handle of nvJPEG's hardware backend, its states, and memory for what it decodes. For one thread at a time."""

    def __init__(self, card: Any, device: torch.device) -> None:
        self.stream = card.stream(device)
        self.handle = libnvjpeg.Handle(card.library, device, self.stream)
        self.memory = torch.empty(0, dtype=torch.uint8, device=device)
        self.states: dict[tuple[int, int], libnvjpeg.State] = {}  # by sampling and size

    def decode(self, encoded: Encoded, table: NDArray[np.void], planes: bool) -> int:
        """One call for the batch, or for each of its samplings; returns when it is done, the images."""
        to = self._places(table, planes)
        numbers = samplings(table) if planes else np.zeros(len(table), np.intp)
        for number in np.unique(numbers).tolist():
            group = np.flatnonzero(numbers == number)
            state = self.states.get((number, len(group)))
            if state is None:  # in the pass that is not measured: batches of few kinds come again and again
                output = libnvjpeg.PLANES if planes else _RGB_INTERLEAVED
                state = self.states[number, len(group)] = self.handle.state(len(group), output)
            state.data[:], state.lengths[:], state.to[:] = encoded.at[group], encoded.size[group], to[group]
            if not self.handle.decode(state):
                raise RuntimeError(f"nvJPEG refused a batch of {len(group)} images")
        self.stream.synchronize()
        return len(encoded)

    def _places(self, table: NDArray[np.void], planes: bool) -> NDArray[np.void]:
        """IMAGE[B]: where the engine writes RGB, or luma and chroma as they are stored."""
        height, width = table["height"].astype(np.int64), table["width"].astype(np.int64)
        to, pitches, sizes = np.zeros(len(table), libnvjpeg.IMAGE), [3 * width], [3 * width * height]
        if planes:
            wide, high = -(-width // table["h"][:, 0]), -(-height // table["v"][:, 0])
            pitches, sizes = [width, wide, wide], [width * height, wide * high, wide * high]
        room = [-(-size // _ALIGN) * _ALIGN for size in sizes]
        ends = np.cumsum(sum(room))
        if ends[-1] > len(self.memory):
            self.memory = torch.empty(int(ends[-1]), dtype=torch.uint8, device=self.memory.device)
        start = self.memory.data_ptr() + ends - sum(room)
        for channel, (pitch, size) in enumerate(zip(pitches, room, strict=True)):
            to["channel"][:, channel], to["pitch"][:, channel] = start, pitch
            start = start + size
        return to


def engine(planes: bool) -> Callable[[Setup], Pass]:
    """nvJPEG's hardware backend called directly on bytes in memory, decoding only: the files in colour that it takes,
    to RGB with chroma repeated, or to planes as they are stored, which takes a call a sampling."""

    def case(setup: Setup) -> Pass:
        if setup.card is None:
            raise RuntimeError("the JPEG engine is part of a GPU")
        if setup.card.library is None:
            raise libnvjpeg.no_library()
        lanes: queue.SimpleQueue[EngineLane] = queue.SimpleQueue()
        for _ in range(_LANES):
            lanes.put(EngineLane(setup.card, setup.device))
        takes = samplings(headers.read(Encoded.of(setup.unique))) > 0
        unique = [file for file, good in zip(setup.unique, takes, strict=True) if good]
        if not unique:
            raise RuntimeError("none of the photos is one that the engine takes")

        def work(encoded: Encoded, table: Any) -> int:
            lane = lanes.get()
            try:
                return lane.decode(encoded, table, planes)
            finally:
                lanes.put(lane)

        return on_threads(work, setup, _LANES, unique)

    return case


class Still:
    """A decoder that takes no time: it lays the images out, and whatever is in memory is taken for their pixels."""

    name, whole_batches = "still", True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def decode(self, encoded: Encoded, headers: NDArray[np.void], windows: Any = None) -> Ragged:
        table = np.zeros(len(encoded), PIXELS)
        channels = np.maximum(headers["channels"], 1)
        put_whole(table, headers["height"], headers["width"], channels, headers["orientation"])
        size = lay_out(table, np.arange(len(encoded)))
        return Ragged(torch.empty(size, dtype=torch.uint8, device=self.device), table)

    def counts(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        pass


def all_but_decoding(setup: Setup) -> Pass:
    """What reading, headers, layout and the resize kernel allow: gpuload with a decoder that takes no time."""
    chosen: dict[str, Any] = {"columns": ["image"], "transforms": {"image": IMAGE}, "device": str(setup.device)}
    dataset = LanceDataset(setup.lance(), setup.batch_size, decoder=Still(setup.device), **chosen)
    return lambda: (batch.size for batch in dataset)


def copy(setup: Setup) -> Pass:
    """The pixels of a batch copied once on the device: what its memory allows."""
    tables = [table for _, table in setup.batches()]
    most = max(int((table["height"].astype(np.int64) * table["width"] * 3).sum()) for table in tables)
    pixels = torch.zeros(most, dtype=torch.uint8, device=setup.device)
    there = torch.empty_like(pixels)

    def run() -> Iterator[int]:
        for _ in range(max(8, len(tables) // _COPIES)):
            for _ in range(_COPIES):
                there.copy_(pixels)
            setup.synchronize()
            yield _COPIES * setup.batch_size

    return run
