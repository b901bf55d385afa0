"""Which columns: names or expressions enter, one `Field` per output column leaves: where it lies and its Arrow type."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from gpuload.errors import ConfigError
from gpuload.tables import reading

_ROW_COLUMNS = {"_rowid": pa.uint64(), "_rowaddr": pa.uint64()}
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z_0-9]*(\.[A-Za-z_][A-Za-z_0-9]*)*")


@dataclass(frozen=True)
class Field:
    """One output column. `path` is empty where only evaluating `expression` gives it."""

    name: str
    type: pa.DataType
    path: tuple[str, ...]
    expression: str
    blob: bool = False


def project(dataset: Any, columns: Sequence[str] | dict[str, str] | None, extra: list[str]) -> list[Field]:
    """One field per output column, `extra` row columns last.

    Raises
    ------
    ConfigError
        An unknown name, or an expression that Lance refuses.
    """
    schema: pa.Schema = dataset.schema
    if isinstance(columns, str):
        raise ConfigError(f"Expected columns as a list of names or a dict of name to SQL, got {columns!r}.")
    if columns is None:
        columns = schema.names
    if not isinstance(columns, (dict, Sequence)):
        raise ConfigError(f"Expected columns as a list of names or a dict of name to SQL, got {columns!r}.")
    texts = [*columns.keys(), *columns.values()] if isinstance(columns, dict) else columns
    wrong = next((text for text in texts if not isinstance(text, str)), None)
    if wrong is not None or None in texts:
        raise ConfigError(f"Expected columns as names or SQL expressions, each a str, got {wrong!r} in {columns!r}.")
    wanted = dict(columns) if isinstance(columns, dict) else {name: name for name in columns}
    if not isinstance(columns, dict) and len(wanted) < len(columns):
        raise ConfigError(f"Expected each column once, got columns={list(columns)}.")
    wanted.update({name: name for name in extra})
    if not wanted:
        raise ConfigError("Expected at least one column, got none. Leave columns out to read all of them.")
    return [_field(dataset, schema, name, text, isinstance(columns, dict)) for name, text in wanted.items()]


def _field(dataset: Any, schema: pa.Schema, name: str, text: str, sql: bool) -> Field:
    if text in _ROW_COLUMNS:
        return Field(name, _ROW_COLUMNS[text], (text,), text)
    path = _path(schema, text)
    if path:
        field = schema.field(path[0])
        blob = len(path) == 1 and is_blob(field)
        for part in path[1:]:
            field = field.type.field(part)
        return Field(name, pa.large_binary() if blob else field.type, path, ".".join(map(_quote, path)), blob)
    if not sql:
        raise ConfigError(
            f"Expected columns of {dataset.uri}, which are {schema.names}; got {text!r}.{near(text, schema.names)}"
        )
    try:
        return Field(name, dataset.scanner(columns={name: text}).projected_schema.field(name).type, (), text)
    except (OSError, ValueError, KeyError) as error:
        words, hint = reading.words(error), near(text, schema.names)
        raise ConfigError(f"Lance refused the expression {text!r} of column {name!r}: {words}{hint}") from error


def near(name: str, known: Iterable[str]) -> str:
    """A question that names the known name most like this one, with a space before it; empty where none is."""
    found = difflib.get_close_matches(name, list(known), 1)
    return f" Did you mean {found[0]!r}?" if found else ""


def _path(schema: pa.Schema, text: str) -> tuple[str, ...]:
    """The names that lead to a stored field, empty where `text` is anything else."""
    if text in schema.names:
        return (text,)
    if not _PLAIN.fullmatch(text):
        return ()
    parts = tuple(text.split("."))
    if parts[0] not in schema.names:
        return ()
    kind = schema.field(parts[0]).type
    for part in parts[1:]:
        if not pa.types.is_struct(kind) or kind.get_field_index(part) < 0:
            return ()
        kind = kind.field(part).type
    return parts


def is_blob(field: pa.Field) -> bool:
    """Whether Lance stores this column as blobs, of the first or the second kind."""
    marked = (field.metadata or {}).get(b"lance-encoding:blob") == b"true"
    return marked or getattr(field.type, "extension_name", None) == "lance.blob.v2"


def _quote(name: str) -> str:
    return name if _PLAIN.fullmatch(name) and name.islower() else f"`{name}`"
