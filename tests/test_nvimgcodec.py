"""nvImageCodec and DALI on the CPU: the classes that decode on the GPU, through their own CPU mode, against Pillow."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
import nvidia.dali.fn
import nvidia.dali.pipeline
import nvidia.nvimgcodec
import pytest
import torch
from conftest import gpuload_threads
from making import by_pillow, claiming, encode, jpeg, judged, picture, without_codes
from test_images import FILES

from gpuload import Image, LanceDataset, Ragged
from gpuload.errors import DeviceError
from gpuload.images import PIXELS, views
from gpuload.images.decode import libjpeg
from gpuload.images.decode.arena import RING, Lane, Lanes, Lease, Slot
from gpuload.images.decode.dali import DaliDecoder
from gpuload.images.decode.lanes import LaneDecoder
from gpuload.images.decode.nvimgcodec import NvImageCodecDecoder
from gpuload.images.resize import resize_normalize
from gpuload.order.draws import Draws

pytestmark = pytest.mark.filterwarnings("ignore::gpuload.BadRowWarning")  # met on purpose in some tests here

CPU = torch.device("cpu")
LIMIT = 1_000_000
DECODERS: dict[str, Callable[..., LaneDecoder]] = {
    "nvimgcodec": NvImageCodecDecoder,
    "dali": DaliDecoder,
    "host": LaneDecoder,
}
HOST = "simplejpeg" if libjpeg.library() is None else "libjpeg-turbo"  # what decodes plain JPEG on the host
NONE = {"simplejpeg": 0, "pillow": 0, "failed": 0}


@pytest.fixture(params=list(DECODERS))
def decoder(request: pytest.FixtureRequest) -> Any:
    made = DECODERS[request.param](CPU, LIMIT)
    yield made
    made.close()


def lent(decoder: LaneDecoder, files: list[bytes | None], orient: bool = True) -> Ragged:
    encoded, headers, _ = judged(files, orient, LIMIT)
    return decoder.decode(encoded, headers, None)


def decoded(decoder: LaneDecoder, files: list[bytes | None]) -> tuple[list[Any], dict[int, str]]:
    """u8[h, w, c] of each file as it is stored, None where there is none; and the causes of all errors."""
    encoded, headers, errors = judged(files, max_pixels=LIMIT)
    with decoder.decode(encoded, headers, None) as ragged:
        assert not errors.keys() & ragged.errors.keys(), "what its header refuses is none of a decoder's business"
        found = [ragged.pixels(i).clone().numpy() if ragged.table["height"][i] else None for i in range(len(ragged))]
        return found, {i: error.cause for i, error in (errors | ragged.errors).items()}


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
    kinds = ["jpeg_420", "jpeg_gray", "png_rgb", "webp_lossy", "bmp", "jpeg2000"]
    decoded(decoder, [FILES[kind]() for kind in kinds])
    assert decoder.counts() == {**NONE, "nvimgcodec": len(kinds)}
    decoded(decoder, [FILES[kind]() for kind in ("gif", "avif", "qoi", "tiff", "tiff_float", "png_rgb16", "jpeg_cmyk")])
    assert decoder.counts() == {**NONE, "nvimgcodec": len(kinds), "pillow": 7}


@pytest.mark.parametrize("decoder", ["nvimgcodec", "dali"], indirect=True)
def test_jpeg_that_is_stored_as_rgb_is_the_hosts(decoder: LaneDecoder) -> None:
    """Both take its planes for YCbCr."""
    ((found,), errors) = decoded(decoder, [FILES["jpeg_rgb"]()])
    assert not errors
    np.testing.assert_array_equal(found, stored(FILES["jpeg_rgb"]()))
    assert decoder.counts() == {**NONE, decoder.library: 0, HOST: 1}


def deeper(bits: int) -> bytes:
    """A JPEG file whose frame says so many bits a sample."""
    file = jpeg(20, 30)
    at = file.index(b"\xff\xc0") + 4
    return file[:at] + bytes([bits]) + file[at + 1 :]


@pytest.mark.parametrize("decoder", ["nvimgcodec", "dali"], indirect=True)
def test_jpeg_of_more_than_eight_bits_is_pillows_to_refuse(decoder: LaneDecoder) -> None:
    """nvImageCodec raises TypeError for the header of the one with 17 bits."""
    files = [jpeg(20, 30), deeper(12), jpeg(20, 30, 1), deeper(17)]
    found, errors = decoded(decoder, files)
    assert sorted(errors) == [1, 3]
    for i in (0, 2):
        np.testing.assert_array_equal(found[i], stored(files[i]))
    assert decoder.counts()[decoder.library] == 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_in_the_table_and_not_in_the_pixels(kind: str, orientation: int, decoder: LaneDecoder) -> None:
    data = encode(picture(17, 23), kind, orientation)
    for orient in (True, False):
        with lent(decoder, [data], orient) as ragged:
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
    assert decoder.counts()["failed"] == 2, "the cut ones; the others' headers gave them away before"


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


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Lane[Any]]:
    """The lanes that decoders make."""
    found: list[Lane[Any]] = []

    class Noted(Lane[Any]):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            found.append(self)

    for module in ("lanes", "nvimgcodec", "dali"):
        monkeypatch.setattr(f"gpuload.images.decode.{module}.Lane", Noted)
    return found


@pytest.mark.parametrize("threads", [1, 3])
def test_four_callers_at_once_get_their_own_pixels(threads: int, made: list[Lane[Any]]) -> None:
    files = [jpeg(100 + i, 90 + 2 * i, i) for i in range(24)] + [FILES["gif"](), FILES["png_rgb"]()]
    expected = [stored(file) for file in files]
    for make in DECODERS.values():
        decoder = make(CPU, LIMIT, threads)

        def work(start: int, decoder: LaneDecoder = decoder) -> int:
            order = [(start + i) % len(files) for i in range(8)]
            found, errors = decoded(decoder, [files[i] for i in order])
            return len(errors) + sum(not np.array_equal(rgb(p), expected[i]) for p, i in zip(found, order, strict=True))

        made.clear()
        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(work, range(60))) == 0
        assert 1 <= len(made) <= 4  # a lane for every call at once, no more
        decoder.close()


def test_windows_are_enough_whatever_decodes(decoder: LaneDecoder) -> None:
    """JPEG in windows, and whole what Pillow reads and what the decoder claims, in one call: each lies where the table
    says."""
    files = [jpeg(120, 90, 1), FILES["gif"](), jpeg(200, 150, 2, subsampling=0), encode(picture(99, 80), "PNG", 6)]
    encoded, headers, _ = judged([*files, FILES["jpeg_rgb"]()])
    image, draws = Image((20, 30), crop="random", flip=0.5), Draws(3, 0, np.arange(5))
    wanted = views.views(image, headers, draws)
    outs = [torch.empty(5, 3, 20, 30) for _ in range(2)]
    for out, needed in zip(outs, (None, views.windows(wanted, headers, (20, 30))), strict=True):
        encoded, headers, _ = judged([*files, FILES["jpeg_rgb"]()])
        with decoder.decode(encoded, headers, needed) as ragged:
            assert not ragged.errors
            resize_normalize(ragged, wanted, image, out)
    assert (outs[0] - outs[1]).abs().max() <= 2e-6  # float32 weights of shifted coordinates


def test_closing_frees_and_the_next_call_works(decoder: LaneDecoder) -> None:
    decoded(decoder, [jpeg()])
    decoder.close()
    (found,), errors = decoded(decoder, [jpeg()])
    assert found is not None
    assert not errors


def test_a_failing_reader_does_not_lose_the_lane(made: list[Lane[Any]], decoder: LaneDecoder) -> None:
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), lent(decoder, [jpeg()]):
            1 / 0  # noqa: B018
    decoded(decoder, [jpeg()])
    assert len(made) == 1


class Package:
    """Stands for the package nvidia.nvimgcodec: what is not given by keyword is the real one's."""

    def __init__(self, **given: Any) -> None:
        self.__dict__.update(given)

    def __getattr__(self, name: str) -> Any:
        return getattr(nvidia.nvimgcodec, name)


