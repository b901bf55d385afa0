"""What this machine has and what works on it: nothing enters; parts, decoders tried on pictures, and advice leave.

A part that is missing is no fault unless it was asked for: without a GPU nothing of CUDA is needed. A decoder counts as
working when it decodes every picture to what Pillow makes of it, as nearly as its kind does.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import io
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from gpuload import kernels  # type: ignore[attr-defined, unused-ignore]  # mypy cannot follow package-dir
from gpuload.device import threads_here
from gpuload.errors import ConfigError, DecodeError, DeviceError, install
from gpuload.images import Decoder, Encoded, headers, pillow
from gpuload.images.decode import libjpeg
from gpuload.images.decode.choose import DECODERS, make_decoder
from gpuload.images.resize import cpu_implementation

SECONDS = 0.3  # a decoder is timed
_SIZE = (448, 448)  # 0.2 megapixels, as ImageNet's
_MAX_PIXELS = 1 << 24
_FAR = 12.0  # mean difference of 255 that no rounding and no interpolation of chroma explains
_ENGINE = "nvjpeg"  # the decoder of the JPEG engine: a GPU's alone
_DISTRIBUTIONS = {  # what is asked for, by the names that wheels have: for CUDA 13, 12, or any
    "CuPy": ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
    "nvJPEG": ("nvidia-nvjpeg", "nvidia-nvjpeg-cu12", "nvidia-nvjpeg-cu13"),
    "nvImageCodec": ("nvidia-nvimgcodec-cu13", "nvidia-nvimgcodec-cu12"),
    "DALI": ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
}


@dataclass(frozen=True)
class Part:
    """Something that gpuload can use.

    Attributes
    ----------
    name, found : str
        ``found`` says what is there, or that nothing is.
    ok : bool
    advice : str
        What to do about it, "" where nothing.
    """

    name: str
    found: str
    ok: bool
    advice: str = ""


@dataclass
class Trial:
    """One decoder on one device.

    Attributes
    ----------
    decoder, device : str
    works : bool
    missing : bool
        It is not there, which is no fault of it.
    why : str
        It does not work.
    rate : float
        Images per second, of one caller.
    pictures : dict of str to dict
        Picture → largest and mean difference to Pillow's pixels, 0 to 255.
    """

    decoder: str
    device: str
    works: bool = False
    missing: bool = False
    why: str = ""
    rate: float = 0.0
    pictures: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass
class Diagnosis:
    """All of it; `ok` where every decoder that is there, or was asked for, works.

    Where none was asked for, a GPU's machine also needs the parts that belong to it.
    """

    parts: list[Part]
    trials: list[Trial]
    asked: list[str]

    @property
    def ok(self) -> bool:
        wanted = [trial for trial in self.trials if trial.decoder in self.asked or not trial.missing]
        named = {trial.decoder for trial in self.trials}
        whole = bool(self.asked) or all(part.ok for part in self.parts)
        return whole and named.issuperset(self.asked) and all(trial.works for trial in wanted)

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


def diagnose(decoders: Sequence[str] = ()) -> Diagnosis:
    """Look at the machine, and try every decoder, or those that are asked for.

    Raises
    ------
    ConfigError
        No such decoder.
    """
    known = [word for word in dict.fromkeys([*DECODERS, _ENGINE]) if word != "auto"]
    unknown = [word for word in decoders if word not in known]
    if unknown:
        raise ConfigError(f"Expected decoders among {known}, got {unknown[0]!r}.")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    trials = [
        try_decoder(word, device)
        for word in decoders or known
        for device in devices
        if device == "cuda" or word.partition(":")[0] != _ENGINE or len(devices) == 1
    ]
    found = parts()
    found.insert(4, _engine(trials))
    return Diagnosis(found, trials, list(decoders))


def parts() -> list[Part]:
    """Python, torch, the GPU and what belongs to it, and what was compiled at installation."""
    versions = f"Python {platform.python_version()}, gpuload {importlib.metadata.version('gpuload')}"
    found = [Part("versions", f"{versions}, torch {torch.__version__}", True)]
    found.append(Part("CPU", f"{threads_here()} cores for this process", True))
    gpu = torch.cuda.is_available()
    if gpu:
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found.append(Part("GPU", ", ".join(names), True))
    else:
        found.append(Part("GPU", "none that torch can use: everything runs on the CPU", True, _why_no_gpu()))
    found.append(_driver())
    for name, distributions in _DISTRIBUTIONS.items():
        have = _installed(distributions)
        line = install("dali" if name == "DALI" else "cuda")
        optional = name == "DALI" or not gpu
        line = line if gpu or name == "DALI" else f"nothing without a GPU; with one: {line}"
        found.append(Part(name, have or "not installed", bool(have) or optional, "" if have else line))
    compiled = cpu_implementation() == "compiled"
    again = "Install gpuload where there is a C++ compiler: pip install --force-reinstall --no-deps gpuload"
    found.append(
        Part("resize on the CPU", "compiled" if compiled else "torch, 20 times slower", True, "" if compiled else again)
    )
    own = libjpeg.library() is not None
    said = "libjpeg-turbo with gpuload's Huffman decoder" if own and libjpeg.own_coefficients() else "libjpeg-turbo"
    found.append(Part("JPEG on the CPU", said if own else "simplejpeg, whole images", True, "" if own else again))
    tables = kernels.tables_library() is not None
    found.append(Part("headers and order", "compiled" if tables else "Python, slower", True, "" if tables else again))
    return found


def pictures() -> dict[str, bytes]:
    """The built-in pictures: slopes, edges and grain, in the kinds of file that take ways of their own."""
    height, width = _SIZE
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    grain = np.random.default_rng(0).integers(-9, 10, (height, width, 3))
    slopes = np.stack([x * 255 / width, y * 255 / height, 128 + 100 * np.sin((x + y) / 23)], -1)
    slopes[height // 3 : height // 2, width // 4 : width // 2] = (220, 30, 40)
    colour = Image.fromarray(np.clip(slopes + grain, 0, 255).astype(np.uint8))
    gray = colour.convert("L")
    return {
        "4:4:4": _file(colour, "JPEG", quality=90, subsampling=0),
        "4:2:0": _file(colour, "JPEG", quality=90, subsampling=2),
        "gray": _file(gray, "JPEG", quality=90),
        "progressive": _file(colour, "JPEG", quality=90, progressive=True),
        "PNG": _file(colour, "PNG"),
    }


def try_decoder(word: str, device: str) -> Trial:
    """Decode every picture, compare it with Pillow's, and take the time."""
    trial = Trial(word, device)
    if word.partition(":")[0] == _ENGINE and device == "cpu":
        trial.missing, trial.why = True, "needs a GPU with a JPEG engine"
        return trial
    try:
        decoder = make_decoder(word, torch.device(device), _MAX_PIXELS, threads_here())
    except (DeviceError, ConfigError) as error:
        trial.missing, trial.why = True, str(error)
        return trial
    except Exception as error:
        trial.why = _one_line(error)
        return trial
    try:
        _measure(decoder, trial)
    except DeviceError as error:  # of a library that is loaded at the first image
        trial.missing, trial.why = True, str(error)
    except Exception as error:
        trial.why = _one_line(error)
    finally:
        decoder.close()
    return trial


