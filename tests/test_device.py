"""Devices, decoders and streams: which are chosen, what is said of missing ones, who waits for whom."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from making import by_row, encode, jpeg, picture

from gpuload import (
    ConfigError,
    DeviceError,
    Encoded,
    Image,
    LanceDataset,
    Ragged,
    Text,
    device,
)
from gpuload.images.decode import libnvjpeg
from gpuload.images.decode.choose import make_decoder
from gpuload.images.decode.cpu import CpuDecoder
from gpuload.images.decode.dali import DaliDecoder
from gpuload.images.decode.lanes import LaneDecoder
from gpuload.images.decode.nvimgcodec import NvImageCodecDecoder
from gpuload.images.decode.nvjpeg import NvJpegDecoder, default_share

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
pytestmark = pytest.mark.filterwarnings("ignore::gpuload.BadRowWarning")  # met on purpose in most tests here
Store = Callable[..., str]


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says that there are two, the second being current; there is no libnvjpeg to ask about their engines."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(libnvjpeg, "library", lambda: None)


@pytest.mark.usefixtures("two_gpus")
def test_cuda_without_a_number_is_the_current_device_of_the_caller() -> None:
    found = [str(device.choose_device(wish)) for wish in ("auto", "cuda", "cuda:0", torch.device("cuda:1"), "cpu")]
    assert found == ["cuda:1", "cuda:1", "cuda:0", "cuda:1", "cpu"]


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_is_not_there_is_an_error_with_a_line_to_do() -> None:
    with pytest.raises(DeviceError, match=r"'cuda:2', got 2 of them.*pip install \"gpuload\[cuda1[23]\]\""):
        device.choose_device("cuda:2")
    with pytest.raises(ConfigError, match="got 'tpu'"):
        device.choose_device("tpu")


def test_auto_is_the_cpu_without_a_gpu_and_in_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.choose_device("auto") == CPU
    monkeypatch.setattr(device, "get_worker_info", lambda: SimpleNamespace(id=0, num_workers=1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("a worker must not touch CUDA"))
    assert device.choose_device("auto") == CPU


@pytest.mark.parametrize(
    ("wish", "where", "kind", "name"),
    [
        ("auto", CPU, CpuDecoder, "cpu"),
        ("cpu", CPU, CpuDecoder, "cpu"),
        ("nvimgcodec", CPU, NvImageCodecDecoder, "nvimgcodec"),
        ("dali", CPU, DaliDecoder, "dali"),
        ("auto", CUDA, NvImageCodecDecoder, "nvimgcodec"),
        ("nvimgcodec:parity", CUDA, NvImageCodecDecoder, "nvimgcodec:parity"),
        ("dali:parity", CUDA, DaliDecoder, "dali:parity"),
        ("cpu", CUDA, LaneDecoder, "cpu"),
    ],
)
@pytest.mark.usefixtures("two_gpus")
def test_a_decoder_is_what_its_name_says(wish: str, where: torch.device, kind: type, name: str) -> None:
    made = make_decoder(wish, where, 1000, 4)
    assert type(made) is kind
    assert (made.name, made.device) == (name, where)


@pytest.mark.parametrize(("engines", "wish", "kind", "share"), [
    (7, "auto", NvJpegDecoder, default_share(16, 7)),
    (7, "nvjpeg", NvJpegDecoder, default_share(16, 7)),
    (1, "nvjpeg:alone", NvJpegDecoder, 0),
    (7, "nvimgcodec", NvImageCodecDecoder, None),
    (0, "auto", NvImageCodecDecoder, None),
])  # fmt: skip
@pytest.mark.usefixtures("two_gpus")
def test_the_decoder_of_a_card_depends_on_its_engines(
    engines: int, wish: str, kind: type, share: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libnvjpeg, "library", lambda: "libnvjpeg")
    monkeypatch.setattr(libnvjpeg, "engines", lambda library, where: engines if where == CUDA else 0)
    made: Any = make_decoder(wish, CUDA, 1000, 16)
    assert type(made) is kind
    if share is not None:
        assert made.name == "nvjpeg"
        assert made.facts()["engines"] == engines
        assert made.facts()["host_share"] == pytest.approx(share, abs=1e-4)


@pytest.mark.usefixtures("two_gpus")
def test_nvjpeg_without_an_engine_is_an_error_and_never_a_slower_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match=r'libnvjpeg for decoder="nvjpeg", got none.*pip install'):
        make_decoder("nvjpeg", CUDA, 1000)
    monkeypatch.setattr(libnvjpeg, "library", lambda: "libnvjpeg")
    monkeypatch.setattr(libnvjpeg, "engines", lambda library, where: 0)
    with pytest.raises(DeviceError, match='JPEG engine for decoder="nvjpeg", got cuda:0 without one'):
        make_decoder("nvjpeg", CUDA, 1000)


@pytest.mark.parametrize(
    ("package", "wish", "line"),
    [
        ("nvidia.nvimgcodec", "auto", "cuda1[23]"),
        ("nvidia.nvimgcodec", "nvimgcodec", "cuda1[23]"),
        ("nvidia.dali.fn", "dali", "dali1[23]"),
    ],
)
@pytest.mark.usefixtures("two_gpus")
def test_a_missing_decoder_is_an_error_and_never_a_slower_one(
    package: str, wish: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DeviceError, match=rf'pip install "gpuload\[{line}\]", or decoder="cpu"'):
        make_decoder(wish, CUDA, 1000)


@pytest.mark.parametrize(("cuda", "line"), [(None, "cuda13"), ("12.8", "cuda12"), ("13.0", "cuda13")])
def test_the_line_to_install_fits_torchs_cuda(cuda: str | None, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(DeviceError, match=rf'pip install "gpuload\[{line}\]"'):
        device.choose_device("cuda:99")


@pytest.mark.parametrize(
    ("name", "kind"), [("cpu", CpuDecoder), ("nvimgcodec", NvImageCodecDecoder), ("dali", DaliDecoder)]
)
def test_a_dataset_that_nobody_closes_takes_its_decoder_along(name: str, kind: type, photos: str) -> None:
    def alive() -> int:
        return sum(type(one) is kind for one in gc.get_objects())

    transforms = {"image": Image(8)}
    gc.collect()
    before = alive()
    dataset = LanceDataset(photos, 25, columns=["image"], transforms=transforms, device="cpu", decoder=name)
    gc.disable()  # on a GPU a decoder is gigabytes: it must not wait for the collector of cycles
    try:
        list(dataset)
        assert alive() == before + 1
        del dataset
        assert alive() == before
    finally:
        gc.enable()


def test_an_unknown_decoder_is_refused_when_the_dataset_is_made(photos: str) -> None:
    with pytest.raises(ConfigError, match=r"Expected decoder as one of .*nvimgcodec:parity.* got 'turbo'"):
        LanceDataset(photos, 4, device="cpu", decoder="turbo")


def test_without_images_no_package_is_needed(store: Store, two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    assert LanceDataset(store({"number": [1, 2]}), 2).stats()["decoder"] == "cpu"
    with pytest.raises(DeviceError, match="nvImageCodec"):
        LanceDataset(store({"image": [jpeg()]}), 2).stats()


# -- the decoders that a GPU uses, on the CPU, at the public surface -----------------------------------------------


OPTIONS: dict[str, Any] = {"columns": ["image", "number"], "batch_size": 16, "shuffle": True, "device": "cpu"}


@pytest.mark.parametrize("decoder", ["nvimgcodec", "nvimgcodec:parity", "dali"])
@pytest.mark.parametrize("image", [None, Image((20, 30), crop="random", flip=0.5, dtype=torch.uint8)])
def test_an_epoch_is_the_same_whatever_decodes(photos: str, decoder: str, image: Image | None) -> None:
    transforms = {} if image is None else {"image": image}
    expected = by_row(LanceDataset(photos, transforms=transforms, **OPTIONS), "image")
    dataset = LanceDataset(photos, transforms=transforms, decoder=decoder, num_threads=3, **OPTIONS)
    for _ in range(2):  # the second time with lanes that are there already
        dataset.set_epoch(0)
        found = by_row(dataset, "image")
        assert found.keys() == expected.keys()
        for row, pixels in found.items():
            # a window of an image and the whole one are resized around centres that differ in their last bits
            assert (pixels.int() - expected[row].int()).abs().max() <= (0 if image is None else 1)
    assert dataset.stats()["images"] == {decoder.partition(":")[0]: 100, "simplejpeg": 0, "pillow": 0, "failed": 0}
    assert f"decoder={decoder!r}" in repr(dataset)
    dataset.close()


@pytest.mark.parametrize("decoder", ["cpu", "nvimgcodec", "dali"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orient", [True, False])
def test_every_decoder_turns_images_alike(store: Store, decoder: str, kind: str, orient: bool) -> None:
    path = store({"image": [encode(picture(17, 23), kind, i) for i in range(1, 9)]})
    options: dict[str, Any] = {"transforms": {"image": Image(None, dtype=torch.uint8, orient=orient)}, "device": "cpu"}
    (expected,) = LanceDataset(path, 8, **options)
    (found,) = LanceDataset(path, 8, decoder=decoder, **options)
    for one, other in zip(found["image"], expected["image"], strict=True):
        assert torch.equal(one, other)


# -- the line as a GPU drives it, with streams that only take notes --------------------------------------------------


class NotedStreams:
    """What `Streams` do that say they are CUDA's; memory and work stay on the CPU."""

    notes: list[tuple[str, Any]] = []  # noqa: RUF012 - shared on purpose

    def __init__(self, device: torch.device) -> None:
        self.cuda, self.device, self.lock, self.count = True, device, threading.Lock(), 0

    def mark(self) -> int:
        with self.lock:
            self.count += 1
            self.notes.append(("mark", self.count))
            return self.count

    def share(self, tensor: torch.Tensor, event: int) -> None:
        assert tensor.dim() == 4
        self.notes.append(("share", event))

    def upload(self, columns: dict[str, Any]) -> int:
        assert not {"image", "other"} & columns.keys()
        columns.update({name: v.clone() for name, v in columns.items() if isinstance(v, torch.Tensor)})
        return self.mark()

    def after(self, event: int) -> None:
        self.notes.append(("after", event))

    def keep(self, columns: dict[str, Any]) -> None:
        self.notes.append(("keep", set(columns)))


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    NotedStreams.notes = []
    for name in ("__init__", "mark", "share", "upload", "after", "keep"):
        monkeypatch.setattr(device.Streams, name, getattr(NotedStreams, name))
    monkeypatch.setattr(device.Streams, "notes", NotedStreams.notes, raising=False)
    return NotedStreams.notes


