"""Bad rows: each ends in the chosen policy, with row, column and cause named, and the other rows unharmed."""

from __future__ import annotations

import pickle
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from making import by_pillow, claiming, encode, jpeg, picture, png

import gpuload
from gpuload import BadRowWarning, DecodeError, Image, LanceDataset, Mix, RowError

pytestmark = pytest.mark.filterwarnings("ignore::gpuload.BadRowWarning")  # met on purpose in most tests here
Store = Callable[..., str]


def cut(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


GOOD = jpeg(40, 40)
BAD: dict[str, tuple[Callable[[], bytes | None], str]] = {
    "null": (lambda: None, "got a null"),
    "empty": (lambda: b"", "got 0 bytes"),
    "one_byte": (lambda: b"\xff", "got 1 bytes starting ff"),
    "jpeg_start": (lambda: b"\xff\xd8", "got 2 bytes starting ffd8"),
    "truncated_jpeg": (lambda: cut(GOOD, 0.5), "Expected a whole JPEG file"),
    "truncated_in_header": (lambda: GOOD[:100], "Expected a whole JPEG file"),
    "truncated_progressive": (lambda: cut(jpeg(64, 64, progressive=True), 0.4), "Expected a whole JPEG file"),
    "truncated_png": (lambda: cut(encode(picture(40, 40), "PNG"), 0.5), "Expected a whole PNG file"),
    "truncated_webp": (lambda: cut(encode(picture(40, 40), "WEBP"), 0.5), "Expected a whole WEBP file"),
    "truncated_avif": (lambda: cut(encode(picture(40, 40), "AVIF"), 0.5), "Expected a whole AVIF file"),
    "truncated_gif": (lambda: cut(encode(picture(40, 40), "GIF"), 0.5), "Expected a whole GIF file"),
    "garbage": (lambda: bytes(range(7, 207)), "got 200 bytes starting 0708090a"),
    "garbage_jpeg": (lambda: b"\xff\xd8\xff\xe0" + bytes(range(200)), "Expected a whole JPEG file"),
    "html": (lambda: b"<!DOCTYPE html><html>404</html>", "got 31 bytes starting 3c21444f"),
    "text": (lambda: b"not found", "got 9 bytes starting 6e6f7420"),
    "postscript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "Expected an image, got"),
    "huge_jpeg": (lambda: claiming(GOOD, 60_000, 60_000), "at most 89478485 pixels .max_pixels., got 60000x60000"),
    "huge_png": (lambda: png(60_000, 60_000, 8, 2, b""), "at most 89478485 pixels .max_pixels., got"),
    "huge_gif": (lambda: huge_gif(), "at most 89478485 pixels .max_pixels., got"),
    "png_without_pixels": (lambda: png(40, 40, 8, 2, b""), "Expected a whole PNG file"),
    "png_broken_pixels": (lambda: broken_png(), "Expected a whole PNG file"),
    "no_width": (lambda: claiming(GOOD, 40, 0), "Expected a"),
}


def huge_gif() -> bytes:
    data = bytearray(encode(picture(8, 8), "GIF"))
    data[6:10] = (60_000).to_bytes(2, "little") * 2
    return bytes(data)


def broken_png() -> bytes:
    data = bytearray(encode(picture(40, 40), "PNG"))
    middle = len(data) // 2
    data[middle : middle + 20] = bytes(20)
    return bytes(data)


ROWS = 11
WHERE = 6  # the bad one
FILES = [jpeg(20 + i, 24, seed=i) for i in range(ROWS)]


def with_bad(store: Store, *bad: bytes | None, at: tuple[int, ...] = (WHERE,)) -> str:
    files: list[bytes | None] = list(FILES)
    for row, data in zip(at, bad, strict=True):
        files[row] = data
    return store({"image": pa.array(files, pa.binary()), "number": range(ROWS)}, max_rows_per_file=4)


kinds = pytest.mark.parametrize("kind", BAD)
own_size = pytest.mark.parametrize("transform", [Image(16), None], ids=["resized", "own_size"])


ALONE: dict[tuple[int, str], torch.Tensor] = {}


def transforms(transform: Image | None) -> dict[str, Image]:
    return {} if transform is None else {"image": transform}


def check_whole(pixels: Any, row: int, transform: Image | None, store: Store, device: str) -> None:
    """This row's pixels are those of the file alone."""
    if transform is None:
        if device == "cpu":
            np.testing.assert_array_equal(pixels.numpy(), by_pillow(FILES[row]))
        return
    if (row, device) not in ALONE:
        (batch,) = LanceDataset(store({"image": [FILES[row]]}), 1, transforms=transforms(transform), device=device)
        ALONE[row, device] = batch["image"][0]
    # a GPU may decode one image alone in another way than several
    torch.testing.assert_close(pixels, ALONE[row, device], rtol=0, atol=0 if device == "cpu" else 0.05)


@kinds
@own_size
def test_raise_names_row_column_cause_and_what_to_do(
    kind: str, transform: Image | None, store: Store, device: str
) -> None:
    make, message = BAD[kind]
    dataset = LanceDataset(with_bad(store, make()), 4, transforms=transforms(transform), device=device)
    batches = iter(dataset)
    assert next(batches).rows.tolist() == [0, 1, 2, 3]  # the batch before is whole
    with pytest.raises(DecodeError, match=message) as caught:
        next(batches)
    error = caught.value
    assert (error.row, error.column) == (WHERE, "image")
    assert f"- at row {WHERE}, column `image`. Set on_error=" in str(error)
    assert error.cause
    assert error.cause in str(error)


@kinds
@own_size
def test_skip_leaves_the_row_out(kind: str, transform: Image | None, store: Store, device: str) -> None:
    path = with_bad(store, BAD[kind][0]())
    dataset = LanceDataset(path, 4, transforms=transforms(transform), on_error="skip", device=device)
    batches = list(dataset)
    assert [batch.rows.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 7], [8, 9, 10]]
    assert batches[1]["number"].tolist() == [4, 5, 7]
    assert all(batch.valid.all() for batch in batches)
    for i, row in enumerate((4, 5, 7)):
        check_whole(batches[1]["image"][i], row, transform, store, device)
    stats = dataset.stats()
    assert (stats["rows_skipped"], stats["rows_masked"], stats["batches"]) == (1, 0, 3)
    assert stats["images"]["failed"] == 1


