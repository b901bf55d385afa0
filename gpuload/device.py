"""Where things run: a wish enters, a torch device, a decoder and the copy to that device leave."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.utils.data import get_worker_info

from gpuload.batch import Batch
from gpuload.decode import Decoder
from gpuload.decode.cpu import CpuDecoder
from gpuload.errors import ConfigError, DeviceError

DECODERS = ("auto", "cpu")


def choose_device(wish: str | torch.device) -> torch.device:
    """The device that ``"auto"``, ``"cuda"``, ``"cuda:1"`` or ``"cpu"`` means here.

    ``"auto"`` is CUDA where there is a GPU, but the CPU in a DataLoader worker: CUDA tensors do not like to cross
    processes.

    Raises
    ------
    DeviceError
        CUDA was asked for and is not there.
    """
    if wish == "auto":
        return torch.device("cuda" if torch.cuda.is_available() and get_worker_info() is None else "cpu")
    try:
        device = torch.device(wish)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f'Expected device="auto", "cuda", "cuda:N" or "cpu", got {wish!r}.') from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f'Expected device="auto", "cuda", "cuda:N" or "cpu", got {wish!r}.')
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"Expected a CUDA device for device={str(wish)!r}, got {torch.cuda.device_count()} of them with torch "
            f'{torch.__version__}. For a machine with a GPU: pip install "gpuload[cuda13]" and a CUDA build of torch. '
            'Without one: device="cpu" or "auto".'
        )
    return device


def check_words(device: str | torch.device, decoder: str) -> None:
    """Raise at once what `choose_device` and `make_decoder` would raise later."""
    if device != "auto":
        choose_device(device)
    if decoder not in DECODERS:
        raise ConfigError(f"Expected decoder as one of {DECODERS}, got {decoder!r}.")


def make_decoder(wish: str, device: torch.device, max_pixels: int) -> Decoder:
    """The decoder that `wish` means on `device`."""
    check_words(device, wish)
    return CpuDecoder(max_pixels)


def threads_here() -> int:
    """Threads that decode by default: the CPU cores this process may use, shared with the other ranks of this
    machine (torchrun's LOCAL_WORLD_SIZE) and the other DataLoader workers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    worker = get_worker_info()
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    shared = (int(ranks) if ranks.isdigit() else 1) * (worker.num_workers if worker else 1)
    return max(1, cores // max(1, shared))


def one_torch_thread() -> None:
    """For threads that decode: torch's own parallel loops would only fight each other. Holds for the thread alone."""
    torch.set_num_threads(1)


def deliver(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`; copies to a GPU start from page-locked memory and do not wait."""
    if device.type == "cpu":
        return batch
    return batch.pin_memory().to(device, non_blocking=True)


def describe(device: torch.device) -> Any:
    """Device and, for a GPU, its name."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
