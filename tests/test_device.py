"""Devices, decoders and streams: which are chosen, what is said of missing ones, who waits for whom."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from making import by_row, encode, jpeg, picture

from gpuload import ConfigError, DeviceError, Image, LanceDataset, Text, device, pipeline
from gpuload.images.decode.cpu import CpuDecoder
from gpuload.images.decode.dali import DaliDecoder
from gpuload.images.decode.lanes import LaneDecoder
from gpuload.images.decode.nvimgcodec import NvImageCodecDecoder

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
Store = Callable[..., str]


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says that there are two, the second being current."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


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
    made = device.make_decoder(wish, where, 1000, 4)
    assert type(made) is kind
    assert (made.name, made.device) == (name, where)


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
        device.make_decoder(wish, CUDA, 1000)


@pytest.mark.parametrize(("cuda", "line"), [(None, "cuda13"), ("12.8", "cuda12"), ("13.0", "cuda13")])
def test_the_line_to_install_fits_torchs_cuda(cuda: str | None, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(DeviceError, match=rf'pip install "gpuload\[{line}\]"'):
        device.choose_device("cuda:99")


@pytest.mark.parametrize("name", ["cpu", "nvimgcodec", "dali"])
def test_a_dataset_that_nobody_closes_takes_its_decoder_along(name: str, photos: str) -> None:
    transforms = {"image": Image(8)}
    dataset = LanceDataset(photos, 25, columns=["image"], transforms=transforms, device="cpu", decoder=name)
    gc.collect()
    gc.disable()  # on a GPU a decoder is gigabytes: it must not wait for the collector of cycles
    try:
        list(dataset)
        gone = weakref.ref(dataset._decoder)
        del dataset
        assert gone() is None
    finally:
        gc.enable()


def test_an_unknown_decoder_is_refused_when_the_dataset_is_made(photos: str) -> None:
    with pytest.raises(ConfigError, match=r"Expected decoder as one of .*nvimgcodec:parity.* got 'nvjpeg'"):
        LanceDataset(photos, 4, device="cpu", decoder="nvjpeg")


@pytest.mark.usefixtures("two_gpus")
def test_without_images_no_package_is_needed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", None)
    monkeypatch.setattr(LanceDataset, "device", CUDA)
    assert LanceDataset(store({"number": [1, 2]}), 2)._decode_with().name == "cpu"
    with pytest.raises(DeviceError, match="nvImageCodec"):
        LanceDataset(store({"image": [jpeg()]}), 2)._decode_with()


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


# -- the line as a GPU drives it, with a side that only takes notes ------------------------------------------------


class NotedSide:
    """A `Side` that says it is CUDA's; memory and work stay on the CPU."""

    cuda, device = True, CPU
    notes: list[tuple[str, Any]] = []  # noqa: RUF012 - shared on purpose

    def __init__(self, device: torch.device) -> None:
        self.lock = threading.Lock()
        self.count = 0

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

    def hand_over(self, columns: dict[str, Any], events: list[int]) -> None:
        self.notes.append(("hand over", list(events)))


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    NotedSide.notes = []
    monkeypatch.setattr(pipeline, "Side", NotedSide)
    return NotedSide.notes


def test_on_a_gpu_a_column_is_one_slice_and_the_consumer_waits_for_all(
    photos: str, noted: list[tuple[str, Any]]
) -> None:
    transforms = {"image": Image(24, crop="random", flip=0.5), "prompt": Text("bytes")}
    dataset = LanceDataset(photos, 16, transforms=transforms, device="cpu", decoder="nvimgcodec", num_threads=2)
    batches = list(dataset)
    handed = [events for what, events in noted if what == "hand over"]
    # memory is allocated, marked and waited for; then the slice itself and the upload are marked
    assert [len(events) for events in handed] == [2] * len(batches) == [2, 2, 2, 2]
    assert sum(what == "mark" for what, _ in noted) == 3 * len(batches)
    assert dataset.stats()["stages"]["decode"]["items"] == 2 * len(batches)
    expected = LanceDataset(photos, 16, transforms=transforms, device="cpu")
    for batch, other in zip(batches, expected, strict=True):
        assert torch.equal(batch["prompt"], other["prompt"])
        assert torch.equal(batch["number"], other["number"])
        assert (batch["image"] - other["image"]).abs().max() < 1e-5
    dataset.close()