@kinds
@own_size
def test_mask_keeps_the_shape_with_zeros(kind: str, transform: Image | None, store: Store, device: str) -> None:
    path = with_bad(store, BAD[kind][0]())
    dataset = LanceDataset(path, 4, transforms=transforms(transform), on_error="mask", device=device)
    batches = list(dataset)
    assert [batch.size for batch in batches] == [4, 4, 3]
    assert batches[1].rows.tolist() == [4, 5, 6, 7]
    assert [batch.valid.tolist() for batch in batches] == [[True] * 4, [True, True, False, True], [True] * 3]
    assert not batches[1]["image"][2].any()
    assert batches[1]["number"].tolist() == [4, 5, 6, 7]
    for i, row in ((0, 4), (1, 5), (3, 7)):
        check_whole(batches[1]["image"][i], row, transform, store, device)
    if transform is not None:
        assert batches[1]["image"].shape == (4, 3, 16, 16)
    stats = dataset.stats()
    assert (stats["rows_skipped"], stats["rows_masked"], stats["batches"]) == (0, 1, 3)


def test_a_masked_row_is_zero_and_not_what_a_mean_would_make_of_it(store: Store, device: str) -> None:
    image = Image(16, mean=(0.5,) * 3, std=(0.5,) * 3)
    path = with_bad(store, None)
    batches = list(LanceDataset(path, 4, transforms={"image": image}, on_error="mask", device=device))
    assert not batches[1]["image"][2].any()


@pytest.mark.parametrize("policy", ["skip", "mask", "replace"])
@own_size
def test_a_bad_row_in_the_last_batch(policy: Any, transform: Image | None, store: Store) -> None:
    path = with_bad(store, b"x" * 50, at=(ROWS - 1,))
    batches = list(LanceDataset(path, 4, transforms=transforms(transform), on_error=policy, device="cpu"))
    assert [batch.size for batch in batches] == ([4, 4, 2] if policy == "skip" else [4, 4, 3])
    check_whole(batches[2]["image"][1], 9, transform, store, "cpu")


