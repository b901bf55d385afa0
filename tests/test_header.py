"""What a JPEG file says of its end: the marker of a thumbnail inside it is not the file's."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image as pillow

from gpuload.decode.encoded import Encoded
from gpuload.decode.header import ends, has_end


def jpeg(exif: bytes = b"") -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    pillow.fromarray(noise).save(file, "JPEG", exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("padding", [b"", b"\0" * 100, b"\r\n", b"\0" * 9000])
def test_a_whole_file_ends_where_its_padding_begins(padding: bytes) -> None:
    # 9,000 bytes are more than are looked at: such a file is left to the decoder that knows best
    assert ends(np.frombuffer(jpeg() + padding, np.uint8)) == (len(padding) < 4096)


@pytest.mark.parametrize("left", [1, 2, 200])
def test_a_cut_file_does_not_end_with_its_thumbnail(left: int) -> None:
    whole = jpeg(exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + jpeg())
    assert whole.count(b"\xff\xd9") == 2
    assert ends(np.frombuffer(whole, np.uint8))
    for cut in (np.frombuffer(whole[:-left], np.uint8), np.frombuffer(whole[:-left] + b"film" * 3000, np.uint8)):
        assert not ends(cut)
        assert not has_end(cut)
        assert list(Encoded(("JPEG",)).decode([np.frombuffer(whole, np.uint8), cut]).errors) == [1]


def test_what_follows_a_whole_file_does_not_matter_to_who_cannot_ask_another_decoder() -> None:
    assert has_end(np.frombuffer(jpeg() + b"film" * 3000, np.uint8))
