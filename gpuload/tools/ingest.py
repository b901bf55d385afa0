"""A folder of images becomes a Lance dataset: one row a file, its bytes as they are.

Enter: a `Folder`. Leave: a dataset with the columns ``image``, ``label``, ``caption``, ``path``, ``height``, ``width``
(label and caption where the folder has them; the size in pixels after orientation), and a report of every file that
did not become a row.

    walk ─ File ─▶ 4 threads read, check the header ─ Row ─▶ RecordBatches of 64 MB ─▶ lance.write_dataset
    (sorted)       (a disk wants several reads under way; the order is kept)

While it writes, a note lies in the target (`claim`). A run that was killed is known by it: what it left is taken away,
and what it had committed is not written twice.
"""

from __future__ import annotations

import itertools
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lance
import pyarrow as pa
from lance.progress import FragmentWriteProgress

from gpuload import signals
from gpuload.errors import ConfigError
from gpuload.progress import files_bar
from gpuload.tables.write import write_stream
from gpuload.tools.claim import Claim, Run, forget, killed, remove_leftovers, remove_unborn
from gpuload.tools.folder import File, Folder, Row, read_ahead, shown

StorageVersion = Literal["2.0", "2.1", "2.2"]
# The file format of new datasets, in this one place: Lance's own default. 2.0 reads runs of rows 1.3 times as fast, but
# a row shuffle at 0.9 of the rate, and knows no blobs (benchmarks/results/read-2.0.json, read-2.2.json).
STORAGE_VERSION: StorageVersion = "2.2"
BATCH_BYTES, BATCH_ROWS = 64 << 20, 8192  # of one write: what stays in memory, a few times over
_NONE: Mapping[str, pa.DataType] = {}
_SOURCE, _RUN = "gpuload.source", "gpuload.run"  # properties of a transaction
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@dataclass
class IngestReport:
    """What became of the files: `rows` of them are rows, the rest is in `left_out`.

    Attributes
    ----------
    rows, bytes : int
        Rows written, and the size of their images.
    classes : list of str
        Names of the labels, in the order of their numbers; empty without a label column.
    without_caption : int or None
        Rows whose caption is null; None without a caption column.
    left_out : list of (path, why)
    unused_captions : list of (path, why)
        Captions that belong to no file.
    total : int
        Rows of the dataset now.
    there : int
        Files of which the dataset had a row already, from this source and path: left out by `resume`, doubled by
        `append`.
    """

    target: str
    rows: int = 0
    bytes: int = 0
    classes: list[str] = field(default_factory=list)
    without_caption: int | None = None
    left_out: list[tuple[str, str]] = field(default_factory=list)
    unused_captions: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    total: int = 0
    there: int = 0


