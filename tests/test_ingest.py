"""A folder becomes a dataset: every file is a row with its very bytes, or reported; nothing half-written stays."""

from __future__ import annotations

import io
import json
import os
import threading
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from gpuload.errors import ConfigError
from gpuload.tools import ingest as module
from gpuload.tools.folder import Folder, Row, why_no_image
from gpuload.tools.ingest import image_schema, ingest, write


def encoded(colour: int, kind: str = "JPEG", size: tuple[int, int] = (8, 6)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (colour % 256, 40, 200)).save(stream, kind)
    return stream.getvalue()


def put(folder: Path, **files: bytes | str) -> Path:
    """Files by path, "__" for "/" and "_dot_" for "."."""
    for name, data in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def rows(target: Path) -> dict[str, dict[str, object]]:
    return {row["path"]: row for row in lance.dataset(str(target)).to_table().to_pylist()}


def run(source: Path, target: Path, **options: object) -> module.IngestReport:
    return ingest(source, target, progress=False, **options)  # type: ignore[arg-type]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "source"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out.lance"


def test_bytes_and_order_are_those_of_the_files(source: Path, target: Path) -> None:
    for name in ("b.jpg", "a10.jpg", "a2.png", "sub/z.jpg", "sub.jpg", "UPPER.JPG", "no_ending", "ü/日本.webp"):
        kind = {".png": "PNG", ".webp": "WEBP"}.get(Path(name).suffix, "JPEG")
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(len(name) * 9, kind))
    report = run(source, target)
    table = lance.dataset(str(target)).to_table()
    paths = table["path"].to_pylist()
    assert paths == sorted(paths, key=lambda path: path.split("/"))
    assert report.rows == len(paths) == 8
    for image, path in zip(table["image"].to_pylist(), paths, strict=True):
        assert image == {"bytes": (source / path).read_bytes(), "path": path}
    assert report.bytes == sum((source / path).stat().st_size for path in paths)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["jpeg", "png", "empty", "html", "cut"]), min_size=1, max_size=40), st.integers(1, 5))
def test_every_file_is_a_row_or_reported(tmp_path_factory: pytest.TempPathFactory, kinds: list[str], n: int) -> None:
    folder = tmp_path_factory.mktemp("any")
    data = {"jpeg": encoded(1), "png": encoded(2, "PNG"), "empty": b"", "html": b"<html>", "cut": encoded(1)[:-9]}
    names = {f"{number % 3}/{number:02}.jpg": kind for number, kind in enumerate(kinds)}
    for name, kind in names.items():
        (folder / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "in" / name).write_bytes(data[kind])
    good = sorted(name for name, kind in names.items() if kind not in ("empty", "html", "cut"))
    if not good:
        with pytest.raises(ConfigError, match="none that can be read"):
            run(folder / "in", folder / "out.lance")
        assert not (folder / "out.lance").exists()
        return
    report = run(folder / "in", folder / "out.lance", num_threads=n, fragment_rows=7)
    assert lance.dataset(str(folder / "out.lance")).to_table()["path"].to_pylist() == good
    assert sorted(good + [path for path, _ in report.left_out]) == sorted(names)


def test_what_is_no_image_is_reported_with_the_reason(source: Path, target: Path) -> None:
    png = encoded(1, "PNG")
    header = b"IHDR" + (50_000).to_bytes(4, "big") * 2 + png[24:29]
    bomb = png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:]
    put(source, a_dot_jpg=encoded(1), b_dot_jpg=b"", c_dot_jpg="<html>no</html>", d_dot_png=bomb, e_dot_pdf="%PDF-1.4")
    put(source, f_dot_eps="%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", _dot_hidden="x")
    (source / "g.jpg").symlink_to(source / "nowhere")
    os.mkfifo(source / "h.jpg")
    (source / "i").symlink_to(source)
    report = run(source, target)
    why = dict(report.left_out)
    assert list(rows(target)) == ["a.jpg"]
    assert set(why) == {"b.jpg", "c.jpg", "d.png", "e.pdf", "f.eps", "g.jpg", "h.jpg", "i"}
    assert why["b.jpg"] == "empty file"
    assert why["c.jpg"] == "not an image: 15 bytes starting 3c68746d6c3e6e6f"
    assert "exceeds limit" in why["d.png"]
    assert why["i"] == "a link to a folder above it"


