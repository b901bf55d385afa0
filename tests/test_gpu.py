"""On a GPU: decoders against Pillow, batches against the CPU's, streams under attack, memory over a long run."""

from __future__ import annotations

import gc
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
import torch
from making import by_pillow, captions, encode, jpeg, judged, picture
from test_images import FILES

from gpuload import DecodeError, Decoder, Image, LanceDataset, Ragged, Text
from gpuload.images import PIXELS, VIEW, put_whole, views
from gpuload.images.decode import libjpeg, libnvjpeg
from gpuload.images.decode.choose import make_decoder
from gpuload.images.resize import resize_normalize, resize_twin
from gpuload.order.draws import Draws

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::gpuload.BadRowWarning")]

DECODERS = ["nvjpeg:alone", "nvimgcodec", "nvimgcodec:parity", "dali", "dali:parity", "cpu"]
# What a GPU's JPEG may differ from Pillow, by mode: (lowest PSNR in dB, largest difference in grey levels).
# Without interpolation of chroma, libjpeg-turbo itself has 38.5 dB and 17 on these photos (4:2:0); with it, another
# inverse DCT has 45.4 dB and 5. The host's pixels and nvJPEG's are Pillow's.
LIMITS = {"": (36.0, 40), "parity": (42.0, 16), "exact": (99.0, 0)}
LEVELS = {mode: most / 255 for mode, (_, most) in LIMITS.items()}  # a crop may be enlarged, so nothing evens out
EXACT = ("cpu", "nvjpeg")
HOST = "simplejpeg" if libjpeg.library() is None else "libjpeg-turbo"  # what decodes plain JPEG on the host
Store = Callable[..., str]


def gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def limits(decoder: str) -> tuple[float, int]:
    name, _, mode = decoder.partition(":")
    return LIMITS["exact" if name in EXACT else mode]


def need(decoder: str) -> None:
    """The decoder's package, or no test: a missing one fails where the GPU is required."""
    package = {"nvimgcodec": "nvidia.nvimgcodec", "dali": "nvidia.dali"}.get(decoder.partition(":")[0])
    try:
        found = package is None or importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        (pytest.fail if os.environ.get("GPULOAD_REQUIRE_GPU") == "1" else pytest.skip)(f"{package} is not installed")


@pytest.fixture(params=DECODERS)
def name(request: pytest.FixtureRequest) -> str:
    need(request.param)
    return str(request.param)


@pytest.fixture
def decoder(name: str) -> Iterator[Decoder]:
    made = make_decoder(name, gpu(), 100_000_000, 8)
    yield made
    made.close()


