"""The one place where decoders are chosen: a word or an object, and a device enter; a `Decoder` leaves."""

from __future__ import annotations

from typing import Any

import torch

from gpuload.device import choose_device
from gpuload.errors import ConfigError
from gpuload.images import Decoder
from gpuload.images.decode import libnvjpeg
from gpuload.images.decode.cpu import CpuDecoder
from gpuload.images.decode.dali import DaliDecoder
from gpuload.images.decode.lanes import LaneDecoder
from gpuload.images.decode.nvimgcodec import NvImageCodecDecoder
from gpuload.images.decode.nvjpeg import NvJpegDecoder

DECODERS = ("auto", "cpu", "nvjpeg", "nvjpeg:alone", "nvimgcodec", "nvimgcodec:parity", "dali", "dali:parity")
CALLS = 2  # to a decoder of a GPU at once: one lays out and submits while the other's images are decoded
_MEMBERS = ("name", "device", "decode", "counts", "close")


def check_decoder(wish: Any, device: str | torch.device) -> None:
    """Raise `ConfigError` for anything that `make_decoder` would not take on `device`, which may be a wish itself."""
    if isinstance(wish, str):
        if wish not in DECODERS:
            raise ConfigError(f"Expected decoder as one of {DECODERS}, got {wish!r}.")
        if wish.startswith("nvjpeg") and choose_device(device).type != "cuda":
            raise ConfigError(
                f'Expected device="cuda" for decoder={wish!r}, whose JPEG engine is part of a GPU, got '
                f'device={str(device)!r}{", which is the CPU here" if device == "auto" else ""}. Do: decoder="auto".'
            )
        return
    missing = [name for name in _MEMBERS if not hasattr(wish, name)]
    if missing:
        raise ConfigError(
            f"Expected decoder as one of {DECODERS} or an object with the members of gpuload.Decoder, got {wish!r} "
            f"without {missing[0]!r}."
        )


def make_decoder(wish: Any, device: torch.device, max_pixels: int, threads: int = 1) -> Decoder:
    """The decoder that `wish` means on `device`; on CUDA, `threads` host threads are for it to use.

    ``"auto"`` is nvJPEG on a card with JPEG engines, nvImageCodec on another and never anything slower, libjpeg-turbo
    and Pillow on the CPU. ``"nvjpeg:alone"`` has no JPEG decoded by the host that the engine takes. A decoder object is
    taken as it is.

    Raises
    ------
    ConfigError
        No such decoder, or one that decodes to another device.
    DeviceError
        Its package is not installed; says what to install. Or the card has no JPEG engine for ``"nvjpeg"``.
    """
    check_decoder(wish, device)
    if not isinstance(wish, str):
        made: Decoder = wish
        if torch.device(made.device) != device:
            raise ConfigError(f"Expected a decoder for {device}, got {made.name!r}, which decodes to {made.device}.")
        return made
    name, _, mode = wish.partition(":")
    cuda = device.type == "cuda"
    if name == "cpu" or (name == "auto" and not cuda):
        return LaneDecoder(device, max_pixels, threads) if cuda else CpuDecoder(max_pixels)
    if name == "nvjpeg" or (name == "auto" and _engines(device)):
        return NvJpegDecoder(device, max_pixels, threads, share=0.0 if mode == "alone" else None)
    shared: dict[str, Any] = {"parity": mode == "parity", "calls": CALLS}
    kind = DaliDecoder if name == "dali" else NvImageCodecDecoder
    return kind(device, max_pixels, threads if cuda else 1, **shared)


def _engines(device: torch.device) -> int:
    """JPEG engines of the card. Without libnvjpeg none are known of: nvImageCodec, which needs it too, then says so."""
    library = libnvjpeg.library()
    return 0 if library is None else libnvjpeg.engines(library, device)


def takes_batches(decoder: Decoder) -> bool:
    """Whether one call gets a whole batch, as is best for a GPU; the others decode slices, in the calling threads.

    A decoder of one's own says so with an attribute ``whole_batches``; without it, its device decides.
    """
    return bool(getattr(decoder, "whole_batches", decoder.device.type == "cuda"))


def calls_at_once(decoder: Decoder, threads: int) -> int:
    """Threads that call the decoder: those that decode, or two that keep it busy."""
    return CALLS if takes_batches(decoder) else threads
