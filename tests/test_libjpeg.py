"""Decoding no further than the crop needs: the same bytes as a whole decode, and the same errors."""

from __future__ import annotations

import ctypes
import io
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from making import by_pillow, encode, jpeg, judged, picture, without, without_codes

from gpuload import HEADER, Image, LanceDataset, Ragged
from gpuload.images import VIEW, sizes, views
from gpuload.images.decode import libjpeg
from gpuload.images.decode.cpu import CpuDecoder
from gpuload.images.planes import PLANES, ycc_to_rgb
from gpuload.images.resize import resize_normalize
from gpuload.order.draws import Draws

pytestmark = pytest.mark.skipif(libjpeg.library() is None, reason="needs the compiled reader and Pillow's own libjpeg")
_KINDS: list[dict[str, Any]] = [
    {"subsampling": 0},
    {"subsampling": 1},
    {"subsampling": 2},
    {"progressive": True, "subsampling": 2},
    {"optimize": True, "restart_marker_blocks": 3, "subsampling": 2},
    {"mode": "L"},
    {"keep_rgb": True},
]


def wanted(regions: Any) -> Any:
    """VIEW[N] of one region of each image."""
    box = np.asarray(regions, np.float64).reshape(-1, 4)
    return views.of_regions(box, np.zeros(len(box), np.bool_))


def decoded(
    decoder: CpuDecoder, files: list[bytes | None], looks: Any, size: tuple[int, int], fast: bool = False
) -> tuple[Ragged, dict[int, Any]]:
    """No further than VIEW[M] need for outputs of `size`; the images, and all errors."""
    encoded, headers, errors = judged(files)
    scales = libjpeg.scales(looks, len(files), size) if fast else None
    ragged = decoder.decode(encoded, headers, views.windows(looks, headers, size, scales), scales)
    return ragged, errors | ragged.errors


def by_pillow_whole(files: list[bytes], orientations: list[int]) -> Ragged:
    """The whole images by Pillow, as a decoder would lend them."""
    found, headers = [], np.zeros(len(files), HEADER)
    for data in files:
        with PIL.Image.open(io.BytesIO(data)) as image:
            found.append(np.array(image))
    headers["orientation"] = orientations
    return Ragged.of(found, headers)


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(_KINDS), st.integers(1, 140), st.integers(1, 140), st.tuples(*[st.floats(0, 1)] * 4),
    st.tuples(st.integers(1, 40), st.integers(1, 40)), st.integers(1, 8),
)  # fmt: skip
def test_a_window_equals_the_same_place_of_a_whole_decode(
    kind: dict[str, Any], height: int, width: int, place: tuple[float, ...], size: tuple[int, int], orientation: int
) -> None:
    options = {**kind}
    pixels = picture(height, width, seed=height, mode=options.pop("mode", "RGB"))
    data = encode(pixels, "JPEG", orientation, quality=80, **options)
    whole = by_pillow_whole([data], [orientation])
    looks, decoder = wanted(region(place, *sizes(whole.table))), CpuDecoder()
    cut, errors = decoded(decoder, [data], looks, size)
    assert not errors
    assert decoder.counts()["libjpeg-turbo"] == 1
    row, got = cut.table[0], cut.pixels(0).numpy()
    assert (row["whole_height"], row["whole_width"], row["scale"]) == (height, width, 1)
    want = whole.pixels(0).numpy()[row["y"] :, row["x"] :][: got.shape[0], : got.shape[1]]
    # at a cut the chroma of the last column is interpolated with what is not there
    inner = (slice(None), slice(1 if row["x"] else 0, -1 if row["x"] + got.shape[1] < width else None))
    np.testing.assert_array_equal(got[inner], want[inner])
    assert_resized_alike(cut, whole, looks, size)


def region(place: Any, tall: Any, wide: Any) -> list[float]:
    """x0, y0, width, height of a place given in shares of an image, and of what they leave."""
    w, h = max(1e-3, place[2] * int(wide[0])), max(1e-3, place[3] * int(tall[0]))
    return [place[0] * (int(wide[0]) - w), place[1] * (int(tall[0]) - h), w, h]


