"""One shape: ragged uint8 pixels of N images and M views of them enter, one ``[M, C, H, W]`` tensor is filled.

Three implementations of one definition: `kernels/resize_normalize.cu` on CUDA; its CPU build
(`kernels/resize_cpu.cpp`) where the package was installed with a compiler; and `resize_twin` in torch, which the
other two are tested against and which works everywhere.

The definition is Pillow's ``resize((W, H), filter, box=region)``. Then the mirror, then ``value * scale + shift`` per
channel; uint8 rounds to the nearest and clamps.

- Bilinear: without the rounding in between. A triangle of half-width ``max(1, scale)`` source pixels, cut at the
  image's edge (not at the region's), its weights divided by their sum.
- Bicubic: Keys' cubic (a = -0.5), twice as wide. First along the axis that Pillow takes first, in its integers, rounded
  and clipped to 0..255; then along the other, clipped but not rounded.
- Nearest: the pixel in which the output's centre lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpuload import kernels  # type: ignore[attr-defined, unused-ignore]  # mypy cannot follow package-dir
from gpuload.images import VIEW, Ragged, pillow
from gpuload.images.transform import Image
from gpuload.images.views import inner, to_seen, to_stored

PAD = 114  # of 255: the gray around a letterbox
LUMA = (19595, 38470, 7471)  # ITU-R 601-2 in 1/65536, as Pillow's convert("L")


def resize_normalize(ragged: Ragged, views: NDArray[np.void], image: Image, out: torch.Tensor) -> None:
    """Crop, orient, resize, mirror and normalise M views of N images into `out`, in one launch.

    Parameters
    ----------
    ragged : Ragged
        N images. The views of one of height 0 become zeros.
    views : VIEW[M]
        Regions in pixels of the whole, oriented images.
    image : Image
        For its mode, dtype, filter, mean and std; the size is that of `out`.
    out : Tensor[M, C, H, W]
        Written; on ``ragged.arena.device``, contiguous or channels-last, of dtype ``image.dtype``. May be a slice
        of a batch: threads may fill disjoint slices at once.

    Raises
    ------
    ValueError
        The arguments do not fit each other.
    """
    _check(ragged, views, image, out)
    if out.is_cuda:
        kernels.run_cuda(rows(ragged, views, image, out.shape[2:]), out, affine(image), image.interpolation)
    elif (library := kernels.cpu_library()) is not None:
        table = rows(ragged, views, image, out.shape[2:])
        kernels.run_cpu(library, table, out, affine(image), image.interpolation)
    else:
        resize_twin(ragged, views, image, out)


def resize_padded(ragged: Ragged, views: NDArray[np.void], image: Image, out: torch.Tensor) -> None:
    """`resize_normalize` for ``crop="pad"``: whole images in the middle of their outputs, gray around them.

    Parameters are those of `resize_normalize`; one launch for each size of what lies in the middle.
    """
    table = ragged.table[views["image"]]
    turned = table["orientation"] >= 5
    heights = np.where(turned, table["whole_width"], table["whole_height"]).astype(np.int64)
    widths = np.where(turned, table["whole_height"], table["whole_width"]).astype(np.int64)
    places = inner(image, heights, widths, views["flip"])
    scale, shift = image.scale_shift()
    for channel in range(image.channels):
        out[:, channel] = PAD * scale[channel] + shift[channel]
    whole = views.copy()
    whole["region"] = np.stack([np.zeros(len(table)), np.zeros(len(table)), widths, heights], axis=1)
    layout = torch.contiguous_format if out.is_contiguous() else torch.channels_last
    for size in np.unique(places[:, 2:], axis=0).tolist():
        chosen = np.flatnonzero((places[:, 2:] == size).all(axis=1))
        made = torch.empty((len(chosen), image.channels, *size), dtype=out.dtype, device=out.device)
        made = made.contiguous(memory_format=layout)
        resize_normalize(ragged, whole[chosen], image, made)
        for k, m in enumerate(chosen.tolist()):
            if not table["height"][m]:
                out[m] = 0
                continue
            top, left, tall, wide = places[m].tolist()
            out[m, :, top : top + tall, left : left + wide] = made[k]


def implementation(device: torch.device) -> str:
    """What `resize_normalize` runs for tensors of `device`: "cuda", or as `cpu_implementation`."""
    return "cuda" if device.type == "cuda" else cpu_implementation()


def cpu_implementation() -> str:
    """What `resize_normalize` runs for CPU tensors: "compiled", or "torch" where no compiler was at hand."""
    return "torch" if kernels.cpu_library() is None else "compiled"


def resize_twin(ragged: Ragged, views: NDArray[np.void], image: Image, out: torch.Tensor) -> None:
    """`resize_normalize` in plain torch, float32, on any device: the definition that the kernels are tested against."""
    (height, width), device = out.shape[2:], out.device
    scale, shift = (torch.tensor(v, device=device).view(-1, 1, 1) for v in image.scale_shift())
    _check_images(views, len(ragged))
    filtered = {"bilinear": _bilinear, "bicubic": _bicubic, "nearest": _nearest}[image.interpolation]
    table = rows_twin(ragged, views, image, (height, width))
    for m, i in enumerate(views["image"].tolist()):
        if not ragged.table["height"][i]:
            out[m] = 0
            continue
        pixels = _oriented(ragged, i).movedim(2, 0)  # u8[c, h, w]
        to_luma = image.channels == 1 and len(pixels) == 3
        if to_luma and image.interpolation != "bilinear":
            pixels = _luma(pixels)
        values = filtered(pixels, table[m], (height, width))  # f32[c, H, W]
        if to_luma and image.interpolation == "bilinear":
            values = (values * torch.tensor(LUMA, device=device).view(3, 1, 1)).sum(0, keepdim=True) / 65536
        if views["flip"][m]:
            values = values.flip(2)
        values = values * scale + shift  # one channel becomes three here
        out[m] = (values + 0.5).floor().clamp(0, 255) if out.dtype == torch.uint8 else values


def _bilinear(pixels: torch.Tensor, row: Any, size: tuple[int, int]) -> torch.Tensor:
    """f32[c, H, W] of u8[c, h, w]: the region of a ROW."""
    x0, y0, w, h = row["region"].tolist()
    top, down = _weights(y0, h, size[0], pixels.shape[1], 1)
    left, across = _weights(x0, w, size[1], pixels.shape[2], 1)
    seen = pixels[:, top : top + down.shape[1], left : left + across.shape[1]].float()
    first, second = (torch.from_numpy(weights.astype(np.float32)).to(pixels.device) for weights in (down, across))
    return first @ seen @ second.T


def _bicubic(pixels: torch.Tensor, row: Any, size: tuple[int, int]) -> torch.Tensor:
    """f32[c, H, W] of u8[c, h, w]: the region of a ROW, whole numbers after the first pass."""
    x0, y0, w, h = row["region"].tolist()
    top, down = _weights(y0, h, size[0], pixels.shape[1], 2)
    left, across = _weights(x0, w, size[1], pixels.shape[2], 2)
    seen = pixels[:, top : top + down.shape[1], left : left + across.shape[1]].double()
    if row["down_first"]:
        seen, down, across = seen.mT, across, down
    whole = np.trunc(across * 2**22 + np.copysign(0.5, across))  # Pillow's weights; their sums are exact in double
    first = (seen @ torch.from_numpy(whole).to(pixels.device).T / 2**22 + 0.5).floor().clamp(0, 255)
    second: torch.Tensor = torch.from_numpy(down.astype(np.float32)).to(pixels.device)
    values = torch.clamp(second @ first.float(), 0, 255)
    return values.mT if row["down_first"] else values


def _nearest(pixels: torch.Tensor, row: Any, size: tuple[int, int]) -> torch.Tensor:
    """f32[c, H, W] of u8[c, h, w]: the region of a ROW."""
    x0, y0, w, h = row["region"].tolist()
    places = []
    for start, extent, count, origin, whole in (
        (y0, h, size[0], int(row["top"]), pixels.shape[1]),
        (x0, w, size[1], int(row["left"]), pixels.shape[2]),
    ):
        steps = np.full(count, extent / count)
        steps[0] = start + origin + steps[0] * 0.5
        at = np.add.accumulate(steps)  # Pillow adds up, too, and its rounding decides where a centre lies between two
        places.append(torch.from_numpy(np.clip(np.nan_to_num(np.floor(at)) - origin, 0, whole - 1).astype(np.int64)))
    down, across = (place.to(pixels.device) for place in places)
    return pixels[:, down][:, :, across].float()


def within(table: NDArray[np.void], regions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Regions in pixels of whole, oriented images → of what was decoded of them, oriented.

    Parameters
    ----------
    table : PIXELS[M]
        Of the image of each region.
    regions : f64[M, 4]
        x0, y0, width, height.
    """
    whole = (
        (table["scale"] == 1) & (table["height"] == table["whole_height"]) & (table["width"] == table["whole_width"])
    )
    if whole.all():
        return regions
    turned = table["orientation"]
    stored = to_stored(regions, turned, table["whole_height"], table["whole_width"]) * table["scale"][:, None]
    stored[:, 0] -= table["x"]
    stored[:, 1] -= table["y"]
    return np.where(whole[:, None], regions, to_seen(stored, turned, table["height"], table["width"]))


