"""Ids: strings enter, or lists of them, of which one is picked; i64[B, L] and its attention mask leave.

strings or lists ─pick─▶ texts ─dropout, prepare─▶ texts ─Tokens─▶ ids, mask
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gpuload.clock import Clock
from gpuload.errors import ConfigError, TextError, expect, is_number, is_one_of
from gpuload.fields import Column, Fails, Field, Geometry, Known, Parts, Taken, is_text
from gpuload.fields.tokens import Tokens, by_value
from gpuload.fields.values import pick, to_python
from gpuload.order.draws import Draws
from gpuload.tables import Selection


@dataclass(frozen=True)
class Text:
    """A string becomes token ids, ``i64[B, L]``, and its attention mask, ``i64[B, L]``, as ``<name>_mask``.

    Parameters
    ----------
    tokenizer : path, tokenizers.Tokenizer, transformers tokenizer, hub name, "bytes" or callable
        A path is a ``tokenizer.json``. A hub name needs ``transformers``. ``"bytes"`` is built in: the ids are the
        UTF-8 bytes, the padding is 0. A callable takes ``list[str]`` and returns a list of id lists, or a mapping with
        ``input_ids`` (and ``attention_mask``); the padding is 0. A copy works, so that the tokenizer stays as it is;
        callables, and what cannot be copied, are called by one thread at a time.
    max_length : int, optional
        In tokens, special tokens included; needed by ``padding="max_length"``. Without it the tokenizer's own limit
        holds: the truncation it was saved with, its ``model_max_length``.
    padding : {"longest", "max_length"}, optional
        Pad to the longest text of the batch, or always to `max_length`. By default as the tokenizer was saved, else to
        the longest.
    truncation : bool
        Cut texts at the limit; False makes a longer one an error of its row.
    pick : {"random", "first"}
        Which string of a list: one drawn for each row and epoch, or the first. Nulls in a list do not count. Texts of a
        row are drawn alike: two outputs of one column, for two tokenizers, have the same one.
    dropout : float
        Probability, in [0, 1], that a text is the empty one, drawn for each row and epoch: for classifier-free
        guidance.
    prepare : callable, optional
        ``list[str] → list[str]``, before the tokenizer: templates, cleaning. Not asked about texts that are dropped.
    pad_id : int, optional
        What to pad with, instead of the tokenizer's pad token. Without either, padding is an error.

    A null is the empty text, listed in ``batch.nulls``; so is a list without a string.
    """

    tokenizer: Any | Callable[[list[str]], Any]
    max_length: int | None = None
    padding: Literal["longest", "max_length"] | None = None
    truncation: bool = True
    pick: Literal["random", "first"] = "random"
    dropout: float = 0.0
    prepare: Callable[[list[str]], list[str]] | None = None
    pad_id: int | None = None

    def __post_init__(self) -> None:
        expect(
            is_one_of(self.padding, (None, "longest", "max_length")),
            'Text(padding="longest"|"max_length")',
            self.padding,
        )
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
        expect(isinstance(self.truncation, bool), "Text(truncation=...) as True or False", self.truncation)
        expect(is_one_of(self.pick, ("random", "first")), 'Text(pick="random"|"first")', self.pick)
        expect(
            is_number(self.dropout) and 0 <= self.dropout <= 1,
            "Text(dropout=...) as a probability in [0, 1]",
            self.dropout,
        )
        expect(self.prepare is None or callable(self.prepare), "Text(prepare=...) as a function", self.prepare)
        number = self.pad_id is None or (type(self.pad_id) is int and -(2**63) <= self.pad_id < 2**63)
        expect(number, "Text(pad_id=...) as an int", self.pad_id)


class TextField:
    """A column of strings or of lists of strings, as token ids and their mask."""

    transform: type | None = Text

    def __init__(self, column: Column, clock: Clock) -> None:
        self.columns, self._name, self._clock = [column], column.name, clock
        self._text: Text = column.transform
        self._tokens: Tokens = column.ready
        self._lists = not is_text(column.type)

    @classmethod
    def column(cls, field: pa.Field, transform: Any, known: Known) -> Column | None:
        if not isinstance(transform, Text):
            return None
        if not (is_text(field.type) or _is_list_of_text(field.type)):
            got = f"{field.name!r} of type {field.type}"
            raise ConfigError(
                f"Expected a string column for Text, got {got}. A column of lists of strings will do, too."
            )
        mask = f"{field.name}_mask"
        if mask in known.names:
            raise ConfigError(f"Expected the name {mask!r} free for an attention mask; rename that column.")
        text = transform
        ready = Tokens(text.tokenizer, text.max_length, text.padding, text.truncation, text.pad_id)
        form = f"int64[B, {ready.length or 'L'}] and {mask}"
        return Column(field.name, field.type, "text", form, transform, cls.make, ready, (mask,))

    @classmethod
    def make(cls, columns: list[Column], parts: Parts) -> list[Field]:
        return [cls(column, parts.tokenize) for column in columns]

    def take(self, rows: Selection, draws: Draws, geometry: Mapping[str, Geometry]) -> Taken:
        with self._clock.timed():
            drawn = draws.uniform("text", 2) if self._lists or self._text.dropout else None  # pick, dropout
            texts, null, errors = self._texts(rows.column(self._name), drawn)
            ids, mask, refused = self._tokens(texts)
        errors |= refused
        fails: Fails = [(i, self._name, error) for i, error in errors.items()]
        nulls = {self._name: null} if null.any() else {}
        return Taken({self._name: ids, f"{self._name}_mask": mask}, nulls, fails)

    def _texts(
        self, column: pa.ChunkedArray, drawn: NDArray[np.float64] | None
    ) -> tuple[list[str | None], NDArray[np.bool_], dict[int, Any]]:
        """What goes to the tokenizer, None for a text that is refused; which were null, bool[B]; and why refused."""
        if self._lists:
            column = pick(column, None if self._text.pick == "first" or drawn is None else drawn[:, 0])
        values, errors = to_python(_plain(column), TextError)
        texts: list[str | None] = [None if i in errors else value or "" for i, value in enumerate(values)]
        null = np.array([value is None and i not in errors for i, value in enumerate(values)], np.bool_)
        kept = [i for i, text in enumerate(texts) if text is not None]
        if drawn is not None and self._text.dropout:
            dropped = drawn[:, 1] < self._text.dropout
            for i in np.flatnonzero(dropped).tolist():
                errors.pop(i, None)
                texts[i] = ""
            kept = [i for i in kept if not dropped[i]]
        if self._text.prepare is not None:
            self._prepare(self._text.prepare, texts, kept, errors)
        return texts, null, errors

    def _prepare(
        self,
        prepare: Callable[[list[str]], list[str]],
        texts: list[str | None],
        kept: list[int],
        errors: dict[int, Any],
    ) -> None:
        """Put what the user's function makes of the texts in their places."""
        asked = [texts[i] or "" for i in kept]
        for i, text in zip(kept, by_value(prepare, asked, "texts", "prepare function"), strict=True):
            if isinstance(text, str):
                texts[i] = text
                continue
            wrong = TextError(f"Expected a str from the prepare function, got {text!r:.80}")
            texts[i], errors[i] = None, text if isinstance(text, TextError) else wrong


def _is_list_of_text(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(is_list) and is_text(kind.value_type)


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A string column without its dictionary."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
