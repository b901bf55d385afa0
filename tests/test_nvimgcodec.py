"""nvImageCodec on the CPU: the class that decodes on the GPU, through its own CPU mode, against Pillow."""

from __future__ import annotations

import ctypes
import os
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from making import by_pillow, claiming, encode, jpeg, picture
from test_images import FILES

from gpuload.errors import DeviceError
from gpuload.images.decode import Ragged
from gpuload.images.decode.arena import RING, Lane, Lanes, Lease, Slot, Tool
from gpuload.images.decode.dali import DaliDecoder
from gpuload.images.decode.lanes import LaneDecoder
from gpuload.images.decode.nvimgcodec import NvImageCodecDecoder

CPU = torch.device("cpu")
LIMIT = 1_000_000
DECODERS: dict[str, Callable[..., LaneDecoder]] = {
    "nvimgcodec": NvImageCodecDecoder,
    "dali": DaliDecoder,
    "host": LaneDecoder,
}


@pytest.fixture(params=list(DECODERS))
def decoder(request: pytest.FixtureRequest) -> Any:
    made = DECODERS[request.param](CPU, LIMIT)
    yield made
    made.close()


def view(data: bytes | None) -> Any:
    return None if data is None else np.frombuffer(data, np.uint8)


def decoded(decoder: LaneDecoder, files: list[bytes | None], orient: bool = True) -> tuple[list[Any], dict[int, str]]:
    """u8[h, w, c] of each file as it is stored, None where there is none; and the causes of the errors."""
    with decoder.decode([view(file) for file in files], orient=orient) as ragged:
        found = [ragged.pixels(i).clone().numpy() if ragged.table["height"][i] else None for i in range(len(ragged))]
        return found, {i: error.cause for i, error in ragged.errors.items()}


def rgb(pixels: Any) -> Any:
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels


def stored(data: bytes) -> Any:
    """u8[h, w, 3] by Pillow, as the file has it."""
    return by_pillow(data, orient=False).transpose(1, 2, 0)


@pytest.mark.parametrize("kind", FILES)
def test_every_format_gives_the_pixels_of_pillow(kind: str, decoder: LaneDecoder) -> None:
    data = FILES[kind]()
    (one, two), errors = decoded(decoder, [data, data])
    assert not errors
    for pixels in (one, two):
        np.testing.assert_array_equal(rgb(pixels), stored(data))


def test_jpeg_and_what_it_knows_goes_through_the_decoder_and_the_rest_through_pillow() -> None:
    decoder = NvImageCodecDecoder(CPU, LIMIT)
    kinds = ["jpeg_420", "jpeg_gray", "png_rgb", "webp_lossy", "bmp", "tiff", "jpeg2000"]
    decoded(decoder, [FILES[kind]() for kind in kinds])
    assert decoder.counts() == {"nvimgcodec": len(kinds), "simplejpeg": 0, "pillow": 0, "failed": 0}
    decoded(decoder, [FILES[kind]() for kind in ("gif", "avif", "qoi", "tiff_float", "png_rgb16", "jpeg_cmyk")])
    assert decoder.counts() == {"nvimgcodec": len(kinds), "simplejpeg": 0, "pillow": 6, "failed": 0}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_in_the_table_and_not_in_the_pixels(kind: str, orientation: int, decoder: LaneDecoder) -> None:
    data = encode(picture(17, 23), kind, orientation)
    for orient in (True, False):
        with decoder.decode([view(data)], orient=orient) as ragged:
            assert ragged.table["orientation"][0] == (orientation if orient else 1)
            assert ragged.pixels(0).shape[:2] == (17, 23)


BAD = {
    "null": (None, "got a null"),
    "empty": (b"", "got 0 bytes"),
    "garbage": (bytes(range(200)), "got 200 bytes starting 00010203"),
    "cut jpeg": (jpeg(60, 70)[:900], "Expected a whole JPEG file"),
    "cut png": (encode(picture(40, 40), "PNG")[:2000], "Expected a whole PNG file"),
    "too large": (claiming(jpeg(60, 70), 2000, 2000), "Expected at most 1000000 pixels"),
}


