"""Mix: several datasets in one order, each as often as its weight says at every place, and no row before its turn."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from making import jpeg
from support_samplers import chain

from gpuload import Batch, ConfigError, DecodeError, Image, LanceDataset, Mix, ShuffleSampler, StateError
from gpuload.order.turns import Turns, shares, take_turns, take_turns_twin

WEIGHT = st.one_of(st.floats(1e-3, 1e3), st.integers(1, 20), st.sampled_from([0.1, 0.3, 1 / 3]))
WEIGHTS = st.lists(WEIGHT, min_size=1, max_size=12)
STOP = st.one_of(st.integers(1, 90), st.sampled_from(["first", "last"]))


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Datasets of 40, 17 and 5 rows; an id says source and row. The third has other names, the fourth other types."""
    folder, found = tmp_path_factory.mktemp("mix"), dict[str, str]()
    for s, (name, rows) in enumerate([("web", 40), ("own", 17), ("rare", 5), ("odd", 3)]):
        ids = np.arange(rows) + 1000 * s
        names = ("image", "text", "id") if s < 2 else ("jpg", "caption", "key")
        texts = pa.array([f"{name} {i}" for i in range(rows)])
        columns = dict(zip(names, ([jpeg(24, 32, seed=int(i)) for i in ids], texts, ids), strict=True))
        if name == "odd":
            columns = {"image": columns["jpg"], "text": ids, "id": ids}
        if name == "own":
            columns = {key: columns[key] for key in ("id", "text", "image")}  # another order
        found[name] = str(folder / f"{name}.lance")
        lance.write_dataset(pa.table(columns), found[name], max_rows_per_file=11)
    return found


def of(stores: dict[str, str], *names: str, **words: Any) -> Mix:
    renamed = {"image": "jpg", "text": "caption", "id": "key"}
    sources = {n: {"uri": stores[n], "columns": renamed} if n == "rare" else stores[n] for n in names}
    return Mix(sources, **words)


def ids(batches: Any) -> list[int]:
    return [int(i) for batch in batches for i in batch["id"][batch.valid]]


def mixed(mix: Mix, batch_size: int = 8, **options: Any) -> LanceDataset:
    return LanceDataset(mix, batch_size, columns=["id"], **options)


# -- turns: properties ---------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(weights=WEIGHTS, places=st.integers(1, 3000), lo=st.integers(0, 10**6))
def test_after_every_place_a_source_came_as_often_as_its_weight_says(
    weights: list[float], places: int, lo: int
) -> None:
    turns = Turns(shares(weights))
    share = np.array([float(w) for w in weights])
    share /= share.sum()
    before = turns.taken(lo)
    source, index = turns(lo, lo + places)
    taken = before + np.cumsum(source[:, None] == np.arange(len(weights)), axis=0)
    expected = share * (lo + 1 + np.arange(places))[:, None]
    assert np.abs(taken - expected).max() <= max(0.0, 1 - 1 / max(2 * len(weights) - 2, 1)) + 1e-6
    assert np.array_equal(index, taken[np.arange(places), source] - 1)
    assert np.array_equal(turns.taken(lo + places), taken[-1])


@settings(deadline=None, max_examples=25)
@given(weights=WEIGHTS, places=st.lists(st.tuples(st.integers(0, 40_000), st.integers(0, 300)), max_size=4))
def test_turns_are_the_same_whenever_they_are_asked_for(weights: list[float], places: list[tuple[int, int]]) -> None:
    turns = Turns(shares(weights))
    for lo, count in places:
        fresh = Turns(shares(weights))
        assert np.array_equal(turns(lo, lo + count), fresh(lo, lo + count))
        source, index = turns(lo, lo + 1)
        assert turns.place(int(source[0]), int(index[0])) == lo
        assert turns.earliest(int(source[0]), int(index[0])) <= lo <= turns.earliest(int(source[0]), int(index[0]) + 3)


@settings(deadline=None, max_examples=20)
@given(weights=WEIGHTS, first=st.integers(0, 50))
def test_the_compiled_turns_are_those_of_the_twin(weights: list[float], first: int) -> None:
    share = shares(weights)
    states = [(np.zeros(len(share), np.int64), np.zeros(len(share), np.int64)) for _ in range(2)]
    for count in (first, 200):
        found, twin = (f(share, *s, count) for f, s in zip((take_turns, take_turns_twin), states, strict=True))
        assert np.array_equal(found, twin)
    assert np.array_equal(*states)


