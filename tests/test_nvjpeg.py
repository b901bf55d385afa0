"""nvJPEG's decoder against a stand-in for the library (nvjpeg_standin.cpp), which checks that its rules are kept."""

from __future__ import annotations

import gc
import io
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from making import by_pillow, by_row, encode, jpeg, judged, picture, without
from standin import CPU, StandIn
from test_images import FILES

from gpuload import Image, LanceDataset
from gpuload.errors import ConfigError, DeviceError
from gpuload.images.decode import libjpeg, libnvjpeg
from gpuload.images.decode.nvjpeg import NvJpegDecoder, default_share, hosts_share, samplings

pytestmark = pytest.mark.filterwarnings("ignore::gpuload.BadRowWarning")  # met on purpose in some tests here

Store = Callable[..., str]
HOST = "simplejpeg" if libjpeg.library() is None else "libjpeg-turbo"
ENGINE = ["gray", "4:4:4", "4:2:2", "4:2:0", "4:4:0"]  # what it takes


def photo(sampling: str, height: int = 40, width: int = 50, seed: int = 0) -> bytes:
    if sampling == "gray":
        return encode(picture(height, width, seed, "L"), "JPEG", quality=85)
    if sampling == "4:4:0":
        return as_440(height, width, seed)
    return jpeg(height, width, seed, subsampling=sampling, quality=85)


