"""One native call a slice on the CPU: the very pixels of decoding and resizing in two calls, each row for itself."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from making import encode, jpeg, picture

from gpuload import Image, LanceDataset, kernels
from gpuload.errors import DecodeError
from gpuload.images import VIEW, Encoded, headers, pillow, sizes, views
from gpuload.images.decode import libjpeg, line
from gpuload.images.decode.cpu import CpuDecoder
from gpuload.images.decode.line import Target
from gpuload.images.resize import resize_normalize
from gpuload.images.transform import IMAGE_DTYPES

pytestmark = pytest.mark.skipif(not line.available(), reason="needs a compiler at installation, and Pillow's libjpeg")
GUARD = 3  # rows before and behind what is filled
FILES: list[dict[str, Any]] = [
    {"subsampling": 0},
    {"subsampling": 1},
    {"subsampling": 2},
    {"progressive": True, "subsampling": 2},
    {"optimize": True, "restart_marker_blocks": 3},
    {"mode": "L"},
    {"keep_rgb": True},
    {"kind": "PNG"},
    {"kind": "PNG", "mode": "L"},
    {"kind": "BMP"},
    {"mode": "CMYK"},
    {"harm": "cut"},
    {"harm": "scan"},
    {"harm": "nothing"},
]


@cache
def file(number: int, height: int, width: int, orientation: int) -> bytes | None:
    """A file of one of the kinds in FILES."""
    options = {**FILES[number]}
    harm, kind = options.pop("harm", ""), options.pop("kind", "JPEG")
    turned = orientation if kind == "JPEG" else 1
    pixels = picture(height, width, seed=height * 100 + width, mode=options.pop("mode", "RGB"))
    data = encode(pixels, kind, turned, **options)
    if harm == "nothing":
        return None
    if harm == "cut":
        return data[: len(data) * 3 // 4]
    return data if harm != "scan" else damaged(data)


def damaged(data: bytes) -> bytes:
    """The file with a marker in the middle of its scan that libjpeg warns about and Pillow refuses."""
    middle = (data.index(b"\xff\xda") + len(data)) // 2
    return data[:middle] + b"\xff\x00\xff" + data[middle + 3 :]


@dataclass
class Wanted:
    """An output of a batch: its views, slice by slice, and where each slice's begin."""

    views: np.ndarray
    starts: list[int]
    image: Image
    size: tuple[int, int]

    def room(self) -> torch.Tensor:
        """A batch between guards, filled with what no resize leaves."""
        layout = torch.channels_last if self.image.channels_last else torch.contiguous_format
        shape = (len(self.views) + 2 * GUARD, self.image.channels, *self.size)
        return torch.full(shape, 77).to(self.image.dtype).contiguous(memory_format=layout)


@dataclass
class Case:
    """A batch as the image field hands it to a decoder."""

    files: list[bytes | None]
    cuts: list[int]
    outputs: list[Wanted]
    scales: np.ndarray | None

    def __post_init__(self) -> None:
        self.headers = headers.read(Encoded.of(self.files))

    def tables(self) -> tuple[Any, ...]:
        """encoded, headers, windows, scales; each time anew, for what Pillow opened is decoded once."""
        encoded, errors = Encoded.of(self.files), dict[int, DecodeError]()
        table = self.headers.copy()
        headers.judge(encoded, table, 1 << 24, errors)
        pillow.open_rest(encoded, table, 1 << 24, errors)
        table["height"][list(errors)] = 0
        windows = None
        for output in self.outputs:
            found = views.windows(output.views, table, output.size, self.scales)
            windows = found if windows is None else views.union(windows, found)
        return encoded, table, windows, self.scales

    def in_two(self) -> tuple[list[torch.Tensor], list[int], dict[str, int]]:
        """Pixels between their guards, indices that failed, and counts."""
        decoder, made = CpuDecoder(), [output.room() for output in self.outputs]
        with decoder.decode(*self.tables()) as ragged:
            for output, out in zip(self.outputs, made, strict=True):
                resize_normalize(ragged, output.views, output.image, out[GUARD:-GUARD])
        return made, sorted(ragged.errors), decoder.counts()

    def in_one(self, threads: int = 1) -> tuple[list[torch.Tensor], list[int], dict[str, int]]:
        decoder, made = CpuDecoder(), [output.room() for output in self.outputs]
        found = decoder.line(*self.tables())
        assert found is not None

        def fill(k: int) -> dict[int, DecodeError]:
            targets = []
            for output, out in zip(self.outputs, made, strict=True):
                part = slice(output.starts[k], output.starts[k + 1])
                targets.append(Target(output.views[part], output.image, out[GUARD:-GUARD][part]))
            filled = found.fill(self.cuts[k], self.cuts[k + 1], targets)
            assert filled.resized > 0
            return filled.errors

        errors = dict[int, DecodeError]()
        with ThreadPoolExecutor(threads) as pool:
            for some in pool.map(fill, range(len(self.cuts) - 1)):
                errors |= some
        return made, sorted(errors), decoder.counts()