def ingest(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    captions: str | os.PathLike[str] | None = None,
    caption_from: str | None = None,
    labels: bool | None = None,
    overwrite: bool = False,
    append: bool = False,
    resume: bool = False,
    num_threads: int = 4,
    fragment_rows: int = 1 << 20,
    fragment_bytes: int = 1 << 30,
    data_storage_version: StorageVersion = STORAGE_VERSION,
    progress: bool = True,
) -> IngestReport:
    """Write every image under `source` as a row of the Lance dataset `target`, in the sorted order of their paths.

    Memory holds a few batches of 64 MB, the names of one folder and the captions of the tables, never all images.
    Nothing is committed before the last file was read: a run that fails leaves an old dataset as it was, and no new
    one, and so does one that is killed: the next takes its leftovers away. Names that start with a dot are not looked
    at.

    Parameters
    ----------
    source : path
        A folder, read with all its sub-folders.
    target : path or URI
    captions : path, optional
        CSV, TSV, JSONL or Parquet with a file column (``file_name``) and a caption column (``caption``, ``text`` or
        ``prompt``). Names are relative to the folder of the table where that is inside `source`, else to `source`.
        Without it every ``metadata.csv``, ``.jsonl`` and ``.parquet`` inside `source` is one. Their other columns are
        kept with their types; a picture with several captions, in a list or in several rows, makes the column one of
        lists. An image that no table gives a caption has the text file beside it: ``7.jpg``, ``7.txt``.
    caption_from : str, optional
        The column of captions, under whatever name.
    labels : bool, optional
        Whether the sub-folders right under `source` are classes. None: if at least two of them hold files.
    overwrite, append, resume : bool
        Write a new version in place of an existing dataset, add rows to it, or add those that it does not have from
        this source and path (and make it, where it is not there). Without any an existing dataset is refused.
    num_threads : int
        Reads under way at a time.
    fragment_rows, fragment_bytes : int
        A fragment is closed when it holds so many rows, or after the batch that brings it to so many bytes.
    data_storage_version : str
        Of a new dataset; one that is appended to keeps its own.
    progress : bool
        A bar on stderr.

    Raises
    ------
    ConfigError
        The folder, the captions or the target cannot work, or no file is an image.
    """
    began, uri = time.perf_counter(), os.path.expanduser(os.fspath(target))
    source, captions = os.path.expanduser(source), None if captions is None else os.path.expanduser(captions)
    origin = os.path.realpath(source)
    old = _existing(uri, overwrite, append, resume, origin)
    folder = Folder(source, captions, labels, without=uri, caption_from=caption_from)
    adds = old is not None and (append or resume)
    known = _Known()
    if old is not None and adds:
        _fit(folder, old, uri)
        known = _Known(*_paths(old, origin), uri=uri, skip=resume)
    report = IngestReport(uri, classes=folder.classes, without_caption=None if folder.caption is None else 0)
    sized = old is None or not adds or "height" in old.schema.names  # older datasets have no sizes
    schema = image_schema(folder.classes or None, folder.caption, folder.metadata.columns, sized)
    mode: Literal["create", "append", "overwrite"] = "create" if old is None else "append" if adds else "overwrite"
    with files_bar(folder.files, progress) as advance, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # what Pillow thinks of a header is not this user's affair
        rows = rows_of(folder, num_threads, report, advance, known)
        first = next(rows, None) if known.skip else None
        if old is not None and known.skip and first is None and report.there:
            report.total = old.count_rows()  # everything is there
        else:
            rows = itertools.chain([first], rows) if first is not None else rows
            what = f"images in {str(source)!r}"
            done = write(rows, uri, schema, mode, fragment_rows, fragment_bytes, data_storage_version, what, origin)
            report.total = done.count_rows()
    report.unused_captions += [(path, "no such file") for path in folder.metadata.left]
    report.seconds = time.perf_counter() - began
    return report


@dataclass(frozen=True)
class _Known:
    """The paths of the rows that are there: from this source, and from who knows where."""

    mine: frozenset[str] | set[str] = frozenset()
    unknown: frozenset[str] | set[str] = frozenset()
    uri: str = ""
    skip: bool = False

    def has(self, path: str) -> bool:
        """Whether there is a row of this file.

        Raises
        ------
        ConfigError
            Nobody can tell, and it has to be known.
        """
        if self.skip and path in self.unknown and path not in self.mine:
            raise ConfigError(
                f"Expected rows whose source is known, got {self.uri!r} with a row {path!r} from who knows where: "
                "written otherwise, compacted, or its version cleaned up. Use --append or --overwrite."
            )
        return path in self.mine


