"""An object store that is away, or cuts its answers off: every row once, or one line that says why not."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
from support_store import Proxy, s3

from gpuload import ConfigError, LanceDataset, ReadError
from gpuload.tables import reading

ROWS = 400


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    """The port of a store with ``bucket/rows.lance``: id, data (2 KB), in fragments of 100."""
    with s3() as port:
        data = [np.random.default_rng(i).bytes(2048) for i in range(ROWS)]
        rows = pa.table({"id": range(ROWS), "data": pa.array(data, pa.binary())})
        straight = Proxy(port)
        lance.write_dataset(rows, URI, storage_options=straight.options(), max_rows_per_file=100)
        straight.close()
        yield port


@pytest.fixture
def proxy(server: int) -> Iterator[Proxy]:
    found = Proxy(server)
    yield found
    found.close()


URI = "s3://bucket/rows.lance"


def opened(proxy: Proxy, batch_size: int = 50, client: dict[str, str] | None = None, **words: Any) -> LanceDataset:
    options = {"storage_options": proxy.options(**(client or {}))}
    words = {"columns": ["id", "data"], "device": "cpu", "batch_readahead": 2, **words}
    return LanceDataset(URI, batch_size, dataset_options=options, **words)


def take_all(batches: Any, found: list[int], state: dict[str, Any], dataset: LanceDataset) -> None:
    """Keeps the ids and the state after each batch."""
    for batch in batches:
        found += ids([batch])
        state.update(dataset.state_dict())


def ids(batches: Any) -> list[int]:
    return [i for batch in batches for i in batch["id"].tolist()]


@pytest.mark.parametrize("shuffle", [False, True])
def test_an_epoch_goes_on_soon_after_an_outage(proxy: Proxy, shuffle: bool) -> None:
    batches = iter(opened(proxy, shuffle=shuffle))
    found = ids([next(batches)])
    with proxy.outage(2.5) as ended:
        found += ids([next(batches) for _ in range(4)])
        went_on = time.monotonic() - ended[0]
    found += ids(batches)
    assert sorted(found) == list(range(ROWS))
    assert went_on < 8


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["away", "silent"])
@pytest.mark.parametrize("seconds", [12, 35])
def test_an_epoch_goes_on_within_15_s_of_a_longer_outage(
    proxy: Proxy, seconds: float, mode: str, capfd: pytest.CaptureFixture[str]
) -> None:
    batches = iter(opened(proxy))
    found = ids([next(batches)])
    with proxy.outage(seconds, mode) as ended:
        found += ids([next(batches) for _ in range(4)])
        went_on = time.monotonic() - ended[0]
    assert sorted(found + ids(batches)) == list(range(ROWS))
    assert went_on < 15
    assert "gpuload: reading rows" in capfd.readouterr().err


def test_an_answer_that_is_cut_off_is_asked_for_again(proxy: Proxy) -> None:
    batches = iter(opened(proxy, shuffle=True))
    found = ids([next(batches)])
    proxy.cut = 8  # more than Lance itself takes
    found += ids(batches)
    assert proxy.cut < 8
    assert sorted(found) == list(range(ROWS))


def test_a_store_that_stays_away_is_an_error_that_names_all_and_a_state_goes_on(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reading, "SAY_AFTER", 0.3)
    quick = {"client_retry_timeout": "2", "client_max_retries": "2", "lance_aimd_max_retries": "0"}
    dataset = opened(proxy, 100, client=quick, shuffle=True)
    batches = iter(dataset)
    found = ids([next(batches)])
    state = dataset.state_dict()
    proxy.set("away")
    began = time.monotonic()
    with pytest.raises(ReadError, match=r"data/\w+\.lance.* got none in \d s: .* reading rows .*\(100\)") as caught:
        take_all(batches, found, state, dataset)
    assert 1 < time.monotonic() - began < 15
    error = caught.value
    assert "bucket/rows.lance" in error.uri
    assert error.waited > 1
    assert "load_state_dict" in str(error)
    assert ".rs:" not in str(error)
    assert len(error.rows) == 100
    assert not set(error.rows) & set(found)
    assert capfd.readouterr().err.startswith("gpuload: reading rows ")
    proxy.set("up")
    dataset.load_state_dict(state)
    rest = ids(dataset)
    assert sorted(found + rest) == list(range(ROWS))
    assert set(error.rows) <= set(rest)


def test_who_leaves_during_an_outage_does_not_wait_for_its_end(proxy: Proxy) -> None:
    client = {"client_max_retries": "1", "lance_aimd_max_retries": "0", "client_retry_timeout": "60"}
    batches = iter(opened(proxy, client=client))
    next(batches)
    proxy.set("away")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # Ray leaves its own in a process that ran it
    ctrl_c = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    ctrl_c.start()
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            list(batches)
        assert time.monotonic() - began < 10
        ctrl_c.join()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_store_that_is_not_there_when_opened(proxy: Proxy) -> None:
    proxy.set("away")
    client = {"client_retry_timeout": "1", "client_max_retries": "1", "lance_aimd_max_retries": "0"}
    with pytest.raises(ReadError, match=r"the store to be readable, got none in .* - reading s3://bucket/rows.lance"):
        opened(proxy, client=client)


def test_what_is_not_there_is_not_waited_for(proxy: Proxy) -> None:
    with pytest.raises(ConfigError, match=r"Expected a Lance dataset at 's3://bucket/no\.lance'"):
        LanceDataset("s3://bucket/no.lance", 8, dataset_options={"storage_options": proxy.options()})


def test_a_users_storage_options_win() -> None:
    given = {"version": 3, "storage_options": {"client_max_retries": "1", "region": "x"}}
    found = reading.with_client("s3://bucket/rows.lance", given)
    assert found["version"] == 3
    assert found["storage_options"] == {**reading.CLIENT, "client_max_retries": "1", "region": "x"}
    assert reading.with_client("/data/rows.lance", given) == given
    assert reading.limit({"storage_options": {"client_retry_timeout": "20s"}}) == 20
    assert reading.limit(None) == reading.LIMIT
