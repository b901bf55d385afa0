"""Buckets: batches whose images share a size, each row once, the same for any ranks, resumes and ways to know sizes."""

from __future__ import annotations

import math
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from making import by_row, encode, jpeg, picture
from support_samplers import chain, real_ids

from gpuload import BadRowWarning, Buckets, ConfigError, Image, LanceDataset, Mix, ShuffleSampler, StateError
from gpuload.order import Rows
from gpuload.order.buckets import Assigned, ByBucket
from gpuload.order.orders import InTurn
from gpuload.order.permutation import Permutation
from gpuload.tables.lance import LanceTable

SIZES = [(16, 16), (12, 20), (20, 12), (8, 32)]
SIDES = st.integers(1, 3000)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GPULOAD_CACHE_DIR", str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """45 images of many shapes; every fourth is stored lying and seen standing. `height` and `width` are as seen."""
    drawn = np.random.default_rng(4)
    sides = [(int(h), int(w)) for h, w in drawn.integers(10, 60, (45, 2))]
    files = [
        encode(picture(w, h, seed=i), "JPEG", orientation=6) if i % 4 == 0 else encode(picture(h, w, seed=i), "PNG")
        for i, (h, w) in enumerate(sides)
    ]
    table = pa.table({
        "id": range(45), "image": files, "height": pa.array([h for h, _ in sides], pa.int32()),
        "width": pa.array([float(w) for _, w in sides]), "zero": [0] * 45, "name": ["x"] * 45,
        "nulls": pa.array([None if i == 7 else 5 for i in range(45)]),
    })  # fmt: skip
    path = str(tmp_path_factory.mktemp("buckets") / "images.lance")
    lance.write_dataset(table, path, max_rows_per_file=13)
    return path


def nearest(height: float, width: float, sizes: Any = SIZES) -> tuple[int, int]:
    """By the definition."""
    found: tuple[int, int] = min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - math.log(height / width)))
    return found


def opened(store: str, batch_size: int = 4, buckets: Buckets | None = None, **options: Any) -> LanceDataset:
    buckets = buckets or Buckets(SIZES, height="height", width="width")
    return LanceDataset(store, batch_size, **{"columns": ["id"], **options}, buckets=buckets)


# -- which bucket ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(
    sizes=st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=12, unique=True),
    images=st.lists(st.tuples(SIDES, SIDES), max_size=20),
)
@example(sizes=[(2, 2), (1, 1), (4, 2), (2, 1)], images=[(5, 5), (7, 2)])
def test_an_image_is_in_the_bucket_of_the_nearest_shape(sizes: Any, images: Any) -> None:
    heights, widths = np.array(images, np.int64).reshape(-1, 2).T
    for (height, width), bucket in zip(images, Buckets(sizes).choose(heights, widths).tolist(), strict=True):
        ratios = np.array([abs(math.log(h / w) - math.log(height / width)) for h, w in sizes])
        assert ratios[bucket] <= ratios.min() + 1e-9
        assert bucket == next(i for i, (h, w) in enumerate(sizes) if h / w == sizes[bucket][0] / sizes[bucket][1])


def test_what_has_no_size_is_in_the_first_bucket() -> None:
    assert Buckets([(1, 9), (1, 1)]).choose(np.array([0, 5, 0]), np.array([4, 5, 0])).tolist() == [0, 1, 0]


# -- cuts: properties ----------------------------------------------------------------------------------------------


def cuts(
    chosen: list[int], batch: int, world: int, seed: int | None, drop: bool = False, start: int = 0
) -> list[ByBucket]:
    """The cut of every rank, of rows in these buckets."""
    assigned = Assigned.of([np.array(chosen, np.int64)], len(chosen), len(SIZES))
    orders: list[Any] = [InTurn(int(count)) for count in assigned.counts]
    count = int((assigned.counts // batch).sum())
    full: Any = np.arange(count) if seed is None else Permutation(count, seed)
    short = np.flatnonzero(assigned.counts % batch)
    return [ByBucket(SIZES, assigned, orders, full, short, batch, rank, world, drop, start) for rank in range(world)]


CHOSEN = st.lists(st.integers(0, len(SIZES) - 1), max_size=120)
SEED = st.one_of(st.none(), st.integers(0, 9))


@settings(deadline=None, max_examples=150)
@given(chosen=CHOSEN, batch=st.integers(1, 17), world=st.integers(1, 6), seed=SEED)
def test_ranks_together_have_each_row_once_in_batches_of_one_bucket(
    chosen: list[int], batch: int, world: int, seed: int | None
) -> None:
    ranks = cuts(chosen, batch, world, seed)
    assert len({len(cut) for cut in ranks}) == 1
    seen: list[int] = []
    for step in range(len(ranks[0])):
        parts: list[Rows] = [cut(step) for cut in ranks]
        assert len({len(part.row) for part in parts}) == 1
        for part in parts:
            assert {SIZES[chosen[row]] for row in part.row.tolist()} == {part.size}
            seen += part.row[: part.real].tolist()
    assert sorted(seen) == list(range(len(chosen)))
    (alone,) = cuts(chosen, batch, 1, seed)
    assert all(part.real == len(part.row) for part in map(alone, range(len(alone))))  # nothing to fill up
    counts = np.bincount(chosen, minlength=len(SIZES))
    assert len(alone) == sum(-(-int(count) // batch) for count in counts)


@settings(deadline=None, max_examples=100)
@given(chosen=CHOSEN, batch=st.integers(1, 9), worlds=st.tuples(*[st.integers(1, 5)] * 2), seed=SEED, data=st.data())
def test_another_world_goes_on_with_the_same_sequence(
    chosen: list[int], batch: int, worlds: tuple[int, int], seed: int | None, data: st.DataObject
) -> None:
    (alone,) = cuts(chosen, batch, 1, seed)
    sequence = [alone(step).row.tolist() for step in range(len(alone))]
    ranks = cuts(chosen, batch, worlds[0], seed)
    steps = data.draw(st.integers(0, len(ranks[0])))
    taken = [cut(step) for step in range(steps) for cut in ranks]
    ranks = cuts(chosen, batch, worlds[1], seed, start=ranks[0].used(steps))
    for step in data.draw(st.permutations(range(len(ranks[0])))):  # whenever it is asked for
        assert (
            ranks[0](step).row.tolist()
            == cuts(chosen, batch, worlds[1], seed, start=ranks[0].start)[0](step).row.tolist()
        )
    taken += [cut(step) for step in range(len(ranks[0])) for cut in ranks]
    assert [part.row[: part.real].tolist() for part in taken if part.real] == sequence


@settings(deadline=None, max_examples=60)
@given(chosen=CHOSEN, batch=st.integers(1, 9), world=st.integers(1, 4), seed=SEED)
def test_drop_last_keeps_full_batches_alone(chosen: list[int], batch: int, world: int, seed: int | None) -> None:
    dropped, whole = (cuts(chosen, batch, world, seed, drop) for drop in (True, False))
    full = int((np.bincount(chosen, minlength=len(SIZES)) // batch).sum())
    assert [len(cut) for cut in dropped] == [full // world] * world
    for a, b in zip(dropped, whole, strict=True):
        assert all((a(s).real, a(s).row.tolist()) == (batch, b(s).row.tolist()) for s in range(len(a)))


@pytest.mark.parametrize("step", [-1, 3])
def test_a_step_outside_of_the_epoch_is_an_index_error(step: int) -> None:
    with pytest.raises(IndexError, match=f"step from 0 to 2, got {step}"):
        cuts([0] * 5, 2, 1, None)[0](step)


def test_memory_is_at_most_eight_bytes_a_row() -> None:
    rows, part = 4_000_000, 1 << 16
    drawn = np.random.default_rng(0)
    tracemalloc.start()
    parts = (drawn.integers(0, 40, min(part, rows - lo)) for lo in range(0, rows, part))
    assigned = Assigned.of(parts, rows, 40)
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert now < 4.1 * rows
    assert peak < 8 * rows
    assert sorted(np.concatenate(np.split(assigned.rows, assigned.ends[:-1])).tolist()[:: 10**5])


# -- datasets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [False, True, "row", "block", "batch"])
def test_every_batch_has_the_size_of_its_bucket(store: str, shuffle: Any) -> None:
    dataset = opened(
        store, columns=["id", "image", "height", "width"], shuffle=shuffle, transforms={"image": Image("bucket")}
    )
    seen = []
    for batch in dataset:
        found = {nearest(h, w) for h, w in zip(batch["height"].tolist(), batch["width"].tolist(), strict=True)}
        assert found == {tuple(batch["image"].shape[2:])}
        assert batch.valid.all()
        seen += batch["id"].tolist()
    assert sorted(seen) == list(range(45))
    assert (seen == real_ids(opened(store))) == (shuffle is False)
    assert "the size of its bucket" in repr(dataset)


def test_headers_say_what_columns_say(store: str, cache: Path) -> None:
    words: dict[str, Any] = {
        "columns": {"picture": "image", "id": "id"}, "shuffle": True, "transforms": {"picture": Image("bucket")},
    }  # fmt: skip
    by_columns = list(opened(store, buckets=Buckets(SIZES, "picture", height="height", width="width"), **words))
    by_headers = list(opened(store, buckets=Buckets(SIZES, "picture"), **words))
    assert [b["id"].tolist() for b in by_headers] == [b["id"].tolist() for b in by_columns]
    assert all(torch.equal(a["picture"], b["picture"]) for a, b in zip(by_columns, by_headers, strict=True))
    assert len(list(cache.iterdir())) == 1
    plain = by_row(LanceDataset(store, 45, columns=["id", "image"], transforms={"image": Image(SIZES[1])}), "image")
    sized = {row: image for row, image in by_row(by_headers, "picture").items() if tuple(image.shape[1:]) == SIZES[1]}
    assert sized
    assert all(torch.equal(image, plain[row]) for row, image in sized.items())


def test_headers_are_read_once_and_the_dataset_is_left_alone(
    store: str, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in Path(store).rglob("*"))
    first = real_ids(opened(store, buckets=Buckets(SIZES)))
    assert "image sizes" in capsys.readouterr().err
    assert sorted(path.name for path in Path(store).rglob("*")) == before

    def never(*_: Any) -> Any:
        raise AssertionError("read again")

    monkeypatch.setattr(LanceTable, "read", never)
    assert len(opened(store, buckets=Buckets(SIZES))) == len(opened(store, buckets=Buckets(SIZES, "image")))
    assert len(opened(store, buckets=Buckets(SIZES[:1]))) == -(-len(first) // 4)  # sizes are kept, not buckets
    assert capsys.readouterr().err == ""
    for path in cache.iterdir():
        path.write_bytes(path.read_bytes()[:100])  # cut short: not taken for whole
    with pytest.raises(AssertionError, match="read again"):
        len(opened(store, buckets=Buckets(SIZES)))


@pytest.mark.parametrize("options", [{"filter": "id % 3 > 0"}, {"samples": 20}], ids=str)
@pytest.mark.parametrize("named", [True, False])
def test_only_rows_that_are_left_are_in_batches(store: str, options: dict[str, Any], named: bool, cache: Path) -> None:
    buckets = Buckets(SIZES, height="height", width="width") if named else Buckets(SIZES)
    len(opened(store, buckets=buckets))  # the sizes of other rows are kept beside
    kept = sorted(real_ids(LanceDataset(store, 50, columns=["id"], **options)))
    batches = list(opened(store, buckets=buckets, columns=["id", "height", "width", "image"], **options))
    assert sorted(real_ids(batches)) == kept
    for b in batches:
        assert len({nearest(h, w) for h, w in zip(b["height"].tolist(), b["width"].tolist(), strict=True)}) == 1
    assert len(list(cache.glob("*.npy"))) == (0 if named else 2)


def test_a_cache_folder_that_cannot_be_is_a_warning(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPULOAD_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="sizes of images cannot be kept"):
        assert len(real_ids(opened(store, buckets=Buckets(SIZES)))) == 45


def test_broken_images_are_in_the_first_bucket_and_bad_rows(tmp_path: Path) -> None:
    files = [jpeg(30, 10, seed=0), b"no image", None, b"", jpeg(30, 10, seed=1), jpeg(10, 30, seed=2)]
    lance.write_dataset(pa.table({"image": pa.array(files, pa.binary())}), str(tmp_path / "x"))
    buckets = Buckets([(8, 24), (24, 8)])
    dataset = LanceDataset(
        str(tmp_path / "x"), 8, buckets=buckets, on_error="mask", transforms={"image": Image("bucket")}
    )
    with pytest.warns(BadRowWarning, match="row 1, column `image`"):
        shapes = {tuple(b["image"].shape[2:]): (b.rows.tolist(), b.valid.tolist()) for b in dataset}
    assert shapes == {(24, 8): ([0, 4], [True, True]), (8, 24): ([1, 2, 3, 5], [False, False, False, True])}


def test_a_column_that_is_none_of_images_is_refused(tmp_path: Path) -> None:
    lance.write_dataset(pa.table({"image": [jpeg(30, 10)], "label": [1], "name": ["a"]}), str(tmp_path / "x"))
    for name in ("label", "name"):
        with pytest.raises(ConfigError, match=f"Expected a column of encoded images for Buckets, got '{name}'"):
            len(LanceDataset(str(tmp_path / "x"), 1, buckets=Buckets([(8, 8)], of=name), device="cpu"))


@settings(deadline=None, max_examples=8)
@given(
    legs=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 1)), max_size=3), last=st.integers(1, 4),
    shuffle=st.sampled_from([False, True, "batch"]),
)  # fmt: skip
def test_a_chain_of_resumes_with_other_worlds_is_one_epoch(
    store: str, legs: list[Any], last: int, shuffle: bool | str
) -> None:
    def make(rank: int, world: int) -> LanceDataset:
        return opened(store, 3, rank=rank, world_size=world, shuffle=shuffle)

    assert real_ids(chain(make, [*legs, (last, None)])) == real_ids(opened(store, 3, shuffle=shuffle))


def test_epochs_have_orders_of_their_own_and_copies_the_same(store: str) -> None:
    dataset = opened(store, shuffle=True)
    copy = pickle.loads(pickle.dumps(dataset))
    first, second = real_ids(dataset), real_ids(dataset)
    assert first != second
    assert sorted(first) == sorted(second)
    assert real_ids(copy) == first
    assert first != real_ids(opened(store, shuffle=True, seed=1))


def test_without_shuffle_batches_come_as_their_last_row_does(store: str) -> None:
    batches = [b["id"].tolist() for b in opened(store)]
    assert all(batch == sorted(batch) for batch in batches)
    full, short = [b for b in batches if len(b) == 4], [b for b in batches if len(b) < 4]
    assert batches == sorted(full, key=max) + sorted(short, key=max)


@pytest.mark.parametrize(
    ("other", "field"),
    [
        ({"buckets": Buckets(SIZES[::-1], height="height", width="width")}, "buckets"),
        ({"buckets": Buckets(SIZES)}, "height"),
        ({"shuffle": "block"}, "shuffle"),
        ({"batch_size": 5}, "batch_size"),
    ],
    ids=str,
)
def test_a_state_of_other_buckets_is_refused(store: str, other: dict[str, Any], field: str) -> None:
    saved = opened(store, shuffle=True).state_dict()
    assert all(isinstance(value, (int, str, bool, type(None))) for value in saved.values())
    with pytest.raises(StateError) as caught:
        opened(store, **{"shuffle": True, **other}).load_state_dict(saved)
    assert caught.value.field == field


# -- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[], 8, [(8,)], [(8, 0)], [(8, 8.5)], [(8, True)], [(8, 8), [8, 8]], ["ab"]])
def test_sizes_are_pairs_of_counts(sizes: Any) -> None:
    with pytest.raises(ConfigError, match="Buckets"):
        Buckets(sizes)


@pytest.mark.parametrize("words", [{"height": "h"}, {"width": "w"}, {"of": 3}, {"height": 3, "width": 4}])
def test_columns_are_names(words: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="Buckets"):
        Buckets(SIZES, **words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"height": "zero", "width": "width"}, "column 'zero' above 0, got 0 at position 0"),
        ({"height": "nulls", "width": "width"}, "column 'nulls' above 0, got nan at position 7"),
        ({"height": "name", "width": "width"}, "column of numbers for Buckets, got 'name', which is string"),
        ({"height": "heigth", "width": "width"}, "heigth.*Did you mean 'height'"),
        ({"of": "img"}, "img"),
    ],
    ids=str,
)
def test_columns_without_sizes_are_refused(store: str, words: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        len(opened(store, buckets=Buckets(SIZES, **words)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": ShuffleSampler()}, "buckets or sampler"),
        ({"shard_granularity": "fragment"}, "without shard_granularity"),
        ({"buckets": [(8, 8)]}, "buckets as a gpuload.Buckets"),
    ],
    ids=str,
)
def test_words_that_buckets_decide_are_refused(store: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LanceDataset(store, 4, **{"buckets": Buckets(SIZES), **options})


def test_a_bucket_and_its_image_belong_together(store: str) -> None:
    with pytest.raises(ConfigError, match=r'buckets=Buckets\(\.\.\.\) beside Image\("bucket"\)'):
        LanceDataset(store, 4, transforms={"image": Image("bucket")})
    with pytest.raises(ConfigError, match="Mix or buckets"):
        LanceDataset(Mix({"a": store}), 4, buckets=Buckets(SIZES))
    with pytest.raises(ConfigError, match='"bucket"'):
        Image("buckets")  # type: ignore[arg-type]


def test_an_empty_dataset_has_no_batch(tmp_path: Path) -> None:
    lance.write_dataset(pa.table({"image": pa.array([], pa.binary())}), str(tmp_path / "none"))
    dataset = LanceDataset(str(tmp_path / "none"), 4, columns=["image"], buckets=Buckets(SIZES), shuffle=True)
    assert len(dataset) == len(list(dataset)) == 0
