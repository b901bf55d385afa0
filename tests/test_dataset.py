"""`LanceDataset` as a whole: exact batches, what ends early ends cleanly, bounded memory, words that are checked."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lance
import lance.torch.data
import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import gpuload_threads
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from making import captions, encode, jpeg, picture

from gpuload import (
    Batch,
    ConfigError,
    DeviceError,
    FullScanSampler,
    Image,
    LanceDataset,
    ShardedBatchSampler,
    ShuffleSampler,
    Text,
)
from gpuload.tables.lance import LanceTable

Store = Callable[..., str]
WHOLE: dict[str, Any] = {"image": Image(16), "prompt": Text("bytes")}


@pytest.fixture
def dataset(photos: str) -> LanceDataset:
    """13 batches through every stage of the line."""
    return LanceDataset(photos, 4, transforms=WHOLE, num_threads=2, device="cpu")


def rows(batches: Any) -> list[list[int]]:
    return [batch.rows.tolist() for batch in batches]


IN_ORDER = [list(range(i, min(i + 4, 50))) for i in range(0, 50, 4)]


# -- exact batches -------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 25), min_size=1, max_size=6),
    st.integers(1, 30),
    st.booleans(),
    st.sampled_from([False, "row", "block", "batch"]),
    st.sampled_from([None, "number % 3 = 1", "number > 10"]),
)
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.filterwarnings("ignore:No row matches filter")
def test_batches_are_exact_across_fragments_of_any_size(
    tmp_path: Path, sizes: list[int], batch_size: int, drop_last: bool, shuffle: Any, filter: str | None
) -> None:
    total = sum(sizes)
    path = tmp_path / "-".join(map(str, sizes))
    for start, size in zip(np.cumsum([0, *sizes]), sizes, strict=False):
        if not path.exists() or lance.dataset(path).count_rows() < total:
            numbers = pa.table({"number": pa.array(range(start, start + size), pa.int64())})
            lance.write_dataset(numbers, path, mode="append" if path.exists() else "create")
    used = [n for n in range(total) if filter is None or (n % 3 == 1 if "%" in filter else n > 10)]
    dataset = LanceDataset(path, batch_size, drop_last=drop_last, shuffle=shuffle, filter=filter, device="cpu")
    batches = list(dataset)
    full, rest = divmod(len(used), batch_size)
    assert [batch.size for batch in batches] == [batch_size] * full + [rest] * (rest > 0 and not drop_last)
    assert len(dataset) == len(batches)
    assert [batch.step for batch in batches] == list(range(len(batches)))
    found = [number for batch in batches for number in batch["number"].tolist()]
    assert found == [row for batch in batches for row in batch.rows.tolist()]
    if not drop_last:
        assert sorted(found) == used
    if not shuffle:
        assert found == used[: len(found)]
    assert all(batch.valid.all() for batch in batches)


def test_columns_of_all_kinds_stay_together(dataset: LanceDataset) -> None:
    texts = captions(50)
    for batch in dataset:
        assert batch["number"].tolist() == batch.rows.tolist()
        for ids, mask, row in zip(batch["prompt"], batch["prompt_mask"], batch.rows.tolist(), strict=True):
            assert bytes(ids[mask.bool()].tolist()).decode() == texts[row]


def test_an_opened_dataset_pins_its_version(store: Store) -> None:
    path = store({"number": range(5)})
    opened = lance.dataset(path)
    lance.write_dataset(pa.table({"number": range(5, 9)}), path, mode="append")
    assert sum(batch.size for batch in LanceDataset(opened, 4, device="cpu")) == 5
    assert sum(batch.size for batch in LanceDataset(path, 4, device="cpu")) == 9
    first = LanceDataset(path, 4, dataset_options={"version": 1}, device="cpu")
    assert sum(batch.size for batch in first) == 5


# -- again and again -----------------------------------------------------------------------------------------------


def test_a_second_iteration_is_the_same(dataset: LanceDataset) -> None:
    first, second = list(dataset), list(dataset)
    assert rows(first) == rows(second) == IN_ORDER
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(first, second, strict=True))


def test_two_iterations_at_once_do_not_disturb_each_other(dataset: LanceDataset) -> None:
    pairs = list(zip(dataset, dataset, strict=True))
    assert [a.rows.tolist() for a, _ in pairs] == [b.rows.tolist() for _, b in pairs] == IN_ORDER


@pytest.mark.parametrize("taken", [0, 1, 3, 12])
def test_an_early_break_leaves_no_thread_and_nothing_behind(taken: int, dataset: LanceDataset) -> None:
    for batch in dataset:
        if batch.step == taken:
            break
    assert not gpuload_threads()
    assert rows(dataset) == IN_ORDER


def test_an_iterator_that_is_not_pulled_starts_nothing(dataset: LanceDataset) -> None:
    batches = iter(dataset)
    assert not gpuload_threads()
    next(batches)
    assert gpuload_threads()
    del batches
    gc.collect()
    assert not gpuload_threads()


def test_an_iterator_collected_in_one_of_its_own_threads_ends_them_all(photos: str) -> None:
    """Python collects a cycle in whichever thread happens to allocate."""
    dropped, waiting = threading.Event(), threading.Event()

    def collect(texts: list[str]) -> list[bytes]:
        if not texts[0].startswith(("0 ", "4 ")):  # ahead of what the loop takes
            waiting.set()
            dropped.wait(10)
            gc.collect()
        return [text.encode() for text in texts]

    dataset = LanceDataset(photos, 4, columns=["prompt"], transforms={"prompt": Text(collect)}, device="cpu")
    gc.collect()
    gc.disable()
    try:
        cycle: list[Any] = [iter(dataset)]
        cycle.append(cycle)
        next(cycle[0])
        next(cycle[0])
        assert waiting.wait(10)
        del cycle
        dropped.set()
        end = time.monotonic() + 10
        while gpuload_threads() and time.monotonic() < end:
            time.sleep(0.01)
        assert not gpuload_threads()
    finally:
        gc.enable()


def test_close_ends_what_runs_and_the_dataset_can_be_used_again(dataset: LanceDataset) -> None:
    batches = iter(dataset)
    next(batches)
    dataset.close()
    assert not gpuload_threads()
    assert list(batches) == []
    dataset.close()
    assert rows(dataset) == IN_ORDER


def test_as_a_context_it_closes_itself(photos: str) -> None:
    with LanceDataset(photos, 4, device="cpu") as dataset:
        batches = iter(dataset)
        next(batches)
        assert gpuload_threads()
    assert not gpuload_threads()


def test_an_exhausted_iteration_stays_exhausted(dataset: LanceDataset) -> None:
    batches = iter(dataset)
    assert len(list(batches)) == 13
    assert list(batches) == []
    assert not gpuload_threads()


# -- exceptions ----------------------------------------------------------------------------------------------------


class Broken(Exception):
    """What a stage raises."""


STAGES = {
    "read": "gpuload.tables.lance.LanceTable.read",
    "encoded": "gpuload.images.encoded.from_arrow",
    "headers": "gpuload.images.headers.read",
    "numbers": "gpuload.fields.numbers.to_tensor",
    "tokens": "gpuload.fields.text.Tokens.__call__",
    "decode": "gpuload.images.decode.line.Line.fill",
    "affine": "gpuload.images.resize.affine",
    "views": "gpuload.images.views.views",
    "windows": "gpuload.images.views.windows",
    "plan": "gpuload.order.cut.FixedSize.ranges",
    "positions": "gpuload.tables.lance.LanceTable.positions",
    "finish": "gpuload.pipeline.Pipeline._finish",
    "keep": "gpuload.device.Streams.keep",
}


def break_at(monkeypatch: pytest.MonkeyPatch, where: str, calls: int, error: type[BaseException] = Broken) -> None:
    """Let the function at `where` raise from its call number `calls` on."""
    parts = where.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module = sys.modules.get(".".join(parts[:cut]))
        if module is not None:
            break
    owner: Any = module
    for name in parts[cut:-1]:
        owner = getattr(owner, name)
    real, seen, lock = getattr(owner, parts[-1]), 0, threading.Lock()

    def breaking(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        with lock:
            seen += 1
            if seen > calls:
                raise error(f"broken {where}")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, parts[-1], breaking)


@pytest.mark.parametrize("calls", [0, 5])
@pytest.mark.parametrize("stage", STAGES)
def test_an_exception_in_any_stage_reaches_the_loop_and_ends_the_threads(
    stage: str, calls: int, dataset: LanceDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    len(dataset)
    with monkeypatch.context() as broken:
        break_at(broken, STAGES[stage], calls)
        with pytest.raises(Broken, match=stage if stage in STAGES[stage] else "broken") as caught:
            seen.extend(dataset)
    assert not gpuload_threads()
    frames = [entry.name for entry in caught.traceback]
    assert "breaking" in frames, "the traceback leads to where it was raised"
    assert rows(dataset) == IN_ORDER


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have notes from Python 3.11 on")
@pytest.mark.parametrize(("stage", "name"), [("read", "read"), ("tokens", "read"), ("decode", "decode")])
def test_an_exception_says_in_which_stage_it_was_raised(
    stage: str, name: str, dataset: LanceDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_at(monkeypatch, STAGES[stage], 3)
    with pytest.raises(Broken) as caught:
        list(dataset)
    assert caught.value.__notes__ == [f"(raised in gpuload's {name} stage)"]


@pytest.mark.parametrize("readahead", [1, 4, 16])
def test_an_exception_comes_at_its_place(readahead: int, photos: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = LanceDataset(photos, 4, transforms=WHOLE, batch_readahead=readahead, device="cpu")
    len(dataset)
    real = LanceTable.read

    def read(self: LanceTable, ranges: Any) -> Any:
        if ranges[0, 0] == 20:
            raise Broken("at row 20")
        return real(self, ranges)

    monkeypatch.setattr(LanceTable, "read", read)
    batches = iter(dataset)
    assert rows(next(batches) for _ in range(5)) == IN_ORDER[:5]
    with pytest.raises(Broken):
        next(batches)
    assert list(batches) == []


def test_an_exception_in_the_loop_ends_the_threads(dataset: LanceDataset) -> None:
    def loop() -> None:
        for _ in dataset:
            raise Broken("in the user's own code")

    with contextlib.suppress(Broken):  # pytest.raises would keep the traceback, and with it the loop's iterator
        loop()
    assert not gpuload_threads()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as in a terminal: what a shell starts in the background ignores it, and so would these tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_while_waiting_ends_the_threads(dataset: LanceDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    real, waiting = LanceTable.read, threading.Event()

    def slow(self: LanceTable, ranges: Any) -> Any:
        if ranges[0, 0] >= 8:
            waiting.set()
            time.sleep(0.3)
        return real(self, ranges)

    monkeypatch.setattr(LanceTable, "read", slow)

    def interrupt() -> None:
        waiting.wait(10)
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        list(dataset)
    thread.join()
    assert not gpuload_threads()
    monkeypatch.undo()
    assert rows(dataset) == IN_ORDER


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_a_program_at_once(photos: str) -> None:
    program = f"""
        import time
        from gpuload import Image, LanceDataset
        dataset = LanceDataset({photos!r}, 2, transforms={{"image": Image(16)}}, batch_readahead=16)
        while True:
            for batch in dataset:
                print(batch.step, flush=True)
                time.sleep(0.01)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for _ in range(3):
            process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode in (-signal.SIGINT, 130)
    assert "KeyboardInterrupt" in errors
    assert "Fatal" not in errors