def test_a_turn_a_billion_places_on_is_a_look_up() -> None:
    turns = Turns(shares([0.7, 0.2, 0.1]))
    source, index = turns(10**15, 10**15 + 10)
    assert sorted(source.tolist()) == [0] * 7 + [1] * 2 + [2]
    assert index[source == 2].tolist() == [10**14]


# -- datasets ------------------------------------------------------------------------------------------------------


def test_every_batch_says_where_its_rows_are_from(stores: dict[str, str]) -> None:
    dataset = LanceDataset(of(stores, "web", "own", "rare", weights={"own": 0.3, "web": 0.5, "rare": 0.2}, stop=60), 7)
    assert dataset.sources == ("web", "own", "rare")
    for batch in dataset:
        assert batch.source is not None
        assert batch.source.dtype == torch.int64
        assert torch.equal(batch.source * 1000 + batch.rows, batch["id"])
        names = [f"{dataset.sources[s]} {r}" for s, r in zip(batch.source.tolist(), batch.rows.tolist(), strict=True)]
        assert batch["text"] == names
        copy = pickle.loads(pickle.dumps(batch)).keep(np.arange(batch.size) < 3).to("cpu")
        assert torch.equal(copy.source, batch.source[:3])
    assert next(iter(LanceDataset(stores["web"], 4))).source is None
    assert Batch({"a": torch.zeros(2)}).source is None


