"""Ids: strings enter, i64[B, L] and its attention mask leave. The tokenizers are other libraries'."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from gpuload.clock import Clock
from gpuload.errors import ConfigError, TextError, expect
from gpuload.fields import Column, Fails, Field, Geometry, Known, Parts, Taken, is_text
from gpuload.order.draws import Draws
from gpuload.tables import Selection

Ids = Sequence[Sequence[int]]  # of each text; bytes are a sequence of ids, too


@dataclass(frozen=True)
class Text:
    """A string becomes token ids, ``i64[B, L]``, and its attention mask, ``i64[B, L]``, as ``<name>_mask``.

    Parameters
    ----------
    tokenizer : path, tokenizers.Tokenizer, transformers tokenizer, hub name, "bytes" or callable
        A path is a ``tokenizer.json``. A hub name needs ``transformers``. ``"bytes"`` is built in: the ids are the
        UTF-8 bytes, the padding is 0. A callable takes ``list[str]`` and returns a list of id lists.
    max_length : int, optional
        In tokens, special tokens included. Needed by ``padding="max_length"``.
    padding : {"longest", "max_length"}
        Pad to the longest text of the batch, or always to `max_length`.
    truncation : bool
        Cut texts at `max_length`; False makes a longer one an error of its row.
    """

    tokenizer: Any | Callable[[list[str]], Any]
    max_length: int | None = None
    padding: Literal["longest", "max_length"] = "longest"
    truncation: bool = True

    def __post_init__(self) -> None:
        expect(self.padding in ("longest", "max_length"), 'Text(padding="longest"|"max_length")', self.padding)
        expect(
            self.max_length is None or (type(self.max_length) is int and self.max_length > 0),
            "Text(max_length=...) as a positive int",
            self.max_length,
        )
        expect(
            self.padding != "max_length" or self.max_length is not None,
            'Text(max_length=...) beside padding="max_length"',
            self.max_length,
        )


class TextField:
    """A column of strings, as token ids and their mask."""

    transform: type | None = Text

    def __init__(self, column: Column, clock: Clock) -> None:
        self.columns, self._name, self._clock = [column], column.name, clock
        self._tokens: Tokens = column.ready

    @classmethod
    def column(cls, field: pa.Field, transform: Any, known: Known) -> Column | None:
        if not isinstance(transform, Text):
            return None
        if not is_text(field.type):
            raise ConfigError(f"Expected a string column for Text, got {field.name!r} of type {field.type}.")
        length = transform.max_length if transform.padding == "max_length" else "L"
        mask = f"{field.name}_mask"
        if mask in known.names:
            raise ConfigError(f"Expected the name {mask!r} free for an attention mask; rename that column.")
        form, ready = f"int64[B, {length}] and {mask}", Tokens(transform)
        return Column(field.name, field.type, "text", form, transform, cls.make, ready, (mask,))

    @classmethod
    def make(cls, columns: list[Column], parts: Parts) -> list[Field]:
        return [cls(column, parts.tokenize) for column in columns]

    def take(self, rows: Selection, draws: Draws, geometry: Mapping[str, Geometry]) -> Taken:
        texts = [text or "" for text in _strings(rows.column(self._name))]
        with self._clock.timed():
            ids, mask, refused = self._tokens(texts)
        fails: Fails = [(error.row, self._name, error) for error in refused]
        return Taken({self._name: ids, f"{self._name}_mask": mask}, fails=fails)


def _strings(column: pa.ChunkedArray) -> list[str | None]:
    """The texts of a string column, plain or dictionary-encoded."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    texts: list[str | None] = column.to_pylist()
    return texts


