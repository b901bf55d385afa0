"""A tokenizer belongs to its owner: what it brings with it holds, nothing is left in it, and it may refuse a text."""

from __future__ import annotations

import threading
from collections import UserDict
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
import torch
from test_text import PROMPTS, fast, read, trained
from tokenizers import Tokenizer, models, pre_tokenizers

from gpuload import ConfigError, LanceDataset, Text, TextError
from gpuload.fields.values import to_python

Store = Callable[..., str]
LONG = "a photo of the red fox"  # 8 tokens with [CLS] and [SEP]


class Whole:
    """A pre-tokenizer in Python, with which a tokenizer cannot be copied."""

    def pre_tokenize(self, pretok: Any) -> None:
        pretok.split(lambda number, text: text.split(" ", "removed"))


def uncopyable(**options: Any) -> Tokenizer:
    tokenizer = trained(**options)
    tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Whole())
    return tokenizer


class Stubborn(type(fast())):  # type: ignore[misc]  # whatever transformers calls it
    """A tokenizer of transformers that cannot be copied."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("no copies")


def stubborn() -> Any:
    return Stubborn(tokenizer_object=trained(), pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")


# -- what it brings with it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["left", "right"])
def test_the_truncation_it_was_saved_with_holds(direction: str, store: Store, tmp_path: Any) -> None:
    tokenizer = trained(max_length=4, direction=direction)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for given in (tokenizer, tmp_path / "tokenizer.json"):
        assert read(store, [LONG], Text(given))["prompt"].tolist() == [tokenizer.encode(LONG).ids]
    with pytest.raises(TextError, match=r"at most 4 tokens \(truncation=False\), got 8"):
        read(store, [LONG], Text(tokenizer, truncation=False))
    assert read(store, [LONG], Text(tokenizer, max_length=6))["prompt"].shape == (1, 6)  # the user's word


def test_model_max_length_holds(store: Store) -> None:
    tokenizer = fast()
    tokenizer.model_max_length = 5
    expected = tokenizer([LONG], truncation=True)["input_ids"]
    assert read(store, [LONG], Text(tokenizer))["prompt"].tolist() == expected
    assert len(expected[0]) == 5
    with pytest.raises(TextError, match="at most 5 tokens"):
        read(store, [LONG], Text(tokenizer, truncation=False))


def test_a_saved_folder_brings_truncation_padding_length_and_side(store: Store, tmp_path: Any) -> None:
    backend = trained(max_length=4)
    backend.enable_padding(length=9, direction="left", pad_id=3, pad_token="[PAD]")
    saved = type(fast())(tokenizer_object=backend, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    saved.save_pretrained(tmp_path / "tokens")
    batch = read(store, [LONG, "a"], Text(tmp_path / "tokens"))
    assert batch["prompt"].tolist() == [[3] * 5 + backend.encode(LONG).ids[-4:], [3] * 6 + backend.encode("a").ids[-3:]]
    assert batch["prompt_mask"].sum(1).tolist() == [4, 3]
    assert read(store, [LONG, "a"], Text(tmp_path / "tokens", padding="longest"))["prompt"].shape == (2, 4)


def test_a_length_that_is_a_multiple_is_kept(store: Store) -> None:
    tokenizer = trained()
    tokenizer.enable_padding(pad_to_multiple_of=8, pad_id=3, pad_token="[PAD]")
    assert read(store, ["a", "a photo"], Text(tokenizer))["prompt"].shape == (2, 8)
    assert read(store, ["a"], Text(tokenizer, padding="max_length", max_length=16))["prompt"].shape == (1, 16)
    with pytest.raises(ConfigError, match="multiple of 8, to which the tokenizer pads, got 12"):
        read(store, ["a"], Text(tokenizer, padding="max_length", max_length=12))


@pytest.mark.parametrize("make", [trained, fast], ids=["tokenizers", "transformers"])
def test_fewer_tokens_than_the_special_ones_are_refused(make: Any, store: Store) -> None:
    with pytest.raises(ConfigError, match="at least the 2 special tokens of a text, got 1"):
        read(store, ["a"], Text(make(), max_length=1))


# -- padding without a pad token -----------------------------------------------------------------------------------

WITHOUT = {"tokenizers": lambda: trained("none"), "transformers": lambda: fast(pad=None)}


@pytest.mark.parametrize("kind", WITHOUT)
def test_padding_without_a_pad_token_is_an_error_with_a_remedy(kind: str, store: Store) -> None:
    texts = ["fox", "the red fox"]
    with pytest.raises(ConfigError, match=r"pad token, for a text of 3 tokens is padded to 5.*Text\(pad_id=\.\.\.\)"):
        read(store, texts, Text(WITHOUT[kind]()))
    assert read(store, texts, Text(WITHOUT[kind](), pad_id=7))["prompt"][0].tolist()[3:] == [7, 7]


@pytest.mark.parametrize("kind", WITHOUT)
@pytest.mark.parametrize("policy", ["skip", "mask"])
@pytest.mark.filterwarnings("ignore::gpuload.BadRowWarning")
def test_what_needs_no_padding_needs_no_pad_token(kind: str, policy: str, store: Store) -> None:
    assert read(store, ["the fox", "red fox"], Text(WITHOUT[kind]()))["prompt"].shape == (2, 4)
    text = Text(WITHOUT[kind](), max_length=4, truncation=False)
    batch = read(store, ["the fox", LONG, "red fox"], text, on_error=policy)  # a refused row needs none either
    assert batch["prompt"].shape == (2 if policy == "skip" else 3, 4)
    assert batch["prompt_mask"][-1].tolist() == [1] * 4


# -- whose tokenizer it is -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [trained, fast, uncopyable, stubborn])
def test_the_user_and_a_running_dataset_do_not_disturb_each_other(make: Any, store: Store) -> None:
    tokenizer = make()

    def by_hand() -> int:
        if isinstance(tokenizer, Tokenizer):
            return len(tokenizer.encode(LONG).ids)
        return len(tokenizer(LONG, truncation=True, max_length=7)["input_ids"])

    wanted = 8 if isinstance(tokenizer, Tokenizer) else 7
    backend = tokenizer if isinstance(tokenizer, Tokenizer) else tokenizer.backend_tokenizer
    path = store({"prompt": [LONG] * 400})
    dataset = LanceDataset(path, 4, columns=["prompt"], transforms={"prompt": Text(tokenizer, max_length=3)})
    copied = make in (trained, fast)
    for batch in dataset:
        assert batch["prompt"].tolist() == [[1, batch["prompt"][0, 1], 2]] * 4
        if copied:  # what is lent may be used between batches alone
            assert by_hand() == wanted
    assert by_hand() == wanted
    settings = backend.padding, backend.truncation
    list(dataset)
    assert (backend.padding, backend.truncation) == settings


@pytest.mark.parametrize("make", [uncopyable, stubborn])
def test_what_cannot_be_copied_gives_the_same_ids(make: Any, store: Store) -> None:
    path = store({"prompt": PROMPTS, "again": PROMPTS})
    text, hand = Text(make(), max_length=5), make()
    backend = hand if make is uncopyable else hand.backend_tokenizer
    backend.enable_truncation(5)
    for batch in LanceDataset(path, 3, transforms={"prompt": text, "again": text}, device="cpu"):
        for i, row in enumerate(batch.rows.tolist()):
            ids = batch["prompt"][i][batch["prompt_mask"][i].bool()].tolist()
            assert ids == backend.encode(PROMPTS[row]).ids
        assert torch.equal(batch["again"], batch["prompt"])


def test_a_callable_is_called_by_one_thread_at_a_time(store: Store) -> None:
    inside, most, lock = 0, 0, threading.Event()

    def tokenize(texts: list[str]) -> list[list[int]]:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        lock.wait(0.002)
        inside -= 1
        return [[1]] * len(texts)

    list(LanceDataset(store({"prompt": PROMPTS}), 1, transforms={"prompt": Text(tokenize)}, device="cpu"))
    assert most == 1


def test_a_mask_that_a_callable_gives_is_kept(store: Store) -> None:
    tokenizer = fast("left")
    batch = read(store, ["a", LONG], Text(lambda texts: tokenizer(texts, padding=True, return_tensors="pt")))
    expected = tokenizer(["a", LONG], padding=True, return_tensors="pt")
    assert torch.equal(batch["prompt"], expected["input_ids"])
    assert torch.equal(batch["prompt_mask"], expected["attention_mask"])


# -- texts that somebody chokes on ---------------------------------------------------------------------------------


def known_words() -> Tokenizer:
    """A tokenizer that has no token for an unknown word, and says so."""
    words = {word: i for i, word in enumerate(["a", "red", "fox"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


VOCABULARY = {"a": 0, "red": 1, "fox": 2}


def picky(texts: list[str]) -> list[list[int]]:
    if any("山" in text for text in texts):
        raise ValueError("no mountains\nhere")
    return [[VOCABULARY[word] for word in text.split()] for text in texts]


MOUNTAIN = ["a fox", "red 山", "a", "red fox", "fox"]
CHOKING = {
    "tokenizers": (known_words, MOUNTAIN, r"Exception: .*Missing \[UNK\] token"),
    "ValueError": (lambda: picky, MOUNTAIN, "ValueError: no mountains - at"),
    "KeyError": (lambda: picky, ["a fox", "red bird", "a", "red fox", "fox"], "KeyError: 'bird'"),
    "no ids": (lambda: lambda texts: [None if "山" in t else picky([t])[0] for t in texts], MOUNTAIN, "got None"),
    "floats": (lambda: lambda texts: [[1.5] if "山" in t else picky([t])[0] for t in texts], MOUNTAIN, r"got \[1\.5\]"),
}


@pytest.mark.parametrize("kind", CHOKING)
def test_a_text_that_a_tokenizer_chokes_on_is_an_error_of_its_row(kind: str, store: Store) -> None:
    make, texts, message = CHOKING[kind]
    text = Text(make(), pad_id=0)
    with pytest.raises(TextError, match=message) as caught:
        read(store, texts, text)
    assert (caught.value.row, caught.value.column) == (1, "prompt")
    with pytest.warns(UserWarning, match="row 1, column `prompt`"):
        batch = read(store, texts, text, on_error="mask")
    assert batch.valid.tolist() == [True, False, True, True, True]
    assert batch["prompt"].tolist() == [[0, 2], [0, 0], [0, 0], [1, 2], [2, 0]]
    assert batch["prompt_mask"].tolist() == [[1, 1], [0, 0], [1, 0], [1, 1], [1, 0]]
    with pytest.warns(UserWarning, match="row 1, column `prompt`"):
        assert read(store, texts, text, on_error="skip").rows.tolist() == [0, 2, 3, 4]


@pytest.mark.filterwarnings("ignore::gpuload.BadRowWarning")
def test_a_refused_text_is_not_tried_in_another_form_nor_its_batch_as_a_whole(store: Store) -> None:
    calls: list[list[str]] = []

    def tokenize(texts: list[str]) -> list[list[int]]:
        calls.append(texts)
        return picky(texts)

    texts = ["a", "red", "山", "fox", "a fox", "red fox", "a", "a"]
    read(store, texts, Text(tokenize), on_error="mask")
    assert calls[0] == texts
    assert all(isinstance(call, list) and call for call in calls)
    assert calls.count(texts) == 1
    assert calls.count(["山"]) == 1
    assert {text for call in calls for text in call} == set(texts)
    assert len(calls) == 7  # a half and its half, down to the one


def test_the_cause_is_that_of_the_tokenizer(store: Store) -> None:
    with pytest.raises(TextError) as caught:
        read(store, MOUNTAIN, Text(picky))
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("error", [RuntimeError, OSError, NameError, TypeError, MemoryError, AttributeError])
@pytest.mark.parametrize("where", ["tokenizer", "prepare"])
def test_what_is_not_about_a_value_reaches_the_user_with_the_stage(where: str, error: Any, store: Store) -> None:
    def fail(texts: list[str]) -> Any:
        raise error("the network is down")

    text = Text(fail) if where == "tokenizer" else Text("bytes", prepare=fail)
    with pytest.raises(error, match="the network is down") as caught:
        read(store, ["a"], text, on_error="skip")
    notes = getattr(caught.value, "__notes__", ["(raised in gpuload's read stage)"])  # from Python 3.11 on
    assert notes == ["(raised in gpuload's read stage)"]


def undecodable() -> pa.Array:
    """Three strings, the second of which is no UTF-8."""
    data = pa.array([b"red", b"\xff\xfe", b"fox"], pa.binary())
    return pa.Array.from_buffers(pa.string(), 3, data.buffers())


def test_a_string_that_is_no_utf_8_is_an_error_of_its_row() -> None:
    """Lance refuses the page that it is in; a sampler of the user's own may hand it over."""
    values, errors = to_python(pa.chunked_array([undecodable()]), TextError)
    assert values == ["red", None, "fox"]
    assert list(errors) == [1]
    assert "Expected a value of type string that Python can hold" in errors[1].cause