def assert_resized_alike(cut: Ragged, whole: Ragged, looks: Any, size: tuple[int, int]) -> None:
    """The columns that a cut spoils are never looked at."""
    outs = [torch.empty(len(looks), 3, *size) for _ in range(2)]
    resize_normalize(cut, looks, Image(size), outs[0])
    resize_normalize(whole, looks, Image(size), outs[1])
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=2e-6)  # float32 weights of shifted coordinates


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_windows_hold_all_that_every_view_of_every_output_looks_at(data: st.DataObject) -> None:
    draw = data.draw
    n, side = draw(st.integers(1, 4)), st.integers(1, 120)
    turns = [draw(st.integers(1, 8)) for _ in range(n)]
    files = []
    for i, turn in enumerate(turns):
        options = {**draw(st.sampled_from(_KINDS))}
        files.append(encode(picture(draw(side), draw(side), i, options.pop("mode", "RGB")), "JPEG", turn, **options))
    encoded, headers, errors = judged(files)
    assert not errors
    assert headers["orientation"].tolist() == turns
    outputs, bounds = [], None
    for _ in range(draw(st.integers(1, 2))):
        looks = np.zeros(draw(st.integers(1, 8)), VIEW)
        for look in looks:
            look["image"], look["flip"] = draw(st.integers(0, n - 1)), draw(st.booleans())
            place = draw(st.tuples(*[st.floats(0, 1)] * 4))
            look["region"] = region(place, *sizes(headers[look["image"]].reshape(1)))
        size = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
        outputs.append((looks, size))
        found = views.windows(looks, headers, size)
        seen = np.isin(np.arange(n), looks["image"])
        assert ((found[:, 2:] > 0).all(axis=1) == seen).all()
        assert (found[:, :2] + found[:, 2:] <= np.stack([headers["width"], headers["height"]], axis=1)).all()
        bounds = found if bounds is None else views.union(bounds, found)
    decoder = CpuDecoder()
    cut, whole = decoder.decode(encoded, headers, bounds), by_pillow_whole(files, turns)
    assert not cut.errors
    for looks, size in outputs:
        assert_resized_alike(cut, whole, looks, size)


@pytest.mark.parametrize("kind", _KINDS)
def test_without_windows_the_whole_is_pillows(kind: dict[str, Any]) -> None:
    options = {**kind}
    data = encode(picture(61, 83, mode=options.pop("mode", "RGB")), "JPEG", 6, **options)
    decoder, (encoded, headers, _) = CpuDecoder(), judged([data])
    ragged = decoder.decode(encoded, headers, None)
    assert decoder.counts()["libjpeg-turbo"] == 1
    assert ragged.table["orientation"][0] == 6
    np.testing.assert_array_equal(ragged.pixels(0).numpy(), by_pillow_whole([data], [6]).pixels(0).numpy())


def test_turning_regions_and_back_is_nothing() -> None:
    generator, orientations = np.random.default_rng(0), np.arange(1, 9, dtype=np.int32)
    regions, whole = generator.uniform(0, 50, (8, 4)), np.full(8, 100)
    there = views.to_stored(regions, orientations, whole, whole + 20)
    assert (there[1:] != regions[1:]).any(axis=1).all()
    np.testing.assert_allclose(views.to_seen(there, orientations, whole, whole + 20), regions)