def test_sub_folders_are_classes(source: Path, target: Path) -> None:
    put(source, cat__1_dot_jpg=encoded(1), ant__deep__2_dot_jpg=encoded(2), top_dot_jpg=encoded(3))
    report = run(source, target)
    assert report.classes == ["ant", "cat"]
    assert {path: row["label"] for path, row in rows(target).items()} == {
        "cat/1.jpg": 1,
        "ant/deep/2.jpg": 0,
        "top.jpg": None,
    }


@pytest.mark.parametrize(("labels", "there"), [(None, False), (True, True), (False, False)])
def test_one_sub_folder_is_a_class_only_when_asked(
    source: Path, target: Path, labels: bool | None, there: bool
) -> None:
    put(source, images__1_dot_jpg=encoded(1))
    run(source, target, labels=labels)
    assert ("label" in lance.dataset(str(target)).schema.names) is there


def test_hugging_face_and_lance_decode_the_columns(source: Path, target: Path) -> None:
    datasets = pytest.importorskip("datasets")
    put(source, a__1_dot_png=encoded(1, "PNG"), b__2_dot_png=encoded(2, "PNG"), b__2_dot_txt="two")
    run(source, target)
    found = datasets.Dataset(lance.dataset(str(target)).to_table())
    assert found.features["label"].names == ["a", "b"]
    assert found[1]["image"].getpixel((0, 0)) == (2, 40, 200)
    assert (found[0]["caption"], found[1]["caption"]) == (None, "two")


CSV = 'file_name,text\nb.jpg,"bee, and ""more"""\na.jpg,ä\n\nlost.jpg,gone\nb.jpg,again\nc.jpg,\n'
JSONL = "\n".join(
    json.dumps({"file_name": name, "caption": text, "other": [1]})
    for name, text in [
        ("b.jpg", 'bee, and "more"'),
        ("a.jpg", "ä"),
        ("lost.jpg", "gone"),
        ("b.jpg", ""),
        ("c.jpg", None),
    ]
)


@pytest.mark.parametrize(
    ("name", "text"),
    [("t.csv", CSV), ("t.tsv", CSV.replace("e,t", "e\tt").replace(".jpg,", ".jpg\t")), ("t.jsonl", JSONL)],
)
@pytest.mark.parametrize("inside", [True, False])
def test_a_table_of_captions(tmp_path: Path, source: Path, target: Path, name: str, text: str, inside: bool) -> None:
    put(source, a_dot_jpg=encoded(1), b_dot_jpg=encoded(2), c_dot_jpg=encoded(3), d_dot_jpg=encoded(4))
    table = (source if inside else tmp_path) / name
    table.write_bytes(b"\xef\xbb\xbf" + text.encode())
    report = run(source, target, captions=table)
    captions = {path: row["caption"] for path, row in rows(target).items()}
    if name == "t.jsonl":
        assert captions == {"a.jpg": "ä", "b.jpg": 'bee, and "more"', "c.jpg": None, "d.jpg": None}
    else:  # a second caption for b.jpg
        assert captions == {"a.jpg": ["ä"], "b.jpg": ['bee, and "more"', "again"], "c.jpg": None, "d.jpg": None}
    assert report.without_caption == 2
    second = [("b.jpg", "a second caption of the same file")] if name == "t.jsonl" else []
    assert report.unused_captions == [*second, ("lost.jpg", "no such file")]
    assert report.left_out == []