@settings(deadline=None, max_examples=12)
@given(
    weights=st.tuples(*[st.sampled_from([0.1, 0.25, 1, 3, 7.5, 1 / 3])] * 3), world=st.integers(1, 4),
    batch=st.integers(1, 9), epoch=st.integers(0, 2), stop=STOP,
)  # fmt: skip
def test_any_ranks_and_batches_make_the_same_order(
    stores: dict[str, str], weights: Any, world: int, batch: int, epoch: int, stop: Any
) -> None:
    mix = of(stores, "web", "own", "rare", weights=dict(zip(("web", "own", "rare"), weights, strict=True)), stop=stop)

    def order(size: int, ranks: int) -> list[int]:
        parts = []
        for rank in range(ranks):
            dataset = mixed(mix, size, rank=rank, world_size=ranks)
            dataset.set_epoch(epoch)
            parts.append([ids([b]) for b in dataset])
            assert len(parts[0]) == len(parts[-1]) == len(dataset)
        return [i for step in zip(*parts, strict=True) for part in step for i in part]

    whole = order(4096, 1)
    assert order(batch, world) == whole
    share = np.array(weights) / sum(weights)
    taken = np.cumsum(np.array(whole)[:, None] // 1000 == np.arange(3), axis=0)
    assert np.abs(taken - share * np.arange(1, len(whole) + 1)[:, None]).max() <= 1


@pytest.mark.parametrize("weights", [None, {"web": 0.7, "own": 0.3}, {"web": 1, "own": 6}])
def test_an_epoch_ends_with_the_source_that_is_exhausted_first_or_last(stores: dict[str, str], weights: Any) -> None:
    sizes = {"web": 40, "own": 17}
    for stop in ("first", "last"):
        found = ids(mixed(of(stores, "web", "own", weights=weights, stop=stop)))
        counts = [sum(i // 1000 == s for i in found) for s in range(2)]
        full = [count >= size for count, size in zip(counts, sizes.values(), strict=True)]
        before = [sum(i // 1000 == s for i in found[:-1]) >= size for s, size in enumerate(sizes.values())]
        assert any(full) and not any(before) if stop == "first" else all(full) and not all(before)
    assert len(ids(mixed(of(stores, "web", "own", stop=23)))) == 23


@pytest.mark.parametrize("stop", ["first", "last", 13, 57])
@pytest.mark.parametrize("shuffle", [True, "block"])
def test_no_row_comes_again_before_all_of_its_source_have_come(stores: dict[str, str], stop: Any, shuffle: Any) -> None:
    mix = of(stores, "web", "own", "rare", weights={"web": 5, "own": 4, "rare": 1}, stop=stop)
    dataset = mixed(mix, shuffle=shuffle)
    found = [i for _ in range(6) for i in ids(dataset)]  # epochs go on where the last one ended
    for s, size in enumerate([40, 17, 5]):
        mine = [i for i in found if i // 1000 == s]
        passes = [mine[k : k + size] for k in range(0, len(mine), size)]
        assert all(sorted(p) == list(range(1000 * s, 1000 * s + size)) for p in passes if len(p) == size)
        assert all(len(set(p)) == len(p) for p in passes)
        whole = {tuple(p) for p in passes if len(p) == size}
        if size > 5 and shuffle is True:
            assert len(whole) == len(mine) // size  # another order each time
            assert not any(sorted(p) == list(p) for p in whole)


def test_a_source_keeps_its_order_when_another_one_joins(stores: dict[str, str]) -> None:
    two, three = (ids(mixed(of(stores, *names, stop=60))) for names in (("web", "own"), ("web", "own", "rare")))
    assert [i for i in two if i < 1000][:20] == [i for i in three if i < 1000][:20]
    other = ids(mixed(of(stores, "web", "own", stop=60), seed=5))
    assert [i for i in two if i < 1000][:20] != [i for i in other if i < 1000][:20]


@settings(deadline=None, max_examples=10)
@given(
    legs=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 2)), max_size=3), last=st.integers(1, 4),
    stop=st.sampled_from(["first", "last", 150]), drop=st.booleans(),
)  # fmt: skip
def test_a_chain_of_resumes_with_other_worlds_is_one_epoch(
    stores: dict[str, str], legs: list[Any], last: int, stop: Any, drop: bool
) -> None:
    mix = of(stores, "web", "own", "rare", stop=stop)

    def make(rank: int, world: int) -> LanceDataset:
        return mixed(mix, 2, rank=rank, world_size=world, drop_last=drop)

    whole = ids(mixed(mix, 2, drop_last=drop))
    found = ids(chain(make, [*legs, (last, None)]))
    assert found == whole[: len(found)]
    assert len(whole) - len(found) < (2 * last if drop else 1)


def test_a_row_that_comes_twice_is_cropped_anew_and_the_same_for_every_world(stores: dict[str, str]) -> None:
    words: dict[str, Any] = {
        "transforms": {"image": Image(16, crop="random", flip=0.5)}, "columns": ["image", "id"], "device": "cpu",
    }  # fmt: skip
    mix = of(stores, "rare", "own", weights={"rare": 2, "own": 1}, stop=24)
    whole = list(LanceDataset(mix, 24, **words))
    pixels = whole[0]["image"]
    assert len({image.numpy().tobytes() for image in pixels}) == 24
    assert len(set(whole[0]["id"].tolist())) < 24
    parts = [list(LanceDataset(mix, 3, rank=rank, world_size=2, **words)) for rank in range(2)]
    assert torch.equal(torch.cat([b["image"] for step in zip(*parts, strict=True) for b in step]), pixels)


def test_each_source_has_its_filter_version_and_columns(stores: dict[str, str], tmp_path: Path) -> None:
    path = str(tmp_path / "old.lance")
    lance.write_dataset(pa.table({"id": [5000, 5001]}), path)
    lance.write_dataset(pa.table({"id": [6000]}), path, mode="append")
    sources = {
        "old": {"uri": path, "version": 1, "storage_options": {"timeout": "9s"}},
        "now": lance.dataset(path),
        "web": {"uri": Path(stores["web"]), "filter": "id < 4 OR id > 38", "columns": ["id"]},
        "rare": {"uri": stores["rare"], "columns": {"id": "key + 1"}},
    }
    dataset = LanceDataset(Mix(sources, stop=60), 60)
    (batch,) = dataset
    assert list(batch) == ["id"]
    seen = [set(batch["id"][batch.source == s].tolist()) for s in range(4)]
    assert seen == [{5000, 5001}, {5000, 5001, 6000}, {0, 1, 2, 3, 39}, set(range(2001, 2006))]
    assert set(batch.rows[batch.source == 2].tolist()) == {0, 1, 2, 3, 39}
    assert set(dataset.dataset) == set(sources)
    assert dataset.dataset["old"].version == 1


def test_one_filter_is_for_all_sources_too(stores: dict[str, str]) -> None:
    sources = {"web": {"uri": stores["web"], "filter": "id > 5 OR id = 2"}, "own": stores["own"]}
    found = ids(mixed(Mix(sources, stop="last"), filter="id % 2 = 0"))
    assert {i for i in found if i < 1000} == {2, *range(6, 40, 2)}
    assert {i for i in found if i >= 1000} == set(range(1000, 1017, 2))


def test_columns_are_chosen_by_the_names_that_sources_share(stores: dict[str, str]) -> None:
    mix = of(stores, "web", "rare", stop=20)
    (batch,) = LanceDataset(mix, 20, columns={"number": "id", "words": "text"})
    assert list(batch) == ["number", "words"]
    with pytest.raises(ConfigError, match=r"source 'rare'.*among \['image', 'text', 'id'\], got 'txt'.*'text'"):
        LanceDataset(of(stores, "rare", "web"), 4, columns={"id": "id", "t": "txt"})


def test_a_batch_reads_each_source_once(stores: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from gpuload.tables.lance import LanceTable

    dataset = mixed(of(stores, "web", "own", "rare", stop=32), 8, batch_readahead=1)
    reads: list[str] = []
    read = LanceTable.read

    def counted(table: LanceTable, ranges: Any) -> Any:
        reads.append(table.uri)
        return read(table, ranges)

    len(dataset)
    monkeypatch.setattr(LanceTable, "read", counted)
    batches = list(dataset)
    assert len(batches) == 4
    assert len(reads) <= 3 * len(batches)


def test_a_cache_holds_every_source(stores: dict[str, str], tmp_path: Path) -> None:
    mix = of(stores, "web", "rare", stop=30)
    plain, cached = (LanceDataset(mix, 10, cache=cache) for cache in (None, tmp_path))
    for a, b in zip(plain, cached, strict=True):
        assert torch.equal(a["id"], b["id"])
        assert torch.equal(a["image"], b["image"])
    assert len(list(tmp_path.glob("*/*/cache.lance"))) == 2


def test_raw_batches_come_from_all_sources(stores: dict[str, str]) -> None:
    found = LanceDataset(of(stores, "web", "own", stop=20), 10, columns=["id"], to_tensor_fn=None)
    rows = [i for batch in found for i in batch.column("id").to_pylist()]
    assert rows == ids(mixed(of(stores, "web", "own", stop=20)))


def test_a_copy_in_another_process_yields_the_same(stores: dict[str, str]) -> None:
    dataset = mixed(of(stores, "web", "own", stop=40))
    copy = pickle.loads(pickle.dumps(dataset))
    assert ids(copy) == ids(dataset)


def test_a_bad_row_is_named_with_its_source(tmp_path: Path) -> None:
    for name, image in (("good", jpeg()), ("bad", b"\xff\xd8\xff nothing")):
        lance.write_dataset(pa.table({"image": [image] * 3}), str(tmp_path / name))
    dataset = LanceDataset(
        Mix({name: str(tmp_path / name) for name in ("good", "bad")}), 6, transforms={"image": Image(8)}
    )
    with pytest.raises(DecodeError, match="The row is of source 'bad'"):
        list(dataset)


# -- states --------------------------------------------------------------------------------------------------------


def test_a_state_is_a_few_scalars(stores: dict[str, str]) -> None:
    state = mixed(of(stores, "web", "own", weights={"web": 2, "own": 1})).state_dict()
    assert all(isinstance(value, (int, str, bool, type(None))) for value in state.values())


@pytest.mark.parametrize(
    ("other", "field"),
    [
        ({"weights": {"web": 2, "own": 2}}, "weights"),
        ({"stop": 9}, "stop"),
        ({"names": ("own", "web")}, "fingerprint"),
        ({"names": ("web", "rare"), "weights": {"web": 2, "rare": 1}}, "fingerprint"),
        ({"filter": "id > 3"}, "filter"),
        ({"own": {"filter": "id > 1000"}}, "fingerprint"),
    ],
    ids=str,
)
def test_a_state_of_another_mix_is_refused(stores: dict[str, str], other: dict[str, Any], field: str) -> None:
    weights = {"web": 2, "own": 1}
    saved = mixed(of(stores, "web", "own", weights=weights)).state_dict()
    names = other.get("names", ("web", "own"))
    mix = of(stores, *names, weights=other.get("weights", weights), stop=other.get("stop", "first"))
    if "own" in other:
        mix = Mix({"web": stores["web"], "own": {"uri": stores["own"], **other["own"]}}, weights=weights)
    with pytest.raises(StateError) as caught:
        mixed(mix, filter=other.get("filter")).load_state_dict(saved)
    assert caught.value.field in (field, "dataset")
    assert str(caught.value.saved) in str(caught.value)


def test_a_source_that_has_another_version_now_is_refused_by_name(stores: dict[str, str], tmp_path: Path) -> None:
    path = str(tmp_path / "grows.lance")
    lance.write_dataset(pa.table({"id": [1, 2]}), path)
    mix = Mix({"web": {"uri": stores["web"], "columns": ["id"]}, "grows": path})
    saved = LanceDataset(mix, 4).state_dict()
    lance.write_dataset(pa.table({"id": [3]}), path, mode="append")
    with pytest.raises(StateError, match=r"grows=.*grows.lance@1.*grows=.*grows.lance@2"):
        LanceDataset(mix, 4).load_state_dict(saved)
    pinned = Mix({"web": {"uri": stores["web"], "columns": ["id"]}, "grows": {"uri": path, "version": 1}})
    LanceDataset(pinned, 4).load_state_dict(saved)


# -- what cannot be mixed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (({},), "at least one"),
        ((["a"],), "dict of name to source"),
        (({1: "a"},), "dict of name to source"),
        (({"a": "x"}, {"b": 1}), r"weights for \['a'\], got them for \['b'\]"),
        (({"a": "x", "b": "y"}, {"a": 1}), "'b' is in one alone"),
        (({"a": "x"}, {"a": 0}), "weight of 'a' above 0"),
        (({"a": "x"}, {"a": float("nan")}), "weight of 'a' above 0"),
        (({"a": "x"}, {"a": "much"}), "weight of 'a' above 0"),
        (({"a": "x"}, [1]), "dict of name to number"),
        (({"a": "x"}, None, "never"), "stop="),
        (({"a": "x"}, None, 0), "stop="),
        (({"a": "x"}, None, True), "stop="),
        (({"a": {"url": "x"}},), "source 'a', got 'url'. Did you mean 'uri'"),
        (({"a": {"filter": "x"}},), "the uri of source 'a'"),
    ],
)
def test_a_mix_is_checked_when_it_is_made(words: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Mix(*words)


def test_weights_without_a_common_measure_are_refused(stores: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="one magnitude"):
        len(mixed(of(stores, "web", "own", weights={"web": 1e30, "own": 1 / 7.1})))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("web", "odd"), r"source 'web' in source 'odd', which 'text' is int64 and there string"),
        (("web", "RARE"), r"which lacks \['image', 'text', 'id'\], has \['jpg', 'caption', 'key'\] as well"),
    ],
)
def test_schemas_that_differ_are_refused_by_name(stores: dict[str, str], names: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LanceDataset(Mix({name: stores[name.lower()] for name in names}), 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": ShuffleSampler()}, "Mix or sampler"),
        ({"shuffle": "batch"}, 'shuffle=True, "row" or "block"'),
        ({"shard_granularity": "fragment"}, "whole sources"),
        ({"samples": 3}, "samples=3"),
        ({"dataset_options": {"version": 1}}, "version of each source"),
        ({"columns": ["ids"]}, "In source 'web'"),
        ({"filter": "nothing = 1"}, "In source 'web'"),
    ],
    ids=str,
)
def test_words_that_a_mix_decides_are_refused(stores: dict[str, str], options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LanceDataset(of(stores, "web", "own"), 4, **options)


def test_options_of_the_dataset_are_those_of_sources_without_their_own(stores: dict[str, str]) -> None:
    """As an opened dataset has its own, they are for the others; with none that takes them they are refused."""
    options = {"storage_options": {"key": "value"}}
    half = Mix({"web": stores["web"], "own": lance.dataset(stores["own"])})
    assert len(list(LanceDataset(half, 4, dataset_options=options)))
    opened = Mix({name: lance.dataset(stores[name]) for name in ("web", "own")})
    with pytest.raises(ConfigError, match="beside a URI or a path"):
        LanceDataset(opened, 4, dataset_options=options)


def test_a_source_that_is_not_there_or_has_no_rows_is_named(stores: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"In source 'gone'|no such folder"):
        LanceDataset(Mix({"web": stores["web"], "gone": "/no/such.lance"}), 4)
    with pytest.raises(ConfigError, match="rows of source 'own', got none with filter='id < 0'"):
        LanceDataset(Mix({"web": stores["web"], "own": {"uri": stores["own"], "filter": "id < 0"}}), 4)
    with pytest.raises(ConfigError, match="version of source 'web' beside a URI"):
        Mix({"web": {"uri": lance.dataset(stores["web"]), "version": 1}})


def test_keywords_of_lance_beside_a_mix_are_for_its_sources(stores: dict[str, str]) -> None:
    options: dict[str, Any] = {"storage_options": {"client_max_retries": "3"}}
    assert len(LanceDataset(of(stores, "web", "own"), 4, dataset_options=options)) > 0
    opened = Mix({"web": lance.dataset(stores["web"])})
    with pytest.raises(ConfigError, match="dataset_options beside a URI or a path"):
        LanceDataset(opened, 4, dataset_options=options)