def native(ragged: Ragged, i: int, flip: bool, image: Image) -> torch.Tensor:
    """Image i at its own size: oriented, mirrored, in the mode, dtype and normalisation of `image`.

    Parameters
    ----------
    ragged : Ragged
    i : int
    flip : bool
        Mirror left and right.
    image : Image
        ``mode="L"`` gives exactly the values of Pillow's ``convert("L")``.

    Returns
    -------
    Tensor[C, h, w]
        Contiguous, its own memory, on ``ragged.arena.device``; [C, 0, 0] where there is no image.
    """
    device = ragged.arena.device
    if not ragged.table["height"][i]:
        return torch.zeros((image.channels, 0, 0), dtype=image.dtype, device=device)
    one = Ragged(ragged.arena, ragged.table[i : i + 1])
    height, width = int(one.table["height"][0]), int(one.table["width"][0])
    if one.table["orientation"][0] >= 5:
        height, width = width, height
    out = torch.empty((image.channels, height, width), dtype=image.dtype, device=device)
    to_luma = image.channels < ragged.table["channels"][i]
    plain = image.dtype == torch.uint8 and not to_luma
    rounds_luma = to_luma and image.dtype != torch.uint8  # before it normalises, where the kernels round only results
    if not plain and not rounds_luma and (out.is_cuda or kernels.cpu_library() is not None):
        view = np.zeros(1, VIEW)
        view["region"], view["flip"] = (0, 0, width, height), flip  # every weight is then 1 or 0
        resize_normalize(one, view, image, out[None])
        return out
    pixels = _oriented(one, 0).movedim(2, 0)
    if flip:
        pixels = pixels.flip(2)
    if to_luma:
        pixels = _luma(pixels)
    if plain and not out.is_cuda:
        out.numpy()[...] = pixels.numpy()  # on this thread alone, and faster than torch's
        return out
    if image.dtype == torch.uint8:
        return out.copy_(pixels)
    scale, shift = (torch.tensor(v, device=device).view(-1, 1, 1) for v in image.scale_shift())
    return out.copy_(pixels * scale + shift)