def as_440(height: int, width: int, seed: int = 0) -> bytes:
    """A 4:2:2 file of the other shape, its header saying 4:4:0: the blocks of each MCU are the same in number."""
    rows, columns = -(-height // 16), -(-width // 8)  # of MCUs
    file = jpeg(8 * rows, 16 * columns, seed, subsampling="4:2:2", quality=85)
    at = file.index(b"\xff\xc0") + 5
    return file[:at] + bytes([*height.to_bytes(2, "big"), *width.to_bytes(2, "big"), 3, 1, 0x12]) + file[at + 7 :]


def decoded(decoder: NvJpegDecoder, files: list[bytes | None]) -> tuple[list[Any], dict[int, Any]]:
    """u8[h, w, c] of each file as it is stored, None where there is none; and all errors."""
    encoded, headers, errors = judged(files)
    with decoder.decode(encoded, headers, None) as ragged:
        found = [ragged.pixels(i).clone().numpy() if ragged.table["height"][i] else None for i in range(len(ragged))]
        return found, errors | ragged.errors


def assert_pillows(found: list[Any], files: list[bytes]) -> None:
    for i, (pixels, file) in enumerate(zip(found, files, strict=True)):
        with PIL.Image.open(io.BytesIO(file)) as image:
            want = np.asarray(image)
        assert pixels.squeeze().shape == want.squeeze().shape, i
        np.testing.assert_array_equal(pixels.squeeze(), want.squeeze(), err_msg=str(i))


# -- pixels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FILES)
def test_every_format_gives_the_pixels_of_pillow(kind: str, card: StandIn) -> None:
    data = FILES[kind]()
    decoder = card.decoder()
    found, errors = decoded(decoder, [data, data])
    assert not errors
    for pixels in found:
        wanted = by_pillow(data, orient=False).transpose(1, 2, 0)
        np.testing.assert_array_equal(np.broadcast_to(pixels, wanted.shape), wanted)
    mine = kind in ("jpeg_444", "jpeg_422", "jpeg_420", "jpeg_gray", "jpeg_1x1", "jpeg_short_of_rows")
    assert decoder.counts()["nvjpeg"] == 2 * mine


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_batch_is_pillows_to_the_bit_whoever_decodes_it(card: StandIn, data: st.DataObject) -> None:
    draw, side = data.draw, st.integers(1, 70)
    files = [
        photo(draw(st.sampled_from(ENGINE)), draw(side), draw(side), seed) for seed in range(draw(st.integers(1, 40)))
    ]
    decoder = card.decoder(share=draw(st.sampled_from([0.0, 0.1, 0.25])))
    found, errors = decoded(decoder, files)  # type: ignore[arg-type]
    assert not errors
    assert_pillows(found, files)
    counts = decoder.counts()
    assert counts["nvjpeg"] + counts.get(HOST, 0) == len(files)
    assert counts["nvjpeg"] >= 0.75 * len(files)
    assert decoder.facts()["not_the_hosts_pixels"] == []


# -- calls -------------------------------------------------------------------------------------------------------------


def test_a_batch_is_one_call_a_sampling(card: StandIn) -> None:
    files = [photo(ENGINE[i % 5], 30 + i, 40 + i, i) for i in range(50)]
    decoder = card.decoder()
    decoded(decoder, files)  # type: ignore[arg-type]
    before = card.count("calls")
    decoded(decoder, files)  # type: ignore[arg-type]
    assert card.count("calls") - before == 5
    assert decoder.counts()["nvjpeg"] == 100


def test_after_the_first_batch_no_call_makes_anything(card: StandIn) -> None:
    decoder = card.decoder()
    made = None
    for seed, count in enumerate([64, 1, 33, 64, 7, 16, 50]):
        generator = np.random.default_rng(seed)
        files = [photo(str(generator.choice(ENGINE)), 20 + i, 30, i) for i in range(count)]
        found, _ = decoded(decoder, files)  # type: ignore[arg-type]
        assert_pillows(found, files)
        now = [card.count(name) for name in ("handles", "states", "initialised")]
        assert made in (None, now)
        made = now


def test_a_larger_batch_than_before_gets_states_of_its_size(card: StandIn) -> None:
    decoder = card.decoder()
    for count in (5, 40, 41):
        files = [photo("4:2:0", 20, 30 + i, i) for i in range(count)]
        found, _ = decoded(decoder, files)  # type: ignore[arg-type]
        assert_pillows(found, files)
    assert decoder.counts()["nvjpeg"] == 86


def test_an_empty_batch_and_one_of_nulls_call_nothing(card: StandIn) -> None:
    decoder = card.decoder()
    assert decoded(decoder, []) == ([], {})
    before = card.count("calls")
    found, errors = decoded(decoder, [None, b""])
    assert (found, sorted(errors)) == ([None, None], [0, 1])
    assert card.count("calls") == before


# -- what the engine does not take -------------------------------------------------------------------------------------


NOT_THE_ENGINES: dict[str, Callable[[], bytes]] = {
    "progressive": lambda: jpeg(progressive=True),
    "RGB": lambda: jpeg(keep_rgb=True),
    "CMYK": lambda: encode(picture(20, 30, mode="CMYK"), "JPEG"),
    "4:1:1": lambda: (lambda f: f[: (at := f.index(b"\xff\xc0") + 11)] + b"\x41" + f[at + 1 :])(
        jpeg(8, 32, subsampling="4:2:0")
    ),
    "cut": lambda: jpeg(60, 60)[:-200],
    "more behind it": lambda: jpeg() + b"more",
    "12 bits": lambda: (lambda f: f[: (at := f.index(b"\xff\xc0") + 4)] + b"\x0c" + f[at + 1 :])(jpeg()),
    "no Huffman tables": lambda: without(jpeg(), 0xC4),
    "no quantisation": lambda: without(jpeg(), 0xDB),
    "PNG": lambda: encode(picture(20, 30), "PNG"),
}


@pytest.mark.parametrize("kind", NOT_THE_ENGINES)
def test_what_it_does_not_take_is_known_before_the_call(kind: str, card: StandIn) -> None:
    file = NOT_THE_ENGINES[kind]()
    _, headers, _ = judged([file, photo("4:4:4")])
    assert samplings(headers).tolist() == [-1, 1]
    decoder = card.decoder()
    decoded(decoder, [photo("4:4:4")])
    queries = card.count("queries")
    good, _ = decoded(decoder, [photo("4:4:4"), file, photo("4:4:4", seed=1)])
    assert_pillows([good[0], good[2]], [photo("4:4:4"), photo("4:4:4", seed=1)])
    assert decoder.counts()["nvjpeg"] == 3
    assert decoder.facts()["calls_repeated"] == 0
    assert card.count("queries") == queries, "the library is asked after a failure only"


def test_a_sampling_and_a_size_that_the_library_does_not_support_are_the_hosts(card: StandIn) -> None:
    card.set(refused_sampling=0x21, least_side=32)
    files = [photo("4:2:2", 50, 50), photo("4:2:0", 50, 50), photo("4:2:0", 31, 50), photo("4:2:0", 32, 32)]
    decoder = card.decoder()
    found, errors = decoded(decoder, files)  # type: ignore[arg-type]
    assert not errors
    assert_pillows(found, files)
    assert {name: decoder.counts()[name] for name in ("nvjpeg", HOST)} == {"nvjpeg": 2, HOST: 2}
    assert decoder.facts()["calls_repeated"] == 0


@pytest.mark.parametrize("setting", ["refused_width", "broken_width"])
@pytest.mark.parametrize("bad", [[0], [11], [3, 4, 9], [*range(12)]])
def test_a_call_that_fails_is_repeated_without_the_culprits(setting: str, bad: list[int], card: StandIn) -> None:
    files = [photo("4:2:0", 40, 77 if i in bad else 50, i) for i in range(12)] + [photo("4:4:4")]
    decoder = card.decoder()
    decoded(decoder, [photo("gray")])
    card.set(**{setting: 77})
    for _ in range(2):
        found, errors = decoded(decoder, files)  # type: ignore[arg-type]
        assert not errors
        assert_pillows(found, files)
    counts = decoder.counts()
    assert (counts["nvjpeg"], counts[HOST]) == (1 + 2 * (13 - len(bad)), 2 * len(bad))
    assert decoder.facts()["images_refused"] == 2 * len(bad)
    assert decoder.facts()["calls_repeated"] >= 2
    if setting == "refused_width":
        assert decoder.facts()["calls_repeated"] == 2, "the library names them all"


def test_a_batch_that_all_went_to_the_host_is_told_once(card: StandIn) -> None:
    decoder = card.decoder()
    decoded(decoder, [photo("gray")])
    card.set(broken_width=50)
    with pytest.warns(RuntimeWarning, match="nvjpeg decoded none of 6 images and the host did it"):
        decoded(decoder, [photo("4:2:0", seed=i) for i in range(6)])


@pytest.mark.parametrize(("status", "kind"), [(5, torch.OutOfMemoryError), (6, DeviceError), (8, DeviceError)])
def test_a_failure_of_the_card_is_an_error_and_the_next_batch_works(
    status: int, kind: type[Exception], card: StandIn
) -> None:
    decoder, files = card.decoder(), [photo("4:2:0", seed=i) for i in range(9)]
    decoded(decoder, files)  # type: ignore[arg-type]
    card.set(status=status)
    with pytest.raises(kind, match=rf"nvjpegDecodeBatched.*status {status}"):
        decoded(decoder, files)  # type: ignore[arg-type]
    card.set(status=0)
    found, _ = decoded(decoder, files)  # type: ignore[arg-type]
    assert_pillows(found, files)


def test_damage_inside_passes_on_the_engine_and_harms_nobody_else(card: StandIn) -> None:
    files = [photo("4:2:0", 60, 60, i) for i in range(5)]
    damaged = bytearray(files[2])
    damaged[-60:-50] = bytes(range(10))
    decoder = card.decoder()
    found, errors = decoded(decoder, [*files[:2], bytes(damaged), *files[3:]])
    assert not errors
    assert found[2].shape == (60, 60, 3)
    assert_pillows([found[i] for i in (0, 1, 3, 4)], [files[i] for i in (0, 1, 3, 4)])


# -- the proof, and the host's share -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("sampling", "name"), [(0x22, "4:2:0"), (0x21, "4:2:2"), (0, "gray")])
def test_an_engine_with_other_planes_is_found_out_and_not_mixed(sampling: int, name: str, card: StandIn) -> None:
    card.set(other_sampling=sampling)
    decoder = card.decoder(share=0.25)
    files = [photo(name, 40, 50 + i, i) for i in range(20)] + [photo("4:4:4", 40, 50 + i, i) for i in range(20)]
    found, _ = decoded(decoder, files)  # type: ignore[arg-type]
    assert decoder.facts()["not_the_hosts_pixels"] == [name]
    assert {key: decoder.counts()[key] for key in ("nvjpeg", HOST)} == {"nvjpeg": 30, HOST: 10}
    assert_pillows(found[20:], files[20:])
    for pixels, file in zip(found[:20], files[:20], strict=True):
        with PIL.Image.open(io.BytesIO(file)) as image:
            assert not np.array_equal(pixels.squeeze(), np.asarray(image)), "not one of them was decoded by the host"


def test_who_decodes_what_is_a_function_of_the_batch(card: StandIn) -> None:
    """Damage shows whether the host had an image: its error, or none."""
    files = []
    for i in range(40):
        damaged = bytearray(photo("4:2:0", 60, 60 + i, i))
        damaged[-150:-148] = b"\xff\xc0"  # a frame within the scan
        files.append(bytes(damaged))
    seen = set()
    for threads in (1, 3):
        decoder = card.decoder(threads=threads, share=0.2)
        for _ in range(3):
            seen.add(tuple(sorted(decoded(decoder, files)[1])))  # type: ignore[arg-type]
        decoder.close()
    (bad,) = seen
    assert len(bad) == 8
    assert not decoded(card.decoder(share=0), files)[1]  # type: ignore[arg-type]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(1, 10**6), st.booleans()), max_size=150), st.floats(0, 0.25))
def test_the_hosts_share_is_bounded_and_from_small_to_large(files: list[tuple[int, bool]], share: float) -> None:
    sizes, may = np.array([s for s, _ in files], np.int64), np.array([m for _, m in files], np.bool_)
    found = hosts_share(sizes, may, share)
    assert found.sum() == min(int(share * len(files)), may.sum())
    assert not (found & ~may).any()
    if may.all() and found.sum() > 1:
        ranks = np.sort(np.argsort(np.argsort(sizes, kind="stable"), kind="stable")[found])
        assert np.diff(ranks).max() - np.diff(ranks).min() <= 1


def test_threads_to_spare_decide_the_share() -> None:
    shares = [default_share(threads, 7) for threads in (1, 6, 8, 16, 64, 1000)]
    assert shares == sorted(shares)
    assert shares[:2] == [0, 0]
    assert 0.1 < shares[3] < 0.15, "16 cores: 1.15 of the engines alone"
    assert shares[-1] == 0.25
    assert default_share(16, 1) == 0.25


# -- lanes, streams, memory --------------------------------------------------------------------------------------------


def test_calls_at_once_have_lanes_of_their_own(card: StandIn) -> None:
    decoder = card.decoder(share=0.1)
    batches = [[photo(ENGINE[(i + k) % 5], 30 + k, 40 + i, i + k) for i in range(20)] for k in range(12)]
    barrier = threading.Barrier(3)

    def call(k: int) -> None:
        if k < 3:
            barrier.wait()
        found, errors = decoded(decoder, batches[k])  # type: ignore[arg-type]
        assert not errors
        assert_pillows(found, batches[k])

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(call, range(12)))
    assert card.count("handles") == 1 + 3, "the one that asked for the engines, and a lane's each"
    decoder.close()
    assert card.count("alive") == 0


