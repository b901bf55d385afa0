"""gpuload inside DALI: the same rows in the same order as `LanceDataset`, epochs, last batches, state, bad rows."""

from __future__ import annotations

import importlib
import struct
import sys
from collections.abc import Callable
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import lance
import numpy as np
import nvidia.dali.experimental.dynamic as ndd
import pyarrow as pa
import pytest
import torch
from making import by_pillow, captions, encode, jpeg, picture
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.base_iterator import LastBatchPolicy
from torch.utils.dlpack import from_dlpack

from gpuload import Batch, ConfigError, DecodeError, DeviceError, Image, LanceDataset, ShardedFragmentSampler, Text
from gpuload.dali import DALILanceIterator, LanceSource, lance_reader

pytestmark = pytest.mark.filterwarnings("ignore::gpuload.BadRowWarning")  # met on purpose in most tests here

COLUMNS = ["image", "prompt", "number"]
WORDS = {"prompt": Text("bytes", 20)}
CPU = {"num_threads": 2, "device_id": None}


@pipeline_def(**CPU)
def decoded(uri: Any, columns: list[str] | None, options: dict[str, Any]) -> Any:
    """Images decoded and resized to 16x16, everything else passed through."""
    image, *rest = lance_reader(uri, columns, **options)
    return fn.resize(fn.decoders.image(image), size=[16, 16]), *rest


@pipeline_def(**CPU)
def numbers(uri: Any, options: dict[str, Any]) -> Any:
    return lance_reader(uri, ["number"], **options)


def reading(uri: Any, batch_size: int = 8, policy: Any = None, **options: Any) -> DALILanceIterator:
    pipeline = decoded(uri, COLUMNS, {"transforms": WORDS, **options}, batch_size=batch_size)
    return DALILanceIterator(pipeline, last_batch_policy=policy)


def rows(batches: Any) -> list[list[int]]:
    return [batch.rows.tolist() for batch in batches]