@own_size
def test_a_batch_of_bad_rows_alone_is_left_out(transform: Image | None, store: Store) -> None:
    path = with_bad(store, *[b"x" * 50] * 4, at=(4, 5, 6, 7))
    dataset = LanceDataset(path, 4, transforms=transforms(transform), on_error="skip", device="cpu")
    assert [(batch.step, batch.size) for batch in dataset] == [(0, 4), (2, 3)]
    stats = dataset.stats()
    assert (stats["rows_skipped"], stats["batches"]) == (4, 2)


def test_the_place_is_right_around_a_batch_that_is_left_out(store: Store) -> None:
    path = with_bad(store, *[b"x" * 50] * 7, at=(4, 5, 6, 7, 8, 9, 10))
    dataset = LanceDataset(path, 4, on_error="skip", device="cpu")
    running = iter(dataset)
    next(running)
    state = dataset.state_dict()
    assert list(running) == []
    assert (state["epoch"], state["step"]) == (0, 1)
    assert dataset.state_dict()["step"] == 3, "the epoch ended, its last batches left out"
    again = LanceDataset(path, 4, on_error="skip", device="cpu")
    again.load_state_dict(state)
    assert list(again) == []
    assert [(batch.epoch, batch.step) for batch in again] == [(1, 0)], "the next epoch"


def test_a_batch_that_other_ranks_wait_for_is_not_left_out(store: Store) -> None:
    path = with_bad(store, *[b"x" * 50] * 4, at=(4, 5, 6, 7))
    options: dict[str, Any] = {"on_error": "skip", "device": "cpu", "world_size": 2}
    with pytest.raises(DecodeError, match=r'other ranks would wait for its step. Set on_error="replace"') as caught:
        list(LanceDataset(path, 4, rank=1, **options))
    assert (caught.value.row, caught.value.column) == (4, "image")
    assert [batch.size for batch in LanceDataset(path, 4, rank=0, **options)] == [4, 3]


def test_every_rank_of_a_full_scan_leaves_the_same_out(store: Store) -> None:
    path = with_bad(store, *[b"x" * 50] * 4, at=(4, 5, 6, 7))
    dataset = LanceDataset(path, 4, on_error="skip", sampler=gpuload.FullScanSampler(), device="cpu")
    assert [batch.step for batch in dataset] == [0, 2]


@own_size
@pytest.mark.parametrize("policy", ["skip", "mask", "replace"])
def test_a_dataset_of_bad_rows_alone_ends(policy: Any, transform: Image | None, store: Store) -> None:
    path = with_bad(store, *[b"\xff\xd8\xff x"] * ROWS, at=tuple(range(ROWS)))
    dataset = LanceDataset(path, 4, transforms=transforms(transform), on_error=policy, device="cpu")
    batches = list(dataset)
    assert [batch.size for batch in batches] == ([] if policy == "skip" else [4, 4, 3])
    assert not any(batch.valid.any() for batch in batches)
    assert dataset.stats()["images"]["failed"] == ROWS
    assert all(not pixels.any() for batch in batches for pixels in batch["image"])


# -- replace -------------------------------------------------------------------------------------------------------


@kinds
@own_size
def test_replace_takes_the_next_good_row(kind: str, transform: Image | None, store: Store, device: str) -> None:
    path = with_bad(store, BAD[kind][0]())
    dataset = LanceDataset(path, 4, transforms=transforms(transform), on_error="replace", device=device)
    batches = list(dataset)
    assert [batch.size for batch in batches] == [4, 4, 3]
    assert batches[1].rows.tolist() == [4, 5, 6, 7]
    assert [batch.valid.tolist() for batch in batches] == [[True] * 4, [True, True, False, True], [True] * 3]
    assert batches[1]["number"].tolist() == [4, 5, 7, 7]
    for i, row in enumerate((4, 5, 7, 7)):
        check_whole(batches[1]["image"][i], row, transform, store, device)
    stats = dataset.stats()
    assert (stats["rows_replaced"], stats["rows_masked"], stats["rows_skipped"], stats["batches"]) == (1, 0, 0, 3)
    assert stats["images"]["failed"] == 1


