"""Damaged images through whole datasets: every decoder that runs here, against Pillow and against unharmed neighbours.

``python benchmarks/fuzz.py --images 10000 [--decoders cpu,nvimgcodec,dali] [--seed N] [--keep FOLDER]``

Each image is one of a few dozen good files of many formats after one to three injuries: bytes changed, cut, repeated or
put in, header fields that lie, tables and chunks left out, doubled or exchanged, the head of one file on the tail of
another. Every second row of a dataset is whole. Child processes read them with limits on time and memory, so that a
crash, a hang or a file that takes all memory is a line of the report.

What must hold: no child dies; no whole row is lost, invalid or other than alone; and with ``cpu`` a damaged row is
valid exactly where Pillow reads the file, with Pillow's very pixels. The other decoders have readers of their own for
some formats: where they disagree with Pillow about a damaged file is counted.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import struct
import subprocess
import sys
import tempfile
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
from numpy.typing import NDArray

DECODERS = ("cpu", "nvimgcodec", "dali")
CHUNK = 500  # images a child
SECONDS, BYTES = 600, 8 << 30  # of a child, at most
MAX_PIXELS = 1_000_000
_SIDE = 24  # pixels of crops
_Random = np.random.Generator


def whole_files() -> list[bytes]:
    """Good files, small, of many formats and kinds."""
    made: list[bytes] = []

    def save(image: PIL.Image.Image, kind: str, orientation: int = 1, **options: Any) -> None:
        file = io.BytesIO()
        if orientation != 1:
            exif = PIL.Image.Exif()
            exif[0x0112] = orientation
            options["exif"] = exif
        image.save(file, kind, **options)
        made.append(file.getvalue())

    for i, (height, width) in enumerate([(40, 56), (33, 17), (9, 64)]):
        coarse = np.random.default_rng(i).integers(0, 256, (4, 5, 4), np.uint8)
        picture = PIL.Image.fromarray(coarse).resize((width, height), PIL.Image.Resampling.BICUBIC)
        rgb = picture.convert("RGB")
        for subsampling in (0, 1, 2):
            save(rgb, "JPEG", subsampling=subsampling, restart_marker_blocks=i)
        save(rgb, "JPEG", 6, progressive=True)
        save(rgb, "JPEG", 3, optimize=True, keep_rgb=True)
        save(rgb.convert("CMYK"), "JPEG")
        save(rgb.convert("L"), "JPEG", 5)
        for mode in ("RGB", "L", "1", "P", "LA", "I;16"):
            save(rgb.convert("L").convert(mode) if mode in ("LA", "I;16") else rgb.convert(mode), "PNG")
        save(picture, "PNG", 8)
        save(rgb, "WEBP", 6, quality=60)
        save(picture, "WEBP", lossless=True)
        save(rgb.quantize(30), "GIF")
        save(rgb, "BMP")
        save(rgb.convert("1"), "BMP")
        save(rgb, "TIFF", 7, compression="tiff_lzw")
        save(rgb, "TIFF")
        save(rgb, "PPM")
        save(rgb, "JPEG2000")
        save(rgb, "QOI")
        save(rgb, "AVIF", 6)
    return made


def parts_of(file: bytes) -> list[bytes]:
    """JPEG segments or PNG chunks, the pixels last; pieces of other files."""
    if file.startswith(b"\xff\xd8"):
        found, at = [file[:2]], 2
        while at + 4 <= len(file) and file[at] == 0xFF and file[at + 1] != 0xDA:
            end = at + 2 + int.from_bytes(file[at + 2 : at + 4], "big")
            found.append(file[at:end])
            at = end
        return [*found, file[at:]]
    if file.startswith(b"\x89PNG"):
        found, at = [file[:8]], 8
        while at + 8 <= len(file):
            end = at + 12 + int.from_bytes(file[at : at + 4], "big")
            found.append(file[at:end])
            at = end
        return found
    step = max(1, len(file) // 12)
    return [file[at : at + step] for at in range(0, len(file), step)]


def bytes_changed(file: bytes, random: _Random, files: list[bytes]) -> bytes:
    data = bytearray(file)
    for _ in range(int(random.integers(1, 8))):
        data[int(random.integers(len(data)))] = int(random.choice([0, 1, 0x7F, 0x80, 0xD8, 0xFF, random.integers(256)]))
    return bytes(data)


def cut(file: bytes, random: _Random, files: list[bytes]) -> bytes:
    start, end = sorted(random.integers(0, len(file) + 1, 2).tolist())
    return [file[:end], file[:start] + file[end:], file[start:]][int(random.integers(3))]


def put_in(file: bytes, random: _Random, files: list[bytes]) -> bytes:
    at = int(random.integers(len(file)))
    more = random.bytes(int(random.integers(1, 64))) if random.integers(2) else file[at : at + 64]
    return file[:at] + more + file[at:]


def lying(file: bytes, random: _Random, files: list[bytes]) -> bytes:
    """Another size, depth, number of components or kind in the header, checksums right."""
    value = int(random.choice([0, 1, 2, 8, 12, 16, 255, 256, 1000, 9400, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1]))
    parts = parts_of(file)
    for i, part in enumerate(parts):
        if part[:1] == b"\xff" and len(part) > 9 and 0xC0 <= part[1] <= 0xCF and part[1] not in (0xC4, 0xCC):
            at, size = [(1, 1), (4, 1), (5, 2), (7, 2), (9, 1), (11, 1)][int(random.integers(6))]
            value = value if at > 1 else 0xC0 + value % 16
            parts[i] = part[:at] + (value % 256**size).to_bytes(size, "big") + part[at + size :]
            return b"".join(parts)
        if part[4:8] == b"IHDR":
            at, size = [(8, 4), (12, 4), (16, 1), (17, 1), (20, 1)][int(random.integers(5))]
            body = part[4:at] + (value % 256**size).to_bytes(size, "big") + part[at + size : -4]
            parts[i] = part[:4] + body + struct.pack(">I", zlib.crc32(body))
            return b"".join(parts)
    at, size = int(random.integers(min(64, len(file)))), int(random.choice([1, 2, 4]))
    return file[:at] + (value % 256**size).to_bytes(size, "little") + file[at + size :]


def tables(file: bytes, random: _Random, files: list[bytes]) -> bytes:
    """Segments or chunks left out, doubled or exchanged."""
    parts = parts_of(file)
    if len(parts) < 3:
        return file
    i, k = random.integers(1, len(parts), 2).tolist()
    which = int(random.integers(3))
    if which == 0:
        del parts[i]
    elif which == 1:
        parts.insert(k, parts[i])
    else:
        parts[i], parts[k] = parts[k], parts[i]
    return b"".join(parts)


def spliced(file: bytes, random: _Random, files: list[bytes]) -> bytes:
    other = files[int(random.integers(len(files)))]
    if random.integers(2):
        a, b = parts_of(file), parts_of(other)
        return b"".join(a[: int(random.integers(1, len(a) + 1))] + b[int(random.integers(len(b))) :])
    return file[: int(random.integers(len(file)))] + other[int(random.integers(len(other))) :]


INJURIES: list[Callable[[bytes, _Random, list[bytes]], bytes]] = [bytes_changed, cut, put_in, lying, tables, spliced]


def damaged(seed: int, index: int, files: list[bytes]) -> bytes:
    """Image `index` of a run: a function of (seed, index)."""
    random = np.random.default_rng([seed, index])
    file = files[int(random.integers(len(files)))]
    for _ in range(int(random.choice([1, 1, 1, 2, 3]))):
        file = INJURIES[int(random.integers(len(INJURIES)))](file or b"\0", random, files)
    return file


def by_pillow(file: bytes) -> NDArray[np.uint8] | None:
    """u8[3, H, W], turned upright; None where Pillow refuses the file or it has more than `MAX_PIXELS`."""
    formats = [name for name in PIL.Image.ID if name not in ("EPS", "WMF")]  # these run other programs, or draw
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with PIL.Image.open(io.BytesIO(file), formats=formats) as image:
                if not 0 < image.width * image.height <= MAX_PIXELS:
                    return None
                image.load()
                pixels = _upright(image)
        except Exception:  # Pillow raises nearly anything
            return None
    return np.ascontiguousarray(np.broadcast_to(np.atleast_3d(pixels), (*pixels.shape[:2], 3)).transpose(2, 0, 1))


def _upright(image: PIL.Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I"):  # 16 bits: gpuload keeps the high byte, where Pillow clips
        found = PIL.Image.fromarray((np.clip(np.asarray(image, np.int64), 0, 65535) >> 8).astype(np.uint8))
    elif image.mode in ("L", "LA", "La", "1", "F"):
        found = image.convert("L")
    else:
        found = image.convert("RGBA" if "transparency" in image.info else "RGB").convert("RGB")
    try:
        value = image.getexif().get(0x0112) if image.format != "TIFF" else 1  # those it has turned already
    except Exception:  # broken metadata do not make an image unreadable
        value = 1
    exif = PIL.Image.Exif()
    exif[0x0112] = value if isinstance(value, int) and 1 <= value <= 8 else 1
    found.info.pop("exif", None)
    found.info["exif"] = exif.tobytes()
    return np.asarray(PIL.ImageOps.exif_transpose(found))


def check(seed: int, first: int, count: int, decoders: list[str], folder: str) -> dict[str, Any]:
    """What a child does: `count` damaged images from `first` on, every decoder. Returns the report."""
    import lance
    import pyarrow as pa

    PIL.Image.init()
    files = whole_files()
    rows: list[bytes] = []
    for k in range(count):
        rows += [files[(first + k) % len(files)], damaged(seed, first + k, files)]
    wanted = [by_pillow(row) for row in rows]
    path, truth = f"{folder}/rows.lance", f"{folder}/truth.lance"
    lance.write_dataset(pa.table({"image": rows}), path)
    lance.write_dataset(pa.table({"image": [b"" if w is None else _png(w) for w in wanted]}), truth)
    found: dict[str, Any] = {"images": count, "read by Pillow": sum(w is not None for w in wanted[1::2]), "wrong": []}
    for name in decoders:
        whole = _read(path, name, None)
        compare(found, f"{name}, whole", wanted, whole, strict=name == "cpu", first=first)
    crops, want = _read(path, "cpu", _SIDE), _read(truth, "cpu", _SIDE)
    compare(found, "cpu, crops", want, crops, strict=True, first=first, most=1e-5)
    return found


def _png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(file, "PNG")
    return file.getvalue()


def _read(path: str, name: str, size: int | None) -> list[NDArray[Any] | None]:
    """The pixels of every row, None where it is not valid."""
    import torch

    import gpuload
    from gpuload.images.decode.choose import make_decoder

    decoder = "cpu" if name == "cpu" else make_decoder(name, torch.device("cpu"), MAX_PIXELS)
    image = gpuload.Image(size, dtype=torch.uint8 if size is None else torch.float32)
    rows: dict[int, NDArray[Any] | None] = {}
    options: dict[str, Any] = {"device": "cpu", "decoder": decoder, "on_error": "mask", "max_pixels": MAX_PIXELS}
    with gpuload.LanceDataset(path, 16, transforms={"image": image}, **options) as dataset:
        for batch in dataset:
            for row, ok, pixels in zip(batch.rows.tolist(), batch.valid.tolist(), batch["image"], strict=True):
                assert row not in rows
                rows[row] = pixels.numpy() if ok else None
        assert len(rows) == dataset.dataset.count_rows()
    return [rows[i] for i in range(len(rows))]


def compare(
    found: dict[str, Any], name: str, wanted: list[Any], got: list[Any], *, strict: bool, first: int, most: float = 0
) -> None:
    """Count where rows differ, and list what may not."""
    tally: Counter[str] = Counter()
    for i, (want, pixels) in enumerate(zip(wanted, got, strict=True)):
        if (want is None) != (pixels is None):
            kind = "refused" if pixels is None else "read, where Pillow does not"
        elif want is None or (want.shape == pixels.shape and np.abs(want.astype(float) - pixels).max() <= most):
            continue
        else:
            kind = "other pixels"
        tally[kind] += 1
        if strict or i % 2 == 0:
            place = f"image {first + i // 2}" if i % 2 else f"the whole file before image {first + i // 2}"
            found["wrong"].append(f"{name}: {place}: {kind}")
    found[name] = dict(tally)


def child(seed: int, first: int, count: int, decoders: list[str], seconds: int = SECONDS) -> dict[str, Any]:
    """The report of a child; of one that died, how."""
    where = {"first": first, "count": count, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--child", json.dumps([BYTES, seed, first, count, decoders, folder])]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return {**where, "wrong": [f"images {first} to {first + count}: not done after {seconds} s"]}
    if done.returncode:
        end = done.stderr.strip().splitlines()[-1:]
        return {**where, "wrong": [f"images {first} to {first + count}: the child ended with {done.returncode} {end}"]}
    report: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return report


def run(images: int, seed: int, decoders: list[str], chunk: int = CHUNK) -> dict[str, Any]:
    """All of them; the sum of the reports."""
    total: dict[str, Any] = {"images": 0, "read by Pillow": 0, "wrong": []}
    for first in range(0, images, chunk):
        report = child(seed, first, min(chunk, images - first), decoders)
        for name, value in report.items():
            if isinstance(value, dict):
                total[name] = dict(Counter(total.get(name, {})) + Counter(value))
            elif name in ("images", "read by Pillow", "wrong"):
                total[name] += value
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--decoders", default=",".join(DECODERS))
    parser.add_argument("--keep", type=Path, default=None, help="a folder for the images of a run, by number")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.child:
        most, *what = json.loads(settings.child)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))  # here, for the parent may not fork beside Lance
        print(json.dumps(check(*what)))
        return
    if settings.keep:
        settings.keep.mkdir(parents=True, exist_ok=True)
        files = whole_files()
        for index in range(settings.images):
            (settings.keep / f"{index}").write_bytes(damaged(settings.seed, index, files))
    report = run(settings.images, settings.seed, settings.decoders.split(","))
    print(json.dumps(report, indent=1))
    sys.exit(bool(report["wrong"]))


if __name__ == "__main__":
    main()