def photo(height: int, width: int, seed: int) -> PIL.Image.Image:
    """Smooth colours and a grain that is the same in all three channels: what a camera gives."""
    generator = np.random.default_rng(seed)
    coarse = PIL.Image.fromarray(generator.integers(0, 256, (9, 11, 3), dtype=np.uint8))
    fine = PIL.Image.fromarray(generator.integers(108, 149, (height // 3 + 1, width // 3 + 1), dtype=np.uint8))
    size, how = (width, height), PIL.Image.Resampling.BICUBIC
    pixels = (
        np.asarray(coarse.resize(size, how)).astype(int) + np.asarray(fine.resize(size, how)).astype(int)[..., None]
    )
    return PIL.Image.fromarray((pixels - 128).clip(0, 255).astype(np.uint8))


def files(count: int) -> list[bytes]:
    """JPEG photos: every subsampling, baseline and progressive, gray, several qualities and sizes."""
    made = []
    for i in range(count):
        image = photo(180 + 37 * (i % 9), 260 + 53 * (i % 7), i)
        options: dict[str, Any] = {"quality": (95, 80, 90)[i % 3], "progressive": i % 5 == 4}
        if i % 8 == 7:
            image = image.convert("L")
        else:
            options["subsampling"] = ("4:2:0", "4:4:4", "4:2:2")[i % 3]
        made.append(encode(image, "JPEG", **options))
    return made


def decoded(decoder: Decoder, data: list[bytes]) -> tuple[list[Any], dict[int, DecodeError]]:
    """u8[h, w, 3] of each file on the host, as it is stored, None where there is none; and all errors."""
    encoded, headers, errors = judged(data, max_pixels=100_000_000)  # type: ignore[arg-type]
    with decoder.decode(encoded, headers, None) as ragged:
        found = []
        for i in range(len(ragged)):
            pixels = ragged.pixels(i).clone().cpu().numpy() if ragged.table["height"][i] else None
            found.append(np.repeat(pixels, 3, axis=2) if pixels is not None and pixels.shape[2] == 1 else pixels)
        return found, errors | ragged.errors


def psnr(one: Any, other: Any) -> float:
    error = float(((one.astype(np.float64) - other) ** 2).mean())
    return 99.0 if error == 0 else 10 * float(np.log10(255**2 / error))


def test_photos_are_pillows_within_the_decoders_limits(name: str, decoder: Decoder) -> None:
    data = files(48)
    found, errors = decoded(decoder, data)
    assert not errors
    expected = [by_pillow(d, orient=False).transpose(1, 2, 0) for d in data]
    ratios = [psnr(one, other) for one, other in zip(found, expected, strict=True)]
    largest = [int(np.abs(a.astype(int) - b).max()) for a, b in zip(found, expected, strict=True)]
    print(f"{name}: PSNR lowest {min(ratios):.1f} median {np.median(ratios):.1f} dB, largest difference {max(largest)}")
    lowest, most = limits(name)
    assert min(ratios) >= lowest
    assert max(largest) <= most
    library = name.partition(":")[0]
    assert decoder.counts()[HOST if library == "cpu" else library] == len(data)


def test_odd_formats_are_pillows(name: str, decoder: Decoder) -> None:
    kinds = [kind for kind in FILES if kind != "jpeg_short_of_rows"]  # how a decoder fills it up is its own affair
    data = [FILES[kind]() for kind in kinds]
    found, errors = decoded(decoder, data)
    assert not errors
    for kind, pixels, file in zip(kinds, found, data, strict=True):
        expected = by_pillow(file, orient=False).transpose(1, 2, 0)
        if (
            kind.startswith("jpeg") and kind != "jpeg_rgb" and name.partition(":")[0] not in EXACT
        ):  # 17 x 23 pixels of coloured noise
            assert psnr(pixels, expected) >= (36 if "parity" in name else 20), kind
        else:
            np.testing.assert_array_equal(pixels, expected, err_msg=kind)


def test_bad_images_leave_their_neighbours_alone(name: str, decoder: Decoder) -> None:
    good = files(4)
    bad = [b"", b"no image at all", jpeg(200, 200)[:3000], encode(picture(40, 40), "PNG")[:900], b"\xff\xd8\xff\xd9"]
    found, errors = decoded(decoder, [file for pair in zip(good, bad[:4], strict=True) for file in pair] + bad[4:])
    assert sorted(errors) == [1, 3, 5, 7, 8]
    for pixels, file in zip(found[0::2], good, strict=False):
        assert psnr(pixels, by_pillow(file, orient=False).transpose(1, 2, 0)) >= limits(name)[0]


def test_one_decoder_serves_many_threads(name: str, decoder: Decoder) -> None:
    data = files(16)
    once, _ = decoded(decoder, data)
    wrong: list[int] = []

    def work(start: int) -> None:
        for repeat in range(10):
            order = [(start + repeat + i) % len(data) for i in range(len(data))]
            found, _ = decoded(decoder, [data[i] for i in order])
            wrong.extend(i for i, pixels in zip(order, found, strict=True) if psnr(pixels, once[i]) < 36)

    threads = [threading.Thread(target=work, args=(4 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(("height", "width"), [(3000, 4000), (1, 7000), (5000, 3)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_the_kernel_reduces_large_images_as_its_twin(height: int, width: int, orientation: int) -> None:
    generator = torch.Generator(gpu()).manual_seed(0)
    arena = torch.randint(0, 256, (height * width * 3,), dtype=torch.uint8, device=gpu(), generator=generator)
    table = np.zeros(1, PIXELS)
    put_whole(table, height, width, 3, orientation)
    ragged, image = Ragged(arena, table), Image(224, crop="random", flip=1.0)
    wanted = views.views(image, table, Draws(0, 0, np.arange(1)))
    out, expected = (torch.empty((1, 3, 224, 224), device=gpu()) for _ in range(2))
    resize_normalize(ragged, wanted, image, out)
    resize_twin(ragged, wanted, image, expected)
    assert (out - expected).abs().max() <= 1e-3  # of the value range; sums of up to 300,000 terms in float32


def test_many_views_of_few_images_in_one_launch() -> None:
    stored = [torch.randint(0, 256, (60 + i, 90 - i, 3), dtype=torch.uint8) for i in range(3)]
    ragged, image = Ragged.of(stored, device=gpu()), Image((31, 40), crop="random", flip=0.5)
    wanted = np.concatenate([views.views(image, ragged.table, Draws(k, 0, np.arange(3))) for k in range(5)])
    assert wanted.dtype == VIEW
    out, expected = (torch.empty((15, 3, 31, 40), device=gpu()) for _ in range(2))
    resize_normalize(ragged, wanted, image, out)
    resize_twin(ragged, wanted, image, expected)
    assert (out - expected).abs().max() <= 2e-5  # float32 weights, some hundred terms


def test_what_the_host_decoded_lies_beside_the_arena(name: str, decoder: Decoder) -> None:
    """Photos and what only Pillow reads, mixed, in calls that make either memory grow."""
    gif = FILES["gif"]()
    for repeat in range(4):
        good = files(4 * (repeat + 1))
        data = [file for photo in good for file in (photo, gif)]
        found, errors = decoded(decoder, data)
        assert not errors
        for pixels in found[1::2]:
            np.testing.assert_array_equal(pixels, by_pillow(gif, orient=False).transpose(1, 2, 0))
        for pixels, file in zip(found[::2], good, strict=True):
            assert psnr(pixels, by_pillow(file, orient=False).transpose(1, 2, 0)) >= limits(name)[0]


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> str:
    """240 rows: image, other (the same turned by EXIF), prompt, number."""
    import lance

    data = files(60)
    images = [data[i % 60] for i in range(240)]
    turned = [encode(photo(90, 120, i % 8), "JPEG", 1 + i % 8) for i in range(240)]
    path = str(tmp_path_factory.mktemp("shots") / "shots.lance")
    table = pa.table({"image": images, "other": turned, "prompt": captions(240), "number": range(240)})
    lance.write_dataset(table, path, max_rows_per_file=50)
    return path


def test_an_epoch_is_the_cpus_with_its_crops_and_flips(name: str, shots: str) -> None:
    transforms = {
        "image": Image(96, crop="random", flip=0.5),
        "other": Image((40, 56), crop="random", flip=0.5, channels_last=True, dtype=torch.float16),
        "prompt": Text("bytes", max_length=40),
    }
    options: dict[str, Any] = {"batch_size": 32, "shuffle": True, "seed": 5, "transforms": transforms}
    dataset = LanceDataset(shots, device="cuda", decoder=name, **options)
    for ours, expected in zip(dataset, LanceDataset(shots, device="cpu", **options), strict=True):
        assert ours.rows.tolist() == expected.rows.tolist()
        assert ours["prompt"].is_cuda
        assert ours["number"].is_cuda
        for column in ("prompt", "prompt_mask", "number"):
            assert torch.equal(ours[column].cpu(), expected[column])
        for column in ("image", "other"):
            assert ours[column].stride() == expected[column].stride()
            difference = (ours[column].cpu().float() - expected[column].float()).abs()
            # another crop, flip or row differs by 0.1 and more on average
            assert difference.mean(dim=(1, 2, 3)).max() < 0.02
            assert difference.max() <= (2e-3 if name.partition(":")[0] in EXACT else LEVELS[name.partition(":")[2]])
    counted = dataset.stats()["images"]
    assert counted["failed"] == 0
    assert sum(counted.values()) == 480
    dataset.close()


@pytest.mark.parametrize("policy", ["skip", "mask"])
@pytest.mark.parametrize("image", [None, Image(32)])
def test_bad_rows_end_as_on_the_cpu(name: str, policy: Any, image: Image | None, store: Store) -> None:
    good = files(4)
    column = pa.array([good[0], None, good[1], good[2][:4000], b"x", FILES["gif"](), good[3]], pa.binary())
    transforms = {} if image is None else {"image": image}
    path, options = store(pa.table({"image": column})), {"transforms": transforms, "on_error": policy}
    (ours,) = LanceDataset(path, 7, device="cuda", decoder=name, **options)  # type: ignore[arg-type]
    (expected,) = LanceDataset(path, 7, device="cpu", **options)  # type: ignore[arg-type]
    assert (ours.rows.tolist(), ours.valid.tolist()) == (expected.rows.tolist(), expected.valid.tolist())
    for one, other in zip(ours["image"], expected["image"], strict=True):
        assert one.is_cuda
        assert one.shape == other.shape
        assert (one.cpu().float() - other.float()).abs().mean() < (5 if image is None else 0.02)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """4,000 photos of 48 x 48 to 63 x 63 pixels and their numbers."""
    import lance

    data = [encode(photo(48 + i % 16, 48 + i % 13, i), "JPEG", quality=95) for i in range(250)]
    path = str(tmp_path_factory.mktemp("tiny") / "tiny.lance")
    lance.write_dataset(pa.table({"image": [data[i % 250] for i in range(4000)], "number": range(4000)}), path)
    return path


def first_pass(dataset: LanceDataset) -> torch.Tensor:
    """f32[rows, 3, H, W] of an epoch in order, every batch waited for."""
    kept = []
    for batch in dataset:
        torch.cuda.synchronize()
        kept.append(batch["image"].clone())
        torch.cuda.synchronize()
    return torch.cat(kept)


def attack(dataset: LanceDataset, expected: torch.Tensor, epochs: int, pause: int) -> tuple[int, int]:
    """Take batches on the current stream, late; poison them after use. (batches, wrong values)"""
    wrong, taken, at = torch.zeros((), dtype=torch.int64, device=expected.device), 0, 0
    for _ in range(epochs):
        at = 0
        for batch in dataset:
            torch.cuda._sleep(pause)  # the GPU falls behind: memory that comes back too early shows now
            there = (batch["image"] - expected[at : at + batch.size]).abs() <= 0.1
            wrong += (~there).sum() + (batch["number"] != batch["number"][0] + _counting(batch.size)).sum()
            at += batch.size
            batch["image"].fill_(float("nan"))
            batch["number"].fill_(-1)
            taken += 1
            del batch, there
    return taken, int(wrong)


_COUNTING: dict[int, torch.Tensor] = {}


def _counting(size: int) -> torch.Tensor:
    if size not in _COUNTING:
        _COUNTING[size] = torch.arange(size, device=gpu())
    return _COUNTING[size]


@pytest.mark.parametrize("name", ["nvjpeg:alone", "nvimgcodec", "dali", "cpu"], indirect=True)
def test_ten_thousand_batches_on_another_stream_without_a_wrong_value(name: str, tiny: str) -> None:
    # the whole count for the default decoder, a tenth for the others
    epochs = 10 if name.startswith("nv") else 1
    options: dict[str, Any] = {"transforms": {"image": Image(32, crop="none")}, "device": "cuda", "decoder": name}
    dataset = LanceDataset(tiny, 4, batch_readahead=6, **options)
    expected = first_pass(dataset)
    assert expected.isfinite().all()
    _counting(4)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        taken, wrong = attack(dataset, expected, epochs, pause=100_000)
    assert (taken, wrong) == (1000 * epochs, 0)
    dataset.close()


def test_two_datasets_at_once_do_not_meet(shots: str) -> None:
    need("nvimgcodec")
    options: dict[str, Any] = {"columns": ["image"], "device": "cuda", "decoder": "nvimgcodec"}
    one = LanceDataset(shots, 20, transforms={"image": Image(64)}, **options)
    two = LanceDataset(shots, 20, transforms={"image": Image(48, flip=1.0)}, **options)
    alone = [torch.cat([batch["image"] for batch in dataset]) for dataset in (one, two)]
    for _ in range(3):
        for step, (first, second) in enumerate(zip(one, two, strict=True)):
            for found, expected in ((first, alone[0]), (second, alone[1])):
                assert (found["image"] - expected[20 * step : 20 * step + 20]).abs().max() <= 0.1


def test_leaving_early_and_beginning_again(shots: str) -> None:
    need("nvimgcodec")
    dataset = LanceDataset(shots, 16, transforms={"image": Image(64)}, columns=["image"], device="cuda")
    expected = next(iter(dataset))["image"].clone()
    used = []
    for _ in range(20):
        batches = iter(dataset)
        assert (next(batches)["image"] - expected).abs().max() <= 0.1
        next(batches)
        batches.close()  # type: ignore[attr-defined]
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_reserved())
    assert used[-1] <= used[5] + (16 << 20)  # another lane may yet need a block of its own


def test_memory_does_not_grow_over_a_thousand_batches(tiny: str) -> None:
    need("nvimgcodec")
    options: dict[str, Any] = {"transforms": {"image": Image(96)}, "columns": ["image"], "device": "cuda"}
    dataset = LanceDataset(tiny, 20, **options)

    def epoch() -> tuple[int, int]:
        for batch in dataset:
            del batch
        torch.cuda.synchronize()
        return torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[0]

    for _ in range(2):
        reserved, free = epoch()
    for _ in range(5):
        later, left = epoch()
    assert later <= reserved + (64 << 20)
    assert left >= free - (128 << 20)  # nvJPEG's own buffers included
    dataset.close()


def test_out_of_memory_is_said_and_the_next_epoch_works(shots: str) -> None:
    need("nvimgcodec")
    options: dict[str, Any] = {"columns": ["image"], "device": "cuda", "decoder": "nvimgcodec"}
    large = LanceDataset(shots, 120, transforms={"image": Image(1024)}, **options)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(gpu()).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (256 << 20)) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError, match="memory") as caught:
            list(large)
        del caught
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    assert sum(batch.size for batch in large) == 240
    large.close()


def test_the_consumers_thread_waits_for_the_gpu_nowhere(shots: str) -> None:
    need("nvimgcodec")
    transforms = {"image": Image(64), "prompt": Text("bytes", max_length=20)}
    dataset = LanceDataset(shots, 16, transforms=transforms, columns=["image", "prompt", "number"], device="cuda")
    list(dataset)  # the first pass allocates
    seen: list[str] = []

    def note(message: Any, *_: Any, **__: Any) -> None:
        if threading.current_thread() is threading.main_thread() and "synchronizing CUDA" in str(message):
            seen.append(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for batch in dataset:
                del batch
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert seen == []
    dataset.close()


def test_what_runs_is_said(shots: str) -> None:
    library = libnvjpeg.library()
    chosen = "nvjpeg" if library is not None and libnvjpeg.engines(library, gpu()) else "nvimgcodec"
    need(chosen)
    dataset = LanceDataset(shots, 16, columns=["image"], transforms={"image": Image(64)}, device="auto")
    assert dataset.device == gpu()
    list(dataset)
    stats = dataset.stats()
    assert (stats["decoder"], stats["resize"]) == (chosen, "cuda")
    assert torch.cuda.get_device_name() in stats["device"]
    counted = {name: count for name, count in stats["images"].items() if count}
    assert counted.keys() <= ({"nvjpeg", HOST} if chosen == "nvjpeg" else {"nvimgcodec"})
    assert sum(counted.values()) == 240
    if chosen == "nvjpeg":
        assert stats["decoder_facts"]["not_the_hosts_pixels"] == []
        assert stats["decoder_facts"]["calls_repeated"] == 0
    assert f"decoder={chosen!r}, resize='cuda'" in repr(dataset)
    dataset.close()