@pytest.mark.parametrize(
    ("bad", "taken"),
    [
        ((), (0, 1, 2, 3)),
        ((3,), (0, 1, 2, 0)),
        ((0, 1), (2, 2, 2, 3)),
        ((1, 2, 3), (0, 0, 0, 0)),
        ((0, 2), (1, 1, 3, 3)),
    ],
)
def test_replace_goes_around_the_end_and_over_other_bad_rows(
    bad: tuple[int, ...], taken: tuple[int, ...], store: Store, device: str
) -> None:
    columns = {
        "image": [None if i in bad else FILES[i] for i in range(4)],
        "prompt": [f"row {i}" for i in range(4)],
        "name": ["a", "b", "c", "d"],
        "count": pa.array([0, None, 2, 3], pa.uint16()),
    }
    words = {"image": Image(16, channels_last=True), "prompt": gpuload.Text("bytes")}
    (batch,) = LanceDataset(store(columns), 4, transforms=words, on_error="replace", device=device)
    assert batch.rows.tolist() == [0, 1, 2, 3]
    assert batch.valid.tolist() == [i not in bad for i in range(4)]
    assert batch["name"] == [columns["name"][i] for i in taken]
    assert ["".join(map(chr, ids.tolist())) for ids in batch["prompt"]] == [f"row {i}" for i in taken]
    assert batch["count"].tolist() == [0 if i == 1 else i for i in taken]
    assert batch.nulls["count"].tolist() == [i == 1 for i in taken]
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    for i, row in enumerate(taken):
        check_whole(batch["image"][i], row, Image(16), store, device)


@own_size
def test_replace_gives_zeros_where_no_row_is_good(transform: Image | None, store: Store, device: str) -> None:
    path = with_bad(store, *[b"x" * 50] * 4, at=(4, 5, 6, 7))
    dataset = LanceDataset(path, 4, transforms=transforms(transform), on_error="replace", device=device)
    batch = list(dataset)[1]
    assert batch.rows.tolist() == [4, 5, 6, 7]
    assert not batch.valid.any()
    assert batch["number"].tolist() == [0] * 4
    assert len(batch["image"]) == 4
    assert not any(pixels.any() for pixels in batch["image"])


def test_replace_keeps_ranks_and_steps_equal(store: Store) -> None:
    path = with_bad(store, *[b"x" * 50] * 3, at=(0, 4, 8))
    for rank in range(2):
        dataset = LanceDataset(path, 4, on_error="replace", rank=rank, world_size=2, device="cpu")
        batches = list(dataset)
        assert [batch.size for batch in batches] == [4, 3]
        assert len(batches) == len(dataset)


def test_the_first_bad_row_of_a_batch_is_the_one_that_is_named(store: Store) -> None:
    path = with_bad(store, b"first", None, at=(2, 9))
    for threads in (1, 2, 5):
        dataset = LanceDataset(path, ROWS, transforms={"image": Image(16)}, num_threads=threads, device="cpu")
        with pytest.raises(DecodeError) as caught:
            list(dataset)
        assert caught.value.row == 2


