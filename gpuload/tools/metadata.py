"""Tables beside the pictures: CSV, TSV, JSONL or Parquet enters; captions and further columns leave, by file.

As Hugging Face's ImageFolder has it: ``metadata.csv``, ``.jsonl`` or ``.parquet`` with a column ``file_name``, all
other columns with their types. Names are compared in one Unicode form: macOS writes é as two characters, others as one.
"""

from __future__ import annotations

import csv
import json
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from gpuload.errors import ConfigError

FILE_KEYS = ("file_name", "filename", "file", "path", "image")
CAPTION_KEYS = ("caption", "text", "prompt")
TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_TAKEN = ("image", "caption", "path")  # columns of the dataset that say something else


class Metadata:
    """What the tables say about files.

    Parameters
    ----------
    root : path
        Paths are relative to it.
    caption_from : str, optional
        The column that holds the captions; else the first of `CAPTION_KEYS` that a table has.

    Attributes
    ----------
    unused : list of (path, why)
        Rows that say nothing new.
    """

    def __init__(self, root: Path, caption_from: str | None = None) -> None:
        self._root, self._wanted = root, caption_from
        self._rows: dict[str, tuple[str, list[dict[str, Any]]]] = {}  # by `form`: the path as written, and its rows
        self._types: dict[str, pa.DataType] = {}
        self._captioned = self._several = False
        self.unused: list[tuple[str, str]] = []

    @property
    def columns(self) -> dict[str, pa.DataType]:
        """Names and types of what is neither file name nor caption."""
        return {_free(name): dtype for name, dtype in self._types.items()}

    @property
    def caption(self) -> pa.DataType | None:
        """Strings, or lists of strings where a picture has several; None without captions."""
        if not self._captioned:
            return None
        return pa.list_(pa.string()) if self._several else pa.string()

    @property
    def left(self) -> list[str]:
        """Files that were named and not taken."""
        return [path for path, _ in self._rows.values()]

    def add(self, table: Path, required: bool) -> str:
        """Take in a table; or why it cannot be one of ours. One that is required is an error instead.

        Raises
        ------
        ConfigError
            It cannot be read, a name or a caption is none, or a column has another type than in another table.
        """
        found = _read(table, self._wanted)
        name = next((key for key in FILE_KEYS if key in found.column_names), None)
        keys = CAPTION_KEYS if self._wanted is None else (self._wanted,)
        caption = next((key for key in keys if key in found.column_names), None)
        others = [
            column for column in found.column_names if column not in (name, caption) and _has_values(found[column])
        ]
        if name is None or (caption is None and (required or not others)):
            also = "" if name is None and not required else f" and one of {keys}"
            wrong = f"Expected a column {FILE_KEYS[0]!r}{also}, got {found.column_names}"
            if required:
                raise ConfigError(f"{wrong} in {str(table)!r}.")
            return wrong
        self._captioned = self._captioned or caption is not None
        for column in others:
            self._settle(column, found.schema.field(column).type, table)
        inside = os.path.relpath(os.path.realpath(table.parent), os.path.realpath(self._root))
        base = "." if inside.startswith("..") else inside
        for line, record in enumerate(found.to_pylist(), 1):
            file, text = record[name], _texts(record[caption]) if caption is not None else []
            if not isinstance(file, str) or text is None:
                got = f"{file!r}: {record[caption] if caption else None!r}"
                raise ConfigError(f"Expected a file name and a text, got {got} in {str(table)!r}, line {line}.")
            several = caption is not None and isinstance(record[caption], list)
            self._put(os.path.normpath(self._path(file, base)), text, {c: record[c] for c in others}, several)
        return ""

    def take(self, path: str) -> tuple[list[str], dict[str, Any]] | None:
        """The captions of a file and its other values, once; None where no table names it."""
        _, rows = self._rows.pop(form(path), ("", []))
        if not rows:
            return None
        return rows[0][""], {_free(name): value for name, value in rows[0].items() if name}

    def _path(self, file: str, base: str) -> str:
        return os.path.relpath(file, self._root) if os.path.isabs(file) else f"{base}/{file}"

    def _put(self, path: str, texts: list[str], others: dict[str, Any], several: bool) -> None:
        _, rows = self._rows.setdefault(form(path), (path, []))
        if not rows:
            rows.append({"": texts, **others})
            self._several = self._several or several
            return
        new = [text for text in texts if text not in rows[0][""]]
        if not new:
            self.unused.append((path, "a second caption of the same file"))
        rows[0][""] = rows[0][""] + new
        self._several = self._several or several or len(rows[0][""]) > 1

    def _settle(self, name: str, dtype: pa.DataType, table: Path) -> None:
        """The type of a column over all tables."""
        try:
            fields = [pa.schema([(name, dtype)]), pa.schema([(name, self._types.get(name, dtype))])]
            self._types[name] = _stored(pa.unify_schemas(fields, promote_options="permissive").field(0).type)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ConfigError(
                f"Expected column {name!r} of one type, got {self._types[name]} and, in {str(table)!r}, {dtype}."
            ) from error


def form(path: str) -> str:
    """The one Unicode form in which names are compared."""
    return unicodedata.normalize("NFC", path)


def _has_values(column: pa.ChunkedArray) -> bool:
    """Whether a column says anything, and so has a type."""
    dtype = column.type
    while pa.types.is_list(dtype) or pa.types.is_large_list(dtype):
        dtype = dtype.value_type
    return not pa.types.is_null(dtype)


def _free(name: str) -> str:
    return f"metadata_{name}" if name in _TAKEN else name


def _texts(value: object) -> list[str] | None:
    """The captions in a cell, None if it holds something else."""
    values: Sequence[object] = value if isinstance(value, list) else [value]
    texts = [text for text in values if isinstance(text, str)]
    return [text for text in texts if text] if len(texts) == len([v for v in values if v is not None]) else None


def _stored(dtype: pa.DataType) -> pa.DataType:
    """A type that can be stored: nothing but nulls becomes strings, a dictionary what it stands for."""
    if pa.types.is_null(dtype):
        return pa.string()
    if pa.types.is_dictionary(dtype):
        return _stored(dtype.value_type)
    if pa.types.is_list(dtype):
        return pa.list_(_stored(dtype.value_type))
    if pa.types.is_struct(dtype):
        return pa.struct([(field.name, _stored(field.type)) for field in dtype])
    return dtype


def _read(table: Path, caption: str | None) -> pa.Table:
    """All rows of a file, by its ending."""
    ending = table.suffix.lower()
    try:
        if ending == ".parquet":
            return pa.parquet.read_table(table)
        if ending in (".jsonl", ".ndjson", ".json"):
            return _read_json(table)
        texts = (*FILE_KEYS, *CAPTION_KEYS, *([caption] if caption else []))
        return pa.csv.read_csv(
            table,
            parse_options=pa.csv.ParseOptions(delimiter="\t" if ending == ".tsv" else ",", newlines_in_values=True),
            convert_options=pa.csv.ConvertOptions(column_types={name: pa.string() for name in texts}),
        )
    except (OSError, ValueError, TypeError, csv.Error, pa.ArrowException) as error:
        first = str(error).partition("\n")[0]
        raise ConfigError(
            f"Expected captions as CSV, TSV or JSONL, or Parquet, got {str(table)!r}: {first}."
        ) from error


def _read_json(table: Path) -> pa.Table:
    with open(table, encoding="utf-8-sig") as lines:
        records = [dict(json.loads(line)) for line in lines if line.strip()]
    names = list(dict.fromkeys(name for record in records for name in record))
    return pa.table({name: pa.array([record.get(name) for record in records]) for name in names})