def test_the_encoded_bytes_live_until_the_engine_has_read_them(card: StandIn) -> None:
    """The stand-in reads them when somebody waits, and says so where they are gone or others."""

    class Owner:
        def __init__(self, files: list[bytes]) -> None:
            self.memory = [np.frombuffer(bytearray(file), np.uint8).copy() for file in files]

        def __del__(self) -> None:
            for memory in self.memory:
                memory[:] = 0

    decoder, kept = card.decoder(), ExitStack()
    with kept:
        for seed in range(4):
            files = [photo("4:2:0", 40, 50, seed + i) for i in range(8)]
            encoded, headers, _ = judged(files)  # type: ignore[arg-type]
            owner = Owner(files)
            encoded.owner, encoded.at = owner, np.array([m.ctypes.data for m in owner.memory], np.uint64)
            with decoder.decode(encoded, headers, None):
                del encoded, owner
    assert not card.broken()


def test_what_nobody_closed_goes_with_its_decoder(card: StandIn) -> None:
    decoder = card.decoder()
    decoded(decoder, [photo("4:2:0")])
    assert card.count("alive") > 0
    gc.disable()  # gigabytes of a GPU do not wait for the collector of cycles
    try:
        del decoder
        assert card.count("alive") == 0
    finally:
        gc.enable()