def test_a_program_that_breaks_and_returns_ends(photos: str) -> None:
    """Also with an iterator that is still open when the interpreter ends."""
    program = f"""
        from gpuload import Image, LanceDataset
        dataset = LanceDataset({photos!r}, 2, transforms={{"image": Image(16)}}, batch_readahead=16)
        batches = iter(dataset)
        next(batches)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


# -- bounded -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> str:
    """1,000 rows with a picture, a caption and a number."""
    files = [jpeg(16, 16, seed=i) for i in range(20)] * 50
    path = str(tmp_path_factory.mktemp("many") / "many.lance")
    lance.write_dataset(pa.table({"image": files, "prompt": captions(1000), "number": range(1000)}), path)
    return path


@pytest.mark.parametrize("columns", [["number"], ["image"], ["prompt"], ["image", "prompt", "number"]], ids=str)
@pytest.mark.parametrize(("readahead", "batch_size"), [(1, 4), (2, 20), (6, 4), (6, 20)])
def test_a_slow_loop_is_read_ahead_of_by_batch_readahead(
    readahead: int, batch_size: int, columns: list[str], many: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = 0
    real, lock = LanceTable.read, threading.Lock()
    dataset = LanceDataset(many, batch_size, columns=columns, batch_readahead=readahead, device="cpu")
    len(dataset)

    def read(self: LanceTable, ranges: Any) -> Any:
        nonlocal started
        with lock:
            started += 1
        return real(self, ranges)

    monkeypatch.setattr(LanceTable, "read", read)
    ahead = []
    for batch in dataset:
        time.sleep(0.004)
        ahead.append(started - batch.step - 1)
        if batch.step == 40:
            break
    assert max(ahead) <= readahead  # from the beginning of their reading on
    assert max(ahead) >= min(readahead, 2), "nothing was read ahead"


def test_batches_that_were_taken_are_let_go(many: str) -> None:
    """But for the last, which the line holds until it is asked for the next."""
    dataset = LanceDataset(many, 100, transforms={"image": Image(16)}, device="cpu")
    older = {id(item) for item in gc.get_objects() if type(item) is Batch}
    for batch in dataset:
        del batch
        assert len([item for item in gc.get_objects() if type(item) is Batch and id(item) not in older]) <= 1


def test_the_main_threads_torch_threads_are_unchanged(dataset: LanceDataset) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in dataset:
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_stages_are_timed_and_counted(dataset: LanceDataset, photos: str) -> None:
    assert len(list(dataset)) == 13
    stats = dataset.stats()
    assert (stats["batches"], stats["rows"]) == (13, 50)
    assert sum(stats["images"].values()) == 50
    assert stats["images"]["failed"] == 0
    assert stats["stages"]["read"]["items"] == 13
    assert stats["stages"]["decode"]["busy_s"] > 0
    assert stats["stages"]["decode"]["threads"] == 2
    stored = lance.dataset(photos).to_table().nbytes
    assert stored * 0.9 < stats["bytes_read"] < stored * 1.5
    list(dataset)
    assert dataset.stats()["batches"] == 26


def test_what_was_counted_is_still_there_after_close(dataset: LanceDataset) -> None:
    for images in (50, 100):
        list(dataset)
        before = dataset.stats()
        dataset.close()
        after = dataset.stats()
        assert after["images"] == before["images"]
        assert sum(after["images"].values()) == images
        assert (after["batches"], after["decoder"]) == (before["batches"], before["decoder"])


NO_EFFECT = (
    "batch_size", "batch_readahead", "readahead_bytes", "transforms", "on_error", "drop_last", "seed", "num_threads",
    "max_pixels",
)  # fmt: skip


@pytest.mark.parametrize("name", NO_EFFECT)
def test_what_would_have_no_effect_cannot_be_set(dataset: LanceDataset, name: str) -> None:
    with pytest.raises(AttributeError):
        setattr(dataset, name, getattr(dataset, name))


def test_a_dict_of_transforms_may_change_afterwards(photos: str) -> None:
    transforms: dict[str, Any] = {"image": Image(16)}
    dataset = LanceDataset(photos, 4, transforms=transforms, device="cpu")
    transforms["image"] = Image(8)
    assert dataset.transforms == {"image": Image(16)}
    with pytest.raises(TypeError):
        dataset.transforms["image"] = Image(8)  # type: ignore[index]


# -- what it says of itself ----------------------------------------------------------------------------------------


def test_repr_names_device_decoder_sampler_and_rows(photos: str, device: str) -> None:
    dataset = LanceDataset(photos, 4, transforms=WHOLE, shuffle=True, seed=3, device=device)
    text = repr(dataset)
    for words in (
        photos,
        "rows=50",
        "batch_size=4",
        "sampler=ShuffleSampler(rank=0, world_size=1, seed=3)",
        f"device='{device}",
        "decoder='",
        "image: float32[B, 3, 16, 16]",
        "prompt: int64[B, L] and prompt_mask",
        "number: int64[B]",
    ):
        assert words in text
    assert dataset.stats()["device"].startswith(device)
    assert f"decoder={dataset.stats()['decoder']!r}" in text


def test_auto_is_the_gpu_where_there_is_one(photos: str) -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert LanceDataset(photos, 4).device.type == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda")])
def test_cuda_without_a_gpu_names_the_install_line(device: Any, photos: str) -> None:
    with pytest.raises(DeviceError, match=r'pip install "gpuload\[cuda1[23]\]".*device="cpu"'):
        LanceDataset(photos, 4, device=device)


def test_a_dataset_pickles_small_and_yields_the_same(dataset: LanceDataset) -> None:
    list(dataset)
    data = pickle.dumps(dataset)
    assert len(data) < 20_000
    again = pickle.loads(data)
    assert rows(again) == IN_ORDER
    assert repr(again) == repr(dataset)
    assert rows(copy.copy(dataset)) == IN_ORDER


# -- RecordBatches and functions of one's own ----------------------------------------------------------------------


def test_without_a_to_tensor_fn_record_batches_come(photos: str) -> None:
    batches = list(LanceDataset(photos, 8, columns=["number", "prompt"], to_tensor_fn=None))
    assert all(isinstance(batch, pa.RecordBatch) for batch in batches)
    assert [len(batch) for batch in batches] == [8] * 6 + [2]
    assert pa.Table.from_batches(batches) == lance.dataset(photos).to_table(columns=["number", "prompt"])


def test_a_to_tensor_fn_is_called_as_lance_calls_it(photos: str) -> None:
    given: list[dict[str, Any]] = []

    def convert(batch: pa.RecordBatch, *args: Any, **kwargs: Any) -> int:
        given.append(kwargs)
        return len(batch)

    assert list(LanceDataset(photos, 8, columns=["number"], to_tensor_fn=convert)) == [8] * 6 + [2]
    assert given[0] == {"hf_converter": None, "use_blob_api": False}


def with_blobs(kind: int, store: Store, **options: Any) -> str:
    """Seven rows: `image`, blobs of the first or the second kind with a null and an empty one among them; `number`."""
    values = [b"aa", None, b"", b"dddd", b"e" * 500, b"f", b"g"]
    if kind == 1:
        field: Any = pa.field("image", pa.large_binary(), metadata={"lance-encoding:blob": "true"})
        column: Any = pa.array(values, pa.large_binary())
        options = {"data_storage_version": "2.1", **options}
    else:
        field, column = lance.blob_field("image"), lance.blob_array(values)
    schema = pa.schema([field, pa.field("number", pa.int64())])
    return store(pa.table([column, pa.array(range(7))], schema=schema), max_rows_per_file=3, **options)


def noted(batch: Any, **words: Any) -> Any:
    """What a to_tensor_fn was given, blobs read."""
    assert isinstance(batch, dict)
    values = {}
    for name, column in batch.items():
        blobs = isinstance(column, list)
        assert not blobs or all(isinstance(blob, (lance.BlobFile, type(None))) for blob in column)
        assert blobs or isinstance(column, pa.Array)
        values[name] = [blob and blob.readall() for blob in column] if blobs else column.to_pylist()
    return values, words


BLOB_OPTIONS: list[dict[str, Any]] = [
    {}, {"columns": ["image"]}, {"columns": ["number", "image"]}, {"with_row_id": True}, {"filter": "number > 1"},
]  # fmt: skip


@pytest.mark.parametrize("options", BLOB_OPTIONS, ids=str)
def test_a_to_tensor_fn_gets_blobs_as_lance_gives_them(store: Store, options: dict[str, Any]) -> None:
    path = with_blobs(1, store)
    expected = list(lance.torch.data.LanceDataset(path, 3, to_tensor_fn=noted, **options))
    found = list(LanceDataset(path, 3, to_tensor_fn=noted, **options))
    assert found[0][1] == {"hf_converter": None, "use_blob_api": True}
    assert [list(values) for values, _ in found] == [list(values) for values, _ in expected][: len(found)]
    for name in found[0][0]:
        ours, theirs = ([value for values, _ in batches for value in values[name]] for batches in (found, expected))
        assert ours == theirs, name


@pytest.mark.parametrize("kind", [1, 2])
def test_blobs_are_those_of_their_rows_in_every_order(store: Store, tmp_path: Path, kind: int) -> None:
    path = with_blobs(kind, store)
    every = [b"aa", None, b"", b"dddd", b"e" * 500, b"f", b"g"]
    more: list[dict[str, Any]] = [
        {"shuffle": True},
        {"cache": str(tmp_path)},
        {"split": (0.0, 0.6)},
        {"rank": 1, "world_size": 2},
    ]
    for options in more:
        for values, words in LanceDataset(path, 2, to_tensor_fn=noted, **options):
            assert words["use_blob_api"] is True
            assert values["image"] == [every[number] for number in values["number"]]
    (batch, *_) = LanceDataset(path, 4, columns={"file": "image", "twice": "number * 2"}, to_tensor_fn=None)
    assert list(batch) == ["twice", "_rowid", "file"]
    assert batch["file"][3].readall() == b"dddd"
    assert batch["twice"].to_pylist() == [0, 2, 4, 6]


def test_a_sampler_that_reads_by_itself_opens_blobs_too(store: Store) -> None:
    class Reads(lance.sampler.Sampler):
        def __call__(self, ds: Any, *args: Any, columns: Any, with_row_id: bool, **others: Any) -> Iterator[Any]:
            yield from ds.to_batches(columns=columns, with_row_id=with_row_id)

    found = list(LanceDataset(with_blobs(1, store), 4, sampler=Reads(), to_tensor_fn=noted))
    assert [values["image"] for values, _ in found] == [[b"aa", None, b"", b"dddd"], [b"e" * 500, b"f", b"g"]]


def test_the_schema_has_the_blobs_that_were_asked_for(store: Store) -> None:
    assert LanceDataset(with_blobs(1, store), 4, to_tensor_fn=noted).schema.names == ["image", "number"]


def test_an_exception_of_a_to_tensor_fn_ends_the_threads(photos: str) -> None:
    def convert(batch: pa.RecordBatch, **kwargs: Any) -> Any:
        raise Broken

    with pytest.raises(Broken):
        list(LanceDataset(photos, 8, columns=["number"], to_tensor_fn=convert))
    assert not gpuload_threads()


class Huge(lance.sampler.Sampler):
    """Nine rows of 256 MiB each, all of them the same bytes."""

    def __init__(self, column: str, value: pa.Buffer) -> None:
        self.column, self.value = column, value

    def __call__(self, ds: Any, *args: Any, **kwargs: Any) -> Iterator[pa.RecordBatch]:
        offsets = pa.array([0, self.value.size], pa.int32()).buffers()[1]
        row = pa.Array.from_buffers(pa.binary(), 1, [None, offsets, self.value])
        yield from [pa.record_batch({self.column: row})] * 9


@pytest.mark.slow
def test_a_record_batch_above_two_gigabytes_keeps_its_rows(store: Store) -> None:
    sampler = Huge("data", pa.py_buffer(bytes(256 << 20)))
    path = store({"data": pa.array([b"x"] * 9, pa.binary())})
    (batch,) = LanceDataset(path, 9, columns=["data"], to_tensor_fn=None, sampler=sampler)
    assert (len(batch), batch.schema.field("data").type) == (9, pa.large_binary())


@pytest.mark.slow
def test_a_sampler_in_lances_loader_keeps_the_rows_of_a_record_batch_above_two_gigabytes(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = list(Huge("data", pa.py_buffer(bytes(256 << 20)))(None))
    path = store({"data": pa.array([b"x"] * 9, pa.binary())})
    monkeypatch.setattr(LanceTable, "read", lambda self, ranges: pa.Table.from_batches(rows))
    (batch,) = ShardedBatchSampler()(path, batch_size=9)
    assert (len(batch), batch.schema.field("data").type) == (9, pa.large_binary())


# -- words that are checked ----------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "column": ({"columns": ["imag"]}, r"\['image', 'prompt', 'number'\]; got 'imag'. Did you mean 'image'"),
    "column_unlike_any": ({"columns": ["xyz"]}, "got 'xyz'.$"),
    "column_as_str": ({"columns": "image"}, "a list of names or a dict of name to SQL, got 'image'"),
    "column_twice": ({"columns": ["image", "image"]}, "each column once"),
    "no_column": ({"columns": []}, "at least one column, got none"),
    "expression": ({"columns": {"x": "numbr + 1"}}, "Lance refused the expression 'numbr . 1' of column 'x'"),
    "filter": ({"filter": "numbr > 1"}, "Lance refused filter='numbr > 1'"),
    "transform": ({"transforms": {"imag": Image(8)}}, "got 'imag'. Did you mean 'image'"),
    "transform_not_read": ({"columns": ["prompt"], "transforms": {"image": Image(8)}}, r"\['prompt'\]; got 'image'"),
    "transform_type": ({"transforms": {"image": 224}}, "gpuload.Image or gpuload.Text for column 'image', got 224"),
    "transform_of_text": ({"transforms": {"prompt": Image(8)}}, "for Image, got 'prompt': string"),
    "transform_of_image": ({"transforms": {"image": Text("bytes")}}, "string column for Text, got 'image'"),
    "transforms_alone": (
        {"transforms": Image(8)},
        "transforms as a dict of column to Image, Text, Boxes or Mask, got Image",
    ),
    "readahead": ({"batch_readahead": 0}, "batch_readahead as an int of at least 1, got 0"),
    "readahead_type": ({"batch_readahead": 2.0}, "batch_readahead as an int of at least 1, got 2.0"),
    "samples": ({"samples": -1}, "samples as an int of at least 0, got -1"),
    "samples_type": ({"samples": 0.5}, "samples as an int of at least 0, got 0.5"),
    "threads": ({"num_threads": 0}, "num_threads as an int of at least 1, got 0"),
    "threads_type": ({"num_threads": "2"}, "num_threads as an int of at least 1, got '2'"),
    "max_pixels": ({"max_pixels": 0}, "max_pixels as an int of at least 1, got 0"),
    "max_pixels_none": ({"max_pixels": None}, "max_pixels as an int of at least 1, got None"),
    "rank_alone": ({"rank": 1}, "rank and world_size, or neither; got 1 and None"),
    "rank_too_high": ({"rank": 2, "world_size": 2}, "0 <= rank < world_size, got rank=2, world_size=2"),
    "granularity": ({"shard_granularity": "row"}, 'shard_granularity=None, "fragment" or "batch", got \'row\''),
    "sampler": ({"sampler": "shuffle"}, "sampler as a gpuload or lance.sampler.Sampler, got str"),
    "shuffle": ({"shuffle": "rows"}, 'shuffle=False, True, "row", "block" or "batch", got \'rows\''),
    "shuffle_and_sampler": ({"shuffle": True, "sampler": FullScanSampler()}, "shuffle or sampler, got both"),
    "rank_and_sampler": (
        {"rank": 0, "world_size": 2, "sampler": ShuffleSampler()},
        "rank or sampler, got both: rank=0",
    ),
    "granularity_and_sampler": (
        {"shard_granularity": "batch", "sampler": ShuffleSampler()},
        "shard_granularity or sampler, got both",
    ),
    "filter_type": ({"filter": 3}, "filter as an SQL condition, got 3"),
    "shuffle_of_fragments": ({"shuffle": "row", "shard_granularity": "fragment"}, 'shuffle="batch" or False beside'),
    "seed": ({"seed": 1.5}, "seed as an int, got 1.5"),
    "on_error": ({"on_error": "ignore"}, r"on_error as one of \('raise', 'skip', 'mask', 'replace'\), got 'ignore'"),
    "device": ({"device": "tpu"}, 'device="auto", "cuda", "cuda:N" or "cpu", got \'tpu\''),
    "device_type": ({"device": 1.5}, 'device="auto", "cuda", "cuda:N" or "cpu", got 1.5'),
    "decoder": ({"device": "cpu", "decoder": "opencv"}, "Expected decoder .*got 'opencv'"),
    "to_tensor_fn": ({"to_tensor_fn": 3}, "to_tensor_fn as a function or None, got 3"),
    "version": ({"dataset_options": {"version": 99}}, "Expected a Lance dataset at .*99"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_words_are_refused_when_it_is_made(name: str, photos: str) -> None:
    options, message = WRONG[name]
    with pytest.raises(ConfigError, match=message):
        LanceDataset(photos, 4, **options)


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, True, "8", None])
def test_a_wrong_batch_size_is_refused(batch_size: Any, photos: str) -> None:
    with pytest.raises(ConfigError, match=r"batch_size as an int of at least 1, got "):
        LanceDataset(photos, batch_size)


@pytest.mark.parametrize("words", [(["image"],), ({"version": 1}, ["image"]), (None,)])
def test_words_by_position_are_refused_and_the_keywords_named(words: Any, photos: str) -> None:
    with pytest.raises(
        ConfigError, match=r"keywords after batch_size, got .* by position.*columns=.*filter="
    ) as caught:
        LanceDataset(photos, 4, *words)
    assert all(repr(word) in str(caught.value) for word in words)


@pytest.mark.parametrize("epoch", ["next", None, 1.5])
def test_a_wrong_epoch_is_refused(epoch: Any, dataset: LanceDataset) -> None:
    with pytest.raises(ConfigError, match="epoch as an int, got "):
        dataset.set_epoch(epoch)


@pytest.mark.parametrize("where", ["/nowhere/x.lance", Path("/nowhere/x.lance"), "/tmp", 3, None, b"x"])
def test_what_is_no_dataset_is_refused(where: Any) -> None:
    with pytest.raises(ConfigError, match="Expected a"):
        LanceDataset(where, 4)


IMAGE_WRONG: list[dict[str, Any]] = [
    {"size": 0}, {"size": -1}, {"size": 2.5}, {"size": True}, {"size": "8"}, {"size": (8,)}, {"size": (8, 0)},
    {"size": (8, 8, 8)}, {"crop": "centre"}, {"crop": True}, {"crop_ratio": 0}, {"crop_ratio": 1.1},
    {"scale": (0, 1)}, {"scale": (0.5, 0.2)}, {"scale": (0.5, 2)}, {"scale": 0.5}, {"ratio": (0, 1)},
    {"ratio": (1, float("inf"))}, {"flip": -0.1}, {"flip": 2}, {"mean": (1, 2)}, {"std": (1, 0, 1)},
    {"mode": "L", "mean": (0.5, 0.5, 0.5)}, {"mode": "BGR"}, {"dtype": torch.int32}, {"dtype": "float32"},
    {"dtype": torch.uint8, "mean": (0.5, 0.5, 0.5)}, {"dtype": torch.uint8, "std": 0.5},
]  # fmt: skip


@pytest.mark.parametrize("options", IMAGE_WRONG, ids=str)
def test_wrong_options_of_an_image_are_refused_and_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(set(options) - {"mode", "dtype"} or set(options)))):
        Image(**{"size": 8, **options})


def test_options_of_an_image_are_brought_to_one_form() -> None:
    assert Image(8) == Image((8, 8))
    assert hash(Image(8)) == hash(Image((8, 8)))
    assert Image(8, mean=0.5, std=(0.5, 0.5, 0.5)).scale_shift() == ((1 / 127.5,) * 3, (-1.0,) * 3)
    assert Image((3, 5), mode="L").shape == (1, 3, 5)


# -- what travels --------------------------------------------------------------------------------------------------


def batch_of(count: int = 4) -> Batch:
    columns = {
        "image": torch.arange(count * 12).reshape(count, 3, 2, 2).float(),
        "prompt": [f"text {i}" for i in range(count)],
        "ragged": [torch.full((3, i + 1, 2), i) for i in range(count)],
    }
    valid = torch.tensor([True] * (count - 1) + [False])
    return Batch(columns, torch.arange(count), valid, 2, 7, {"number": torch.tensor([False, True] * (count // 2))})


def test_a_batch_is_a_mapping_with_a_place() -> None:
    batch = batch_of()
    assert isinstance(batch, dict)
    assert (batch.size, batch.epoch, batch.step) == (4, 2, 7)
    assert list(batch) == ["image", "prompt", "ragged"]
    inputs, targets = batch["prompt"], batch["image"]
    assert len(inputs) == len(targets) == 4


def test_a_batchs_repr_shows_shapes_and_no_pixels() -> None:
    assert repr(batch_of()) == (
        "Batch(image: float32[4, 3, 2, 2], prompt: list[4] of str, ragged: list[4] of int64[3, 1, 2], "
        "epoch=2, step=7, rows=4, invalid=1)"
    )
    assert repr(Batch({}, torch.arange(0), torch.ones(0, dtype=torch.bool))) == "Batch(epoch=0, step=0, rows=0)"


def test_columns_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="Expected 2 values in column 'x', got 3"):
        Batch({"x": [1, 2, 3]}, torch.arange(2), torch.ones(2, dtype=torch.bool))


def test_keep_takes_the_same_rows_of_everything() -> None:
    kept = batch_of().keep(np.array([False, True, False, True]))
    assert kept["image"].flatten(1)[:, 0].tolist() == [12, 36]
    assert kept["prompt"] == ["text 1", "text 3"]
    assert [item.shape[1] for item in kept["ragged"]] == [2, 4]
    assert kept.rows.tolist() == [1, 3]
    assert kept.valid.tolist() == [True, False]
    assert kept.nulls["number"].tolist() == [True, True]
    assert (kept.epoch, kept.step) == (2, 7)


def test_to_moves_the_columns_and_leaves_the_rows(device: str) -> None:
    moved = batch_of().to(device)
    assert moved["image"].device.type == device
    assert all(item.device.type == device for item in moved["ragged"])
    assert moved["prompt"] == batch_of()["prompt"]
    assert moved.rows.device.type == moved.valid.device.type == "cpu"
    assert (moved.epoch, moved.step) == (2, 7)


@pytest.mark.gpu
def test_pin_memory_pins_the_columns() -> None:
    pinned = batch_of().pin_memory()
    assert pinned["image"].is_pinned()
    assert all(item.is_pinned() for item in pinned["ragged"])
    assert torch.equal(pinned["image"], batch_of()["image"])


def test_a_batch_survives_pickling() -> None:
    batch, again = batch_of(), pickle.loads(pickle.dumps(batch_of()))
    assert isinstance(again, Batch)
    assert torch.equal(again["image"], batch["image"])
    assert torch.equal(again.valid, batch.valid)
    assert torch.equal(again.nulls["number"], batch.nulls["number"])
    assert (again.epoch, again.step, again["prompt"]) == (2, 7, batch["prompt"])


def test_pictures_of_one_size_are_stacked_and_others_are_not(store: Store, device: str) -> None:
    files = [encode(picture(8, 9, seed=i), "PNG") for i in range(2)] + [encode(picture(8, 8), "PNG")]
    first, second = LanceDataset(store({"image": files}), 2, device=device)
    assert first["image"].shape == (2, 3, 8, 9)
    assert second["image"].shape == (1, 3, 8, 8)
    (mixed,) = LanceDataset(store({"image": files}), 3, device=device)
    assert [tuple(pixels.shape) for pixels in mixed["image"]] == [(3, 8, 9), (3, 8, 9), (3, 8, 8)]