def _measure(decoder: Decoder, trial: Trial) -> None:
    files = pictures()
    for (name, file), pixels in zip(files.items(), _decode(decoder, list(files.values())), strict=True):
        with Image.open(io.BytesIO(file)) as image:
            expected = np.asarray(image)
        expected = expected.reshape(*expected.shape[:2], -1)
        off = np.abs(pixels.astype(np.int64) - expected)  # gray is one channel, or three that are equal
        trial.pictures[name] = {"largest": float(off.max()), "mean": round(float(off.mean()), 3)}
    far = [name for name, off in trial.pictures.items() if off["mean"] > _FAR]
    trial.works, trial.why = not far, f"far from Pillow's pixels: {', '.join(far)}" if far else ""
    batch, images = list(files.values()) * 8, 0
    began = time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        _decode(decoder, batch)
        images += len(batch)
    trial.rate = images / (time.perf_counter() - began)


def _decode(decoder: Decoder, files: list[bytes]) -> list[NDArray[np.uint8]]:
    """Pixels of whole files, u8[height, width, channels] each, on the host.

    Raises
    ------
    DecodeError
        The first that the decoder refuses.
    """
    encoded, errors = Encoded.of(files), dict[int, DecodeError]()
    table = headers.read(encoded)
    pillow.open_rest(encoded, table, _MAX_PIXELS, errors)
    with decoder.decode(encoded, table, None) as ragged:
        for error in (*errors.values(), *ragged.errors.values()):
            raise error
        return [ragged.pixels(i).cpu().numpy().copy() for i in range(len(files))]


def _engine(trials: list[Trial]) -> Part:
    """Whether the GPU has a JPEG engine, by its decoder."""
    tried = [trial for trial in trials if trial.decoder == _ENGINE]
    if any(trial.works for trial in tried):
        return Part("JPEG engine", "there", True)
    return Part("JPEG engine", "not tried" if not tried else f"none: {tried[0].why}", True)


def _driver() -> Part:
    """The driver of NVIDIA's, asked by CUDA's own library."""
    try:
        library, version = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
        if library.cuDriverGetVersion(ctypes.byref(version)) == 0:
            return Part("driver", f"for CUDA {version.value // 1000}.{version.value % 1000 // 10} and older", True)
    except (OSError, AttributeError):
        pass
    return Part("driver", "none of NVIDIA's", not torch.cuda.is_available())


def _why_no_gpu() -> str:
    if torch.version.cuda is None:
        return "This torch is built without CUDA; https://pytorch.org/get-started has the line for one with it."
    return (
        ""
        if _driver().found.startswith("none")
        else f"torch is built for CUDA {torch.version.cuda}: is the driver older?"
    )


def _installed(distributions: Sequence[str]) -> str:
    """Name and version of the first that is there."""
    for name in distributions:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def _file(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