def read(data: bytes, window: tuple[int, int, int, int], channels: int, eighths: int, theirs: bool) -> tuple[Any, Any]:
    """The part and its pixels, the coefficients decoded by libjpeg or by our own reader."""
    parts, source = np.zeros(1, libjpeg.PART), np.frombuffer(data, np.uint8)
    out = np.zeros((window[2] + libjpeg.BLOCK) * window[3] * channels, np.uint8)
    parts["data"], parts["size"] = source.ctypes.data, len(source)
    parts["out"], parts["room"] = out.ctypes.data, len(out)
    for name, value in zip("xywh", window, strict=True):
        parts[name] = value
    parts["channels"], parts["eighths"], parts["theirs"] = channels, eighths, theirs
    libjpeg.read(parts)
    return parts[0], out


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_a_damaged_file_is_decoded_as_by_libjpeg_or_left_to_it(data: st.DataObject) -> None:
    draw = data.draw
    kind = {"quality": draw(st.sampled_from([5, 75, 100])), **draw(st.sampled_from(_KINDS))}
    height, width = draw(st.integers(1, 60)), draw(st.integers(1, 60))
    gray = kind.pop("mode", "RGB") == "L"
    file = bytearray(encode(picture(height, width, seed=width, mode="L" if gray else "RGB"), "JPEG", **kind))
    start = file.find(b"\xff\xda")
    for _ in range(draw(st.integers(0, 3))):
        at, new = draw(st.integers(start, len(file) - 1)), draw(st.binary(max_size=3))
        file[at : at + draw(st.integers(0, 20))] = new
        if len(file) <= start:
            break
    eighths = draw(st.sampled_from([8, 8, 4, 1]))
    h, w = (-(size * eighths // -8) for size in (height, width))
    x, y = draw(st.integers(0, w - 1)), draw(st.integers(0, h - 1))
    window = (x, y, draw(st.integers(1, w - x)), draw(st.integers(1, h - y)))
    ours, got = read(bytes(file), window, 1 if gray else 3, eighths, theirs=False)
    part, want = read(bytes(file), window, 1 if gray else 3, eighths, theirs=True)
    if ours["status"] == 0:
        assert part["status"] == 0
        np.testing.assert_array_equal(got, want)


def test_our_own_reader_decodes_every_baseline_file_of_one_scan() -> None:
    for kind in _KINDS:
        options = {**kind}
        pixels = picture(50, 70, mode=options.pop("mode", "RGB"))
        part, _ = read(encode(pixels, "JPEG", **options), (3, 5, 40, 30), 3 if pixels.mode == "RGB" else 1, 8, False)
        assert (part["status"], part["theirs"]) == (0, "progressive" in kind)


def test_a_library_that_our_reader_does_not_fit_decodes_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    real = libjpeg.library()

    class Other:
        """Another layout: what our reader makes is wrong."""

        def gpuload_jpeg_read(self, address: int, count: int) -> None:
            real.gpuload_jpeg_read(address, count)  # type: ignore[union-attr]
            parts = np.ctypeslib.as_array((ctypes.c_uint8 * (count * libjpeg.PART.itemsize)).from_address(address))
            for part in parts.view(libjpeg.PART):
                if not part["theirs"]:
                    (ctypes.c_uint8 * 1).from_address(int(part["out"]))[0] ^= 1

    monkeypatch.setattr(libjpeg, "library", Other)
    libjpeg.own_coefficients.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="does not fit Pillow's libjpeg"):
            part, _ = read(jpeg(), (0, 0, 32, 24), 3, 8, theirs=False)
        assert (part["status"], part["theirs"]) == (0, 1)
    finally:
        libjpeg.own_coefficients.cache_clear()


def pillows(file: bytes) -> Any:
    """u8[h, w, c] by Pillow, None where it refuses the file."""
    try:
        with PIL.Image.open(io.BytesIO(file)) as image:
            pixels = np.array(image)
    except (OSError, SyntaxError):
        return None
    return pixels.reshape(*pixels.shape[:2], -1)


_CODES = [0, 1, 16, 17]
_FRAMES = [  # some with the standard tables and some with their own
    encode(picture(40, 48, seed=i, mode=kind.pop("mode", "RGB")), "JPEG", quality=80, **kind)
    for i, kind in enumerate(
        [{}, {"mode": "L"}, {"optimize": True}, {"restart_marker_blocks": 2}, {"progressive": True}, {"keep_rgb": True}]
    )
]


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(_FRAMES), st.sets(st.sampled_from(_CODES))), min_size=1, max_size=6))
def test_files_without_huffman_tables_are_pillows_in_every_order(chosen: list[tuple[bytes, set[int]]]) -> None:
    """Frames of Motion JPEG leave the standard tables out; a file never gets those of the file before."""
    files = [without_codes(file, dropped) for file, dropped in chosen]
    want = [pillows(file) for file in files]
    got, errors = decoded(CpuDecoder(), list(files), wanted([[0, 0, 48, 40]] * len(files)), (40, 48))
    assert sorted(errors) == [i for i, pixels in enumerate(want) if pixels is None]
    for i, pixels in enumerate(want):
        if pixels is not None:
            np.testing.assert_array_equal(got.pixels(i).numpy(), pixels)