def looks(
    generator: np.random.Generator, table: np.ndarray, cuts: list[int], most: int
) -> tuple[np.ndarray, list[int]]:
    """One to `most` views of every image, in any order within a slice: (VIEW[M], where each slice's begin)."""
    parts, starts = [], [0]
    for lo, hi in pairwise(cuts):
        which = generator.permutation(np.repeat(np.arange(lo, hi), generator.integers(1, most + 1, hi - lo)))
        heights, widths = (np.maximum(found, 1)[which] for found in sizes(table))
        share = generator.uniform(0.05, 1, (len(which), 2)) ** generator.integers(0, 2)  # or the whole image
        w, h = share[:, 0] * widths, share[:, 1] * heights
        place = generator.uniform(0, 1, (len(which), 2))
        found = np.zeros(len(which), VIEW)
        found["image"], found["flip"] = which, generator.integers(0, 2, len(which)) > 0
        found["region"] = np.stack([place[:, 0] * (widths - w), place[:, 1] * (heights - h), w, h], axis=1)
        parts.append(found)
        starts.append(starts[-1] + len(found))
    return np.concatenate(parts), starts


def case(files: list[bytes | None], seed: int, images: list[tuple[Image, int]], fast: bool, each: int = 3) -> Case:
    """`files` in slices of up to `each`, and for every (Image, most views of an image) an output."""
    generator = np.random.default_rng(seed)
    cuts = [*range(0, len(files), each), len(files)]
    scales = 2 ** generator.integers(0, 4, len(files)) if fast else None
    found = Case(files, cuts, [], scales)
    encoded = Encoded.of(files)
    table = headers.read(encoded)
    pillow.open_rest(encoded, table, 1 << 24, {})  # what only Pillow knows
    for image, most in images:
        assert image.shape is not None
        found.outputs.append(Wanted(*looks(generator, table, cuts, most), image, image.shape[1:]))
    return found


def assert_alike(one: tuple[Any, ...], two: tuple[Any, ...]) -> None:
    for got, want in zip(one[0], two[0], strict=True):
        assert torch.equal(got, want)
        for guard in (got[:GUARD], got[-GUARD:]):
            assert (guard == 77).all()
    assert one[1:] == two[1:]


_IMAGES = st.builds(
    Image,
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    dtype=st.sampled_from(IMAGE_DTYPES),
    mode=st.sampled_from(["RGB", "L"]),
    channels_last=st.booleans(),
)
_FILES = st.builds(
    file, st.integers(0, len(FILES) - 1), st.integers(1, 90), st.integers(1, 90), st.integers(1, 8)
)  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(
    st.lists(_FILES, min_size=1, max_size=7), st.lists(st.tuples(_IMAGES, st.integers(1, 3)), min_size=1, max_size=3),
    st.integers(0, 2**32), st.booleans(), st.integers(1, 8),
)  # fmt: skip
def test_one_call_gives_the_pixels_of_two(
    files: list[bytes | None], images: list[tuple[Image, int]], seed: int, fast: bool, each: int
) -> None:
    made = case(files, seed, images, fast, each)
    assert_alike(made.in_one(), made.in_two())


@pytest.mark.parametrize("dtype", IMAGE_DTYPES, ids=str)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_and_type(orientation: int, dtype: torch.dtype) -> None:
    files = [file(k, 61, 83, orientation) for k in range(7)]
    normal = {} if dtype == torch.uint8 else {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    images = [(Image((20, 31), dtype=dtype, channels_last=last, **normal), 2) for last in (False, True)]  # type: ignore[arg-type]
    made = case(files, orientation, images, fast=False)
    one = made.in_one()
    assert_alike(one, made.in_two())
    assert one[2]["libjpeg-turbo"] == len(files), "nothing of this is left to others"


def test_threads_fill_slices_of_one_batch_at_once() -> None:
    files = [file(k % len(FILES), 40 + k, 90 - k, 1 + k % 8) for k in range(42)]
    made = case(files, 0, [(Image(32), 1), (Image(16, dtype=torch.uint8, channels_last=True), 3)], fast=True, each=2)
    two = made.in_two()
    for _ in range(5):
        assert_alike(made.in_one(threads=8), two)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_damage_stays_in_its_row(data: st.DataObject) -> None:
    draw = data.draw
    good = [file(k, 50, 70, 1) for k in (0, 2, 5)]
    bad = bytearray(file(draw(st.integers(0, 6)), draw(st.integers(8, 80)), draw(st.integers(8, 80)), 1) or b"")
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(2, max(2, len(bad) - 1)))
        bad[at : at + draw(st.integers(0, 20))] = draw(st.binary(max_size=4))
    images = [(Image((24, 17)), 2)]
    made = case([good[0], bytes(bad), good[1], good[2]], draw(st.integers(0, 99)), images, fast=False, each=4)
    one, two = made.in_one(), made.in_two()
    assert_alike(one, two)
    assert set(one[1]) <= {1}


