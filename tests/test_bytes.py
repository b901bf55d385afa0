"""Images that stay encoded, for DALI: which are judged whole, and that the bytes are the stored ones."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import numpy as np
import pyarrow as pa
import pytest
from making import encode, jpeg, picture

from gpuload import DecodeError
from gpuload.dali import LanceSource

Store = Callable[..., str]
WITH_A_THUMBNAIL = jpeg(40, 50, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + jpeg(8, 8))
FILM = b"film" * 3000  # more than padding


@pytest.mark.parametrize("left", [1, 2, 200])
@pytest.mark.parametrize("more", [b"", FILM], ids=["cut", "film"])
def test_a_cut_file_does_not_end_with_its_thumbnail(store: Store, left: int, more: bytes) -> None:
    assert WITH_A_THUMBNAIL.count(b"\xff\xd9") == 2
    path = store({"image": [WITH_A_THUMBNAIL, WITH_A_THUMBNAIL[:-left] + more]})
    words = r"a whole JPEG file, got \d+ bytes without its end marker - at row 1, column `image`"
    with closing(LanceSource(path, None, 2)) as source, pytest.raises(DecodeError, match=words):
        source()


@pytest.mark.filterwarnings("ignore::gpuload.BadRowWarning")
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("form", ["binary", "struct"])
def test_what_follows_a_whole_file_does_not_matter_and_bytes_are_as_stored(
    store: Store, form: str, large: bool
) -> None:
    files = [WITH_A_THUMBNAIL + FILM, WITH_A_THUMBNAIL, None, encode(picture(9, 8), "PNG") + b"\0" * 9000, jpeg()]
    kind = pa.large_binary() if large else pa.binary()
    column = pa.array(files, kind)
    if form == "struct":
        values = [{"bytes": file, "path": None} for file in files]
        column = pa.array(values, pa.struct({"bytes": kind, "path": pa.string()}))
    with closing(LanceSource(store(pa.table({"image": column})), None, 5, on_error="mask")) as source:
        (fed,) = source()
        batch = source.take()
        assert batch.valid.tolist() == [file is not None for file in files]
        assert batch["image"][2] is None
        for array, file in zip(fed, files, strict=True):
            assert array.dtype == np.uint8
            assert array.tobytes() == file or file is None