def test_on_a_gpu_large_batches_are_cut_and_slices_wait_for_the_memory(
    photos: str, noted: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_CUDA_SLICE_BYTES", 12000)
    options: dict[str, Any] = {"transforms": {"image": Image(24)}, "columns": ["image"], "device": "cpu"}
    dataset = LanceDataset(photos, 50, decoder="nvimgcodec", num_threads=2, **options)
    calls: list[int] = []
    decoder = dataset._decode_with()
    decode = decoder.decode
    monkeypatch.setattr(decoder, "decode", lambda views, **how: calls.append(len(views)) or decode(views, **how))
    (batch,) = dataset
    assert sorted(calls) == [1, 7, 7, 7, 7, 7, 7, 7], "eighths: a decoder is made for calls of one size"
    ((_, events),) = [note for note in noted if note[0] == "hand over"]
    assert len(events) > 5
    waited = [event for what, event in noted if what == "share"]
    assert len(waited) == len(events) - 1, "every slice of pixels came after the allocation"
    assert len(set(waited)) == 1
    assert waited[0] not in events
    (expected,) = LanceDataset(photos, 50, **options)
    assert (batch["image"] - expected["image"]).abs().max() < 1e-5
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
            dataset = LanceDataset(path, 5, decoder="nvimgcodec", **options)
            (batch,), (expected,) = dataset, LanceDataset(path, 5, **options)
            assert (batch.rows.tolist(), batch.valid.tolist()) == (expected.rows.tolist(), expected.valid.tolist())
            assert batch["words"] == expected["words"]
            for one, other in zip(batch["image"], expected["image"], strict=True):
                assert one.shape == other.shape
                assert (one.float() - other.float()).abs().max() < 1e-5


# -- Side against stand-ins for CUDA ---------------------------------------------------------------------------------


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

    device._copy_stream.cache_clear()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", Within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: streams[-1])
    yield streams
    device._copy_stream.cache_clear()


def test_the_consumers_stream_waits_for_every_event_and_memory_is_kept_for_it(current: list[Stream]) -> None:
    side, worker = device.Side(CUDA), Stream()
    current.append(worker)
    events = [side.mark(), side.mark()]
    current.pop()
    assert worker.done == [("record", event) for event in events]
    columns = {"one": on_cuda(), "many": [on_cuda(), on_cuda()], "words": ["a"], "host": torch.zeros(2)}
    side.hand_over(columns, events)
    assert current[0].done == [("wait", event) for event in events]
    for tensor in (columns["one"], *columns["many"]):
        assert tensor.streams == [current[0]]  # type: ignore[union-attr]


def test_memory_is_kept_for_every_stream_that_writes_to_it(current: list[Stream]) -> None:
    side, other, memory = device.Side(CUDA), Stream(), on_cuda()
    made = side.mark()
    current.append(other)
    side.share(memory, made)
    assert other.done == [("wait", made)]
    assert memory.streams == [other]


def test_what_is_no_image_goes_up_through_pinned_memory_on_a_stream_of_its_own(
    current: list[Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = []

    def to(tensor: torch.Tensor, where: Any, non_blocking: bool = False) -> Any:
        moved.append((getattr(tensor, "pinned", False), where, non_blocking, current[-1]))
        return on_cuda()

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        pinned = tensor.clone()
        pinned.pinned = True  # type: ignore[attr-defined]
        return pinned

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    side = device.Side(CUDA)
    columns: dict[str, Any] = {"ids": torch.ones(3), "none": torch.ones(0), "words": ["a"], "there": on_cuda()}
    there = columns["there"]
    event = side.upload(columns)
    assert event.stream is not current[0], "the consumer's stream is left alone"
    assert moved == [(True, CUDA, True, event.stream), (False, CUDA, True, event.stream)]
    assert columns["there"] is there
    assert columns["words"] == ["a"]
    assert current == [current[0]]


def test_on_the_cpu_a_side_does_nothing() -> None:
    side = device.Side(CPU)
    columns = {"ids": torch.ones(3)}
    side.hand_over(columns, [side.mark(), side.upload(columns)])
    side.after(None)
    assert side.mark() is None
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