def image_schema(
    classes: list[str] | None,
    captioned: pa.DataType | bool | None,
    others: Mapping[str, pa.DataType] = _NONE,
    sized: bool = False,
) -> pa.Schema:
    """The columns, described as ``datasets`` describes them, so that it and Lance's own loader decode them too.

    An image is ``struct<bytes, path>``: a plain binary column loses its Image feature in ``datasets`` and is an
    error in Lance's loader. A label is int64 because a ClassLabel is, and because a loss function takes that.
    `captioned` is the type of the captions, True for strings; `others` are further columns, which describe themselves.
    """
    columns: list[tuple[str, pa.DataType, dict[str, Any]]] = [("image", _IMAGE, {"_type": "Image"})]
    if classes is not None:
        columns.append(("label", pa.int64(), {"names": classes, "_type": "ClassLabel"}))
    text = pa.string() if captioned is True else captioned
    value = {"dtype": "string", "_type": "Value"}
    if text:
        described = {"feature": value, "_type": "List"} if pa.types.is_list(text) else value
        columns.append(("caption", text, described))
    columns.append(("path", pa.string(), value))
    if sized:
        sides = [side for side in ("height", "width") if side not in others]
        columns += [(side, pa.int32(), {"dtype": "int32", "_type": "Value"}) for side in sides]
    features = {"info": {"features": {name: feature for name, _, feature in columns}}}
    fields = [pa.field(name, dtype) for name, dtype, _ in columns]
    fields += [pa.field(name, dtype) for name, dtype in others.items()]
    return pa.schema(fields, metadata={b"huggingface": json.dumps(features, ensure_ascii=False).encode()})


def write(
    rows: Iterator[Row],
    uri: str,
    schema: pa.Schema,
    mode: Literal["create", "append", "overwrite"] = "create",
    fragment_rows: int = 1 << 20,
    fragment_bytes: int = 1 << 30,
    data_storage_version: StorageVersion = STORAGE_VERSION,
    expected: str = "rows",
    source: str = "",
) -> lance.LanceDataset:
    """Stream rows into a dataset, committed at the end. A failure takes away whatever it had written.

    Raises
    ------
    ConfigError
        The target cannot be written to, or is full; another process writes there; there is no row.
    """
    fresh = mode == "create" and "://" not in uri
    if fresh:
        try:
            Path(uri).parent.mkdir(parents=True, exist_ok=True)
            Path(uri).mkdir(exist_ok=_is_empty(uri))
        except OSError as error:
            raise ConfigError(f"Expected a place for a new dataset, got {uri!r}: {error.strerror}.") from error
    with signals.unwinding():
        run = Run(source, mode)
        claim = Claim(uri, run)
        try:
            return write_stream(
                _batches(rows, schema, expected),
                schema,
                uri,
                mode=mode,
                max_rows_per_file=fragment_rows,
                max_bytes_per_file=fragment_bytes,
                data_storage_version=None if mode == "append" else data_storage_version,
                progress=_Noted(claim),
                transaction_properties={_SOURCE: source, _RUN: run.id},
            )
        except BaseException as error:
            if not _committed(_opened(uri), run):  # a signal may have come behind the commit
                remove_unborn(uri) if fresh else remove_leftovers(uri, run)
            if "storage version" in str(error):
                raise ConfigError(
                    f"Expected a storage version that pylance {lance.__version__} writes, got {data_storage_version!r}."
                ) from None
            raise
        finally:
            claim.release()


class _Noted(FragmentWriteProgress):
    """Lance says which files it has finished."""

    def __init__(self, claim: Claim) -> None:
        self._claim = claim

    def begin(self, fragment: Any, **kwargs: Any) -> None:
        pass  # its file has no name yet

    def complete(self, fragment: Any, **kwargs: Any) -> None:
        for file in fragment.files:
            self._claim.finished(file.path)


def _batches(rows: Iterator[Row], schema: pa.Schema, expected: str) -> Iterator[pa.RecordBatch]:
    """Rows gathered up to `BATCH_BYTES`. No row at all is an error: nobody means to write that."""
    held: list[Row] = []
    size, none = 0, True
    for row in rows:
        held.append(row)
        size, none = size + len(row.data), False
        if size >= BATCH_BYTES or len(held) >= BATCH_ROWS:
            yield _batch(held, schema)
            held, size = [], 0
    if none:
        raise ConfigError(f"Expected {expected}, found none that can be read; nothing was written.")
    if held:
        yield _batch(held, schema)


