"""Tokenizers, opened: texts enter, i64[B, L] ids and their mask leave, and an error for each text that was refused.

A tokenizer belongs to its owner: ours is a copy. What cannot be copied is called under a lock of its own, and has its
settings back afterwards.
"""

from __future__ import annotations

import copy
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from gpuload.errors import ConfigError, GpuloadError, RowError, TextError

_UNLIMITED = 10**9  # transformers' model_max_length where there is none is 10**30
_PAD_TOKENS = ("[PAD]", "<pad>", "<|pad|>")
_INT64 = (1 << 63) - 1


@dataclass(frozen=True)
class Masked:
    """The ids of a text with an attention mask that their tokenizer gave; as long as they are, and cut like them."""

    ids: Sequence[int]
    mask: Sequence[int]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> Masked:
        return Masked(self.ids[part], self.mask[part])


Ids = Sequence[int] | Masked  # of one text; bytes are a sequence of ids, too


@dataclass
class Opened:
    """A tokenizer that is ready, and what it brings with it.

    Attributes
    ----------
    encode : callable
        Texts → the ids of each; cut to `limit` where that was asked for.
    pad_id : int or None
        None without a pad token.
    left : bool
        Whether it pads on the left.
    limit : int or None
        Tokens of a text at most: what was asked for, else its own.
    length : int
        Tokens it pads to at least, 0 without.
    multiple : int
        Of which the padded length is a multiple.
    """

    encode: Callable[[list[str]], Sequence[Ids | TextError]]
    pad_id: int | None = 0
    left: bool = False
    limit: int | None = None
    length: int = 0
    multiple: int = 1