def test_a_date_after_the_year_9999_is_an_error_of_its_row(store: Store) -> None:
    path = store({"day": pa.array([0, 4_000_000, 1], pa.int32()).cast(pa.date32())})
    with pytest.warns(UserWarning, match="row 1, column `day`"):
        (batch,) = LanceDataset(path, 3, on_error="mask", device="cpu")
    assert [str(day) for day in batch["day"]] == ["1970-01-01", "None", "1970-01-02"]


def test_a_home_folder_is_expanded(store: Store, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    trained().save(str(tmp_path / "tokenizer.json"))
    assert read(store, ["a"], Text("~/tokenizer.json"))["prompt"].shape == (1, 3)


ANSWERS: dict[str, tuple[Any, str]] = {
    "none": (lambda texts: None, "Expected 4 id lists from the tokenizer, got None"),
    "number": (lambda texts: torch.tensor(3), "Expected 4 id lists from the tokenizer, got tensor"),
    "bytes": (lambda texts: b"abcd", "Expected 4 id lists from the tokenizer, got b'abcd'"),
    "no_ids": (lambda texts: {"ids": []}, r"Expected input_ids from the tokenizer, got a mapping of \['ids'\]"),
    "masks": (
        lambda texts: {"input_ids": [[1]] * len(texts), "attention_mask": [[1]]},
        "Expected 4 attention masks from the tokenizer, got 1",
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_that_is_none_at_all_is_no_error_of_a_row(name: str, store: Store) -> None:
    function, message = ANSWERS[name]
    dataset = LanceDataset(store({"text": ["a"] * 4}), 4, transforms={"text": Text(function)}, on_error="mask")
    with pytest.raises(ConfigError, match=message):
        list(dataset)


def test_answers_may_be_a_mapping_of_any_kind(store: Store) -> None:
    found = Text(lambda texts: UserDict(input_ids=([len(text)] for text in texts)))
    (batch,) = LanceDataset(store({"text": ["a", "bc"]}), 2, transforms={"text": found})
    assert batch["text"].tolist() == [[1], [2]]


def test_a_prepare_function_without_a_result_is_no_error_of_a_row(store: Store) -> None:
    text = Text("bytes", prepare=lambda texts: texts.sort())  # type: ignore[arg-type, func-returns-value]
    with pytest.raises(ConfigError, match="Expected 2 texts from the prepare function, got None"):
        list(LanceDataset(store({"text": ["a", "bc"]}), 2, transforms={"text": text}, on_error="skip"))