def test_metadata_of_each_folder_and_texts_beside_images(source: Path, target: Path) -> None:
    put(source, a__1_dot_jpg=encoded(1), a__metadata_dot_csv="file_name,caption\n1.jpg,one\n", b__2_dot_jpg=encoded(2))
    put(source, b__2_dot_txt=" two\n", b__2_dot_json="{}", b__alone_dot_txt="nobody", b__3_dot_jpg=encoded(3))
    put(source, b__4_dot_jpg=b"broken", b__4_dot_txt="four", metadata_dot_jsonl='{"file_name": "b/3.jpg", "boxes": []}')
    report = run(source, target)
    captions = {path: row["caption"] for path, row in rows(target).items()}
    assert captions == {"a/1.jpg": "one", "b/2.jpg": "two", "b/3.jpg": None}
    assert [path for path, _ in report.left_out] == ["metadata.jsonl", "b/4.jpg"]
    assert report.unused_captions == [("b/alone.txt", "a text without an image beside it")]


def test_without_any_caption_there_is_no_column(source: Path, target: Path) -> None:
    put(source, a_dot_jpg=encoded(1), a_dot_json="{}")
    report = run(source, target)
    assert lance.dataset(str(target)).schema.names == ["image", "path", "height", "width"]
    assert (report.without_caption, report.left_out) == (None, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,words\na,b\n", r"Expected a column 'file_name' .* got \['name', 'words'\]"),
        ('{"file_name": "a.jpg", "caption": ["a", 3]}', r"Expected captions as .* JSONL"),
        ('{"file_name": "a.jpg", "caption": 3}', r"got 'a.jpg': 3 .*line 1"),
        ('{"file_name": "a.jpg"', r"Expected captions as CSV, TSV or JSONL"),
    ],
)
def test_a_table_that_cannot_work(source: Path, target: Path, text: str, message: str) -> None:
    put(source, a_dot_jpg=encoded(1))
    table = source / ("t.jsonl" if text.startswith("{") else "t.csv")
    table.write_text(text)
    with pytest.raises(ConfigError, match=message):
        run(source, target, captions=table)
    assert not target.exists()


def test_an_existing_target_is_refused_and_left_as_it_was(source: Path, target: Path) -> None:
    put(source, a_dot_jpg=encoded(1))
    run(source, target)
    before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    put(source, b_dot_jpg=encoded(2))
    with pytest.raises(ConfigError, match=r"exists\. Use --overwrite or --append"):
        run(source, target)
    assert {path: path.read_bytes() for path in target.rglob("*") if path.is_file()} == before
    run(source, target, overwrite=True)
    assert list(rows(target)) == ["a.jpg", "b.jpg"]
    run(source, target, append=True)
    assert lance.dataset(str(target)).count_rows() == 4


