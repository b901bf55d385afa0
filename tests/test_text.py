"""Text columns: the ids and mask of every kind of tokenizer are those of calling it by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from making import captions, jpeg
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from gpuload import ConfigError, LanceDataset, Text, TextError

pytestmark = pytest.mark.filterwarnings("ignore::gpuload.BadRowWarning")  # met on purpose in most tests here
Store = Callable[..., str]
PROMPTS = captions(20)


def trained(pad: str = "[PAD]", **truncation: Any) -> Tokenizer:
    """A word tokenizer with [CLS] … [SEP] around every text; [PAD] is not 0."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[UNK]", "[CLS]", "[SEP]", pad]
    tokenizer.train_from_iterator(PROMPTS, trainers.WordLevelTrainer(special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    if truncation:
        tokenizer.enable_truncation(**truncation)
    return tokenizer


def fast(side: str = "right", pad: str | None = "[PAD]") -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=trained(), pad_token=pad, cls_token="[CLS]", sep_token="[SEP]", padding_side=side
    )


def read(store: Store, texts: list[str | None], text: Text, **options: Any) -> Any:
    """The one batch of these texts."""
    path = store({"prompt": pa.array(texts, pa.string())})
    (batch,) = LanceDataset(path, len(texts), transforms={"prompt": text}, **{"device": "cpu", **options})
    return batch


def by_hand(tokenizer: Tokenizer, texts: list[str], length: int | None, fill: bool = False) -> tuple[Any, Any]:
    """(ids, mask) of the tokenizer's own padding and truncation."""
    own = Tokenizer.from_str(tokenizer.to_str())
    own.enable_padding(pad_id=3, pad_token="[PAD]", length=length if fill else None)
    if length:
        own.enable_truncation(length)
    found = own.encode_batch(texts)
    return torch.tensor([e.ids for e in found]), torch.tensor([e.attention_mask for e in found])


LENGTHS: list[dict[str, Any]] = [{}, {"max_length": 6}, {"max_length": 8, "padding": "max_length"}, {"max_length": 64}]
lengths = pytest.mark.parametrize("options", LENGTHS, ids=str)


@lengths
@pytest.mark.parametrize("form", ["object", "path", "Path"])
def test_ids_and_mask_are_those_of_the_tokenizer_by_hand(
    form: str, options: dict[str, Any], store: Store, tmp_path: Path, device: str
) -> None:
    tokenizer = trained()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    given = {"object": tokenizer, "path": str(tmp_path / "tokenizer.json"), "Path": tmp_path / "tokenizer.json"}[form]
    batch = read(store, PROMPTS, Text(given, **options), device=device)
    ids, mask = by_hand(tokenizer, PROMPTS, options.get("max_length"), "padding" in options)
    assert batch["prompt"].device.type == device
    assert batch["prompt"].dtype == batch["prompt_mask"].dtype == torch.int64
    assert torch.equal(batch["prompt"].cpu(), ids)
    assert torch.equal(batch["prompt_mask"].cpu(), mask)


@pytest.mark.parametrize("side", ["right", "left"])
@lengths
def test_a_transformers_tokenizer_pads_and_cuts_as_itself(side: str, options: dict[str, Any], store: Store) -> None:
    tokenizer = fast(side)
    batch = read(store, PROMPTS, Text(tokenizer, **options))
    expected = fast(side)(
        PROMPTS,
        padding=options.get("padding", "longest"),
        truncation="max_length" in options,
        max_length=options.get("max_length"),
        return_tensors="pt",
    )
    assert torch.equal(batch["prompt"], expected["input_ids"])
    assert torch.equal(batch["prompt_mask"], expected["attention_mask"])


def test_a_transformers_tokenizer_in_a_folder_is_a_path_too(store: Store, tmp_path: Path) -> None:
    fast("left").save_pretrained(tmp_path / "tokens")
    batch = read(store, PROMPTS, Text(str(tmp_path / "tokens"), max_length=6))
    expected = fast("left")(PROMPTS, padding=True, truncation=True, max_length=6, return_tensors="pt")
    assert torch.equal(batch["prompt"], expected["input_ids"])
    assert torch.equal(batch["prompt_mask"], expected["attention_mask"])


@pytest.mark.parametrize("direction", ["left", "right"])
def test_the_side_of_the_tokenizers_own_truncation_is_kept(direction: str, store: Store) -> None:
    tokenizer = trained(max_length=3, direction=direction)
    batch = read(store, ["a photo of the red fox"], Text(tokenizer, max_length=5))
    own = trained(max_length=5, direction=direction)
    assert batch["prompt"].tolist() == [own.encode("a photo of the red fox").ids]


@pytest.mark.parametrize(("pad", "given", "pad_id"), [("[PAD]", None, 3), ("<pad>", None, 3), ("none", 9, 9)])
def test_padding_has_the_tokenizers_pad_id_or_the_one_given(
    pad: str, given: int | None, pad_id: int, store: Store
) -> None:
    batch = read(store, ["fox", "the red fox"], Text(trained(pad), pad_id=given))
    assert batch["prompt"][0].tolist()[3:] == [pad_id] * 2
    assert batch["prompt_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]


def test_padding_that_the_tokenizer_was_given_is_kept(store: Store) -> None:
    tokenizer = trained()
    tokenizer.enable_padding(direction="left", pad_id=2, pad_token="[SEP]", length=40)
    batch = read(store, ["fox", "the red fox"], Text(tokenizer))
    assert batch["prompt"].shape == (2, 40)
    assert batch["prompt"][0].tolist()[:37] == [2] * 37
    assert batch["prompt_mask"].tolist() == [[0] * 37 + [1] * 3, [0] * 35 + [1] * 5]


def test_the_users_tokenizer_is_not_modified(store: Store) -> None:
    tokenizer = trained(max_length=3)
    tokenizer.enable_padding(length=40)
    before = tokenizer.to_str()
    read(store, PROMPTS, Text(tokenizer, max_length=6))
    assert tokenizer.to_str() == before
    other = fast("left")
    other(PROMPTS[0])
    before = other.backend_tokenizer.to_str()
    read(store, PROMPTS, Text(other))
    assert other.backend_tokenizer.to_str() == before
    assert other.padding_side == "left"


def test_bytes_are_utf_8_with_zeros_behind(store: Store) -> None:
    texts = ["abc", "", "Fluß 山", "\x00"]
    batch = read(store, texts, Text("bytes"))
    assert batch["prompt"].tolist() == [[*text.encode(), *[0] * (9 - len(text.encode()))] for text in texts]
    assert batch["prompt_mask"].sum(1).tolist() == [3, 0, 9, 1]
    cut = read(store, texts, Text("bytes", max_length=4, padding="max_length"))
    assert cut["prompt"].tolist() == [[*text.encode()[:4], *[0] * (4 - len(text.encode()[:4]))] for text in texts]


@given(st.lists(st.text(max_size=20), min_size=1, max_size=12), st.integers(1, 12), st.booleans())
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mask_counts_the_bytes_of_any_text(store: Store, texts: list[str], length: int, fill: bool) -> None:
    batch = read(store, texts, Text("bytes", max_length=length, padding="max_length" if fill else "longest"))
    encoded = [text.encode()[:length] for text in texts]
    width = length if fill else max(len(data) for data in encoded)
    assert batch["prompt"].shape == batch["prompt_mask"].shape == (len(texts), width)
    for row, mask, data in zip(batch["prompt"].tolist(), batch["prompt_mask"].tolist(), encoded, strict=True):
        assert bytes(row[: len(data)]) == data
        assert mask == [1] * len(data) + [0] * (width - len(data))


ROWS = [[5, 6, 7], [8]]


@pytest.mark.parametrize(
    "answer",
    [
        ROWS,
        [torch.tensor(row) for row in ROWS],
        [pa.array(row).to_numpy() for row in ROWS],
        {"input_ids": ROWS},
        [tuple(row) for row in ROWS],
    ],
    ids=["lists", "tensors", "arrays", "mapping", "tuples"],
)
def test_a_callable_may_answer_in_any_form(answer: Any, store: Store) -> None:
    asked: list[list[str]] = []

    def tokenize(texts: list[str]) -> Any:
        asked.append(texts)
        return answer

    batch = read(store, ["one", "two"], Text(tokenize))
    assert asked == [["one", "two"]]
    assert batch["prompt"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["prompt_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_a_callable_may_answer_with_one_tensor(store: Store) -> None:
    batch = read(store, ["one", "two"], Text(lambda texts: torch.tensor([[1, 2], [3, 4]])))
    assert batch["prompt"].tolist() == [[1, 2], [3, 4]]


def test_a_callable_with_too_few_answers_is_refused(store: Store) -> None:
    with pytest.raises(ConfigError, match="Expected 2 id lists from the tokenizer, got 1"):
        read(store, ["one", "two"], Text(lambda texts: [[1]]))


@pytest.mark.parametrize("tokenizer", [trained(), fast(), "bytes"], ids=["tokenizers", "transformers", "bytes"])
def test_a_null_is_an_empty_text(tokenizer: Any, store: Store) -> None:
    null, empty = (read(store, ["the fox", text, "red"], Text(tokenizer)) for text in (None, ""))
    assert torch.equal(null["prompt"], empty["prompt"])
    assert torch.equal(null["prompt_mask"], empty["prompt_mask"])
    assert null.valid.all()


def test_texts_that_are_all_empty_have_no_width(store: Store) -> None:
    batch = read(store, ["", None], Text("bytes"))
    assert batch["prompt"].shape == (2, 0)


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int8(), pa.string()), pa.string_view()], ids=str)
def test_every_string_type_is_text(kind: pa.DataType, store: Store) -> None:
    texts = ["red fox", None, "grass", "red fox"]
    expected = read(store, texts, Text(trained()))
    (batch,) = LanceDataset(store({"prompt": pa.array(texts, kind)}), 4, transforms={"prompt": Text(trained())})
    assert torch.equal(batch["prompt"].cpu(), expected["prompt"])


def test_a_string_column_without_a_tokenizer_is_a_list_of_str(store: Store) -> None:
    (batch,) = LanceDataset(store({"prompt": ["a", None, ""]}), 3, device="cpu")
    assert batch["prompt"] == ["a", None, ""]
    assert list(batch) == ["prompt"]


# -- rows that are too long ----------------------------------------------------------------------------------------

LONG = ["a", "abcde", "abc", "abcdef"]


def test_too_long_a_text_is_an_error_of_its_row(store: Store) -> None:
    with pytest.raises(
        TextError, match=r"at most 4 tokens \(truncation=False\), got 5 - at row 1, column `prompt`"
    ) as e:
        read(store, LONG, Text("bytes", max_length=4, truncation=False))
    assert (e.value.row, e.value.column) == (1, "prompt")


def test_too_long_texts_are_skipped_and_the_others_whole(store: Store) -> None:
    batch = read(store, LONG, Text("bytes", max_length=4, truncation=False), on_error="skip")
    assert batch.rows.tolist() == [0, 2]
    assert batch["prompt"].tolist() == [[97, 0, 0], [97, 98, 99]]
    assert batch["prompt_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize("tokenizer", [trained(), fast(), "bytes"], ids=["tokenizers", "transformers", "bytes"])
def test_too_long_texts_are_masked_as_empty_ones_and_the_others_whole(tokenizer: Any, store: Store) -> None:
    texts = ["a", "a photo of the red fox under the grass", "of"]
    plain = read(store, ["a", "", "of"], Text(tokenizer, max_length=4, truncation=False, padding="max_length"))
    batch = read(store, texts, Text(tokenizer, max_length=4, truncation=False, padding="max_length"), on_error="mask")
    assert batch.valid.tolist() == [True, False, True]
    for name in ("prompt", "prompt_mask"):
        assert torch.equal(batch[name], plain[name])


def test_a_bad_image_and_a_bad_text_of_one_row_count_once(store: Store) -> None:
    path = store({"prompt": ["abcde", "a"], "image": [b"\xff\xd8\xff", jpeg()]})
    transforms = {"prompt": Text("bytes", max_length=4, truncation=False)}
    dataset = LanceDataset(path, 2, transforms=transforms, on_error="skip", device="cpu")
    # the column is found by its first bytes, which look like a JPEG's
    (batch,) = dataset
    assert batch.rows.tolist() == [1]
    assert dataset.stats()["rows_skipped"] == 1


# -- tokenizers that are not there ---------------------------------------------------------------------------------


def test_a_missing_file_is_named(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer file at .*nowhere/tokenizer\.json.*no such file"):
        read(store, PROMPTS, Text(str(tmp_path / "nowhere" / "tokenizer.json")))


def test_a_file_that_is_no_tokenizer_is_named(store: Store, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"hello": 1}')
    with pytest.raises(ConfigError, match=r"Expected a tokenizer\.json at .*tokenizer\.json"):
        read(store, PROMPTS, Text(tmp_path / "tokenizer.json"))


def test_a_hub_name_without_a_network_is_a_clear_error(store: Store) -> None:
    with pytest.raises(ConfigError, match="Expected a tokenizer at 'nobody/has-this-tokenizer'"):
        read(store, PROMPTS, Text("nobody/has-this-tokenizer"))


def test_what_is_no_tokenizer_is_refused(store: Store) -> None:
    with pytest.raises(ConfigError, match=r'hub name, "bytes" or a callable; got int'):
        read(store, PROMPTS, Text(3))


def test_a_tokenizer_for_a_column_of_numbers_is_refused(store: Store) -> None:
    with pytest.raises(ConfigError, match="Expected a string column for Text, got 'x' of type int64"):
        len(LanceDataset(store({"x": [1]}), 1, transforms={"x": Text("bytes")}))


def test_a_column_with_the_name_of_the_mask_is_refused(store: Store) -> None:
    path = store({"prompt": ["a"], "prompt_mask": [1]})
    with pytest.raises(ConfigError, match="'prompt_mask' free for an attention mask"):
        len(LanceDataset(path, 1, transforms={"prompt": Text("bytes")}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "max_length=...\\) as a positive int, got 0"),
        ({"max_length": "77"}, "max_length=...\\) as a positive int, got '77'"),
        ({"max_length": True}, "max_length=...\\) as a positive int, got True"),
        ({"padding": "max_length"}, "max_length=...\\) beside padding"),
        ({"padding": True}, "padding=.*got True"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_when_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Text("bytes", **options)


def test_many_threads_tokenize_as_one(store: Store) -> None:
    path = store({"prompt": PROMPTS * 10})
    found = []
    for tokenizer in (trained(), fast()):
        dataset = LanceDataset(path, 3, transforms={"prompt": Text(tokenizer, max_length=5)}, device="cpu")
        found.append([batch["prompt"].tolist() for batch in dataset])
    ids = [by_hand(trained(), (PROMPTS * 10)[i : i + 3], 5)[0].tolist() for i in range(0, 200, 3)]
    assert found == [ids, ids]


def test_texts_that_are_too_long_are_refused_together(store: Callable[..., str]) -> None:
    seen: list[str] = []

    def words(texts: list[str]) -> list[list[int]]:
        seen.extend(texts)
        return [[len(word) for word in text.split()] for text in texts]

    path = store({"prompt": ["a b c d", "a", "a b c", "b b", "c c c c c"]})
    text = Text(words, max_length=2, truncation=False)
    (batch,) = LanceDataset(path, 5, transforms={"prompt": text}, on_error="mask", device="cpu")
    assert batch.valid.tolist() == [False, True, False, True, False]
    assert batch["prompt"].tolist() == [[0, 0], [1, 0], [0, 0], [1, 1], [0, 0]]
    assert sorted(seen) == sorted(["", "a b c d", "a", "a b c", "b b", "c c c c c"]), "no text was tokenized again"