def test_a_closed_decoder_can_be_used_again(card: StandIn) -> None:
    decoder = card.decoder()
    for _ in range(2):
        found, _ = decoded(decoder, [photo("4:2:0")])
        assert_pillows(found, [photo("4:2:0")])
        decoder.close()
        assert card.count("alive") == 0


# -- which decoder -----------------------------------------------------------------------------------------------------


def test_a_card_without_an_engine_is_an_error_that_says_so(card: StandIn) -> None:
    card.set(engines=0)
    with pytest.raises(DeviceError, match=r'GPU with a JPEG engine for decoder="nvjpeg".*decoder="nvimgcodec"'):
        card.decoder()


def test_without_the_library_the_error_has_the_line_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libnvjpeg, "library", lambda: None)
    with pytest.raises(DeviceError, match=r'libnvjpeg for decoder="nvjpeg".*pip install "gpuload\[cuda1[23]\]"'):
        NvJpegDecoder(CPU, 1000)


@pytest.mark.parametrize("decoder", ["nvjpeg", "nvjpeg:alone"])
@pytest.mark.parametrize("device", ["cpu", "auto", CPU])
def test_on_the_cpu_it_is_refused_when_the_dataset_is_made(
    decoder: str, device: Any, photos: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=rf'device="cuda" for decoder=\'{decoder}\''):
        LanceDataset(photos, 4, device=device, decoder=decoder)


