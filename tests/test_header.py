"""What a JPEG file says of its end, where the marker of a thumbnail is not the file's, and of its orientation."""

from __future__ import annotations

import io
import struct
import warnings

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image as pillow

from gpuload.images.decode.encoded import Encoded
from gpuload.images.decode.header import ends, has_end, jpeg_orientation


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


@st.composite
def exif(draw: st.DrawFn) -> bytes:
    """An EXIF segment of entries that are mostly as they should be, some bytes of it exchanged, or its end cut off."""
    order = draw(st.sampled_from("<>"))
    tags = st.sampled_from([0x010F, 0x0112, 0x0112, 0x0132, 0x8769, 0xC4A5])
    kinds, numbers, values = (
        st.sampled_from([3, 3, 3, 1, 2, 4, 5, 7, 8, 9, 12, 99]),
        st.integers(0, 5),
        st.integers(0, 9),
    )
    made = b""
    for tag, kind, number in draw(st.lists(st.tuples(tags, kinds, st.one_of(st.just(1), numbers)), max_size=5)):
        inline = struct.pack(order + "HH", draw(values), 0) if kind == 3 else struct.pack(order + "L", draw(values))
        made += struct.pack(order + "HHL", tag, kind, number) + inline
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "LH", 8, len(made) // 12)
    whole = bytearray(b"Exif\0\0" + head + made + bytes(4 + draw(st.integers(0, 40))))
    for at, byte in draw(st.lists(st.tuples(st.integers(6, len(whole) - 1), st.integers(0, 255)), max_size=3)):
        whole[at] = byte
    return bytes(whole[: draw(st.one_of(st.just(len(whole)), st.integers(6, len(whole))))])


SIX = b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"  # the entry that says orientation 6


@given(exif())
@example(b"Exif\0\0II*\0\x08\0\0\0\x02\0" + b"\x0f\x01\x02\0\x05\0\0\0\xff\xff\0\0" + SIX + bytes(9))  # broken before
@example(b"Exif\0\0II*\0\x08\0\0\0\x02\0" + b"\x0f\x01\x63\0\x05\0\0\0\xff\xff\0\0" + SIX + bytes(9))  # unknown before
@example(b"Exif\0\0Exif\0\0II*\0\x08\0\0\0\x01\0" + SIX + bytes(4))
@example(b"Exif\0\0")
def test_the_orientation_is_pillows_whatever_the_exif_data(segment: bytes) -> None:
    file = jpeg(segment)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = jpeg_orientation(np.frombuffer(file, np.uint8))
        try:
            with pillow.open(io.BytesIO(file)) as image:
                expected = image.getexif().get(0x0112)
        except Exception:  # Pillow gives such a file up, metadata and all
            expected = 1
    assert found == (expected if isinstance(expected, int) and 1 <= expected <= 8 else 1)