def test_what_is_left_is_decoded_by_others_and_its_errors_have_their_row() -> None:
    kinds = [0, 7, 12, 2, 11, 13, 9]  # plain, PNG, a damaged scan, plain, cut, a null, BMP
    made = case([file(k, 64, 64, 1) for k in kinds], 0, [(Image(16), 1)], fast=False, each=8)
    (pixels,), errors, counts = made.in_one()
    assert errors == [2, 4]
    assert counts == {"libjpeg-turbo": 2, "simplejpeg": 0, "pillow": 2, "failed": 2}
    zeros = [not pixels[GUARD + m].any() for m in np.argsort(made.outputs[0].views["image"])]
    assert zeros == [False, False, True, False, True, True, False]


def test_a_view_of_another_slice_is_refused_and_nothing_is_written() -> None:
    files: list[bytes | None] = [jpeg(), jpeg(), jpeg()]
    made = case(files, 0, [(Image(8), 1)], fast=False, each=3)
    found = CpuDecoder().line(*made.tables())
    assert found is not None
    output = made.outputs[0]
    for lo, hi in ((0, 2), (1, 3)):
        out = output.room()[GUARD:-GUARD]
        with pytest.raises(ValueError, match=f"views of the images {lo} to {hi - 1}, got another"):
            found.fill(lo, hi, [Target(output.views, output.image, out)])
        assert (out == 77).all()


@pytest.mark.parametrize(
    "out",
    [torch.zeros(2, 3, 8, 8), torch.zeros(3, 1, 8, 8), torch.zeros(3, 3, 8, 8).half(),
     torch.zeros(3, 3, 8, 16)[..., ::2], torch.zeros(3, 8, 8), torch.zeros(3, 3, 8, 8, device="meta")],
    ids=["rows", "channels", "dtype", "strides", "dimensions", "device"],
)  # fmt: skip
def test_a_target_is_checked_before_it_is_written_to(out: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="Expected VIEW"):
        Target(np.zeros(3, VIEW), Image(8), out)
    Target(np.zeros(3, VIEW), Image(8), torch.zeros(3, 3, 8, 8))


def epoch(path: str, outputs: dict[str, Image]) -> tuple[list[dict[str, torch.Tensor]], list[Any], dict[str, Any]]:
    """Every batch's pixels, its valid rows, and the figures at the end."""
    columns = dict.fromkeys(outputs, "image")
    pixels, valid = [], []
    with LanceDataset(
        path, 10, columns=columns, transforms=outputs, device="cpu", on_error="mask", num_threads=2
    ) as dataset:
        for batch in dataset:
            pixels.append({name: batch[name].clone() for name in outputs})
            valid.append(batch.valid.tolist())
        return pixels, valid, dataset.stats()


@pytest.fixture
def mixed(store: Callable[..., str]) -> str:
    """50 rows: JPEG of all kinds and orientations, among them what Pillow reads and what nobody can."""
    return store({"image": [file(k % len(FILES), 30 + k, 80 - k, 1 + k % 8) for k in range(50)]}, max_rows_per_file=16)


@pytest.mark.filterwarnings("ignore::gpuload.BadRowWarning")
def test_a_dataset_gives_the_same_batches_with_and_without(mixed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = {
        "wide": Image((20, 44), crop="random", flip=0.5, mean=0.5, std=0.25),
        "small": Image(12, dtype=torch.uint8, channels_last=True, mode="L"),
    }
    one, valid, stats = epoch(mixed, outputs)
    monkeypatch.setattr(line, "available", lambda: False)
    two, expected, before = epoch(mixed, outputs)
    assert valid == expected
    assert stats["images"] == before["images"]
    for got, want in zip(one, two, strict=True):
        for name in outputs:
            assert torch.equal(got[name], want[name])
    resize, decode = (stats["stages"][name] for name in ("resize", "decode"))
    assert 0 < resize["busy_s"] < decode["busy_s"]
    assert resize["items"] == decode["items"], "one a slice, whatever the number of outputs"


def test_the_plain_path_calls_neither_the_decoder_nor_the_resize(photos: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("called for plain JPEG files")

    monkeypatch.setattr(CpuDecoder, "decode", never)
    monkeypatch.setattr("gpuload.images.resize.resize_normalize", never)
    pixels, valid, stats = epoch(photos, {"image": Image(24)})
    assert sum(map(sum, valid)) == stats["images"]["libjpeg-turbo"] == 50
    assert all(batch["image"].any(dim=3).any(dim=2).all() for batch in pixels)


@pytest.mark.parametrize("missing", ["cpu_library", "library"])
def test_where_one_of_the_two_libraries_is_missing_there_is_no_line(
    missing: str, photos: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _, _ = epoch(photos, {"image": Image(24)})
    monkeypatch.setattr(kernels if missing == "cpu_library" else libjpeg, missing, lambda: None)
    assert not line.available()
    got, _, stats = epoch(photos, {"image": Image(24)})
    assert sum(stats["images"].values()) == 50
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one["image"], two["image"], rtol=0, atol=3e-5)  # float32, in another order