@pytest.mark.parametrize("option", ["overwrite", "append", None])
def test_what_is_no_dataset_is_never_written_over(source: Path, target: Path, option: str | None) -> None:
    put(source, a_dot_jpg=encoded(1))
    put(target, precious="data")
    with pytest.raises(ConfigError, match="Expected a Lance dataset"):
        run(source, target, **({option: True} if option else {}))
    assert [path.name for path in target.iterdir()] == ["precious"]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_size_of_each_image_is_written_as_a_person_sees_it(
    source: Path, target: Path, kind: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    Image.new("RGB", (8, 6)).save(stream, kind, exif=exif)
    put(source, a=stream.getvalue())
    run(source, target)
    (row,) = rows(target).values()
    assert (row["height"], row["width"]) == ((6, 8) if orientation < 5 else (8, 6))
    assert [str(lance.dataset(str(target)).schema.field(side).type) for side in ("height", "width")] == ["int32"] * 2


def test_a_dataset_without_sizes_is_appended_to(source: Path, target: Path) -> None:
    write([Row("old.jpg", encoded(1))], str(target), image_schema(None, captioned=False))
    put(source, a_dot_jpg=encoded(2))
    run(source, target, append=True)
    assert list(rows(target)) == ["old.jpg", "a.jpg"]
    assert lance.dataset(str(target)).schema.names == ["image", "path"]


def test_append_keeps_class_numbers_and_refuses_other_columns(tmp_path: Path, target: Path) -> None:
    put(tmp_path / "1", b__1_dot_jpg=encoded(1), a__1_dot_jpg=encoded(2), a__1_dot_txt="first")
    put(tmp_path / "2", b__2_dot_jpg=encoded(3))
    put(tmp_path / "3", b__3_dot_jpg=encoded(4), c__3_dot_jpg=encoded(5))
    put(tmp_path / "4", a_dot_jpg=encoded(6))
    put(tmp_path / "5", a_dot_jpg=encoded(7), a_dot_txt="a caption")
    run(tmp_path / "1", target)
    run(tmp_path / "2", target, append=True)
    assert rows(target)["b/2.jpg"]["label"] == 1
    assert rows(target)["b/2.jpg"]["caption"] is None
    with pytest.raises(ConfigError, match=r"Expected the classes \['a', 'b'\] .* got \['c'\]"):
        run(tmp_path / "3", target, append=True)
    run(tmp_path / "4", tmp_path / "plain.lance")
    with pytest.raises(ConfigError, match="they must agree"):
        run(tmp_path / "5", tmp_path / "plain.lance", append=True)


@pytest.mark.parametrize("old", [True, False])
def test_a_failure_midway_leaves_the_old_dataset_or_none(
    source: Path, target: Path, old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(source, **{f"{i:02}_dot_jpg": encoded(i) for i in range(20)})
    if old:
        run(source, target)
    monkeypatch.setattr(module, "BATCH_BYTES", 1000)

    rows_of: Any = module.rows_of

    def broken(*args: object) -> Iterator[Row]:
        for index, row in enumerate(rows_of(*args)):
            if index == 15:
                raise MemoryError("no more")
            yield row

    monkeypatch.setattr(module, "rows_of", broken)
    with pytest.raises(MemoryError, match="no more"):
        run(source, target, overwrite=old, fragment_rows=4)
    assert target.exists() is old
    assert not old or list(rows(target)) == [f"{i:02}.jpg" for i in range(20)]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("gpuload-ingest")]


@pytest.mark.parametrize("what", ["missing", "a file", "empty"])
def test_a_source_that_cannot_work(source: Path, target: Path, what: str) -> None:
    if what == "a file":
        source.write_bytes(encoded(1))
    elif what == "empty":
        put(source, _dot_hidden="x")
    with pytest.raises(ConfigError, match=r"Expected (a folder of )?images"):
        run(source, target)
    assert not target.exists()


def test_the_target_may_lie_inside_the_source(source: Path) -> None:
    put(source, a_dot_jpg=encoded(1))
    for _ in range(2):
        report = run(source, source / "out.lance", overwrite=True)
        assert (report.rows, report.left_out) == (1, [])


def test_fragments_and_storage_version(source: Path, target: Path) -> None:
    put(source, **{f"{i}_dot_jpg": encoded(i) for i in range(10)})
    run(source, target, fragment_rows=4, data_storage_version="2.0")
    dataset = lance.dataset(str(target))
    assert [fragment.count_rows() for fragment in dataset.get_fragments()] == [4, 4, 2]
    assert dataset.data_storage_version == "2.0"


def test_memory_is_bounded_by_the_batches(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """256 MB go through in batches of 4 MB; Python and Arrow together never hold more than a few of them."""
    monkeypatch.setattr(module, "BATCH_BYTES", 4 << 20)
    highest = 0

    def many() -> Iterator[Row]:
        nonlocal highest
        for index in range(1024):
            highest = max(highest, pa.total_allocated_bytes() + tracemalloc.get_traced_memory()[0])
            yield Row(f"{index}", os.urandom(256 << 10))

    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        write(many(), str(target), image_schema(None, captioned=False))
    finally:
        tracemalloc.stop()
    assert lance.dataset(str(target)).count_rows() == 1024
    assert highest - before < 64 << 20


def test_the_walk_reads_one_folder_at_a_time(source: Path) -> None:
    put(source, a__1_dot_jpg=encoded(1), b__1_dot_jpg=encoded(1))
    walk = Folder(source).walk()
    assert next(walk).path == "a/1.jpg"
    put(source, b__2_dot_jpg=encoded(1))
    assert [file.path for file in walk] == ["b/1.jpg", "b/2.jpg"]


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_no_bytes_make_the_header_check_raise(data: bytes) -> None:
    for start in (b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\x00", b"BM", b"RIFF0000WEBP", b"P6 "):
        assert isinstance(why_no_image(start + data), str)
