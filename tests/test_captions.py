"""Captions: one of a list for each row and epoch, dropped or made into a prompt, the same however they are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from making import by_row

from gpuload import ConfigError, LanceDataset, Text, TextError
from gpuload.fields.values import pick

Store = Callable[..., str]
CAPTIONS = [[f"{row}:{i}" for i in range(1 + row % 4)] for row in range(60)]
KINDS = {"list": pa.list_(pa.string()), "large_list": pa.large_list(pa.large_string())}


def read(path: str, text: Text, batch_size: int = 7, epoch: int = 0, **options: Any) -> dict[int, str]:
    """Row → its text, by the bytes."""
    dataset = LanceDataset(path, batch_size, transforms={"caption": text}, device="cpu", **options)
    dataset.set_epoch(epoch)
    found: dict[int, str] = {}
    for batch in dataset:
        pairs = zip(batch["caption"], batch["caption_mask"].bool(), strict=True)
        texts = [bytes(ids[mask].tolist()).decode() for ids, mask in pairs]
        found.update(zip(batch.rows.tolist(), texts, strict=True))
    return found


@pytest.fixture
def path(store: Store) -> str:
    return store({"caption": pa.array(CAPTIONS, pa.list_(pa.string()))}, max_rows_per_file=16)


@pytest.mark.parametrize("kind", KINDS)
def test_one_caption_a_row_and_epoch_is_drawn(kind: str, store: Store) -> None:
    path = store({"caption": pa.array(CAPTIONS, KINDS[kind])})
    epochs = [read(path, Text("bytes", pick="random"), epoch=epoch) for epoch in range(40)]
    for row, texts in enumerate(CAPTIONS):
        assert {epoch[row] for epoch in epochs} == set(texts)  # each of four is missed with 4 * 0.75 ** 40
    assert epochs[0] != epochs[1]


def test_fixed_size_lists_are_lists() -> None:
    """Lance 14.0.2 fails at writing those of strings; other versions and samplers may give them."""
    values = pa.array([["a", "b"], None, ["c", None], [None, None], [None, "d"]], pa.list_(pa.string(), 2))
    assert pick(pa.chunked_array([values]), None).to_pylist() == ["a", None, "c", None, "d"]
    assert pick(pa.chunked_array([values[1:], values[:1]]), np.full(5, 0.9)).to_pylist() == [None, "c", None, "d", "b"]
    assert pick(pa.chunked_array([], values.type), None).to_pylist() == []


def test_the_first_is_the_first_that_is_no_null(store: Store) -> None:
    values = pa.array([["a", "b"], [None, "c"], [], None, [None], ["", "d"]], pa.list_(pa.string()))
    found = read(store({"caption": values}), Text("bytes", pick="first"))
    assert found == {0: "a", 1: "c", 2: "", 3: "", 4: "", 5: ""}
    dataset = LanceDataset(store({"caption": values}), 6, transforms={"caption": Text("bytes")}, device="cpu")
    (batch,) = dataset
    assert batch.nulls["caption"].tolist() == [False, False, True, True, True, False]
    assert dataset.stats()["nulls"] == 3


def test_null_captions_are_listed_like_other_nulls(store: Store) -> None:
    (batch,) = LanceDataset(store({"caption": ["a", None, ""]}), 3, transforms={"caption": Text("bytes")})
    assert batch.nulls["caption"].tolist() == [False, True, False]


TEXTS = [Text("bytes"), Text("bytes", dropout=0.5), Text("bytes", pick="first", dropout=0.5)]


@pytest.mark.parametrize("text", TEXTS, ids=["pick", "both", "dropout"])
def test_what_is_drawn_depends_on_seed_epoch_and_row_alone(text: Text, path: str) -> None:
    expected = read(path, text, seed=5, epoch=3)
    for options in ({"batch_size": 60}, {"batch_size": 1}, {"num_threads": 1}, {"filter": "true"}):
        assert read(path, text, **{"seed": 5, "epoch": 3, **options}) == expected
    ranks = [read(path, text, seed=5, epoch=3, rank=rank, world_size=2) for rank in range(2)]
    assert {**ranks[0], **ranks[1]} == expected
    assert read(path, text, seed=5, epoch=3, columns={"caption": "caption"}, shuffle="row") == expected
    assert read(path, text, seed=6, epoch=3) != expected
    assert read(path, text, seed=5, epoch=4) != expected


def test_it_is_the_same_after_a_resume(path: str) -> None:
    def dataset() -> LanceDataset:
        return LanceDataset(path, 7, shuffle=True, transforms={"caption": Text("bytes", dropout=0.3)}, device="cpu")

    whole, first, second = by_row(dataset(), "caption"), dataset(), dataset()
    batches = iter(first)
    begun = by_row([next(batches) for _ in range(3)], "caption")
    second.load_state_dict(first.state_dict())
    rest = by_row(second, "caption")
    batches.close()
    assert {row: ids.tolist() for row, ids in {**begun, **rest}.items()} == {
        r: ids.tolist() for r, ids in whole.items()
    }


def test_two_tokenizers_of_one_column_get_the_same_caption(path: str) -> None:
    columns, text = {"one": "caption", "two": "caption"}, Text("bytes", dropout=0.3)
    for batch in LanceDataset(path, 8, columns=columns, transforms=dict.fromkeys(columns, text), device="cpu"):
        assert batch["one"].tolist() == batch["two"].tolist()


@given(st.floats(0, 1), st.integers(0, 2**32))
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_dropped_text_is_the_empty_one(path: str, dropout: float, seed: int) -> None:
    plain, found = read(path, Text("bytes"), 60, seed=seed), read(path, Text("bytes", dropout=dropout), 60, seed=seed)
    dropped = [row for row in plain if found[row] != plain[row]]
    assert all(found[row] == "" for row in dropped)
    if dropout in (0, 1):
        assert len(dropped) == 60 * dropout


def test_as_many_are_dropped_as_asked_for(store: Store) -> None:
    path = store({"caption": ["text"] * 4000})
    share = sum(text == "" for text in read(path, Text("bytes", dropout=0.1), 500).values()) / 4000
    assert abs(share - 0.1) < 0.02  # four standard deviations


def test_prepare_comes_after_picking_and_before_the_tokenizer(path: str) -> None:
    asked: list[list[str]] = []

    def prepare(texts: list[str]) -> list[str]:
        asked.append(texts)
        return [f"a photo of {text}" for text in texts]

    text = Text("bytes", pick="first", prepare=prepare)
    assert read(path, text, 60) == {row: f"a photo of {row}:0" for row in range(60)}
    assert asked == [[f"{row}:0" for row in range(60)]]
    found = read(path, Text("bytes", pick="first", dropout=0.5, prepare=prepare), 60)
    dropped = [row for row, text in found.items() if not text]  # the empty text and no template
    assert 10 < len(dropped) < 50
    assert len(asked[1]) == 60 - len(dropped)


@pytest.mark.filterwarnings("ignore::gpuload.BadRowWarning")
@pytest.mark.parametrize("kind", ["raises", "answers"])
def test_a_text_that_prepare_refuses_is_an_error_of_its_row(kind: str, store: Store) -> None:
    def prepare(texts: list[str]) -> Any:
        if kind == "answers":
            return [None if text == "bad" else text.upper() for text in texts]
        if "bad" in texts:
            raise ValueError("no such template")
        return [text.upper() for text in texts]

    path = store({"caption": ["a", "b", "bad", "c"]})
    text = Text("bytes", prepare=prepare)
    with pytest.raises(TextError, match="prepare function") as caught:
        read(path, text)
    assert (caught.value.row, caught.value.column) == (2, "caption")
    assert read(path, text, on_error="skip") == {0: "A", 1: "B", 3: "C"}


@pytest.mark.parametrize(("answer", "message"), [(["a"], "got 1"), ("ab", "got 'ab'")])
def test_prepare_answers_one_text_a_text(answer: Any, message: str, store: Store) -> None:
    with pytest.raises(ConfigError, match=f"Expected 2 texts from the prepare function, {message}"):
        read(store({"caption": ["a", "b"]}), Text("bytes", prepare=lambda texts: answer))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"pick": "last"}, r'Text\(pick="random"\|"first"\), got \'last\''),
        ({"dropout": 1.5}, r"dropout=...\) as a probability in \[0, 1\], got 1.5"),
        ({"dropout": True}, r"dropout=...\) as a probability in \[0, 1\], got True"),
        ({"prepare": "upper"}, r"prepare=...\) as a function, got 'upper'"),
        ({"pad_id": "0"}, r"pad_id=...\) as an int, got '0'"),
        ({"pad_id": True}, r"pad_id=...\) as an int, got True"),
        ({"truncation": "yes"}, r"truncation=...\) as True or False, got 'yes'"),
    ],
)
def test_wrong_words_are_refused_when_made(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Text("bytes", **words)


def test_lists_of_numbers_are_no_captions(store: Store) -> None:
    path = store({"caption": pa.array([[1, 2]], pa.list_(pa.int64()))})
    with pytest.raises(ConfigError, match="Expected a string column for Text, got 'caption' of type list"):
        read(path, Text("bytes"))