def as_on_a_gpu(decoder: Any) -> Any:
    """Gets whole batches."""
    decoder.whole_batches = True
    return decoder


def handed_over(notes: list[tuple[str, Any]]) -> list[list[int]]:
    """The events that the consumer's stream waited for before each batch was kept for it."""
    batches: list[list[int]] = [[]]
    for what, value in notes:
        if what == "after":
            batches[-1].append(value)
        elif what == "keep":
            batches.append([])
    assert batches.pop() == []
    return batches


def test_on_a_gpu_a_column_is_one_slice_and_the_consumer_waits_for_all(
    photos: str, noted: list[tuple[str, Any]]
) -> None:
    transforms = {"image": Image(24, crop="random", flip=0.5), "prompt": Text("bytes")}
    decoder = as_on_a_gpu(NvImageCodecDecoder(CPU, 10**6))
    dataset = LanceDataset(photos, 16, transforms=transforms, device="cpu", decoder=decoder)
    batches = list(dataset)
    handed = handed_over(noted)
    # memory is allocated, marked and waited for; then the slice itself and the upload are marked
    assert [len(events) for events in handed] == [2] * len(batches) == [2, 2, 2, 2]
    assert sum(what == "mark" for what, _ in noted) == 3 * len(batches)
    assert [value for what, value in noted if what == "keep"] == [set(batch) for batch in batches]
    assert dataset.stats()["stages"]["decode"]["items"] == 2 * len(batches)
    expected = LanceDataset(photos, 16, transforms=transforms, device="cpu")
    for batch, other in zip(batches, expected, strict=True):
        assert torch.equal(batch["prompt"], other["prompt"])
        assert torch.equal(batch["number"], other["number"])
        assert (batch["image"] - other["image"]).abs().max() < 1e-5
    dataset.close()