@pytest.mark.parametrize("readahead", [1, 8])
def test_an_error_comes_at_its_place_after_all_batches_before(readahead: int, store: Store) -> None:
    path = with_bad(store, None, at=(8,))
    dataset = LanceDataset(
        path, 2, transforms={"image": Image(16)}, batch_readahead=readahead, num_threads=4, device="cpu"
    )
    batches = iter(dataset)
    assert [next(batches).rows.tolist() for _ in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(DecodeError):
        next(batches)
    assert list(batches) == []


def test_the_row_that_is_named_is_the_position_in_the_dataset(store: Store) -> None:
    path = with_bad(store, None)
    options: list[dict[str, Any]] = [
        {"filter": "number >= 5"},
        {"shuffle": True},
        {"rank": 1, "world_size": 2},
        {"columns": {"photo": "image"}},
    ]
    for option in options:
        dataset = LanceDataset(path, 2, device="cpu", **option)
        with pytest.raises(DecodeError) as caught:
            list(dataset)
        assert caught.value.row == WHERE
        assert caught.value.column == ("photo" if "columns" in option else "image")


def test_a_masked_row_of_a_filled_up_rank_is_counted_once(store: Store) -> None:
    path = with_bad(store, None, at=(0,))  # row 0 fills up the short rank
    masked = 0
    for rank in range(2):
        dataset = LanceDataset(path, 4, on_error="mask", rank=rank, world_size=2, device="cpu")
        for batch in dataset:
            assert not batch.valid[batch.rows == 0].any()
        masked += dataset.stats()["rows_masked"]
    assert masked == 1


def test_two_bad_columns_of_one_row_are_one_bad_row(store: Store) -> None:
    path = store({"a": pa.array([jpeg(), b"x"], pa.binary()), "b": pa.array([jpeg(), None], pa.binary())})
    dataset = LanceDataset(path, 2, on_error="skip", transforms={"a": Image(8), "b": Image(8)}, device="cpu")
    (batch,) = dataset
    assert batch.rows.tolist() == [0]
    assert dataset.stats()["rows_skipped"] == 1


# -- limits --------------------------------------------------------------------------------------------------------


def test_max_pixels_is_the_last_size_that_passes(store: Store) -> None:
    files = [jpeg(20, 30), encode(picture(20, 30), "PNG"), jpeg(20, 31), encode(picture(21, 30), "PNG")]
    dataset = LanceDataset(store({"image": files}), 4, on_error="mask", max_pixels=600, device="cpu")
    assert next(iter(dataset)).valid.tolist() == [True, True, False, False]
    raising = LanceDataset(store({"image": files}), 4, max_pixels=600, device="cpu")
    with pytest.raises(DecodeError, match=r"at most 600 pixels \(max_pixels\), got 20x31 = 620 - at row 2"):
        list(raising)


def test_nothing_is_allocated_for_what_a_header_claims(store: Store) -> None:
    path = with_bad(store, claiming(GOOD, 60_000, 60_000), png(60_000, 60_000, 8, 2, b""), at=(5, 6))
    dataset = LanceDataset(path, ROWS, on_error="mask", transforms={"image": Image(8)}, device="cpu")
    tracemalloc.start()  # NumPy's and Python's memory
    (batch,) = dataset
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert batch.valid.sum() == ROWS - 2
    assert peak < 20_000_000


# -- the errors themselves -----------------------------------------------------------------------------------------


def test_a_row_error_survives_pickling() -> None:
    error = DecodeError("Expected a, got b", 3, "image", "Do c.")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is DecodeError
    assert (copy.row, copy.column, copy.cause, copy.hint, str(copy)) == (3, "image", error.cause, "Do c.", str(error))


def test_state_errors_survive_pickling() -> None:
    error = gpuload.StateError("Expected x", "seed", 1, 2)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.field, copy.saved, copy.here) == ("Expected x", "seed", 1, 2)


def test_every_error_is_a_gpuload_error_and_a_builtin_one() -> None:
    names = [name for name in gpuload.__all__ if name.endswith("Error")]
    for name in names:
        kind = getattr(gpuload, name)
        assert issubclass(kind, gpuload.GpuloadError)
        assert kind is gpuload.GpuloadError or issubclass(kind, (ValueError, RuntimeError))
    assert issubclass(gpuload.TextError, RowError)
    assert issubclass(DecodeError, RowError)


def test_replace_in_a_mix_leaves_rows_and_sources_as_they_are(store: Store) -> None:
    broken = {"a": {0, 3, 6, 9}, "b": {1, 5, 11}}  # no row of both
    paths = {}
    for name, start in (("a", 0), ("b", 100)):
        files = [b"broken" if row in broken[name] else jpeg(8, 8, row) for row in range(12)]
        paths[name] = store({"image": files, "id": range(start, start + 12)})
    with LanceDataset(
        Mix(paths, stop="last"), 8, transforms={"image": Image(8)}, on_error="replace", device="cpu"
    ) as dataset:
        with pytest.warns(BadRowWarning):
            batches = list(dataset)
        bad = {(found.source, found.row) for found in dataset.bad_rows}
    assert bad == {(name, row) for name in paths for row in broken[name]}
    for batch in batches:
        places = [("ab"[s], row) for s, row in zip(batch.source.tolist(), batch.rows.tolist(), strict=True)]
        assert batch.valid.tolist() == [place not in bad for place in places]
        for (name, row), valid, found in zip(places, batch.valid.tolist(), batch["id"].tolist(), strict=True):
            assert not valid or found == row + 100 * (name == "b")
