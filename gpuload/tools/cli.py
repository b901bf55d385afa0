"""The command line: ``gpuload ingest``, ``inspect``, ``view``, ``verify``, ``bench``, ``demo`` and ``doctor``.

Enter: arguments. Leave: tables on stdout, progress and complaints on stderr, exit code 1 with one line on an error.
Torch and Lance are imported inside the commands, so that ``gpuload --help`` is quick.
"""

from __future__ import annotations

import csv
import json
import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from gpuload import signals
from gpuload.errors import BadRowWarning, ConfigError, GpuloadError

if TYPE_CHECKING:
    from rich.console import Console

    from gpuload.batch import Batch
    from gpuload.order.samplers import FullScanSampler
    from gpuload.tools.doctor import Trial
    from gpuload.tools.ingest import IngestReport
    from gpuload.tools.verify import Verified

_LISTED = 20  # lines of a report on stderr


class _Group(TyperGroup):
    """Errors of this package are one line, not a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except GpuloadError as error:
            _complain(f"gpuload: {error}")
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(signals.say_and_status()) from error


app = typer.Typer(
    cls=_Group,
    help="Lance datasets as batches of tensors: make one from a folder of images, look into it, try it.",
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from gpuload import __version__

        print(f"gpuload {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it and exit.")
    ] = False,
) -> None: ...


@app.command()
def ingest(
    source: Annotated[Path, typer.Argument(help="A folder of images, with its sub-folders.")],
    target: Annotated[str, typer.Argument(metavar="OUT.lance", help="Path or URI of the dataset.")],
    captions: Annotated[
        Path | None,
        typer.Option(
            help="CSV, TSV, JSONL or Parquet with file_name and caption. Else metadata.*, else 7.txt by 7.jpg."
        ),
    ] = None,
    caption_from: Annotated[
        str | None, typer.Option(metavar="NAME", help="The table's column of captions. Default: caption, text, prompt.")
    ] = None,
    labels: Annotated[
        bool | None, typer.Option("--labels/--no-labels", help="Sub-folders are classes. Default: if two or more.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write a new version of an existing dataset.")] = False,
    append: Annotated[bool, typer.Option("--append", help="Add rows to an existing dataset.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Add only the files that are not in it yet, by source and path.")
    ] = False,
    fragment_rows: Annotated[int, typer.Option(min=1, help="Rows of a fragment at most.")] = 1 << 20,
    threads: Annotated[int, typer.Option(min=1, help="Files read at a time.")] = 4,
    storage_version: Annotated[str | None, typer.Option(help="Lance file format, for instance 2.0.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write every file left out, and why, to this CSV.")] = None,
    progress: Annotated[bool, typer.Option("--progress/--no-progress", help="A bar on stderr.")] = True,
) -> None:
    """Write a folder of images as a Lance dataset: one row a file, its bytes as they are.

    Captions come from --captions, else from metadata.csv, .jsonl or .parquet in its folders, else from 7.txt by 7.jpg.
    The other columns of these tables are kept with their types.
    """
    from gpuload.tools.ingest import STORAGE_VERSION, ingest

    done = ingest(
        source,
        target,
        captions=captions,
        caption_from=caption_from,
        labels=labels,
        overwrite=overwrite,
        append=append,
        resume=resume,
        num_threads=threads,
        fragment_rows=fragment_rows,
        data_storage_version=storage_version or STORAGE_VERSION,  # type: ignore[arg-type]
        progress=progress,
    )
    if append and done.there:
        _complain(
            f"{done.there:,} of these files were in {target} already and are in it twice now; --resume adds the others"
        )
    _say_what_happened(done, report, adds=append or resume)


def _say_what_happened(done: IngestReport, file: Path | None, adds: bool) -> None:
    for what, entries in (("left out", done.left_out), ("caption not used", done.unused_captions)):
        for path, why in entries[:_LISTED]:
            _complain(f"{what}: {path}: {why}")
        if len(entries) > _LISTED:
            _complain(f"{what}: {len(entries) - _LISTED:,} more{'' if file else '; --report FILE lists them all'}")
    if file is not None:
        rows = [("left out", *entry) for entry in done.left_out]
        rows += [("caption not used", *entry) for entry in done.unused_captions]
        try:
            with open(file.expanduser(), "w", encoding="utf-8", newline="") as out:
                csv.writer(out).writerows([("what", "path", "why"), *rows])
        except OSError as error:
            raise ConfigError(f"Expected a place for the report, got {str(file)!r}: {error.strerror}.") from error
    from gpuload.tools.describe import size

    parts = [f"{done.rows:,} rows, {size(done.bytes)} of images, in {done.seconds:,.1f} s"]
    parts += [f"{done.there:,} were there"] if adds and done.there else []
    parts += [f"{done.total:,} rows in all"] if adds else []
    parts += [f"{len(done.classes):,} classes"] if done.classes else []
    if done.without_caption is not None:
        parts.append(f"{done.rows - done.without_caption:,} with a caption, {done.without_caption:,} without")
    parts += [f"files left out: {len(done.left_out):,}"] if done.left_out else []
    parts += [f"captions not used: {len(done.unused_captions):,}"] if done.unused_captions else []
    print(f"{done.target}: {'; '.join(parts)}")


@app.command()
def inspect(
    dataset: Annotated[str, typer.Argument(metavar="X.lance", help="Path or URI of any Lance dataset.")],
) -> None:
    """Show what a Lance dataset holds: columns and their roles, rows, fragments, bytes, formats and sizes of images."""
    from gpuload.tools.describe import columns, facts, form, image_sample, open_table, role

    source, console = open_table(dataset), _console()
    found = columns(source)
    console.print(f"[bold]{_plain(source.uri)}[/bold]")
    _table(console, ("", ""), facts(source), named=False)
    roles = [(column.name, str(column.type), role(column), form(source, column)) for column in found]
    _table(console, ("column", "type", "role", "in a batch"), roles)
    for column in found:
        if column.role == "image" and source.rows:
            _table(console, (column.name, ""), image_sample(source, column.name))


@app.command()
def view(
    dataset: Annotated[str, typer.Argument(metavar="X.lance", help="Path or URI of any Lance dataset with images.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture to write; its ending says the format.")],
    rows: Annotated[int, typer.Option(min=1, help="How many rows.")] = 24,
    start: Annotated[int, typer.Option(min=0, help="The first row.")] = 0,
    image: Annotated[str | None, typer.Option(help="Column of the images. Default: the first.")] = None,
    caption: Annotated[
        str | None, typer.Option(help="Column of the captions. Default: a text, else the class.")
    ] = None,
    columns: Annotated[int | None, typer.Option(min=1, help="Tiles side by side.")] = None,
) -> None:
    """Draw a contact sheet of a batch, decoded as for training; rows that cannot be decoded are crossed out."""
    from gpuload.dataset import LanceDataset
    from gpuload.tools.describe import caption_column, class_names, image_column, open_table
    from gpuload.tools.sheet import contact_sheet

    source = open_table(dataset)
    image, caption = image_column(source, image), caption_column(source, caption)
    if start >= source.rows:
        raise ConfigError(f"Expected --start below the {source.rows:,} rows of {dataset!r}, got {start:,}.")
    wanted = list(dict.fromkeys([image, *([caption] if caption else [])]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BadRowWarning)  # the sheet shows them
        with LanceDataset(
            dataset, columns=wanted, batch_size=rows, on_error="mask", device="cpu", sampler=_from(start)
        ) as d:
            batch = next(iter(d))
    texts = _texts(batch, caption, class_names(source, caption)) if caption else None
    title = f"{Path(dataset).name}, rows {int(batch.rows[0]):,} to {int(batch.rows[-1]):,}"
    sheet = contact_sheet(batch[image], texts, valid=batch.valid, columns=columns, title=title)
    _save(sheet, out)
    broken = int((~batch.valid).sum())
    print(f"{out}: {title}{f', {broken:,} not readable' if broken else ''}; column {image}, captions from {caption}")


@app.command()
def verify(
    dataset: Annotated[str, typer.Argument(metavar="X.lance", help="Path or URI of any Lance dataset with images.")],
    image: Annotated[list[str] | None, typer.Option(help="A column of images. Default: all of them.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the bad images to this .jsonl or .lance.")
    ] = None,
    fix: Annotated[
        bool, typer.Option("--fix", help="Write a new version of the dataset without the bad rows.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of tables.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads that decode. Default: one a core.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Do not go on where an interrupted run ended.")] = False,
    progress: Annotated[bool, typer.Option("--progress/--no-progress", help="A bar on stderr.")] = True,
) -> None:
    """Decode every image, and say which rows are bad.

    Exit status: 0 if no image is bad, or --fix has removed those that are; 1 if some are; 2 if that cannot be said.
    """
    from gpuload.tools.verify import check_report, verify, write_report

    try:
        if out is not None:
            out = out.expanduser()
            check_report(out)
        done = verify(dataset, images=image, num_threads=threads, fix=fix, restart=restart, progress=progress)
        if out is not None:
            write_report(done.bad, out)
    except GpuloadError as error:
        _complain(f"gpuload: {error}")
        raise typer.Exit(2) from error
    if done.begun_at:
        _complain(f"went on at row {done.begun_at:,}, where an interrupted run ended; --restart begins again")
    if as_json:
        print(json.dumps(done.as_json(), ensure_ascii=False))
    else:
        _say_what_is_bad(done, out)
    raise typer.Exit(1 if done.bad and done.fixed_version is None else 0)


def _say_what_is_bad(done: Verified, out: Path | None) -> None:
    shown = [(f"{bad.row:,}", bad.column, bad.reason, bad.decoder) for bad in done.bad[:_LISTED]]
    if shown:
        _table(_console(), ("row", "column", "reason", "decoder"), shown)
    if len(done.bad) > _LISTED:
        _complain(f"{len(done.bad) - _LISTED:,} more{'' if out else '; --out FILE.jsonl and --json list them all'}")
    parts = [f"{done.images:,} images in {done.rows:,} rows of version {done.version}", f"{len(done.bad):,} bad"]
    parts += [f"{len(done.bad_rows):,} rows with one"] if done.bad else []
    parts += [f"version {done.fixed_version} is without them"] if done.fixed_version is not None else []
    print(f"{done.dataset}: {'; '.join(parts)}; {done.seconds:,.1f} s")


@app.command()
def bench(
    dataset: Annotated[str, typer.Argument(metavar="X.lance", help="Path or URI of any Lance dataset.")],
    seconds: Annotated[float, typer.Option(min=0, help="How long, in as many epochs as it takes.")] = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a batch.")] = 64,
    size: Annotated[int, typer.Option(min=1, help="Images are cropped at random to this height and width.")] = 224,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads that decode. Default: one a core.")] = None,
    shuffle: Annotated[str | None, typer.Option(help="row, block or batch. Default: in order.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a timeline for Perfetto or chrome://tracing.")] = None,
    progress: Annotated[bool, typer.Option("--progress/--no-progress", help="A bar on stderr.")] = True,
) -> None:
    """Load a dataset as for training: its rate, where the time goes, and what would make it faster."""
    from gpuload.progress import rows_bar
    from gpuload.tools.bench import advice, measure, prepare, table
    from gpuload.tools.trace import Trace

    timeline, console = Trace() if trace else None, _console()
    prepared = prepare(dataset, batch_size, size, threads, shuffle)
    with rows_bar("loading", seconds, progress) as show:
        done = measure(prepared, seconds, timeline, show)
    _table(console, *table(done.stats))
    console.print(
        f"{done.rows:,} rows in {done.seconds:,.2f} s: [bold]{done.rate:,.0f} rows/s[/bold], first batch", end=" "
    )
    console.print(f"after {done.first:,.2f} s; {done.stats['bottleneck']}")
    for line in advice(done.stats):
        console.print(_plain(line))
    for bad in done.bad_rows[:_LISTED]:
        _complain(f"bad row: {bad.row}, column {bad.column}: {bad.reason}")
    if done.bad_rows:
        print(f"{len(done.bad_rows):,} bad rows, masked while measuring; `gpuload verify {dataset}` lists all of them")
    if timeline and trace:
        print(f"{trace}: {timeline.write(trace.expanduser()):,} events")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for shapes.lance and sheet.png. Default: this one.")] = Path("."),
    rows: Annotated[int, typer.Option(min=1, help="Generated pictures.")] = 512,
    progress: Annotated[bool, typer.Option("--progress/--no-progress", help="A bar on stderr.")] = True,
) -> None:
    """Make a small captioned dataset, load an epoch of it as for training, and draw its first batch."""
    from gpuload.dataset import LanceDataset
    from gpuload.fields.text import Text
    from gpuload.images.transform import Image
    from gpuload.progress import rows_bar
    from gpuload.tools.bench import table
    from gpuload.tools.demo import demo_mark, demo_places, write_demo
    from gpuload.tools.sheet import contact_sheet

    target, picture = demo_places(out)
    console, began = _console(), time.perf_counter()
    with rows_bar("drawing", rows, progress) as show:
        write_demo(target, rows, show=show)
    made = time.perf_counter() - began
    console.print(f"[bold]{_plain(str(target))}[/bold]: {rows:,} captioned pictures, made in {made:.1f} s")
    dataset = LanceDataset(
        str(target),
        columns=["image", "caption"],
        batch_size=64,
        shuffle="batch",
        transforms={"image": Image(size=224, crop="random", scale=(0.7, 1), flip=0.5), "caption": Text("bytes")},
    )
    with dataset:
        began, batches = time.perf_counter(), iter(dataset)
        first = next(batches)
        with rows_bar("loading", rows, progress) as show:
            done = first.size
            for batch in batches:
                done += batch.size
                show(done, done)
        seconds = time.perf_counter() - began
        stats = dataset.stats()
    _table(console, ("first batch", "dtype", "shape", "device"), _shapes(first))
    head, cells = table(stats)
    del stats["stages"]
    rate = f"{stats['rows'] / seconds:,.0f}"
    _table(console, ("epoch", ""), [("rows/s", rate), ("seconds", f"{seconds:.2f}"), *_flat(stats)])
    _table(console, head, cells)
    pairs = zip(first["caption"].cpu(), first["caption_mask"].cpu().bool(), strict=True)
    captions = [bytes(ids[mask].tolist()).decode() for ids, mask in pairs]  # "bytes" can be read back
    sheet = contact_sheet(first["image"][:24], captions[:24], columns=8, title="gpuload demo: the first batch")
    _save(sheet, picture, pnginfo=demo_mark())
    console.print(f"The first batch, cropped and mirrored at random: [bold]{_plain(str(picture))}[/bold]")


@app.command()
def doctor(
    decoder: Annotated[
        list[str] | None, typer.Option("--decoder", "-d", help="Must work; may be given often. Default: all are tried.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON, on stdout.")] = False,
) -> None:
    """Say what this machine has, try every decoder on built-in pictures, and how to install what is missing.

    Exit status 0 where everything that is there, or was asked for, works; else 1.
    """
    from gpuload.tools.doctor import diagnose

    found = diagnose(decoder or ())
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        console = _console()
        _table(console, ("part", "found", "to do"), [(part.name, part.found, part.advice) for part in found.parts])
        tried = [(t.decoder, t.device, *_tried(t)) for t in found.trials]
        _table(console, ("decoder", "on", "images/s", "mean (largest) difference to Pillow, of 255"), tried)
        console.print("All of it works." if found.ok else "Not all of it works.")
    if not found.ok:
        raise typer.Exit(1)


def main() -> None:
    """What the script ``gpuload`` runs."""
    signals.listen()
    try:
        app(prog_name="gpuload")
    except SystemExit as end:
        if signals.received():
            signals.leave(int(end.code or 1))
        raise


# -- what the commands share ---------------------------------------------------------------------------------------


def _from(start: int) -> FullScanSampler:
    """All rows in order, beginning at row `start`."""
    from gpuload.order.samplers import FullScanSampler

    class From(FullScanSampler):
        def plan(self, *args: Any, start: int = 0, **kwargs: Any) -> Any:
            return super().plan(*args, start=start + first, **kwargs)

    first = start
    return From()


def _texts(batch: Batch, name: str, classes: Sequence[str]) -> list[str | None]:
    """Captions: texts as they are, several in one line, classes by their names, None for a null."""
    nulls = batch.nulls[name].tolist() if name in batch.nulls else [False] * batch.size
    values = [None if null else value for null, value in zip(nulls, batch[name], strict=True)]
    named = dict(enumerate(classes))
    if classes:
        return [None if value is None else named.get(int(value)) for value in values]
    return [" / ".join(filter(None, value)) if isinstance(value, list) else value for value in values]


def _tried(trial: Trial) -> tuple[str, str]:
    """Rate, and differences or what is in the way."""
    if not trial.works:
        return "", trial.why if trial.missing else f"BROKEN: {trial.why}"
    offs = [f"{name} {off['mean']:.2g} ({off['largest']:.0f})" for name, off in trial.pictures.items()]
    exact = all(off["largest"] == 0 for off in trial.pictures.values())
    return f"{trial.rate:,.0f}", "none" if exact else ", ".join(offs)


def _shapes(batch: Batch) -> list[tuple[str, str, str, str]]:
    """(column, dtype, shape, device) of what a batch holds."""
    rows = []
    for name, value in batch.items():
        if hasattr(value, "dtype"):
            rows.append((name, str(value.dtype).removeprefix("torch."), str(list(value.shape)), str(value.device)))
        else:
            rows.append((name, f"list of {type(value[0]).__name__}", str(len(value)), ""))
    return rows


def _flat(stats: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Counters and names as text, nested ones with the name they lie under."""
    rows: list[tuple[str, str]] = []
    for name, value in stats.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{above}{name}: ")
        else:
            rows.append((f"{above}{name}", value if isinstance(value, str) else f"{value:,}"))
    return rows


def _complain(text: str) -> None:
    print(text, file=sys.stderr)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120, soft_wrap=False)


def _table(console: Console, head: Sequence[str], rows: Iterable[Sequence[str]], *, named: bool = True) -> None:
    from rich import box
    from rich.table import Table

    table = Table(*head, box=box.SIMPLE_HEAD, show_header=named, pad_edge=False)
    for row in rows:
        table.add_row(*(_plain(cell) for cell in row))
    console.print(table)


def _save(sheet: Any, out: Path, **options: Any) -> None:
    out = out.expanduser()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(out, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"Expected a place for a picture, for instance sheet.png, got {str(out)!r}: {error}."
        ) from error


if __name__ == "__main__":
    main()