class Tokens:
    """A tokenizer made ready. Safe to call from many threads.

    Parameters
    ----------
    tokenizer, max_length, padding, truncation, pad_id
        Those of `gpuload.Text`.

    Raises
    ------
    ConfigError
        No such tokenizer, or words that it cannot follow.
    """

    def __init__(
        self, tokenizer: Any, max_length: int | None, padding: str | None, truncation: bool, pad_id: int | None
    ) -> None:
        self._opened = _open(tokenizer, max_length, truncation)
        self._max_length, self._padding, self._truncation = max_length, padding, truncation
        self._pad_id = self._opened.pad_id if pad_id is None else pad_id
        multiple = self._opened.multiple
        if padding == "max_length" and max_length is not None and max_length % multiple:
            raise ConfigError(
                f"Expected Text(max_length=...) as a multiple of {multiple}, to which the tokenizer pads, "
                f"got {max_length}."
            )

    @property
    def length(self) -> int | None:
        """L where it is the same for every batch."""
        return self._max_length if self._padding == "max_length" else None

    def __call__(self, texts: Sequence[str | None]) -> tuple[torch.Tensor, torch.Tensor, dict[int, TextError]]:
        """Ids and attention mask, both i64[B, L], and by index why texts were refused.

        None is a text that was refused already. A refused text has no ids; one that is longer than the limit with
        ``truncation=False`` has those of the empty text.

        Raises
        ------
        ConfigError
            Texts have to be padded, and there is no pad token.
        """
        rows, errors = self._rows(texts)
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))  # i64[B]
        good = np.ones(len(rows), np.bool_)
        good[[*errors, *(i for i, text in enumerate(texts) if text is None)]] = False
        width = self._width(int(lengths[good if good.any() else slice(None)].max(initial=0)))
        short = np.flatnonzero(good & (lengths < width))
        if self._pad_id is None and len(short):
            raise ConfigError(
                f"Expected a tokenizer with a pad token, for a text of {lengths[short[0]]} tokens is padded to "
                f"{width}, got one without. Set Text(pad_id=...)."
            )
        for i in np.flatnonzero(lengths > width).tolist():
            rows[i] = rows[i][:width]
        place, lengths = np.arange(width), np.minimum(lengths, width)
        filled = place >= width - lengths[:, None] if self._opened.left else place < lengths[:, None]  # bool[B, L]
        ids, mask = np.full((len(rows), width), self._pad_id or 0, np.int64), filled.astype(np.int64)
        if any(isinstance(row, Masked) for row in rows):
            mask[filled] = _flat([row.mask if isinstance(row, Masked) else [1] * len(row) for row in rows])
            rows = [row.ids if isinstance(row, Masked) else row for row in rows]
        ids[filled] = _flat(rows)
        return torch.from_numpy(ids), torch.from_numpy(mask), errors

    def _rows(self, texts: Sequence[str | None]) -> tuple[list[Any], dict[int, TextError]]:
        """The ids of each text (`Ids`), none where it was refused, and why."""
        asked = [i for i, text in enumerate(texts) if text is not None]
        answers = self._encode([text for text in texts if text is not None])
        errors = {i: one for i, one in zip(asked, answers, strict=True) if isinstance(one, TextError)}
        if errors or len(asked) < len(texts):
            rows: list[Any] = [()] * len(texts)
            for i, answer in zip(asked, answers, strict=True):
                rows[i] = () if i in errors else answer
        else:
            rows = answers
        limit = self._opened.limit
        long = [] if limit is None else [i for i, row in enumerate(rows) if len(row) > limit]
        if not long:
            return rows, errors
        if self._truncation:
            for i in long:
                rows[i] = rows[i][:limit]
            return rows, errors
        (empty,) = self._encode([""])
        for i in long:
            errors[i] = TextError(f"Expected at most {limit} tokens (truncation=False), got {len(rows[i])}")
            rows[i] = () if isinstance(empty, TextError) else empty[:limit]
        return rows, errors

    def _encode(self, texts: list[str]) -> list[Any]:
        """`Ids` or a `TextError` for each text."""
        return by_value(self._opened.encode, texts, "id lists", "tokenizer")

    def _width(self, longest: int) -> int:
        """L of a batch whose longest text has `longest` tokens."""
        if self._padding == "max_length" and self._max_length is not None:
            return self._max_length
        least = self._opened.length if self._padding is None else 0
        return -(-max(longest, least) // self._opened.multiple) * self._opened.multiple


def by_value(call: Callable[[list[str]], Any], texts: list[str], what: str, who: str) -> list[Any]:
    """What `call` gives for each text, or the `TextError` why it chokes on that one.

    Where a call fails, each half of its texts is a call of its own, down to the one text that is refused. What is not
    about a value (a network that is down, a name that does not exist) is raised.

    Parameters
    ----------
    what, who : str
        What `call` gives and what it is, for messages: "id lists" of the "tokenizer".

    Raises
    ------
    ConfigError
        Not one answer a text.
    """
    if not texts:
        return []
    try:
        return _expected(call(list(texts)), len(texts), what, who)
    except BaseException as error:
        if not _about_a_value(error):
            raise
        if len(texts) > 1:
            half = len(texts) // 2
            return by_value(call, texts[:half], what, who) + by_value(call, texts[half:], what, who)
        reason = str(error).split("\n")[0] or "no reason"
        refused = TextError(f"Expected a text that the {who} takes, got {type(error).__name__}: {reason}")
        refused.__cause__ = error
        return [refused]


def _expected(answer: Any, count: int, what: str, who: str) -> list[Any]:
    """The answers of a function of the user's as a list, which has to have `count` of them."""
    whole = isinstance(answer, (str, bytes, Mapping)) or not getattr(answer, "ndim", 1)
    several = hasattr(answer, "__iter__") and not whole
    found = list(answer) if several else []
    if not several or len(found) != count:
        got = str(len(found)) if several else f"{answer!r:.80}"
        raise ConfigError(f"Expected {count} {what} from the {who}, got {got}.")
    return found


def _about_a_value(error: BaseException) -> bool:
    """Whether an exception of somebody else's code speaks of the text it was given."""
    if isinstance(error, GpuloadError):
        return isinstance(error, RowError)
    plain = type(error) is Exception  # all that tokenizers raises
    panic = type(error).__name__ == "PanicException"  # of compiled Rust code, and no Exception
    return plain or panic or isinstance(error, (ValueError, LookupError, ArithmeticError))


# -- opening -------------------------------------------------------------------------------------------------------


def _open(tokenizer: Any, max_length: int | None, truncation: bool) -> Opened:
    if isinstance(tokenizer, Tokenizer):
        return _tokenizers(tokenizer, max_length, truncation)
    if isinstance(tokenizer, (str, Path)):
        return _named(tokenizer, max_length, truncation)
    if hasattr(tokenizer, "batch_encode_plus") or hasattr(tokenizer, "pad_token_id"):
        return _transformers(tokenizer, max_length, truncation)
    if callable(tokenizer):
        return _callable(tokenizer, max_length)
    raise ConfigError(
        "Expected Text(tokenizer=...) as a path to tokenizer.json, a tokenizers.Tokenizer, a transformers "
        f'tokenizer, a hub name, "bytes" or a callable; got {type(tokenizer).__name__}.'
    )


def _named(name: str | Path, max_length: int | None, truncation: bool) -> Opened:
    """``"bytes"``, a file, a folder or a name on the hub."""
    if name == "bytes":
        return Opened(lambda texts: [text.encode("utf-8", "surrogatepass") for text in texts], limit=max_length)
    path = os.path.expanduser(name)
    if os.path.isfile(path):
        return _tokenizers(_load(path), max_length, truncation)
    if os.path.isdir(path) and os.path.isfile(os.path.join(path, "tokenizer.json")):
        loaded = _from_hub(path)
        backend = getattr(loaded, "backend_tokenizer", None)  # nobody has called it: what it is set to was saved
        length = (getattr(backend, "padding", None) or {}).get("length")
        opened = _transformers(loaded, max_length, truncation)
        opened.length = length or 0
        return opened
    if path.endswith(".json"):
        raise ConfigError(f"Expected a tokenizer file at {str(name)!r}, got no such file.")
    return _transformers(_from_hub(path), max_length, truncation)


def _tokenizers(tokenizer: Tokenizer, max_length: int | None, truncation: bool) -> Opened:
    """One of the library `tokenizers`. Its own truncation holds where no `max_length` was given."""
    padding, own_cut = tokenizer.padding or {}, tokenizer.truncation or {}
    limit = own_cut.get("max_length") if max_length is None else max_length
    _expect_room(limit, truncation, tokenizer.num_special_tokens_to_add(False))
    wanted: dict[str, Any] | None = None
    if limit is not None and truncation:
        wanted = {"max_length": limit, "stride": 0, "strategy": "longest_first", "direction": "right"}
        wanted |= {name: own_cut[name] for name in ("strategy", "direction") if name in own_cut}
    try:
        own, copied = Tokenizer.from_str(tokenizer.to_str()), True
    except Exception:  # a part of it is written in Python
        own, copied = tokenizer, False
    if copied:
        _set(own, None, wanted)

    def encode(texts: list[str]) -> list[Ids]:
        if copied:
            return [encoding.ids for encoding in own.encode_batch_fast(texts)]
        with _lock_of(own), _kept(own):
            _set(own, None, wanted)
            return [encoding.ids for encoding in own.encode_batch_fast(texts)]

    named = next((i for token in _PAD_TOKENS if (i := tokenizer.token_to_id(token)) is not None), None)
    return Opened(
        encode,
        pad_id=int(padding["pad_id"]) if padding else named,
        left=padding.get("direction") == "left",
        limit=limit,
        length=padding.get("length") or 0,
        multiple=padding.get("pad_to_multiple_of") or 1,
    )


def _transformers(tokenizer: Any, max_length: int | None, truncation: bool) -> Opened:
    """One of `transformers`. Where no `max_length` was given, the smallest of its own limits holds."""
    saved = getattr(tokenizer, "init_kwargs", {})
    limit = max_length
    if limit is None:
        cut = saved.get("max_length") if "truncation_strategy" in saved else None
        limits = [one for one in (getattr(tokenizer, "model_max_length", None), cut) if one and one < _UNLIMITED]
        limit = min(map(int, limits), default=None)
    count_special = getattr(tokenizer, "num_special_tokens_to_add", None)
    _expect_room(limit, truncation, count_special() if count_special else 0)
    options = {"truncation": True, "max_length": limit} if limit is not None and truncation else {}
    try:
        own, lent = copy.deepcopy(tokenizer), None
    except Exception:  # whatever a part of it has against being copied
        own, lent = tokenizer, getattr(tokenizer, "backend_tokenizer", None)

    def encode(texts: list[str]) -> list[Ids]:
        with _lock_of(own), _kept(lent):  # a fast one keeps its truncation in itself, and panics when called twice
            found = own(texts, padding=False, return_attention_mask=False, verbose=False, **options)
        return list(found["input_ids"])

    pad_id = tokenizer.pad_token_id
    return Opened(
        encode,
        pad_id=None if pad_id is None else int(pad_id),
        left=getattr(tokenizer, "padding_side", "right") == "left",
        limit=limit,
        multiple=saved.get("pad_to_multiple_of") or 1,
    )


def _callable(function: Callable[[list[str]], Any], max_length: int | None) -> Opened:
    """Whatever lists of ids it returns: lists, arrays, a tensor, or a mapping with ``input_ids``, whose
    ``attention_mask`` is kept."""

    def encode(texts: list[str]) -> list[Ids | TextError]:
        with _lock_of(function):
            found = function(texts)
        masks = None
        if isinstance(found, Mapping) or hasattr(found, "input_ids"):
            if "input_ids" not in found:
                raise ConfigError(f"Expected input_ids from the tokenizer, got a mapping of {list(found)}.")
            masks, found = found.get("attention_mask"), found["input_ids"]
        rows = _all_checked(_expected(found, len(texts), "id lists", "tokenizer"))
        if masks is None:
            return rows
        masks = _expected(masks, len(texts), "attention masks", "tokenizer")
        return [_masked(row, mask) for row, mask in zip(rows, masks, strict=True)]

    return Opened(encode, limit=max_length)


def _masked(ids: Ids | TextError, mask: Any) -> Ids | TextError:
    if isinstance(ids, (TextError, Masked)):
        return ids
    mask = _plain(mask)
    if len(mask) != len(ids):
        return TextError(f"Expected an attention mask of {len(ids)} from the tokenizer, got one of {len(mask)}")
    return Masked(ids, mask)


def _plain(row: Any) -> list[Any]:
    """A row of any library as a list."""
    return row.tolist() if hasattr(row, "tolist") else list(row)


def _all_checked(answers: list[Any]) -> list[Any]:
    """A callable's answers: lists of ids, or why one is none. All of them together first, for that is quick."""
    try:
        rows = [_plain(row) for row in answers]
        flat = np.asarray(list(itertools.chain.from_iterable(rows)) or [0])
        if flat.ndim == 1 and flat.dtype.kind == "i":
            return rows
    except (TypeError, ValueError):  # one is no list, or one of lists
        pass
    return [_checked(row) for row in answers]


def _checked(row: Any) -> list[int] | TextError:
    """A callable's answer for one text, if it is a list of ids."""
    try:
        ids = _plain(row)
        array = np.asarray(ids)
        good = not ids or (array.ndim == 1 and array.dtype.kind in "iu" and array.max() <= _INT64)
    except (TypeError, ValueError):  # no list, or one of lists
        good = False
    return ids if good else TextError(f"Expected token ids as a list of int64 from the tokenizer, got {row!r:.80}")


def _expect_room(limit: int | None, truncation: bool, special: int) -> None:
    """A tokenizer with fewer tokens to give than it adds by itself cuts nothing, without a word."""
    if limit is not None and truncation and limit < special:
        raise ConfigError(
            f"Expected Text(max_length=...) of at least the {special} special tokens of a text, got {limit}."
        )


_locks: dict[int, threading.Lock] = {}  # by id: one for each object, wherever it is used
os.register_at_fork(after_in_child=_locks.clear)


def _lock_of(tokenizer: Any) -> threading.Lock:
    return _locks.setdefault(id(tokenizer), threading.Lock())


@contextmanager
def _kept(tokenizer: Any) -> Iterator[None]:
    """Leaves a `tokenizers.Tokenizer` with the padding and truncation it has now; None is left alone."""
    if tokenizer is None:
        yield
        return
    padding, cut = tokenizer.padding, tokenizer.truncation
    try:
        yield
    finally:
        _set(tokenizer, padding, cut)


def _set(tokenizer: Any, padding: dict[str, Any] | None, cut: dict[str, Any] | None) -> None:
    """Give it these settings, and touch it only where they differ."""
    if tokenizer.padding != padding:
        tokenizer.enable_padding(**padding) if padding else tokenizer.no_padding()
    if tokenizer.truncation != cut:
        tokenizer.enable_truncation(**cut) if cut else tokenizer.no_truncation()


def _load(path: str) -> Tokenizer:
    try:
        return Tokenizer.from_file(path)
    except Exception as error:  # tokenizers raises a bare Exception
        raise ConfigError(f"Expected a tokenizer.json at {path!r}, got: {error}") from error


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


# -- rows of ids ---------------------------------------------------------------------------------------------------


def _flat(ids: list[Any]) -> NDArray[Any]:
    """One row of ids after the other."""
    if ids and all(isinstance(row, bytes) for row in ids):
        return np.frombuffer(b"".join(ids), np.uint8)
    return np.fromiter(itertools.chain.from_iterable(ids), np.int64)