def rows(ragged: Ragged, views: NDArray[np.void], image: Image, size: Sequence[int]) -> NDArray[np.void]:
    """The kernels' table, ROW[M], for the filter of `image` and outputs of `size` (height, width).

    Raises
    ------
    ValueError
        A view is of none of the images.
    """
    library = kernels.tables_library()
    if library is None or image.interpolation != "bilinear":
        return rows_twin(ragged, views, image, size)
    found = np.empty(len(views), kernels.ROW)
    made = kernels.run_rows(library, ragged.table, views, ragged.arena.data_ptr(), found)
    if made < len(views):
        raise ValueError(f"Expected views of {len(ragged)} images, got one of image {views['image'][made]}.")
    return found


def rows_twin(ragged: Ragged, views: NDArray[np.void], image: Image, size: Sequence[int]) -> NDArray[np.void]:
    """`rows` in NumPy: for where nothing could be compiled, and for the filters that need more than the region."""
    _check_images(views, len(ragged))
    found, table = np.zeros(len(views), kernels.ROW), ragged.table[views["image"]]
    found["pixels"] = table["offset"] + ragged.arena.data_ptr()
    for name in ("pitch", "height", "width", "channels", "orientation"):
        found[name] = table[name]
    regions = views["region"] if image.interpolation == "bilinear" else rounded(views["region"])
    found["region"], found["flip"] = within(table, regions), views["flip"]
    if image.interpolation == "nearest":
        corners = regions[:, :2] * table["scale"][:, None] - found["region"][:, :2]
        found["left"], found["top"] = np.rint(np.nan_to_num(corners)).T
    if image.interpolation == "bicubic" and pillow.chooses_first_pass():
        found["down_first"] = down_first(table, size)
    return found