def _batch(rows: list[Row], schema: pa.Schema) -> pa.RecordBatch:
    paths = pa.array([row.path for row in rows], pa.string())
    images = pa.array([row.data for row in rows], pa.binary())
    columns: dict[str, pa.Array[Any]] = {
        "image": pa.StructArray.from_arrays([images, paths], fields=list(_IMAGE)),
        "label": pa.array([row.label for row in rows], pa.int64()),
        "path": paths,
        "height": pa.array([row.height for row in rows], pa.int32()),
        "width": pa.array([row.width for row in rows], pa.int32()),
    }
    if "caption" in schema.names:
        columns["caption"] = pa.array([row.caption for row in rows], schema.field("caption").type)
    for name in schema.names:
        if name not in columns or any(name in row.others for row in rows):  # a table's own label is in `others`
            columns[name] = pa.array([row.others.get(name) for row in rows], schema.field(name).type)
    return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)


def rows_of(
    folder: Folder, num_threads: int, report: IngestReport, advance: Callable[[int], None], known: _Known
) -> Iterator[Row]:
    """The rows in the folder's order; what cannot be one, or is one already, goes to the report."""
    report.left_out += folder.left_out
    report.unused_captions += folder.unused

    def images() -> Iterator[File]:
        for file in folder.walk():
            if file.kind == "image":
                there = known.has(shown(file.path))
                report.there += there
                if there and known.skip:
                    folder.metadata.take(file.path)
                    advance(0)
                else:
                    yield file
            elif file.kind == "text":
                report.unused_captions.append((file.path, file.why))
            elif file.kind == "odd":
                report.left_out.append((file.path, file.why))

    labels = {name: number for number, name in enumerate(folder.classes)}
    for row in read_ahead(folder.root, images(), num_threads):
        told = folder.metadata.take(row.path)
        if row.refused:
            report.left_out.append((row.path, row.refused))
        else:
            if told is not None:
                texts, row.others = told
                row.caption = texts or row.caption
            row.caption = _as(row.caption, folder.caption)
            row.label = labels.get(row.path.split("/")[0]) if "/" in row.path else None
            report.rows, report.bytes = report.rows + 1, report.bytes + len(row.data)
            if report.without_caption is not None:
                report.without_caption += row.caption is None
            yield row
        advance(len(row.data))


def _as(caption: str | list[str] | None, dtype: pa.DataType | None) -> str | list[str] | None:
    """The captions of a picture as the column has them: one, or a list."""
    if not caption or dtype is None:
        return None
    texts = [caption] if isinstance(caption, str) else caption
    return texts if pa.types.is_list(dtype) else texts[0]


def _fit(folder: Folder, old: lance.LanceDataset, uri: str) -> None:
    """Take the columns and class numbers of the dataset that rows are appended to, or say why they cannot fit."""
    described = json.loads((old.schema.metadata or {}).get(b"huggingface", b"{}"))
    known = described.get("info", {}).get("features", {}).get("label", {}).get("names", [])
    new = [name for name in folder.classes if name not in known]
    if new:
        raise ConfigError(f"Expected the classes {known} of {uri!r}, got {new} in {str(folder.root)!r} as well.")
    folder.classes = known
    if "caption" in old.schema.names and (folder.caption is None or pa.types.is_string(folder.caption)):
        folder.caption = old.schema.field("caption").type  # one caption may be a list of one
    mine = image_schema(known or None, folder.caption, folder.metadata.columns, "height" in old.schema.names)
    if [(f.name, f.type) for f in mine] != [(f.name, f.type) for f in old.schema]:
        raise ConfigError(f"Expected the columns {old.schema.names} of {uri!r}, got {mine.names}; they must agree.")


