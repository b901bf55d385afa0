"""Ids: list[str] enters, i64[B, L] and its attention mask leave. The tokenizers are other libraries'."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from gpuload.errors import ConfigError, TextError
from gpuload.images.transform import Text

Ids = Sequence[Sequence[int]]  # of each text; bytes are a sequence of ids, too


class Tokens:
    """A `Text` made ready: the tokenizer opened, its padding id and side known. Safe to call from many threads."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self.pad_id, self._left = 0, False
        self._encode = self._open(text.tokenizer)

    def __call__(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask, both i64[B, L].

        Raises
        ------
        TextError
            With `row` as the index into `texts`: a text longer than ``max_length`` with ``truncation=False``.
        """
        ids = self._encode(texts) if texts else []
        if len(ids) != len(texts):
            raise ConfigError(f"Expected {len(texts)} id lists from the tokenizer, got {len(ids)}.")
        limit = self._text.max_length
        if limit is not None:
            for i, row in enumerate(ids):
                if len(row) > limit and not self._text.truncation:
                    raise TextError(f"Expected at most {limit} tokens (truncation=False), got {len(row)}", i)
            ids = [row[:limit] for row in ids]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        longest = limit if self._text.padding == "max_length" else int(lengths.max(initial=0))
        out = np.full((len(ids), longest or 0), self.pad_id, np.int64)
        place = np.arange(longest or 0)
        mask = place >= (longest or 0) - lengths[:, None] if self._left else place < lengths[:, None]
        out[mask] = _flat(ids)
        return torch.from_numpy(out), torch.from_numpy(mask.astype(np.int64))

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