ORDERS: dict[str, Callable[[], dict[str, Any]]] = {
    "in order": dict,
    "rows": lambda: {"shuffle": True, "seed": 3},
    "batches": lambda: {"shuffle": "batch"},
    "fragments": lambda: {"sampler": ShardedFragmentSampler(1, 3, randomize=True)},
    "rank 2 of 3": lambda: {"shuffle": "block", "rank": 2, "world_size": 3},
    "Lance's own sampler": lambda: {"sampler": lance.sampler.ShardedFragmentSampler(0, 2)},
    "filter": lambda: {"filter": "number % 3 = 1", "shuffle": True},
    "samples": lambda: {"samples": 20, "seed": 5},
    "split": lambda: {"split": (0.2, 0.9), "shuffle": True},
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_same_batches_in_the_same_order_as_the_dataset(photos: str, order: str) -> None:
    expected = LanceDataset(photos, 8, columns=COLUMNS, transforms=WORDS, **ORDERS[order]())
    with reading(photos, **ORDERS[order]()) as iterator:
        for epoch in (0, 1, 5):
            iterator.set_epoch(epoch)
            expected.set_epoch(epoch)
            for batch, wanted in zip(iterator, expected, strict=True):
                assert isinstance(batch, Batch)
                assert list(batch) == ["image", "prompt", "prompt_mask", "number"]
                for name in ("prompt", "prompt_mask", "number"):
                    assert torch.equal(batch[name], wanted[name])
                assert torch.equal(batch.rows, wanted.rows)
                assert torch.equal(batch.valid, wanted.valid)
                assert (batch.epoch, batch.step) == (wanted.epoch, wanted.step)
                assert batch["image"].shape == (batch.size, 16, 16, 3)


def test_ranks_together_read_every_row_once(photos: str) -> None:
    found: list[int] = []
    for rank in range(3):
        with reading(photos, shuffle=True, rank=rank, world_size=3) as iterator:
            assert len(iterator) == 3
            found += [row for batch in iterator for row in batch.rows[batch.valid].tolist()]
    assert sorted(found) == list(range(50))


def test_decoded_pixels_are_those_of_the_dataset(photos: str) -> None:
    @pipeline_def(batch_size=8, **CPU)
    def native() -> Any:
        return fn.decoders.image(lance_reader(photos, ["image"], shuffle=True))

    with DALILanceIterator(native()) as iterator:
        for batch, wanted in zip(iterator, LanceDataset(photos, 8, columns=["image"], shuffle=True), strict=True):
            for pixels, known in zip(batch["image"], wanted["image"], strict=True):
                assert torch.equal(pixels.permute(2, 0, 1), known)


def test_resized_pixels_are_those_of_the_dataset_but_for_the_border(store: Callable[..., str]) -> None:
    path = store({"image": [jpeg(200 + 16 * i, 320 - 16 * i, seed=i) for i in range(6)]})

    @pipeline_def(batch_size=6, **CPU)
    def resized() -> Any:
        return fn.resize(fn.decoders.image(lance_reader(path)), size=[96, 96])

    (wanted,) = LanceDataset(path, 6, transforms={"image": Image(96, crop="none", dtype=torch.uint8)})
    with DALILanceIterator(resized()) as iterator:
        (batch,) = iterator
    difference = (batch["image"].permute(0, 3, 1, 2).float() - wanted["image"].float()).abs()
    assert difference[:, :, 2:-2, 2:-2].max() <= 1  # both round the same sum
    assert difference.mean() <= 0.25  # DALI clamps at the edge where Pillow renormalises: up to 14 in two pixels
    assert difference.max() <= 16


def test_source_in_a_plain_external_source_ends_each_epoch(photos: str) -> None:
    source = LanceSource(photos, ["image", "number"], 16, shuffle=True)

    @pipeline_def(batch_size=16, **CPU)
    def plain() -> Any:
        image, number = fn.external_source(source=source, num_outputs=2, dtype=source.dtype, ndim=source.ndim)
        return fn.peek_image_shape(image), number

    pipeline = plain()
    expected = LanceDataset(photos, 16, columns=["number"], shuffle=True)
    with closing(source):
        for epoch in range(3):
            source.set_epoch(epoch)
            expected.set_epoch(epoch)
            run = iter(lambda: torch.from_numpy(pipeline.run()[1].as_array().copy()), None)  # until StopIteration
            found = list(run)
            assert [len(batch) for batch in found] == [16, 16, 16, 2]
            assert all(torch.equal(a, b["number"]) for a, b in zip(found, expected, strict=True))
            pipeline.reset()


def test_source_hands_out_views_and_the_types_of_its_outputs(photos: str) -> None:
    with closing(LanceSource(photos, COLUMNS, 8, transforms=WORDS)) as source:
        assert source.outputs == ["image", "prompt", "prompt_mask", "number"]
        assert source.dtype == [types.UINT8, types.INT64, types.INT64, types.INT64]
        assert source.ndim == [1, 1, 1, 0]
        assert len(source) == 7
        images, ids, mask, number = source()
        assert not any(image.flags.owndata or image.flags.writeable for image in images)
        assert ids.shape == mask.shape == (8, 20)
        assert number.tolist() == list(range(8))
        assert "LanceSource(" in repr(source)
        assert source.stats()["images"]["failed"] == 0


def test_outputs_stay_what_they_were_when_the_source_has_gone_on(photos: str) -> None:
    with DALILanceIterator(numbers(photos, {}, batch_size=4)) as iterator:
        batches = list(iterator)
    assert [n for batch in batches for n in batch["number"].tolist()] == list(range(50))


@pytest.mark.parametrize(
    ("policy", "sizes"),
    [("PARTIAL", [16, 16, 16, 2]), ("DROP", [16, 16, 16]), (LastBatchPolicy.FILL, [16, 16, 16, 16])],
)
def test_last_batch(photos: str, policy: Any, sizes: list[int]) -> None:
    with reading(photos, 16, policy) as iterator:
        for _ in range(2):
            batches = list(iterator)
            assert [batch.size for batch in batches] == sizes
            assert len(iterator) == len(sizes)
            assert sum(int(batch.valid.sum()) for batch in batches) == min(50, sum(sizes))
        if policy is LastBatchPolicy.FILL:
            assert batches[-1].rows.tolist() == [48] + [49] * 15
            assert batches[-1].valid.tolist() == [True] * 2 + [False] * 14
            assert torch.equal(batches[-1]["image"][1], batches[-1]["image"][15])


def test_drop_keeps_ranks_equal(photos: str) -> None:
    for rank in range(3):
        with reading(photos, 8, "DROP", rank=rank, world_size=3) as iterator:
            assert [int(batch.valid.sum()) for batch in iterator] == [8, 8]


def test_resume_within_an_epoch_and_across_the_two_loaders(photos: str) -> None:
    expected = LanceDataset(photos, 8, columns=COLUMNS, transforms=WORDS, shuffle=True)
    expected.set_epoch(2)
    whole, following = rows(expected), rows(expected)
    with reading(photos, shuffle=True) as iterator:
        iterator.set_epoch(2)
        states = [iterator.state_dict()]
        for _ in iterator:
            states.append(iterator.state_dict())
    for taken, state in enumerate(states):
        assert (state["epoch"], state["step"]) == (2, taken)
        expected.load_state_dict(state)
        assert rows(expected) == (whole[taken:] or following)
    with reading(photos, shuffle=True) as fresh:
        for taken in (3, 6, 1):
            fresh.load_state_dict(states[taken])
            assert rows(fresh) == whole[taken:]
        assert rows(fresh) == following


def test_a_state_saved_by_two_ranks_resumes_with_one(photos: str) -> None:
    taken = []
    for rank in range(2):
        with reading(photos, shuffle=True, rank=rank, world_size=2) as iterator:
            running = iter(iterator)
            taken += next(running).rows.tolist()
            state = iterator.state_dict()
    with reading(photos, shuffle=True) as iterator:
        iterator.load_state_dict(state)
        left = [row for batch in iterator for row in batch.rows.tolist()]
    assert sorted(taken + left) == list(range(50))


def test_state_of_a_plain_source_counts_what_the_pipeline_has_not_given_back(photos: str) -> None:
    with closing(LanceSource(photos, ["number"], 8)) as source:
        for _ in range(4):
            source()
        assert source.state_dict()["step"] == 4
        assert source.state_dict(pending=2)["step"] == 2
        source.load_state_dict(source.state_dict(pending=2))
        assert source()[0].tolist() == list(range(16, 24))


def test_an_epoch_left_early_begins_anew(photos: str) -> None:
    with reading(photos, shuffle=True) as iterator:
        first = next(iter(iterator)).rows
        for step, _ in enumerate(iterator):
            if step == 2:
                break
        iterator.set_epoch(1)
        other = rows(iterator)
        assert len(other) == 7
        iterator.set_epoch(0)
        assert torch.equal(next(iter(iterator)).rows, first)
        iterator.reset()
        assert torch.equal(next(iterator).rows, first)


def test_an_epoch_is_left_early_even_where_the_pipeline_has_read_it_to_the_end(photos: str) -> None:
    expected = LanceDataset(photos, 8, columns=["number"], shuffle=True)
    first, second = rows(expected), rows(expected)
    with reading(photos, shuffle=True) as iterator:
        for batch in iterator:
            if batch.step == 5:  # of 0 to 6
                break
        assert rows(iterator) == first
        assert rows(iterator) == second
        for batch in iterator:
            if batch.step == 5:
                iterator.set_epoch(0)
                break
        assert rows(iterator) == first


def bad_rows() -> list[bytes | None]:
    files: list[bytes | None] = [jpeg(20 + i, 30, seed=i) for i in range(12)]
    files[5], files[6], files[8], files[9] = None, b"", b"not an image", encode(picture(8, 8), "GIF")
    files[10] = jpeg(20, 30)[:-2]
    return files


BAD = [5, 6, 8, 9, 10]


def test_a_bad_row_is_named_after_the_batches_before_it(store: Callable[..., str]) -> None:
    path = store({"image": bad_rows(), "number": range(12)})
    with DALILanceIterator(decoded(path, None, {}, batch_size=2)) as iterator:
        running = iter(iterator)
        assert rows([next(running), next(running)]) == [[0, 1], [2, 3]]
        with pytest.raises(DecodeError, match="a null - at row 5, column `image`") as raised:
            next(running)
        assert raised.value.row == 5


def test_a_plain_source_raises_for_a_bad_row(store: Callable[..., str]) -> None:
    source = LanceSource(store({"image": bad_rows()}), None, 4)
    with closing(source):
        source()
        with pytest.raises(DecodeError, match="at row 5"):
            source()


@pytest.mark.parametrize(
    ("row", "words"),
    [(6, "0 bytes"), (8, "starting 6e6f7420"), (9, "JPEG, PNG.*got a GIF file"), (10, "without its end marker")],
)
def test_what_is_judged_before_decoding(store: Callable[..., str], row: int, words: str) -> None:
    path = store({"image": [bad_rows()[0], bad_rows()[row]]})
    with closing(LanceSource(path, None, 2)) as source, pytest.raises(DecodeError, match=words):
        source()


def test_images_with_too_many_pixels_are_judged_by_their_header(store: Callable[..., str]) -> None:
    path = store({"image": [jpeg(20, 20), encode(picture(30, 40), "PNG")]})
    words = r"at most 1000 pixels .* got 30x40 = 1200 - at row 1"
    with closing(LanceSource(path, None, 2, max_pixels=1000)) as source, pytest.raises(DecodeError, match=words):
        source()


def test_skip_leaves_bad_rows_out(store: Callable[..., str]) -> None:
    path = store({"image": bad_rows(), "number": range(12)})
    with DALILanceIterator(decoded(path, None, {"on_error": "skip"}, batch_size=4)) as iterator:
        assert rows(iterator) == [[0, 1, 2, 3], [4, 7], [11]]
        iterator.source.last_batch_policy = "FILL"
        assert [batch.rows.tolist() for batch in iterator] == [[0, 1, 2, 3], [4, 7, 7, 7], [11] * 4]


def test_a_batch_of_nothing_but_bad_rows_is_left_out(store: Callable[..., str]) -> None:
    path = store({"image": [jpeg(), b"x", None, jpeg(), jpeg()], "number": range(5)})
    with DALILanceIterator(decoded(path, None, {"on_error": "skip"}, batch_size=1)) as iterator:
        running = iter(iterator)
        first = next(running)
        state = iterator.state_dict()  # the pipeline holds the batches behind the bad ones
        rest = [next(running), next(running)]
        iterator.load_state_dict(state)
        again = list(iterator)
    assert rows([first, *rest]) == [[0], [3], [4]]
    assert [batch.step for batch in rest] == [3, 4]
    assert rows(again) == [[3], [4]]
    with closing(LanceSource(path, ["number"], 1, filter="number < 3", on_error="skip")) as source:
        assert [source()[0].tolist() for _ in range(3)] == [[0], [1], [2]]
    with closing(LanceSource(path, None, 1, on_error="skip")) as source:
        assert [source()[1].tolist() for _ in range(2)] == [[0], [3]]


def test_replace_feeds_the_next_good_row(store: Callable[..., str]) -> None:
    path = store({"image": bad_rows(), "number": range(12)})
    with DALILanceIterator(decoded(path, None, {"on_error": "replace"}, batch_size=6)) as iterator:
        batches = list(iterator)
    assert rows(batches) == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert [batch["number"].tolist() for batch in batches] == [[0, 1, 2, 3, 4, 0], [7, 7, 11, 11, 11, 11]]
    assert torch.cat([batch.valid for batch in batches]).logical_not().nonzero().flatten().tolist() == BAD
    assert torch.equal(batches[0]["image"][5], batches[0]["image"][0])
    assert torch.equal(batches[1]["image"][0], batches[1]["image"][1])
    assert batches[1]["image"][0].any()


def test_replace_feeds_a_black_image_where_no_row_is_good(store: Callable[..., str]) -> None:
    path = store({"image": [jpeg(), jpeg(), b"x", None], "number": [3, 4, 5, 6]})
    with DALILanceIterator(decoded(path, None, {"on_error": "replace"}, batch_size=2)) as iterator:
        _, batch = iterator
    assert batch["image"].shape == (2, 16, 16, 3)
    assert not batch["image"].any()
    assert batch["number"].tolist() == [0, 0]
    assert batch.rows.tolist() == [2, 3]
    assert not batch.valid.any()


def test_mask_keeps_shapes(store: Callable[..., str]) -> None:
    path = store({"image": bad_rows(), "number": range(12)})
    with DALILanceIterator(decoded(path, None, {"on_error": "mask"}, batch_size=4)) as iterator:
        batches = list(iterator)
    assert [batch["image"].shape for batch in batches] == [(4, 16, 16, 3)] * 3
    assert torch.cat([batch.valid for batch in batches]).logical_not().nonzero().flatten().tolist() == BAD
    assert not torch.cat([batch["image"] for batch in batches])[BAD].any()


def test_an_image_that_breaks_inside_dali_is_named(store: Callable[..., str]) -> None:
    whole = encode(picture(64, 64), "PNG")
    middle = len(whole) // 2
    images = [jpeg(), jpeg(), jpeg(), whole[:middle] + bytes(64) + whole[middle + 64 :]]  # every chunk is there
    path = store({"image": images, "number": range(4)})
    iterator = DALILanceIterator(decoded(path, None, {"on_error": "skip"}, batch_size=2))
    with iterator:
        running = iter(iterator)
        assert next(running).rows.tolist() == [0, 1]
        with pytest.raises(DecodeError, match=r"at row 3, column `image`.*DALI fails whole batches"):
            next(running)
        with pytest.raises(DecodeError):
            next(running)


def bmp_555() -> bytes:
    """16 bits a pixel, five for each colour."""
    pixels = bytes(range(24))
    head = struct.pack("<LHHL", 54 + len(pixels), 0, 0, 54)
    return b"BM" + head + struct.pack("<LllHHLLllLL", 40, 4, 3, 1, 16, 0, len(pixels), 0, 0, 0, 0) + pixels


def png_with_a_bad_checksum() -> bytes:
    whole = encode(picture(20, 30), "PNG")
    at = whole.index(b"IEND") - 8  # of the chunk before
    return whole[:at] + b"abcd" + whole[at + 4 :]


REFUSED: dict[str, Callable[[], bytes]] = {
    "BMP": bmp_555,
    "PNG": png_with_a_bad_checksum,
    "TIFF": lambda: encode(picture(20, 30, mode="1"), "TIFF"),
    "TIFF 32": lambda: encode(picture(20, 30, mode="L").convert("I"), "TIFF"),
    "TIFF lzma": lambda: encode(picture(20, 30), "TIFF", compression="lzma"),
    "WEBP": lambda: encode(picture(20, 30), "WEBP", 6, lossless=True),
    "JPEG2000": lambda: encode(picture(20, 30, mode="L").convert("LA"), "JPEG2000"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_valid_file_that_dali_refuses_is_named(kind: str, store: Callable[..., str]) -> None:
    file = REFUSED[kind]()
    assert by_pillow(file).size, "others read it"
    path = store({"image": [jpeg(seed=i) for i in range(5)] + [file, jpeg()], "number": range(7)})
    with DALILanceIterator(decoded(path, None, {}, batch_size=4)) as iterator:
        running = iter(iterator)
        assert next(running).rows.tolist() == [0, 1, 2, 3]
        words = rf"DALI decodes, got a {kind.split()[0]} file that .* it refuses: .+ - at row 5, column `image`"
        with pytest.raises(DecodeError, match=words) as caught:
            next(running)
        assert "no longer valid" not in str(caught.value)
        assert (caught.value.row, caught.value.column) == (5, "image")


def test_what_dali_cannot_carry_travels_beside(store: Callable[..., str]) -> None:
    table = pa.table(
        {
            "image": [jpeg(seed=i) for i in range(5)],
            "name": captions(5),
            "half": pa.array(np.arange(5, dtype=np.float16)),
            "flag": [True, False, None, True, False],
            "box": pa.array([[i, i, i, i] for i in range(5)], pa.list_(pa.float32(), 4)),
            "tags": [["a"], [], None, ["b"], []],
        }
    )
    path = store(table)
    with DALILanceIterator(decoded(path, None, {}, batch_size=3)) as iterator:
        for batch, wanted in zip(iterator, LanceDataset(path, 3), strict=True):
            assert iterator.source.outputs == ["image", "half", "flag", "box"]
            assert set(batch) == set(wanted)
            assert batch["name"] == wanted["name"]
            assert batch["tags"] == wanted["tags"]
            for name in ("half", "flag", "box"):
                assert batch[name].dtype == wanted[name].dtype
                assert torch.equal(batch[name], wanted[name])
            assert {k: v.tolist() for k, v in batch.nulls.items()} == {k: v.tolist() for k, v in wanted.nulls.items()}


@pytest.mark.parametrize(
    "options", [{"exec_dynamic": False}, {"prefetch_queue_depth": 4}, {"enable_conditionals": True}]
)
def test_every_kind_of_executor(photos: str, options: dict[str, Any]) -> None:
    pipeline = decoded(photos, COLUMNS, {"transforms": WORDS, "shuffle": True}, batch_size=8, **options)
    expected = LanceDataset(photos, 8, columns=["number"], shuffle=True)
    with DALILanceIterator(pipeline) as iterator:
        for _ in range(2):
            assert [b["number"].tolist() for b in iterator] == [b["number"].tolist() for b in expected]
        assert next(iter(iterator)).step == 0
        assert iterator.state_dict()["step"] == 1


def test_output_map_names_the_outputs_of_the_pipeline(photos: str) -> None:
    @pipeline_def(batch_size=8, **CPU)
    def twice() -> Any:
        image = lance_reader(photos, ["image"])
        return fn.peek_image_shape(image), fn.decoders.image_random_crop(image, seed=1)

    with DALILanceIterator(twice(), ["shape", "pixels"]) as iterator:
        batch = next(iter(iterator))
    assert set(batch) == {"shape", "pixels"}
    assert batch["shape"][:, :2].tolist() == [[24 + 5 * (i % 7), 20 + 3 * (i % 11)] for i in range(8)]
    with pytest.raises(ConfigError, match="output_map with 2 different names"):
        DALILanceIterator(twice())


def test_the_dynamic_api_takes_the_same_source(photos: str) -> None:
    dataset = LanceDataset(photos, 8, columns=["number"], shuffle=True)
    with closing(LanceSource(photos, ["image", "number"], 8, shuffle=True)) as source:
        for _ in range(2):
            found = []
            for images, numbers in iter(source, None):
                pixels = ndd.resize(ndd.decoders.image(ndd.as_batch(images)), size=[16, 16])
                assert pixels.torch().shape == (len(numbers), 16, 16, 3)
                found.append(numbers.tolist())
            assert found == rows(dataset)  # of one epoch after the other


def test_every_format_that_dali_decodes_passes(store: Callable[..., str]) -> None:
    kinds = ["JPEG", "PNG", "BMP", "TIFF", "PPM", "WEBP", "JPEG2000"]
    files = [encode(picture(24, 32), kind, **({"lossless": True} if kind == "WEBP" else {})) for kind in kinds]
    path = store({"image": files, "number": range(7)})
    with DALILanceIterator(decoded(path, None, {}, batch_size=7)) as iterator:
        (batch,) = iterator
    assert batch.valid.all()


def test_words_that_cannot_work(photos: str) -> None:
    with pytest.raises(ConfigError, match="inside a function under @pipeline_def"):
        lance_reader(photos)
    with pytest.raises(ConfigError, match="only Text in transforms, got Image"):
        LanceSource(photos, transforms={"image": Image(16)})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="Expected drop_last left to DALI"):
        LanceSource(photos, drop_last=True)
    with pytest.raises(ConfigError, match=r"one of \['FILL', 'DROP', 'PARTIAL'\], got 'WRAP'"):
        LanceSource(photos, last_batch_policy="WRAP")
    with pytest.raises(ConfigError, match="at most the pipeline's 4, got 8"):
        numbers(photos, {"batch_size": 8}, batch_size=4)

    @pipeline_def(batch_size=8, **CPU)
    def other() -> Any:
        return fn.random.uniform()

    with pytest.raises(ConfigError, match="a pipeline with lance_reader, or source="):
        DALILanceIterator(other())
    with reading(photos) as iterator:
        next(iter(iterator))
        with pytest.raises(ConfigError, match="before the epoch"):
            iterator.source.last_batch_policy = "DROP"


def test_without_dali_the_import_names_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.delitem(sys.modules, "gpuload.dali")
    with pytest.raises(DeviceError, match=r'pip install "gpuload\[dali1[23]\]"'):
        importlib.import_module("gpuload.dali")


@pytest.mark.gpu
def test_mixed_decoding_on_a_gpu(photos: str) -> None:
    @pipeline_def(batch_size=8, num_threads=2, device_id=0)
    def mixed() -> Any:
        image, number = lance_reader(photos, ["image", "number"], shuffle=True)
        pixels = fn.decoders.image(image, device="mixed", jpeg_fancy_upsampling=True, hw_decoder_load=0.0)
        return pixels, number.gpu()

    with DALILanceIterator(mixed()) as iterator:
        for batch, wanted in zip(iterator, LanceDataset(photos, 8, shuffle=True, device="cpu"), strict=True):
            assert batch["number"].is_cuda
            assert torch.equal(batch["number"].cpu(), wanted["number"])
            for pixels, known in zip(batch["image"], wanted["image"], strict=True):
                error = (pixels.cpu().permute(2, 0, 1).float() - known.float()).pow(2).mean()
                assert error < 6.5  # PSNR 40: the GPU's decoders round differently


@pytest.mark.gpu
def test_mixed_batches_stay_whole_while_the_gpu_is_behind(photos: str) -> None:
    @pipeline_def(batch_size=5, num_threads=2, device_id=0)
    def mixed() -> Any:
        image = fn.decoders.image(lance_reader(photos, ["image"]), device="mixed", hw_decoder_load=0.0)
        return fn.resize(image, size=[64, 64])

    with DALILanceIterator(mixed(), ["image"]) as iterator:
        expected = []
        for batch in iterator:
            torch.cuda.synchronize()
            expected.append(batch["image"].clone())
        torch.cuda.synchronize()
        wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(20):
            for batch, known in zip(iterator, expected, strict=True):
                torch.cuda._sleep(1_000_000)
                wrong += ((batch["image"].int() - known.int()).abs() > 8).sum()
                batch["image"].fill_(0)
                del batch
        assert int(wrong) == 0


def test_dalis_memory_on_a_gpu_is_kept_until_it_has_been_copied(photos: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for the GPU: its events, and DALI's tensors."""
    passed: list[bool] = []

    class Event:
        def __init__(self, blocking: bool) -> None:
            assert blocking, "who waits for it does not spin"
            self.number = len(passed)
            passed.append(False)

        def query(self) -> bool:
            return passed[self.number]

        def synchronize(self) -> None:
            passed[self.number] = True

    monkeypatch.setattr(torch.cuda, "Event", Event)
    stream = SimpleNamespace(record_event=lambda event: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    given: list[Any] = []

    def theirs(tensor: Any) -> Any:
        given.append(SimpleNamespace(device=torch.device("cuda", 0), clone=lambda: from_dlpack(tensor).clone()))
        return given[-1]

    monkeypatch.setattr("gpuload.dali.from_dlpack", theirs)

    pipeline = numbers(photos, {}, batch_size=10)
    with DALILanceIterator(pipeline) as iterator:
        batches = iter(iterator)
        for k in range(3):
            assert next(batches)["number"].tolist() == list(range(10 * k, 10 * k + 10))
            assert iterator.lent == given  # the GPU is behind
        passed[:2] = [True, True]
        next(batches)
        assert iterator.lent == given[2:]
    assert not iterator.lent
    assert all(passed), "closing waits for those who read"


def test_pillow_agrees_with_the_first_picture(photos: str) -> None:
    data = lance.dataset(photos).take([0], columns=["image"]).column("image")[0].as_py()

    @pipeline_def(batch_size=1, **CPU)
    def one() -> Any:
        return fn.decoders.image(lance_reader(photos, ["image"]))

    with DALILanceIterator(one()) as iterator:
        pixels = next(iter(iterator))["image"][0]
    assert (pixels.permute(2, 0, 1).numpy() == by_pillow(data)).all()