class Tokens:
    """A `Text` made ready: the tokenizer opened, its padding id and side known. Safe to call from many threads."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self.pad_id, self._left = 0, False
        self._encode = self._open(text.tokenizer)

    def __call__(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor, list[TextError]]:
        """Token ids and attention mask, both i64[B, L], and an error for each text that is longer than ``max_length``
        with ``truncation=False``, with `row` as its index; its ids are those of the empty text."""
        ids = self._encode(texts) if texts else []
        if len(ids) != len(texts):
            raise ConfigError(f"Expected {len(texts)} id lists from the tokenizer, got {len(ids)}.")
        limit, refused = self._text.max_length, list[TextError]()
        if limit is not None and not self._text.truncation:
            long = [i for i, row in enumerate(ids) if len(row) > limit]
            refused = [
                TextError(f"Expected at most {limit} tokens (truncation=False), got {len(ids[i])}", i) for i in long
            ]
            if long:
                (empty,), ids = self._encode([""]), list(ids)
                for i in long:
                    ids[i] = empty
        if limit is not None:
            ids = [row[:limit] for row in ids]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        longest = limit if self._text.padding == "max_length" else int(lengths.max(initial=0))
        out = np.full((len(ids), longest or 0), self.pad_id, np.int64)
        place = np.arange(longest or 0)
        mask = place >= (longest or 0) - lengths[:, None] if self._left else place < lengths[:, None]
        out[mask] = _flat(ids)
        return torch.from_numpy(out), torch.from_numpy(mask.astype(np.int64)), refused

    def _open(self, tokenizer: Any) -> Callable[[list[str]], Ids]:
        if isinstance(tokenizer, Tokenizer):
            return self._tokenizers(tokenizer)
        if isinstance(tokenizer, (str, Path)):
            if tokenizer == "bytes":
                return _utf8
            if os.path.isfile(tokenizer):
                return self._tokenizers(_load(tokenizer))
            if os.path.isdir(tokenizer) and os.path.isfile(os.path.join(tokenizer, "tokenizer.json")):
                return self._transformers(_from_hub(str(tokenizer)))
            if str(tokenizer).endswith(".json"):
                raise ConfigError(f"Expected a tokenizer file at {str(tokenizer)!r}, got no such file.")
            return self._transformers(_from_hub(str(tokenizer)))
        if hasattr(tokenizer, "batch_encode_plus") or hasattr(tokenizer, "pad_token_id"):
            return self._transformers(tokenizer)
        if callable(tokenizer):
            return self._callable(tokenizer)
        raise ConfigError(
            "Expected Text(tokenizer=...) as a path to tokenizer.json, a tokenizers.Tokenizer, a transformers "
            f'tokenizer, a hub name, "bytes" or a callable; got {type(tokenizer).__name__}.'
        )

    def _tokenizers(self, tokenizer: Tokenizer) -> Callable[[list[str]], Ids]:
        """A copy of its own, so that the user's keeps its padding and truncation."""
        own = Tokenizer.from_str(tokenizer.to_str())
        padding, cut = own.padding, own.truncation
        if padding:
            self.pad_id, self._left = int(padding["pad_id"]), padding["direction"] == "left"
        else:
            self.pad_id = next((i for t in ("[PAD]", "<pad>", "<|pad|>") if (i := own.token_to_id(t)) is not None), 0)
        own.no_padding()
        own.no_truncation()
        if self._text.max_length is not None and self._text.truncation:
            own.enable_truncation(self._text.max_length, direction=cut["direction"] if cut else "right")
        return lambda texts: [encoding.ids for encoding in own.encode_batch_fast(texts)]

    def _transformers(self, tokenizer: Any) -> Callable[[list[str]], Ids]:
        if tokenizer.pad_token_id is not None:
            self.pad_id = int(tokenizer.pad_token_id)
        self._left = tokenizer.padding_side == "left"
        cut = self._text.max_length is not None and self._text.truncation
        options = {"truncation": True, "max_length": self._text.max_length} if cut else {}
        lock = threading.Lock()  # a fast tokenizer keeps its truncation in itself and panics when called twice at once

        def encode(texts: list[str]) -> Ids:
            with lock:
                found: Ids = tokenizer(texts, padding=False, return_attention_mask=False, verbose=False, **options)[
                    "input_ids"
                ]
            return found

        return encode

    def _callable(self, function: Callable[[list[str]], Any]) -> Callable[[list[str]], Ids]:
        """Whatever lists of ids it returns: lists, arrays, a tensor, or a mapping with ``input_ids``."""

        def encode(texts: list[str]) -> Ids:
            found = function(texts)
            if isinstance(found, dict) or hasattr(found, "input_ids"):
                found = found["input_ids"]
            return [row.tolist() if hasattr(row, "tolist") else list(row) for row in found]

        return encode


def _utf8(texts: list[str]) -> Ids:
    return [text.encode("utf-8", "surrogatepass") for text in texts]


def _flat(ids: Ids) -> NDArray[Any]:
    """One row of ids after the other."""
    if ids and isinstance(ids[0], bytes):
        return np.frombuffer(b"".join(ids), np.uint8)  # type: ignore[arg-type]  # all of them are bytes
    return np.fromiter(itertools.chain.from_iterable(ids), np.int64)


def _load(path: str | Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises a bare Exception
        raise ConfigError(f"Expected a tokenizer.json at {str(path)!r}, got: {error}") from error


def _from_hub(name: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ConfigError(
            f"Expected a tokenizer file or an installed `transformers` for the hub name {name!r}. "
            'pip install "gpuload[hf]"'
        ) from error
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"Expected a tokenizer at {name!r}, got: {str(error).splitlines()[0]}") from error