def test_the_standard_huffman_tables_give_the_whole_picture_natively() -> None:
    file, decoder = _FRAMES[0], CpuDecoder()
    files = [without_codes(file, set(_CODES)), file, without_codes(file, {1, 17}), without_codes(_FRAMES[1], {0})]
    got, errors = decoded(decoder, list(files), wanted([[0, 0, 48, 40]] * 4), (40, 48))
    assert not errors
    assert decoder.counts()["libjpeg-turbo"] == 4
    for i in range(3):
        np.testing.assert_array_equal(got.pixels(i).numpy(), pillows(file))


def test_a_dataset_of_frames_without_huffman_tables_is_pillows(store: Any) -> None:
    files = [without_codes(_FRAMES[i % 2], set(_CODES) if i % 3 else set()) for i in range(12)]
    dataset = LanceDataset(store({"image": files}), 12, device="cpu", transforms={"image": Image(40, crop="none")})
    (batch,) = list(dataset)
    for i, file in enumerate(files):
        alone = Image(40, crop="none")
        with Ragged.of([pillows(file)]) as ragged:
            out = torch.empty(1, 3, 40, 40)
            resize_normalize(ragged, wanted([[0, 0, 48, 40]]), alone, out)
        torch.testing.assert_close(batch["image"][i], out[0], rtol=0, atol=2e-6)


def test_a_file_without_quantization_tables_does_not_get_those_of_the_file_before() -> None:
    whole = encode(picture(40, 40), "JPEG", quality=60)
    got, errors = decoded(CpuDecoder(), [whole, without(whole, 0xDB)], wanted([[0, 0, 40, 40]] * 2), (8, 8))
    assert list(errors) == [1]
    np.testing.assert_array_equal(got.pixels(0).numpy(), pillows(whole))


def test_less_is_decoded_than_the_whole() -> None:
    ragged, _ = decoded(CpuDecoder(), [jpeg(400, 600)], wanted([300, 200, 50, 40]), (25, 20))
    assert ragged.table["height"][0] <= 40 + 2 * (2 + 3)
    assert ragged.table["width"][0] <= 50 + 32 + 2 * (2 + 3)