def _existing(uri: str, overwrite: bool, append: bool, resume: bool, source: str) -> lance.LanceDataset | None:
    """The dataset at the target, if there is one; or why the target cannot be used. A killed run's leftovers go."""
    if overwrite + append + resume > 1:
        raise ConfigError("Expected one of overwrite, append and resume, got several.")
    left, old = killed(uri), _opened(uri)
    done = left is not None and _committed(old, left)
    if left is not None and not done:
        remove_unborn(uri) if old is None else remove_leftovers(uri, left)
    if old is None:
        if append:
            raise ConfigError(
                f"Expected a Lance dataset to append to, got {uri!r}, which is none. Leave --append away to make one."
            )
        if os.path.lexists(uri) and not _is_empty(uri):
            raise ConfigError(
                f"Expected a Lance dataset or a new place, got {uri!r}, which is something else: "
                f"{_seen(uri)}. Nothing there was touched; take another name, or remove it."
            )
        return None
    if done and left is not None and left.source == source and not (overwrite or resume):
        raise ConfigError(
            f"Expected a run to be repeated with --resume, got {uri!r}, where the {left.mode} of {source!r} was killed "
            f"after its rows were there: {old.count_rows():,} rows in all. --resume adds what is missing, if anything."
        )
    forget(uri)
    if not (overwrite or append or resume):
        raise ConfigError(
            f"Expected a new place, got {uri!r}, which exists. Use --overwrite or --append. --resume adds only the "
            "files that are not in it."
        )
    return old


def origins(uri: str) -> list[str]:
    """Where the rows of each version come from, as `write` was told, "" where nobody said; empty without a dataset.

    The leftovers of a run that was killed are taken away.
    """
    left, dataset = killed(uri), _opened(uri)
    if left is not None and not _committed(dataset, left):
        remove_unborn(uri) if dataset is None else remove_leftovers(uri, left)
    if dataset is None:
        return []
    found = dataset.get_transactions(len(dataset.versions()))
    return ["" if each is None else (each.transaction_properties or {}).get(_SOURCE, "") for each in found] or [""]


def _opened(uri: str) -> lance.LanceDataset | None:
    with suppress(ValueError, OSError):
        return lance.dataset(uri)
    return None


def _committed(dataset: lance.LanceDataset | None, run: Run) -> bool:
    """Whether what the run wrote is in the dataset."""
    if dataset is None:
        return False
    found = dataset.get_transactions(100)
    return any(run.id == (each.transaction_properties or {}).get(_RUN) for each in found if each is not None)


def _paths(dataset: lance.LanceDataset, source: str) -> tuple[set[str], set[str]]:
    """The paths of the rows that came from this source, and of those of which nobody knows where they came from.

    Each commit of `write` says its source. Its files are no longer known by it once they were compacted, or once the
    version was cleaned up.
    """
    sources: dict[str, str] = {}
    for each in dataset.get_transactions(len(dataset.versions())):
        origin = None if each is None else (each.transaction_properties or {}).get(_SOURCE)
        parts = getattr(each.operation, "fragments", []) if each is not None and origin is not None else []
        sources.update({file.path: origin for part in parts for file in part.files})
    mine, unknown = [], []
    for fragment in dataset.get_fragments():
        origins = {sources[file.path] for file in fragment.data_files() if file.path in sources}
        if source in origins:
            mine.append(fragment)
        elif not origins:
            unknown.append(fragment)

    def paths(fragments: list[Any]) -> set[str]:
        if not fragments:
            return set()
        return set(dataset.scanner(columns=["path"], fragments=fragments).to_table().column("path").to_pylist())

    return paths(mine), paths(unknown)


def _seen(uri: str) -> str:
    """What is at a place, in a few words."""
    if not os.path.isdir(uri):
        return "a file" if os.path.isfile(uri) else "no folder"
    names = sorted(os.listdir(uri))
    return f"a folder with {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


def _is_empty(uri: str) -> bool:
    return os.path.isdir(uri) and not os.listdir(uri)