class Counted(CpuDecoder):
    """Notes how many images a call has."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def decode(self, encoded: Encoded, *given: Any) -> Ragged:
        self.calls.append(len(encoded))
        return super().decode(encoded, *given)


def test_on_a_gpu_large_batches_are_cut_and_slices_wait_for_the_memory(
    store: Store, noted: list[tuple[str, Any]]
) -> None:
    padding = bytes((129 << 20) // 50)  # encoded bytes: more than two times what a call gets
    path = store({"image": [jpeg(30, 40, i) + padding for i in range(50)]})
    options: dict[str, Any] = {"transforms": {"image": Image(24)}, "device": "cpu"}
    decoder = as_on_a_gpu(Counted())
    dataset = LanceDataset(path, 50, decoder=decoder, **options)
    (batch,) = dataset
    assert sorted(decoder.calls) == [11, 13, 13, 13], "quarters: a decoder is made for calls of one size"
    (events,) = handed_over(noted)
    assert len(events) == 5
    waited = [event for what, event in noted if what == "share"]
    assert len(waited) == len(events) - 1, "every slice of pixels came after the allocation"
    assert len(set(waited)) == 1
    assert waited[0] not in events
    (expected,) = LanceDataset(path, 50, **options)
    assert torch.equal(batch["image"], expected["image"])
    dataset.close()


@pytest.mark.usefixtures("noted")
def test_on_a_gpu_own_sizes_lists_and_bad_rows_work_as_on_the_cpu(store: Store) -> None:
    files = [jpeg(20, 30), None, encode(picture(9, 8), "GIF"), b"no image", jpeg(20, 31)]
    table = pa.table({"image": pa.array(files, pa.binary()), "words": ["a", "b", "c", "d", "e"]})
    path = store(table)
    for image in (None, Image(16), Image(None)):
        transforms = {} if image is None else {"image": image}
        for policy in ("skip", "mask"):
            options: dict[str, Any] = {"transforms": transforms, "device": "cpu", "on_error": policy}
            decoder = as_on_a_gpu(NvImageCodecDecoder(CPU, 10**6))
            (batch,), (expected,) = LanceDataset(path, 5, decoder=decoder, **options), LanceDataset(path, 5, **options)
            assert (batch.rows.tolist(), batch.valid.tolist()) == (expected.rows.tolist(), expected.valid.tolist())
            assert batch["words"] == expected["words"]
            for one, other in zip(batch["image"], expected["image"], strict=True):
                assert one.shape == other.shape
                assert (one.float() - other.float()).abs().max() < 1e-5


# -- Streams against stand-ins for CUDA ------------------------------------------------------------------------------


class OnCuda(torch.Tensor):
    """A tensor that says it is on a GPU, and notes which streams it is recorded for."""

    is_cuda = True
    streams: list[Any]

    def record_stream(self, stream: Any) -> None:
        self.streams.append(stream)


def on_cuda() -> OnCuda:
    made = torch.zeros(2).as_subclass(OnCuda)
    made.streams = []
    return made


class Stream:
    """A stream: the events it has recorded and waited for, in order."""

    def __init__(self, device: Any = None) -> None:
        self.done: list[tuple[str, Any]] = []

    def wait_event(self, event: Any) -> None:
        self.done.append(("wait", event))


class Event:
    def record(self, stream: Stream) -> None:
        self.stream = stream
        stream.done.append(("record", self))


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Stream]]:
    """The current stream is the last of this list."""
    streams = [Stream()]

    class Within(AbstractContextManager[None]):
        def __init__(self, stream: Stream) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            streams.append(self.stream)

        def __exit__(self, *error: object) -> None:
            streams.pop()

    device.copy_stream.cache_clear()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", Within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: streams[-1])
    yield streams
    device.copy_stream.cache_clear()


def test_the_consumers_stream_waits_for_every_event_and_memory_is_kept_for_it(current: list[Stream]) -> None:
    streams, worker = device.Streams(CUDA), Stream()
    current.append(worker)
    events = [streams.mark(), streams.mark()]
    current.pop()
    assert worker.done == [("record", event) for event in events]
    columns = {"one": on_cuda(), "many": [on_cuda(), on_cuda()], "words": ["a"], "host": torch.zeros(2)}
    for event in events:
        streams.after(event)
    streams.keep(columns)
    assert current[0].done == [("wait", event) for event in events]
    for tensor in (columns["one"], *columns["many"]):
        assert tensor.streams == [current[0]]  # type: ignore[union-attr]


def test_memory_is_kept_for_every_stream_that_writes_to_it(current: list[Stream]) -> None:
    streams, other, memory = device.Streams(CUDA), Stream(), on_cuda()
    made = streams.mark()
    current.append(other)
    streams.share(memory, made)
    assert other.done == [("wait", made)]
    assert memory.streams == [other]


def test_what_is_no_image_goes_up_in_one_pinned_copy_on_a_stream_of_its_own(
    current: list[Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned, moved, empty = list[Any](), list[Any](), torch.empty

    def locked(size: int, *, dtype: torch.dtype, pin_memory: bool = False) -> torch.Tensor:
        assert pin_memory
        pinned.append(empty(size, dtype=dtype))
        return pinned[-1]

    def to(tensor: torch.Tensor, where: Any, non_blocking: bool = False) -> Any:
        moved.append((tensor is pinned[-1], where, non_blocking, current[-1]))
        return tensor.clone()

    monkeypatch.setattr(torch, "empty", locked)
    monkeypatch.setattr(torch.Tensor, "to", to)
    streams = device.Streams(CUDA)
    given: dict[str, Any] = {
        "ids": torch.arange(12).view(3, 4).T,
        "flags": torch.tensor([True, False, True]),
        "none": torch.ones(0, 2),
        "one": torch.tensor(2.5, dtype=torch.float16),
        "boxes": [torch.rand(2, 4), torch.rand(0, 4), torch.rand(1, 4)],
    }
    columns = {**given, "words": ["a"], "there": on_cuda()}
    there = columns["there"]
    event = streams.upload(columns)
    assert event.stream is not current[0], "the consumer's stream is left alone"
    assert moved == [(True, CUDA, True, event.stream)], "one copy for all"
    for name, value in given.items():
        for one, other in zip(*([v] if torch.is_tensor(v) else v for v in (columns[name], value)), strict=True):
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            assert torch.equal(one, other)
    assert columns["there"] is there
    assert columns["words"] == ["a"]
    assert current == [current[0]]
    moved.clear()
    streams.upload({"words": ["a"], "there": there, "empty": []})
    assert not moved


def test_on_the_cpu_streams_do_nothing() -> None:
    streams = device.Streams(CPU)
    columns = {"ids": torch.ones(3)}
    assert streams.mark() is None
    assert streams.upload(columns) is None
    streams.after(None)
    streams.share(columns["ids"], None)
    streams.keep(columns)
    assert torch.equal(columns["ids"], torch.ones(3))


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")  # torch 2.11 says so to everybody
def test_spans_have_names_for_the_profiler(photos: str) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, device.span("gpuload.x"):
        pass
    assert "gpuload.x" in {event.key for event in profile.key_averages()}


def test_spans_reach_nvtx_in_cuda_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", log.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: log.append("pop"))
    with pytest.raises(ZeroDivisionError), device.span("gpuload.x"):
        1 // 0  # noqa: B018
    assert log == ["gpuload.x", "pop"]


@pytest.mark.parametrize(
    ("ranks", "workers", "threads"), [(None, 0, 8), ("1", 0, 8), ("3", 0, 2), ("2", 2, 2), ("16", 0, 1), ("many", 0, 8)]
)
def test_threads_are_the_cores_shared_with_ranks_and_workers(
    ranks: str | None, workers: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    worker = SimpleNamespace(num_workers=workers) if workers else None
    monkeypatch.setattr(device, "get_worker_info", lambda: worker)
    assert device.threads_here() == threads
