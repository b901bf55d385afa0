"""What the host does for every image that a GPU decodes: all but decoding and the kernel; rows/s and CPU time a row.

Runs anywhere: nvImageCodec makes its objects and is not asked to decode, on photos of 40 x 40 pixels, so that reading
hardly counts. The rate of the line is what Python allows; a GPU that decodes faster would wait for it.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import data
import harness
import torch

SIZE, CALL = 40, 128  # pixels; images a call
CPU = torch.device("cpu")


def small(settings: Any, exif: bool = False) -> list[bytes]:
    """The photos, made small; with the EXIF data of a camera."""
    from PIL import Image as pillow

    camera = pillow.Exif()
    if exif:
        camera[0x0112] = 6  # orientation
        for tag, text in ((0x010F, "A camera's maker"), (0x0110, "A camera"), (0x0132, "2026:01:01 00:00:00")):
            camera[tag] = text
        camera.get_ifd(0x8769).update(dict.fromkeys(range(0x9000, 0x9010), "0232"))
    found = []
    for image, _ in data.encoded(settings.images):
        with pillow.open(io.BytesIO(image)) as photo:
            file = io.BytesIO()
            photo.convert("RGB").resize((SIZE, SIZE)).save(file, "JPEG", quality=80, exif=camera)
            found.append(file.getvalue())
    return found


def stored(settings: Any) -> str:
    """Path of a Lance dataset of them."""
    import lance
    import pyarrow as pa

    def write(path: Path) -> None:
        images = itertools.islice(itertools.cycle(small(settings)), settings.rows)
        lance.write_dataset(pa.table({"image": pa.array(list(images), pa.binary())}), str(path))

    return data.made(settings, f"{SIZE}px.lance", write)


class Blank:
    """Stands for nvImageCodec: makes all its objects, and decodes nothing but the first call, in which a decoder of a
    GPU is tested. Whatever is in the arena is taken for pixels."""

    def __init__(self) -> None:
        from nvidia import nvimgcodec

        self.real = nvimgcodec

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def Decoder(self, **options: Any) -> BlankDecoder:
        return BlankDecoder(self.real.Decoder(**options))


class BlankDecoder:
    def __init__(self, real: Any) -> None:
        self.real = real

    def decode(self, streams: list[Any], images: list[Any], **how: Any) -> list[Any]:
        if self.real is not None:
            real, self.real = self.real, None
            found: list[Any] = real.decode(streams, images=images, **how)
            return found
        return images


def blank() -> Any:
    """The default decoder of a GPU, which makes all its objects and decodes nothing; called as on a GPU."""
    from gpuload.images.decode.nvimgcodec import NvImageCodecDecoder

    decoder = NvImageCodecDecoder(CPU, 10**9, package=Blank())
    decoder.whole_batches = True
    return decoder


def calls(exif: bool) -> harness.Case:
    """Headers and decode calls of one thread."""

    def case(settings: Any) -> harness.Job:
        from gpuload import Encoded
        from gpuload.images import headers

        files, decoder = itertools.cycle(small(settings, exif)), blank()
        encoded = Encoded.of([next(files) for _ in range(CALL)])

        def job() -> Iterator[int]:
            for _ in range(max(1, settings.rows // CALL)):
                with decoder.decode(encoded, headers.read(encoded), None) as ragged:
                    yield len(ragged)

        return job

    return case


def line(settings: Any) -> harness.Job:
    """A dataset's batches, each in a call of its own, as on a GPU: two threads make the calls."""
    from gpuload import Image, LanceDataset

    options: dict[str, Any] = {"device": "cpu", "transforms": {"image": Image(8, crop="random", flip=0.5)}}
    dataset = LanceDataset(stored(settings), CALL, decoder=blank(), **options)
    return lambda: (batch.size for batch in dataset)


def captions(settings: Any) -> harness.Job:
    """Captions to ids and mask."""
    from gpuload.fields.text import Tokens

    tokens, texts = Tokens("bytes", 77, None, True, None), [f"{'a caption ' * (3 + i % 9)}" for i in range(CALL)]
    return lambda: (len(tokens(texts)[0]) for _ in range(max(1, settings.rows // CALL)))


CASES = {
    "decode calls": calls(exif=False),
    "decode calls, EXIF": calls(exif=True),
    "captions": captions,
    "line, 2 threads": line,
}

if __name__ == "__main__":
    harness.main("host", CASES, {**data.ARGUMENTS, "rows": 40960}, lambda settings: stored(settings) and None)