def down_first(table: NDArray[np.void], size: Sequence[int]) -> NDArray[np.bool_]:
    """bool[M]: for which images, PIXELS[M], Pillow resizes down columns first; by their whole size alone."""
    turned = table["orientation"] >= 5
    heights = np.where(turned, table["whole_width"], table["whole_height"])
    widths = np.where(turned, table["whole_height"], table["whole_width"])
    found: NDArray[np.bool_] = (size[0] < heights) & (heights - size[0] > 2 * (widths - size[1]))
    return found


def rounded(regions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Regions f64[M, 4] as Pillow takes a box (x0, y0, x1, y1): as four floats."""
    low = regions[:, :2].astype(np.float32)
    high = (regions[:, :2] + regions[:, 2:]).astype(np.float32)
    return np.concatenate([low, high - low], axis=1).astype(np.float64)


def affine(image: Image) -> NDArray[np.float32]:
    """Scale of three channels, then shift of three channels; with one channel the others are unused."""
    scale, shift = image.scale_shift()
    unused = (0.0,) * (3 - image.channels)
    return np.array(scale + unused + shift + unused, np.float32)


def _check(ragged: Ragged, views: NDArray[np.void], image: Image, out: torch.Tensor) -> None:
    m = len(views)
    good = views.dtype == VIEW and out.dim() == 4 and out.shape[:2] == (m, image.channels)
    if not good or out.dtype != image.dtype or out.device != ragged.arena.device:
        raise ValueError(
            f"Expected VIEW[{m}] and out [{m}, {image.channels}, H, W] of {image.dtype} on {ragged.arena.device}, got "
            f"{views.dtype} {views.shape} and {tuple(out.shape)} of {out.dtype} on {out.device}."
        )
    if not (out.is_contiguous() or out.is_contiguous(memory_format=torch.channels_last)):
        raise ValueError(f"Expected out contiguous or channels-last, got strides {out.stride()} of {tuple(out.shape)}.")


def _check_images(views: NDArray[np.void], n: int) -> None:
    beyond = views["image"][(views["image"] < 0) | (views["image"] >= n)]
    if len(beyond):
        raise ValueError(f"Expected views of {n} images, got one of image {beyond[0]}.")


def _oriented(ragged: Ragged, i: int) -> torch.Tensor:
    """View or copy of image i as a person sees it, u8[h, w, c]: its EXIF orientation (1..8) applied."""
    pixels, orientation = ragged.pixels(i), int(ragged.table["orientation"][i])
    mirrored = [axis for axis, which in ((0, (3, 4, 6, 7)), (1, (2, 3, 7, 8))) if orientation in which]
    if mirrored:
        pixels = pixels.flip(mirrored)
    return pixels.transpose(0, 1) if orientation >= 5 else pixels


def _luma(pixels: torch.Tensor) -> torch.Tensor:
    """i32[1, h, w] of u8[3, h, w]: exactly Pillow's ``convert("L")``."""
    factors = torch.tensor(LUMA, dtype=torch.int32, device=pixels.device).view(3, 1, 1)
    return ((pixels.int() * factors).sum(0, keepdim=True, dtype=torch.int32) + 32768) >> 16


def _weights(start: float, extent: float, count: int, size: int, radius: int) -> tuple[int, NDArray[np.float64]]:
    """The filter along one axis: `count` outputs over source pixels [start, start + extent) of an axis of `size`.

    Returns the first source pixel any output sees, and f64[count, pixels seen]; rows sum to 1. Radius 1 is the
    triangle, 2 the cubic.
    """
    scale = extent / count
    step = max(1.0, scale)
    support = radius * step
    centers = start + (np.arange(count) + 0.5) * scale
    first = max(0, int(centers[0] - support + 0.5))
    last = min(size, int(centers[-1] + support + 0.5))
    at = np.arange(first, max(last, first + 1))
    x = np.abs((at - centers[:, None] + 0.5) / step)
    if radius == 1:
        weights = np.clip(1 - x, 0, None)
    else:
        inner, outer = (1.5 * x - 2.5) * x * x + 1, -0.5 * (((x - 5) * x + 8) * x - 4)
        weights = np.where(x < 1, inner, np.where(x < 2, outer, 0))
    return first, weights / weights.sum(axis=1, keepdims=True)