def test_a_file_cut_below_the_crop_is_still_an_error_and_others_are_unharmed() -> None:
    whole = jpeg(64, 64)
    decoder = CpuDecoder()
    files = [whole, whole[: len(whole) * 3 // 4], None, whole]
    ragged, errors = decoded(decoder, files, wanted([[0, 0, 16, 8]] * 4), (8, 8))
    assert sorted(errors) == [1, 2]
    assert sorted(ragged.errors) == [1], "a null never comes to the decoder's judgement"
    assert decoder.counts() == {"libjpeg-turbo": 2, "simplejpeg": 0, "pillow": 0, "failed": 1}


def test_what_libjpeg_warns_about_and_what_is_no_jpeg_is_decoded_whole() -> None:
    whole = jpeg(64, 64, seed=3)
    garbled = whole[:200] + b"\xff\x00\xff" + whole[203:]
    files = [whole, encode(picture(30, 40), "PNG"), whole, garbled]
    decoder = CpuDecoder()
    ragged, errors = decoded(decoder, files, wanted([[2, 2, 20, 20]] * 4), (10, 10))
    assert decoder.counts()["libjpeg-turbo"] >= 1
    assert decoder.counts()["pillow"] >= 1
    np.testing.assert_array_equal(ragged.pixels(1).numpy(), by_pillow(files[1]).transpose(1, 2, 0))
    assert list(errors) == [3], "Pillow has the last word, and it refuses"
    assert ragged.table[["x", "y", "height", "width"]][1].tolist() == (0, 0, 30, 40)


def test_fast_halves_large_images_and_stays_near() -> None:
    smooth = encode(picture(800, 1000).resize((250, 200)).resize((1000, 800)), "JPEG", quality=90)
    image, draws = Image(64, dtype=torch.uint8), Draws(0, 0, np.array([0]))
    looks = views.of_regions(*views.regions(image, np.array([800]), np.array([1000]), draws))
    outs = []
    for fast in (False, True):
        ragged, _ = decoded(CpuDecoder(), [smooth], looks, (64, 64), fast)
        assert ragged.table["scale"][0] == (1 / 8 if fast else 1)
        out = torch.empty(1, 3, 64, 64, dtype=torch.uint8)
        resize_normalize(ragged, looks, image, out)
        outs.append(out.float())
        assert ragged.table["height"][0] < (800 if not fast else 120)
    assert 10 * torch.log10(255**2 / (outs[0] - outs[1]).square().mean()) > 30  # dB


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_the_compiled_windows_are_the_twins(data: st.DataObject) -> None:
    n, m = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 9))
    table, wanted = np.zeros(n, HEADER), np.zeros(m, VIEW)
    sides = st.integers(1, 3000)
    for i in range(n):
        table[i]["height"], table[i]["width"], table[i]["orientation"] = (
            data.draw(sides), data.draw(sides), data.draw(st.integers(1, 8)),
        )  # fmt: skip
    for k in range(m):
        i = wanted[k]["image"] = data.draw(st.integers(0, n - 1))
        (tall,), (wide,) = sizes(table[i : i + 1])
        x, y, w, h = data.draw(st.tuples(*[st.floats(0, 1)] * 4))
        w, h = max(1e-3, w * wide), max(1e-3, h * tall)
        wanted[k]["region"] = (x * (wide - w), y * (tall - h), w, h)
    size = (data.draw(st.integers(1, 600)), data.draw(st.integers(1, 600)))
    scales = np.array(data.draw(st.lists(st.sampled_from([1, 2, 4, 8]), min_size=n, max_size=n)))
    for given_scales in (None, scales):
        found = views.windows(wanted, table, size, given_scales)
        np.testing.assert_array_equal(found, views.windows_twin(wanted, table, size, given_scales))
        assert ((found[:, 2] > 0) == np.isin(np.arange(n), wanted["image"])).all()


@pytest.mark.parametrize(("sampling", "h", "v"), [("4:4:4", 1, 1), ("4:2:2", 2, 1), ("4:2:0", 2, 2), ("gray", 0, 0)])
def test_planes_are_what_pillows_pixels_come_from(sampling: str, h: int, v: int) -> None:
    height, width = 37, 51
    options = {} if sampling == "gray" else {"subsampling": sampling}
    file = encode(picture(height, width, mode="RGB" if h else "L"), "JPEG", **options)
    chroma = [(-(-height // v), -(-width // h))] * 2 if h else []
    found = libjpeg.planes(file, [(height, width), *chroma])
    assert found is not None
    out, row = np.zeros((height, width, 3), np.uint8), np.zeros(1, PLANES)
    for name, plane in zip(("y", "cb", "cr"), found, strict=False):
        row[name], row["pitch_y" if name == "y" else "pitch_c"] = plane.ctypes.data, plane.shape[1]
    row["height"], row["width"], row["h"], row["v"] = height, width, max(h, 1), max(v, 1)
    row["out"], row["out_pitch"] = out.ctypes.data, width * 3
    ycc_to_rgb(row, None)
    np.testing.assert_array_equal(out, by_pillow(file).transpose(1, 2, 0))
    for wrong in ([(height, width)] * 3, [(height, width + 1), *chroma], [(height, width)] * 2):
        if wrong != [(height, width), *chroma]:
            with pytest.raises(ValueError, match="Expected a JPEG file with planes of"):
                libjpeg.planes(file, wrong)
