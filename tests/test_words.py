"""Nothing that is given is ignored: words against each other, of another type, or without effect are refused."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import lance.sampler
import numpy as np
import pyarrow as pa
import pytest
import torch
from making import jpeg
from test_fields import ByPillow

from gpuload import (
    Batch,
    Boxes,
    ConfigError,
    Image,
    LanceDataset,
    Mix,
    ShardedBatchSampler,
    ShardedFragmentSampler,
    StateError,
    Text,
)
from gpuload.augment import CutMix, MixUp
from gpuload.tables.lance import LanceTable
from gpuload.tools.ingest import ingest

Store = Callable[..., str]


class Own(lance.sampler.Sampler):
    """A sampler that reads by itself."""

    def __call__(self, ds: Any, *args: Any, **kwargs: Any) -> Any:
        yield from ds.to_batches(columns=kwargs["columns"], batch_size=kwargs["batch_size"])


def convert(batch: pa.RecordBatch, **options: Any) -> Any:
    return batch


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "transforms": (
        {"to_tensor_fn": convert, "transforms": {"image": Image(8)}},
        "transforms or to_tensor_fn, got both",
    ),
    "transforms_none": ({"to_tensor_fn": None, "transforms": {"image": Image(8)}}, "transforms or to_tensor_fn"),
    "decoder": ({"to_tensor_fn": convert, "decoder": "cpu"}, "decoder or to_tensor_fn, got both: decoder='cpu'"),
    "on_error": ({"to_tensor_fn": convert, "on_error": "skip"}, "on_error or to_tensor_fn, got both: on_error='skip'"),
    "samples": ({"sampler": Own(), "samples": 3}, "gpuload sampler beside samples, got samples=3"),
    "cache": ({"sampler": Own(), "cache": True}, "gpuload sampler beside cache, got cache=True"),
    "drop_last": ({"sampler": Own(), "drop_last": True}, "gpuload sampler beside drop_last"),
    "fast": (
        {"transforms": {"image": Image(8, fast=True)}, "decoder": ByPillow(), "device": "cpu"},
        r"Image\(fast=True\) with decoder='cpu' and device='cpu', got it for column 'image'",
    ),
    "filter": ({"filter": 3}, "filter as an SQL condition, got 3"),
    "columns_numbers": ({"columns": [0]}, r"columns as names or SQL expressions, each a str, got 0 in \[0\]"),
    "columns_none": ({"columns": ["image", None]}, "each a str, got None"),
    "columns_values": ({"columns": {"a": 3}}, "each a str, got 3"),
    "columns_keys": ({"columns": {3: "image"}}, "each a str, got 3"),
    "columns_number": ({"columns": 3}, "columns as a list of names or a dict of name to SQL, got 3"),
    "columns_text": ({"columns": "image"}, "columns as a list of names or a dict of name to SQL, got 'image'"),
    "drop_last_text": ({"drop_last": "no"}, "drop_last as True or False, got 'no'"),
    "with_row_id": ({"with_row_id": "yes"}, "with_row_id as True or False, got 'yes'"),
    "auto_detect_rank": ({"auto_detect_rank": None}, "auto_detect_rank as True or False, got None"),
    "dataset_options": ({"dataset_options": 1}, "dataset_options as a dict of keywords of lance.dataset, got 1"),
    "dataset_options_text": ({"dataset_options": "x"}, "dataset_options as a dict"),
    "dataset_options_name": ({"dataset_options": {"a": 1}}, "keywords of lance.dataset, got .*'a'"),
    "cache_number": ({"cache": 1}, "cache as True, False or a folder, got 1"),
    "cache_bytes": ({"cache": b"x"}, "cache as True, False or a folder, got b'x'"),
    "cache_nowhere": ({"cache": "/no/such/folder"}, "cache as a folder that exists, got '/no/such/folder'"),
    "samples_text": ({"samples": ""}, "samples as an int of at least 0, got ''"),
    "transforms_list": ({"transforms": []}, r"transforms as a dict of column to .*got \[\]"),
    "device_number": ({"device": 10**30}, "device="),
    "rank": ({"rank": 0, "world_size": 2, "sampler": Own()}, "rank or sampler, got both"),
}


@pytest.fixture
def path(store: Store) -> str:
    return store({"image": [jpeg(20, 24)] * 6, "id": range(6)})


@pytest.mark.parametrize("name", WRONG)
def test_words_without_effect_are_refused(name: str, path: str) -> None:
    options, message = WRONG[name]
    with pytest.raises(ConfigError, match=message):
        LanceDataset(path, 4, **options)


def test_dataset_options_beside_an_opened_dataset_are_refused(path: str) -> None:
    with pytest.raises(ConfigError, match=r"dataset_options beside a URI or a path, got .*version.: 1"):
        LanceDataset(lance.dataset(path), 4, dataset_options={"version": 1})
    assert len(LanceDataset(path, 4, dataset_options={"version": 1})) == 2


@pytest.mark.gpu
def test_fast_on_a_gpu_is_refused(path: str) -> None:
    for decoder in ("auto", "cpu"):
        with pytest.raises(ConfigError, match=r"Image\(fast=True\) with decoder='cpu' and device='cpu'"):
            LanceDataset(path, 4, transforms={"image": Image(8, fast=True)}, decoder=decoder, device="cuda")


IMAGES: list[dict[str, Any]] = [
    {"size": None, "crop": "random"}, {"size": None, "crop": "none"}, {"size": None, "crop_ratio": 0.5},
    {"size": None, "scale": (0.5, 1)}, {"size": None, "ratio": (1, 1)}, {"size": None, "fast": True},
    {"size": None, "channels_last": True}, {"size": 8, "scale": (0.5, 1)}, {"size": 8, "ratio": (1, 1)},
    {"size": 8, "crop": "random", "crop_ratio": 0.5}, {"size": 8, "crop": "none", "crop_ratio": 0.5},
    {"size": 8, "crop": "none", "scale": (0.5, 1)},
]  # fmt: skip


@pytest.mark.parametrize("words", IMAGES, ids=str)
def test_words_of_an_image_without_effect_are_refused(words: dict[str, Any]) -> None:
    name = list(words)[-1]
    with pytest.raises(ConfigError, match=rf"beside Image\({name}=\.\.\.\), got .* beside {name}="):
        Image(**words)


@pytest.mark.parametrize(
    "words", [{"flip": True}, {"flip": False}, {"orient": "no"}, {"fast": 1}, {"channels_last": 0}]
)
def test_what_is_no_number_and_no_bool_is_refused(words: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"Image\({next(iter(words))}=\.\.\.\) as "):
        Image(8, **words)


ARRAY = np.array([1, 2])
NUMBERS = ("crop_ratio", "scale", "ratio", "flip", "mean", "std")


@pytest.mark.parametrize(
    "word",
    ["dataset_options", "samples", "cache", "shard_granularity", "to_tensor_fn", "transforms", "device", "on_error",
     "shuffle", "decoder", "split", "filter", "seed", "max_pixels", "buckets", "after", "sampler"],
)  # fmt: skip
def test_an_array_is_no_word_of_a_dataset(word: str, path: str) -> None:
    options: dict[str, Any] = {word: ARRAY}
    with pytest.raises(ConfigError, match="Expected"):
        next(iter(LanceDataset(path, 4, **options)))


@pytest.mark.parametrize("word", ["size", "crop", "dtype", "mode", "views", "augment", "crop_ratio", "scale", "flip"])
def test_an_array_is_no_word_of_an_image(word: str) -> None:
    options: dict[str, Any] = {"size": 8, word: ARRAY}
    with pytest.raises(ConfigError, match="Expected"):
        Image(**options)


@pytest.mark.parametrize("value", ["x", b"x", {"a": 1}, ("a", "b"), [None, None], ..., 1j, Path("x")], ids=repr)
@pytest.mark.parametrize("word", NUMBERS)
def test_what_is_no_number_is_none_of_an_image(word: str, value: Any) -> None:
    crop = {"scale": "random", "ratio": "random"}.get(word, "center")
    options: dict[str, Any] = {"crop": crop, word: value}
    with pytest.raises(ConfigError, match=rf"Image\({word}="):
        Image(8, **options)


def test_numbers_of_an_image_may_be_those_of_numpy_and_torch() -> None:
    wanted = Image(8, mean=(0.5, 0.25, 1.0), std=(0.5, 0.5, 0.5), flip=0.5, crop_ratio=0.5)
    mean, half = torch.tensor([0.5, 0.25, 1.0]), np.float32(0.5)
    assert Image(8, mean=mean, std=np.full(3, 0.5), flip=half, crop_ratio=half) == wanted  # type: ignore[arg-type]
    assert Image(8, mean=(0.5, 0.25, 1.0), std=0.5, flip=half, crop_ratio=half) == wanted  # type: ignore[arg-type]
    assert Image(8, mean=0.5, std=torch.tensor(0.5)).mean == (0.5,) * 3  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make",
    [lambda: Text("bytes", padding=ARRAY), lambda: Text("bytes", pick=ARRAY), lambda: Text("bytes", dropout="x"),  # type: ignore[arg-type]
     lambda: Boxes("image", format=ARRAY), lambda: Mix({"a": "x"}, stop=ARRAY), lambda: MixUp(0.5, "id", 10**30),  # type: ignore[arg-type]
     lambda: MixUp(0.5, "id", 3, images=[1]), lambda: CutMix(0.5, "id", 3, images=""),  # type: ignore[arg-type]
     lambda: ShardedBatchSampler(randomize="no"), lambda: ShardedFragmentSampler(randomize=ARRAY)],  # type: ignore[arg-type]
)  # fmt: skip
def test_words_of_another_type_are_refused_everywhere(make: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError, match="Expected"):
        make()


def test_an_epoch_beyond_64_bits_and_an_array_in_a_state_are_refused(path: str) -> None:
    dataset = LanceDataset(path, 4)
    with pytest.raises(ConfigError, match="epoch as an int of 64 bits"):
        dataset.set_epoch(10**30)
    for name in dataset.state_dict():
        if name != "uri":  # of no account where the fingerprint is the same
            with pytest.raises(StateError):
                dataset.load_state_dict({**dataset.state_dict(), name: ARRAY})


@pytest.mark.parametrize("state", [None, 3, "state", []])
def test_what_is_no_state_is_a_config_error(state: Any, path: str) -> None:
    with pytest.raises(ConfigError, match=r"Expected a state_dict\(\) of gpuload.LanceDataset, got "):
        LanceDataset(path, 4).load_state_dict(state)


def test_a_home_folder_is_expanded_everywhere_alike(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    home = tmp_path / "home"
    (home / "photos").mkdir(parents=True)
    (home / "cache").mkdir()
    (home / "photos" / "a.jpg").write_bytes(jpeg())
    (home / "captions.csv").write_text("file_name,caption\na.jpg,a photo\n")
    done = ingest("~/photos", "~/out/photos.lance", captions="~/captions.csv", progress=False)
    assert (done.rows, done.without_caption) == (1, 0)
    assert (home / "out" / "photos.lance").is_dir()
    held = []  # a cache goes with its dataset
    for where in ("~/out/photos.lance", Path("~/out/photos.lance")):
        held.append(dataset := LanceDataset(where, 1, cache="~/cache", device="cpu"))
        assert len(list(dataset)) == 1
        assert dataset.dataset.uri == str(home / "out" / "photos.lance")
        assert LanceTable(where).rows == 1
    assert len(os.listdir(home / "cache")) == 2
    assert not Path("~").exists()


# -- what a user puts into a batch ---------------------------------------------------------------------------------

OWN: dict[str, Any] = {
    "loss": 3.5, "count": 7, "none": None, "flag": True, "name": "run 1", "scalar": torch.tensor(1.0),
    "numpy": np.float32(2),
    "classes": ["a", "b", "c"], "table": {"a": 1}, "more": torch.arange(9), "array": np.arange(4), "pair": (1, 2, 3, 4),
    "nothing": [],
}  # fmt: skip


def filled(path: str) -> Batch:
    batch = next(iter(LanceDataset(path, 4, device="cpu", transforms={"image": Image(8)})))
    batch.update(OWN)
    return batch


@pytest.mark.parametrize("name", OWN)
def test_a_batch_with_a_value_of_the_users_is_printed_moved_and_pickled(name: str, path: str) -> None:
    batch = next(iter(LanceDataset(path, 4, device="cpu", transforms={"image": Image(8)})))
    batch[name] = OWN[name]
    assert f"{name}: " in repr(batch)
    for other in (batch.to("cpu"), pickle.loads(pickle.dumps(batch)), copy.copy(batch), copy.deepcopy(batch)):
        assert isinstance(other, Batch)
        assert list(other) == list(batch)
        assert str(other[name]) == str(OWN[name])
        assert torch.equal(other.rows, batch.rows)
    kept = batch.keep(np.array([True, False, True, False]))
    assert kept["id"].tolist() == [0, 2]
    whole = OWN[name] if name not in ("array", "pair") else [OWN[name][0], OWN[name][2]]  # as long as the batch
    assert str(kept[name]).split() == str(whole).split()


def test_a_framework_may_rebuild_a_batch_with_values_of_the_users(path: str) -> None:
    batch = filled(path)
    columns = {name: value for name, value in batch.items() if name in ("image", "id", "loss", "scalar", "name")}
    assert Batch(columns).size == 4
    with pytest.raises(ValueError, match="Expected 4 values in column 'classes', got 3"):
        Batch({"classes": OWN["classes"]}, batch.rows)


def test_transforms_beside_nothing_else_still_work(path: str, store: Store) -> None:
    texts = store({"text": ["a"]})
    assert next(iter(LanceDataset(texts, 1, transforms={"text": Text("bytes")})))["text"].tolist() == [[97]]
    assert len(list(LanceDataset(path, 4, to_tensor_fn=convert, device="cpu"))) == 2
    assert len(list(LanceDataset(path, 4, sampler=Own(), device="cpu"))) == 2