# -- through the dataset -----------------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {"columns": ["image", "number"], "batch_size": 16, "shuffle": True, "device": "cpu"}


@pytest.mark.parametrize("image", [None, Image((20, 30), crop="random", flip=0.5, dtype=torch.uint8)])
def test_an_epoch_is_the_cpus_to_the_bit(photos: str, image: Image | None, card: StandIn) -> None:
    transforms = {} if image is None else {"image": image}
    expected = by_row(LanceDataset(photos, transforms=transforms, **OPTIONS), "image")
    decoder = card.decoder(threads=2, share=0.2)
    dataset = LanceDataset(photos, transforms=transforms, decoder=decoder, **OPTIONS)
    for _ in range(2):
        dataset.set_epoch(0)
        found = by_row(dataset, "image")
        assert found.keys() == expected.keys()
        for row, pixels in found.items():
            # a window of an image and the whole one are resized around centres that differ in their last bits
            assert (pixels.int() - expected[row].int()).abs().max() <= (0 if image is None else 1)
    stats = dataset.stats()
    assert stats["decoder"] == "nvjpeg"
    assert stats["images"] == {"nvjpeg": 82, HOST: 18, **dict.fromkeys({"simplejpeg", "pillow", "failed"} - {HOST}, 0)}
    assert stats["decoder_facts"]["host_share"] == 0.2
    dataset.close()


@pytest.mark.parametrize("policy", ["skip", "mask"])
@pytest.mark.parametrize("image", [None, Image(32)])
def test_bad_rows_end_as_on_the_cpu(policy: Any, image: Image | None, store: Store, card: StandIn) -> None:
    good = [photo(ENGINE[i], 40, 50, i) for i in range(5)]
    files = [
        good[0],
        None,
        good[1],
        good[2][:400],
        b"x",
        FILES["gif"](),
        good[3],
        encode(picture(9, 9), "PNG"),
        good[4],
    ]
    path = store({"image": files})
    options: dict[str, Any] = {"transforms": {} if image is None else {"image": image}, "on_error": policy}
    (ours,) = LanceDataset(path, 9, device="cpu", decoder=card.decoder(), **options)
    (expected,) = LanceDataset(path, 9, device="cpu", **options)
    assert (ours.rows.tolist(), ours.valid.tolist()) == (expected.rows.tolist(), expected.valid.tolist())
    for one, other in zip(ours["image"], expected["image"], strict=True):
        torch.testing.assert_close(one, other, atol=0 if image is None else 2e-6, rtol=0)


def test_an_early_end_and_two_datasets_at_once(photos: str, card: StandIn) -> None:
    options: dict[str, Any] = {"transforms": {"image": Image(24, crop="random")}, **OPTIONS}
    first = LanceDataset(photos, decoder=card.decoder(), **options)
    second = LanceDataset(photos, decoder=card.decoder(), **options)
    expected = list(LanceDataset(photos, **options))
    for _ in range(2):
        for i, (one, other) in enumerate(zip(first, second, strict=True)):
            torch.testing.assert_close(one["image"], expected[i]["image"], atol=2e-6, rtol=0)
            torch.testing.assert_close(other["image"], expected[i]["image"], atol=2e-6, rtol=0)
            if i == 1:
                break
        first.set_epoch(0)
        second.set_epoch(0)
    first.close()
    second.close()
    assert card.count("alive") == 0
