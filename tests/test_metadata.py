"""Tables beside the pictures: their columns come along with their types, their names in whatever Unicode form."""

from __future__ import annotations

import datetime
import json
import unicodedata
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pyarrow.parquet
import pytest
from making import jpeg

from gpuload.errors import ConfigError
from gpuload.tools.ingest import IngestReport, ingest

RECORDS: list[dict[str, Any]] = [
    {"file_name": "a.jpg", "text": "one", "score": 0.5, "count": 3, "good": True, "boxes": [[1, 2], [3, 4]]},
    {"file_name": "b.jpg", "text": "two", "score": 1.0, "count": None, "good": False, "boxes": []},
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for name in "abc":
        (tmp_path / "in" / f"{name}.jpg").write_bytes(jpeg())
    return tmp_path / "in"


def run(source: Path, **options: Any) -> tuple[IngestReport, pa.Table]:
    target = str(source.parent / "out.lance")
    report = ingest(source, target, progress=False, **options)
    return report, lance.dataset(target).to_table()


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_columns_come_along_with_their_types(source: Path, kind: str) -> None:
    if kind == "jsonl":
        (source / "metadata.jsonl").write_text("\n".join(json.dumps(record) for record in RECORDS))
    elif kind == "parquet":
        pa.parquet.write_table(pa.Table.from_pylist(RECORDS), source / "metadata.parquet")
    else:
        (source / "metadata.csv").write_text(
            "file_name,text,score,count,good\na.jpg,one,.5,3,true\nb.jpg,two,1,,false\n"
        )
    report, table = run(source)
    assert table.schema.names[3:5] == ["height", "width"]
    types = {name: table.schema.field(name).type for name in table.schema.names[5:]}
    expected = {"score": pa.float64(), "count": pa.int64(), "good": pa.bool_()}
    assert types == expected | ({} if kind == "csv" else {"boxes": pa.list_(pa.list_(pa.int64()))})
    assert table["caption"].to_pylist() == ["one", "two", None]
    for name in types:
        assert table[name].to_pylist() == [RECORDS[0][name], RECORDS[1][name], None]
    assert (report.left_out, report.unused_captions) == ([], [])


def test_parquet_keeps_times_and_what_a_dictionary_stands_for(source: Path) -> None:
    when = datetime.datetime(2026, 1, 2, 3, 4, 5)
    columns = {"file_name": ["a.jpg"], "when": pa.array([when], pa.timestamp("ms"))}
    kinds = pa.array(["x"]).dictionary_encode()
    pa.parquet.write_table(pa.table({**columns, "kind": kinds}), source / "metadata.parquet")
    _, table = run(source)
    assert table.schema.field("when").type == pa.timestamp("ms")
    assert table["when"].to_pylist() == [when, None, None]
    assert table.schema.field("kind").type == pa.string()
    assert "caption" not in table.schema.names


@pytest.mark.parametrize("rows", [False, True])
def test_several_captions_are_a_list(source: Path, rows: bool) -> None:
    if rows:
        (source / "metadata.csv").write_text("file_name,caption\na.jpg,one\na.jpg,two\nb.jpg,three\na.jpg,one\n")
    else:
        lines = [{"file_name": "a.jpg", "caption": ["one", "two"]}, {"file_name": "b.jpg", "caption": ["three"]}]
        (source / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (source / "c.txt").write_text("four")
    report, table = run(source)
    assert table["caption"].to_pylist() == [["one", "two"], ["three"], ["four"]]
    assert len(report.unused_captions) == rows


def test_captions_come_from_the_column_that_is_named(source: Path) -> None:
    (source / "metadata.csv").write_text("file_name,caption,title\na.jpg,long,short\n")
    _, table = run(source, caption_from="title")
    assert table.slice(0, 1).select(["caption"]).to_pylist() == [{"caption": "short"}]
    assert table["metadata_caption"].to_pylist()[0] == "long"
    with pytest.raises(ConfigError, match="Expected a table with a column 'nme'"):
        run(source, caption_from="nme", overwrite=True)


@pytest.mark.parametrize("disk", ["NFC", "NFD"])
def test_names_are_compared_in_one_unicode_form(tmp_path: Path, disk: Any) -> None:
    other = "NFD" if disk == "NFC" else "NFC"
    source = tmp_path / "in"
    (source / unicodedata.normalize(disk, "é")).mkdir(parents=True)
    (source / unicodedata.normalize(disk, "é/ü.jpg")).write_bytes(jpeg())
    (source / unicodedata.normalize(disk, "ö.jpg")).write_bytes(jpeg())
    (source / unicodedata.normalize(other, "ö.txt")).write_text("beside")
    (source / "metadata.csv").write_text(unicodedata.normalize(other, "file_name,caption\né/ü.jpg,named\n"))
    report, table = run(source)
    assert sorted(table["caption"].to_pylist()) == ["beside", "named"]
    assert (report.left_out, report.unused_captions) == ([], [])


def test_a_label_of_a_table_is_the_label(source: Path) -> None:
    for name in "xy":
        (source / name).mkdir()
        (source / name / "1.jpg").write_bytes(jpeg())
    (source / "metadata.csv").write_text("file_name,label\nx/1.jpg,cat\ny/1.jpg,dog\n")
    report, table = run(source)
    assert table["label"].to_pylist() == [None, None, None, "cat", "dog"]
    assert report.classes == []
    with pytest.raises(ConfigError, match="got both"):
        run(source, labels=True, overwrite=True)


def test_columns_that_do_not_fit_are_an_error(source: Path) -> None:
    (source / "x").mkdir()
    (source / "x" / "1.jpg").write_bytes(jpeg())
    (source / "metadata.csv").write_text("file_name,n\na.jpg,3\n")
    (source / "x" / "metadata.csv").write_text("file_name,n\n1.jpg,three\n")
    with pytest.raises(ConfigError, match="Expected column 'n' of one type, got int64 and"):
        run(source)
    (source / "x" / "metadata.csv").write_text("file_name,n\n1.jpg,3.5\n")
    _, table = run(source)
    assert table["n"].to_pylist() == [3.0, None, None, 3.5]


def test_append_takes_the_columns_of_the_dataset(source: Path, tmp_path: Path) -> None:
    (source / "metadata.jsonl").write_text(json.dumps({"file_name": "a.jpg", "caption": ["one", "two"], "n": 1}))
    run(source)
    other = tmp_path / "other"
    other.mkdir()
    (other / "d.jpg").write_bytes(jpeg())
    (other / "metadata.csv").write_text("file_name,caption,n\nd.jpg,four,4\n")
    target = str(tmp_path / "out.lance")
    assert ingest(other, target, progress=False, append=True).total == 4
    assert lance.dataset(target).to_table(columns=["caption", "n"]).to_pylist()[3] == {"caption": ["four"], "n": 4}
    (other / "metadata.csv").write_text("file_name,caption,m\nd.jpg,four,4\n")
    with pytest.raises(ConfigError, match="they must agree"):
        ingest(other, target, progress=False, append=True)