class Always:
    """Stands for a decoder that refuses everything, as nvImageCodec does when the GPU has no memory left."""

    def __init__(self, **options: Any) -> None:
        pass

    def decode(self, streams: list[Any], **_: Any) -> list[None]:
        return [None] * len(streams)


def test_a_batch_that_all_went_to_the_host_is_told_once() -> None:
    decoder = NvImageCodecDecoder(CPU, LIMIT, package=Package(Decoder=Always))
    with pytest.warns(RuntimeWarning, match="nvimgcodec decoded none of 5 images and the host did it"):
        found, errors = decoded(decoder, [jpeg(20, 30, i) for i in range(5)])
    assert not errors
    for i, pixels in enumerate(found):
        np.testing.assert_array_equal(pixels, stored(jpeg(20, 30, i)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded(decoder, [jpeg(20, 30, i) for i in range(5)])
    assert decoder.counts() == {**NONE, "nvimgcodec": 0, HOST: 10}


@pytest.mark.parametrize("error", [TypeError("precision"), ValueError("codec"), RuntimeError("stream")])
def test_whatever_it_raises_about_a_header_the_image_is_the_hosts(error: Exception) -> None:
    files = [jpeg(20, 30, i) for i in range(3)]

    def refusing(view: Any) -> Any:
        if bytes(view) == files[1]:
            raise error
        return nvidia.nvimgcodec.CodeStream(view)

    decoder = NvImageCodecDecoder(CPU, LIMIT, package=Package(CodeStream=refusing))
    found, errors = decoded(decoder, files)
    assert not errors
    for pixels, file in zip(found, files, strict=True):
        np.testing.assert_array_equal(pixels, stored(file))
    assert decoder.counts() == {**NONE, "nvimgcodec": 2, HOST: 1}


@pytest.mark.parametrize(
    "error", [TypeError("precision"), KeyError(6), RuntimeError("bad stream"), ValueError("depth")]
)
def test_whatever_it_raises_over_one_image_the_image_is_the_hosts(error: Exception) -> None:
    files = [jpeg(20 + i, 30, i) for i in range(6)]

    class Choking:
        def __init__(self, **options: Any) -> None:
            self.real = nvidia.nvimgcodec.Decoder(**options)

        def decode(self, streams: list[Any], **given: Any) -> Any:
            if any(stream.height in (21, 24) for stream in streams):
                raise error
            return self.real.decode(streams, **given)

    decoder = NvImageCodecDecoder(CPU, LIMIT, package=Package(Decoder=Choking))
    found, errors = decoded(decoder, files)  # type: ignore[arg-type]
    assert not errors
    for pixels, file in zip(found, files, strict=True):
        np.testing.assert_array_equal(pixels, stored(file))
    assert decoder.counts() == {**NONE, "nvimgcodec": 4, HOST: 2}


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA error: unspecified launch failure")])
def test_what_is_not_about_an_image_reaches_the_user(error: Exception) -> None:
    class Dead(Always):
        def decode(self, streams: list[Any], **_: Any) -> list[None]:
            raise error

    with pytest.raises(type(error)):
        decoded(NvImageCodecDecoder(CPU, LIMIT, package=Package(Decoder=Dead)), [jpeg(20, 30), jpeg(20, 30)])


@pytest.mark.parametrize("decoder", ["nvimgcodec", "dali"], indirect=True)
def test_jpeg_without_huffman_tables_is_the_hosts(decoder: LaneDecoder) -> None:
    """libjpeg has standard ones; what a GPU's decoder makes of it is not known."""
    plain, gray = jpeg(40, 48), encode(picture(40, 48, mode="L"), "JPEG")
    files = [plain, without_codes(plain, {0, 1, 16, 17}), without_codes(plain, {17}), gray, without_codes(gray, {0})]
    found, errors = decoded(decoder, files)  # type: ignore[arg-type]
    assert not errors
    for pixels, file in zip(found, files, strict=True):
        np.testing.assert_array_equal(rgb(pixels), stored(file))
    assert decoder.counts() == {**NONE, decoder.library: 2, HOST: 3}


def test_a_missing_package_is_an_error_with_the_line_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", None)
    with pytest.raises(DeviceError, match=r'pip install "gpuload\[cuda1[23]\]"'):
        NvImageCodecDecoder(CPU, LIMIT)


def test_dali_orders_its_outputs_on_the_lanes_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    image = nvidia.dali.fn.decoders.image

    class Noted(nvidia.dali.pipeline.Pipeline):  # type: ignore[misc]
        def __init__(self, *, device_id: Any, **options: Any) -> None:
            assert device_id == 1
            super().__init__(device_id=None, **options)

        def outputs(self, cuda_stream: Any = None) -> Any:
            given.append(cuda_stream)
            return super().outputs()

    def on_the_cpu(encoded: Any, *, device: str, jpeg_fancy_upsampling: bool, **options: Any) -> Any:
        assert (device, jpeg_fancy_upsampling) == ("mixed", False)
        return image(encoded, device="cpu", **options)

    monkeypatch.setattr(nvidia.dali.pipeline, "Pipeline", Noted)
    monkeypatch.setattr(nvidia.dali.fn.decoders, "image", on_the_cpu)
    monkeypatch.setattr("gpuload.images.decode.dali.Lane", lambda device, tool: Lane(CPU, tool, FakeStream(77)))
    decoder = DaliDecoder(torch.device("cuda", 1), LIMIT)
    with lent(decoder, [jpeg(), jpeg()]) as ragged:
        assert not ragged.errors
    assert decoder.counts()["dali"] == 2
    assert given == [77]


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: an illegal memory access was encountered",
        "Critical error: CUDA runtime API error cudaErrorLaunchFailure (719): unspecified launch failure",
        "nvml error, CUDA driver API error CUDA_ERROR_ILLEGAL_ADDRESS (700)",
        "Out of memory on device 0",
    ],
)
def test_dali_does_not_look_for_a_bad_image_on_a_dead_gpu(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []

    class Dead(nvidia.dali.pipeline.Pipeline):  # type: ignore[misc]
        def run(self, *_: Any) -> Any:
            runs.append(1)
            raise RuntimeError(message)

    monkeypatch.setattr(nvidia.dali.pipeline, "Pipeline", Dead)
    decoder = DaliDecoder(CPU, LIMIT)
    with pytest.raises(RuntimeError) as caught:
        lent(decoder, [jpeg(20, 30, i) for i in range(8)])
    assert str(caught.value) == message
    assert len(runs) == 1
    assert decoder.counts() == {**NONE, "dali": 0}


@pytest.mark.parametrize("kind", [RuntimeError, TypeError, ValueError])
@pytest.mark.parametrize("named", [True, False])
def test_dali_leaves_one_bad_image_to_the_host_and_decodes_the_others(
    named: bool, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [jpeg(20, 30, i) for i in range(8)]
    runs: list[int] = []

    class Picky(nvidia.dali.pipeline.Pipeline):  # type: ignore[misc]
        def feed_input(self, name: str, views: list[Any]) -> None:
            self.bad = [k for k, view in enumerate(views) if bytes(view) == files[5]]
            super().feed_input(name, views)

        def run(self, *given: Any) -> Any:
            runs.append(1)
            if self.bad:
                raise kind(f"Error in sample #{self.bad[0]}" if named else "Error in a sample")
            return super().run(*given)

    monkeypatch.setattr(nvidia.dali.pipeline, "Pipeline", Picky)
    decoder = DaliDecoder(CPU, LIMIT)
    found, errors = decoded(decoder, files)  # type: ignore[arg-type]
    assert not errors
    for pixels, file in zip(found, files, strict=True):
        np.testing.assert_array_equal(pixels, stored(file))
    assert decoder.counts() == {**NONE, "dali": 7, HOST: 1}
    assert len(runs) == (2 if named else 7), "halves, halves of the half, and so on"


@pytest.mark.parametrize("policy", ["mask", "skip", "raise"])
@pytest.mark.parametrize("kind", DECODERS)
def test_threads_of_the_host_end_with_a_dataset_that_nobody_closed(
    kind: str, policy: Any, store: Callable[..., str]
) -> None:
    """Bad rows or not: an error must not keep the frames that it came from, and the decoder in them."""
    files: list[bytes | None] = [encode(picture(30, 40, i), kind) for i in range(6) for kind in ("PNG", "GIF")]
    files += [None, b"x", jpeg(60, 60)[:900], encode(picture(30, 40), "PNG")[:700], encode(picture(30, 40), "GIF")[:99]]
    path = store({"image": files if policy != "raise" else files[:12]})
    decoder = DECODERS[kind](CPU, LIMIT, 3)
    decoder.whole_batches = True  # type: ignore[attr-defined]
    options: dict[str, Any] = {"transforms": {"image": Image(8)}, "device": "cpu", "on_error": policy}
    dataset = LanceDataset(path, len(files), decoder=decoder, **options)

    def threads() -> list[str]:
        return [thread.name for thread in gpuload_threads() if thread.name.startswith("gpuload-host")]

    gc.collect()
    gc.disable()  # nor do they wait for the collector of cycles
    try:
        assert len(list(dataset)) == 1
        assert threads()
        del dataset, decoder
        end = time.monotonic() + 5
        while threads() and time.monotonic() < end:
            time.sleep(0.01)
        assert not threads()
    finally:
        gc.enable()


class Given(Package):
    """Stands for nvImageCodec on a GPU: notes how a Decoder is made and what it is called with. Whatever it decodes has
    the colour `result`; with None it decodes nothing, with a str it puts the pixels elsewhere."""

    def __init__(self, result: Any, log: list[str]) -> None:
        super().__init__(result=result, log=log, made=dict[str, Any](), called=list[dict[str, Any]]())

    def Backend(self, kind: Any, **options: Any) -> Any:
        nvidia.nvimgcodec.Backend(kind, **options)  # it must know the words
        return kind, options

    def Decoder(self, **options: Any) -> Any:
        self.made = options
        return self

    def as_images(self, memory: list[Any], cuda_stream: int) -> list[Any]:
        places = [m.__cuda_array_interface__ for m in memory]
        self.called.append({"memory": places, "images on": cuda_stream})
        for m in places if isinstance(self.result, tuple) else []:
            pixels = (ctypes.c_uint8 * int(np.prod(m["shape"]))).from_address(m["data"][0])
            np.ctypeslib.as_array(pixels).reshape(m["shape"])[:] = self.result
        return memory

    def decode(self, streams: list[Any], images: list[Any], params: Any, cuda_stream: int) -> list[Any]:
        self.log.append("decode")
        self.called[-1] |= {"decode on": cuda_stream, "turned": params.apply_exif_orientation}
        return [self.result] * len(streams)


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, result: Any, **options: Any) -> tuple[NvImageCodecDecoder, Given]:
    """A decoder that takes itself to be on cuda:1, on lanes of stand-ins."""
    stream = FakeStream(77)
    given = Given(result, stream.log)
    monkeypatch.setattr("gpuload.images.decode.nvimgcodec.Lane", lambda device, tool: Lane(CPU, tool, stream))
    return NvImageCodecDecoder(torch.device("cuda", 1), LIMIT, 8, calls=2, package=given, **options), given


@pytest.mark.parametrize(("parity", "kinds"), [(False, ["HW_GPU_ONLY", "GPU_ONLY", "HYBRID_CPU_GPU"]),
                                               (True, ["GPU_ONLY", "HYBRID_CPU_GPU"])])  # fmt: skip
def test_on_a_gpu_it_is_told_which_backends_and_never_the_host(
    parity: bool, kinds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, given = on_a_gpu(monkeypatch, (201, 99, 52), parity=parity, hardware_load=0.4)
    with lent(decoder, [jpeg()] * 20) as ragged:
        assert (ragged.pixels(19).numpy() == (201, 99, 52)).all()
    assert [kind.name for kind, _ in given.made["backends"]] == kinds
    if not parity:
        policy = given.LoadHintPolicy.FIXED
        assert given.made["backends"][0][1] == {"load_hint": 0.4, "load_hint_policy": policy}
    assert given.made["options"] == f":fancy_upsampling={int(parity)}"
    assert (given.made["device_id"], given.made["max_num_cpu_threads"]) == (1, min(4, (os.cpu_count() or 2) - 1))
    probe, call = given.called
    assert {(one["shape"], one["typestr"]) for one in probe.pop("memory")} == {((64, 64, 3), "|u1")}
    assert {(one["shape"], one["typestr"]) for one in call.pop("memory")} == {((24, 32, 3), "|u1")}
    assert probe == call == {"images on": 77, "decode on": 77, "turned": False}
    first, second = (at for at, what in enumerate(given.log) if what == "decode")
    assert "wait all" in given.log[first:second], "the probe's result is known before anything else is decoded"


def test_the_first_call_of_every_decoder_is_as_large_as_the_largest_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """It fixes what the JPEG engine gets of a call, which must not depend on the lane."""
    decoder, given = on_a_gpu(monkeypatch, (200, 100, 50))

    def pictures(held: ExitStack, images: int) -> int:
        """Pictures of the first call of a decoder that is made for `images`, 0 where there is one already."""
        given.called.clear()
        held.enter_context(lent(decoder, [jpeg()] * images))
        *first, call = given.called
        assert len(call["memory"]) == images
        return sum(len(one["memory"]) for one in first)

    for images, needed in [(1, 16), (60, 64), (58, 0), (64, 0), (128, 128), (100, 0)]:
        with ExitStack() as held:
            assert pictures(held, images) == needed, images
    with ExitStack() as held:
        assert pictures(held, 3) == 0
        assert pictures(held, 3) == 128, "another lane, for the first one is lent"


def test_a_gpu_without_nvjpeg_is_an_error_with_the_line_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, _ = on_a_gpu(monkeypatch, None)
    with pytest.raises(DeviceError, match=r'cuda:1, got nothing: nvJPEG is missing.*"gpuload\[cuda1[23]\]"'):
        lent(decoder, [jpeg()])
    with pytest.raises(DeviceError):  # and no decoder that failed is used
        lent(decoder, [jpeg()])


def test_pixels_that_do_not_come_where_they_should_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, _ = on_a_gpu(monkeypatch, (200, 100, 50))
    with ExitStack() as held:  # memory that is handed out again may hold the right colour from before
        for _ in range(20):
            held.enter_context(lent(decoder, [jpeg()]))
    decoder, _ = on_a_gpu(monkeypatch, "elsewhere")
    with pytest.raises(DeviceError, match=r'memory of cuda:1, got values up to \d+ from it.*decoder="dali"'):
        lent(decoder, [jpeg()])


# The ring's protocol, with stand-ins for CUDA's streams and events.


class FakeEvent:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def synchronize(self) -> None:
        self.log.append(f"wait {self.name}")


class FakeStream:
    def __init__(self, number: int = 0) -> None:
        self.log: list[str] = []
        self.events, self.cuda_stream = 0, number

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
    ragged = Ragged(torch.empty(0), np.zeros(0, PIXELS), {}, Lease(lanes, lane, slot))
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