@pytest.mark.filterwarnings("ignore:.*decoded none")
def test_bad_images_are_errors_of_their_rows_and_harm_no_other(decoder: LaneDecoder) -> None:
    good = [jpeg(30 + i, 50 - i, i) for i in range(len(BAD) + 1)]
    files: list[bytes | None] = [good[0]]
    for (bad, _), file in zip(BAD.values(), good[1:], strict=True):
        files += [bad, file]
    found, errors = decoded(decoder, files)
    assert sorted(errors) == list(range(1, len(files), 2))
    for i, (_, cause) in enumerate(BAD.values()):
        assert cause in errors[2 * i + 1], errors[2 * i + 1]
        assert found[2 * i + 1] is None
    for i, file in enumerate(good):
        np.testing.assert_array_equal(found[2 * i], stored(file))
    assert decoder.counts()["failed"] == len(BAD)


def test_a_batch_of_nothing_and_a_batch_of_bad_ones(decoder: LaneDecoder) -> None:
    assert decoded(decoder, []) == ([], {})
    assert decoded(decoder, [None, b""])[0] == [None, None]
    ((found,), errors) = decoded(decoder, [jpeg(9, 8)])
    assert found.shape == (9, 8, 3)
    assert not errors


def test_arenas_are_used_again_and_grow(decoder: LaneDecoder) -> None:
    for repeat in range(3):
        for size in (1, 5, 3, 12):
            files = [jpeg(20 * size + i, 300 * size // 12 + i + 1, i + repeat) for i in range(size)]
            found, errors = decoded(decoder, files)
            assert not errors
            for pixels, file in zip(found, files, strict=True):
                np.testing.assert_array_equal(rgb(pixels), stored(file))


@pytest.mark.parametrize("threads", [1, 3])
def test_four_callers_at_once_get_their_own_pixels(threads: int) -> None:
    files = [jpeg(100 + i, 90 + 2 * i, i) for i in range(24)] + [FILES["gif"](), FILES["png_rgb"]()]
    expected = [stored(file) for file in files]
    for make in DECODERS.values():
        decoder = make(CPU, LIMIT, threads)

        def work(start: int, decoder: LaneDecoder = decoder) -> int:
            order = [(start + i) % len(files) for i in range(8)]
            found, errors = decoded(decoder, [files[i] for i in order])
            return len(errors) + sum(not np.array_equal(rgb(p), expected[i]) for p, i in zip(found, order, strict=True))

        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(work, range(60))) == 0
        assert len(decoder._lanes._free) <= 4  # a lane for every call at once, no more
        decoder.close()


def test_closing_frees_and_the_next_call_works(decoder: LaneDecoder) -> None:
    decoded(decoder, [jpeg()])
    decoder.close()
    (found,), errors = decoded(decoder, [jpeg()])
    assert found is not None
    assert not errors


def test_a_failing_reader_does_not_lose_the_lane(decoder: LaneDecoder) -> None:
    with pytest.raises(ZeroDivisionError), decoder.decode([view(jpeg())]):
        1 / 0  # noqa: B018
    assert len(decoder._lanes._free) == 1
    decoded(decoder, [jpeg()])


class Always:
    """Stands for a decoder that refuses everything, as nvImageCodec does when the GPU has no memory left."""

    def decode(self, streams: list[Any], **_: Any) -> list[None]:
        return [None] * len(streams)


def test_a_batch_that_all_went_to_the_host_is_told_once() -> None:
    decoder = NvImageCodecDecoder(CPU, LIMIT)
    decoder._lanes.give(Lane(CPU, Tool(Always())))
    with pytest.warns(RuntimeWarning, match="nvimgcodec decoded none of 5 images and the host did it"):
        found, errors = decoded(decoder, [jpeg(20, 30, i) for i in range(5)])
    assert not errors
    for i, pixels in enumerate(found):
        np.testing.assert_array_equal(pixels, stored(jpeg(20, 30, i)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded(decoder, [jpeg(20, 30, i) for i in range(5)])
    assert decoder.counts() == {"nvimgcodec": 0, "simplejpeg": 10, "pillow": 0, "failed": 0}


def test_a_missing_package_is_an_error_with_the_line_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", None)
    with pytest.raises(DeviceError, match=r'pip install "gpuload\[cuda1[23]\]"'):
        NvImageCodecDecoder(CPU, LIMIT)


def test_dali_orders_its_outputs_on_the_lanes_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    from nvidia.dali.pipeline import Pipeline

    given: list[Any] = []

    class Noted(Pipeline):  # type: ignore[misc]
        def outputs(self, cuda_stream: Any = None) -> Any:
            given.append(cuda_stream)
            return super().outputs()

    decoder = DaliDecoder(CPU, LIMIT)
    decoder._pipeline = Noted
    lane = decoder._lanes.take(decoder._lane)
    lane.tool.made, lane.tool.images = decoder._build(2), 2
    monkeypatch.setattr(decoder, "device", torch.device("cuda", 0))
    lane.stream = SimpleNamespace(cuda_stream=77)
    assert len(decoder._decode_part(lane, [view(jpeg()), view(jpeg())])) == 2
    assert given == [77]


class Given:
    """Stands for nvImageCodec on a GPU: notes how a Decoder is made and what it is called with. Whatever it decodes has
    the colour `result`; with None it decodes nothing, with a str it puts the pixels elsewhere."""

    def __init__(self, real: Any, result: Any) -> None:
        self.real, self.result, self.made, self.called = real, result, dict[str, Any](), dict[str, Any]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def Backend(self, kind: Any, **options: Any) -> Any:
        self.real.Backend(kind, **options)  # it must know the words
        return kind, options

    def Decoder(self, **options: Any) -> Any:
        self.made = options
        return self

    def as_images(self, memory: list[Any], cuda_stream: int) -> list[Any]:
        self.called = {"memory": [m.__cuda_array_interface__ for m in memory], "images on": cuda_stream}
        for m in self.called["memory"] if isinstance(self.result, tuple) else []:
            pixels = (ctypes.c_uint8 * int(np.prod(m["shape"]))).from_address(m["data"][0])
            np.ctypeslib.as_array(pixels).reshape(m["shape"])[:] = self.result
        return memory

    def decode(self, streams: list[Any], images: list[Any], params: Any, cuda_stream: int) -> list[Any]:
        self.called |= {"decode on": cuda_stream, "turned": params.apply_exif_orientation}
        return [self.result] * len(streams)


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, result: Any, **options: Any) -> tuple[NvImageCodecDecoder, Given]:
    """A decoder that takes itself to be on cuda:1, on a lane of stand-ins."""
    decoder = NvImageCodecDecoder(CPU, LIMIT, 8, calls=2, **options)
    given = decoder._nv = Given(decoder._nv, result)
    decoder.device = torch.device("cuda", 1)
    stream = FakeStream()
    stream.cuda_stream = 77  # type: ignore[attr-defined]
    monkeypatch.setattr("gpuload.images.decode.nvimgcodec.Lane", lambda device, tool: Lane(CPU, tool, stream))
    return decoder, given


@pytest.mark.parametrize(("parity", "kinds"), [(False, ["HW_GPU_ONLY", "GPU_ONLY", "HYBRID_CPU_GPU"]),
                                               (True, ["GPU_ONLY", "HYBRID_CPU_GPU"])])  # fmt: skip
def test_on_a_gpu_it_is_told_which_backends_and_never_the_host(
    parity: bool, kinds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, given = on_a_gpu(monkeypatch, (201, 99, 52), parity=parity, hardware_load=0.4)
    lane = decoder._lane()
    decoder._ready(lane, 20)
    assert [kind.name for kind, _ in given.made["backends"]] == kinds
    if not parity:
        policy = given.real.LoadHintPolicy.FIXED
        assert given.made["backends"][0][1] == {"load_hint": 0.4, "load_hint_policy": policy}
    assert given.made["options"] == f":fancy_upsampling={int(parity)}"
    assert (given.made["device_id"], given.made["max_num_cpu_threads"]) == (1, min(4, (os.cpu_count() or 2) - 1))
    memory = given.called.pop("memory")
    assert {(one["shape"], one["typestr"]) for one in memory} == {((64, 64, 3), "|u1")}
    assert given.called == {"images on": 77, "decode on": 77, "turned": False}
    assert lane.stream.log[-1] == "wait all", "the probe's result is known before anything else is decoded"


def test_the_first_call_of_every_decoder_is_as_large_as_the_largest_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """It fixes what the JPEG engine gets of a call, which must not depend on the lane."""
    decoder, given = on_a_gpu(monkeypatch, (200, 100, 50))
    calls = [(1, 16), (60, 64), (58, 0), (64, 0), (128, 128), (100, 0)]  # images, pictures of the first call
    for images, pictures in calls:
        given.called = {"memory": []}
        lane = decoder._lanes.take(decoder._lane)
        decoder._ready(lane, images)
        decoder._lanes.give(lane)
        assert len(given.called["memory"]) == pictures, images
    one, other = (decoder._lanes.take(decoder._lane) for _ in range(2))
    decoder._ready(one, 3)
    assert given.called == {"memory": []}
    decoder._ready(other, 3)
    assert len(given.called["memory"]) == 128


def test_a_gpu_without_nvjpeg_is_an_error_with_the_line_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, _ = on_a_gpu(monkeypatch, None)
    with pytest.raises(DeviceError, match=r'cuda:1, got nothing: nvJPEG is missing.*"gpuload\[cuda1[23]\]"'):
        decoder.decode([view(jpeg())])
    with pytest.raises(DeviceError):  # and no decoder that failed is used
        decoder.decode([view(jpeg())])


def test_pixels_that_do_not_come_where_they_should_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, _ = on_a_gpu(monkeypatch, (200, 100, 50))
    for _ in range(20):  # memory that is handed out again may hold the right colour from before
        decoder._ready(decoder._lane(), 1)
    decoder, _ = on_a_gpu(monkeypatch, "elsewhere")
    with pytest.raises(DeviceError, match=r'memory of cuda:1, got values up to \d+ from it.*decoder="dali"'):
        decoder.decode([view(jpeg())])


# The ring's protocol, with stand-ins for CUDA's streams and events.


class FakeEvent:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def synchronize(self) -> None:
        self.log.append(f"wait {self.name}")


class FakeStream:
    def __init__(self) -> None:
        self.log: list[str] = []
        self.events = 0

    def record_event(self, event: Any = None) -> FakeEvent:
        self.events += 1
        self.log.append(f"record {self.events}")
        return FakeEvent(self.log, str(self.events))

    def synchronize(self) -> None:
        self.log.append("wait all")


def use(lane: Lane[Any], size: int) -> Slot:
    slot = lane.slot()
    slot.arena(size)
    slot.done()
    return slot


def test_an_arena_is_lent_again_only_after_its_event() -> None:
    stream = FakeStream()
    lane: Lane[Any] = Lane(CPU, None, stream)
    first = [use(lane, 100) for _ in range(RING)]
    assert len({id(slot) for slot in first}) == RING
    # a fresh allocation is waited for in full, because the JPEG engine ignores the stream's order
    assert stream.log == [text for i in range(RING) for text in ("wait all", f"record {i + 1}")]
    for i in range(5):
        stream.log.clear()
        assert use(lane, 100) is first[i % RING]
        assert stream.log == [f"wait {i + 1}", f"record {i + 1 + RING}"]


def test_a_larger_arena_is_waited_for_and_a_smaller_one_is_not() -> None:
    stream = FakeStream()
    slot = Slot(CPU, stream)
    small = slot.arena(10)
    assert stream.log == ["wait all"]
    assert slot.arena(len(small)) is small
    assert stream.log == ["wait all"]
    assert len(slot.arena(len(small) + 1)) > len(small)
    assert stream.log == ["wait all", "wait all"]


def test_after_a_failure_the_whole_stream_is_waited_for() -> None:
    stream = FakeStream()
    lanes: Lanes[None] = Lanes()
    lane = lanes.take(lambda: Lane(CPU, None, stream))
    for slot in (lane.slot(), lane.slot()):
        slot.arena(1)
    stream.log.clear()
    ragged = Ragged(torch.empty(0), np.zeros(0), {}, Lease(lanes, lane, slot))
    with pytest.raises(RuntimeError, match="kernel"), ragged:
        raise RuntimeError("kernel")
    assert lanes.take(lambda: Lane(CPU, None, stream)) is lane
    lane.slot()
    assert stream.log == ["wait all"]  # no event says what the one that failed had started


def test_what_a_slot_keeps_alive_goes_when_it_is_lent_again() -> None:
    stream = FakeStream()
    slot = Slot(CPU, stream)
    slot.wait()
    slot.keep.append("bytes")
    slot.done()
    assert slot.keep == ["bytes"]
    slot.wait()
    assert slot.keep == []


def test_lanes_are_made_for_calls_at_once_only() -> None:
    made: list[Lane[None]] = []
    lanes: Lanes[None] = Lanes()
    barrier = threading.Barrier(3)

    def call(_: int) -> None:
        lane = lanes.take(lambda: made.append(Lane(CPU, None)) or made[-1])  # type: ignore[func-returns-value]
        barrier.wait()
        lanes.give(lane)

    for _ in range(4):
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(call, range(3)))
    assert len(made) == 3
