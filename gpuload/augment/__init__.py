"""What changes pixels once they are cropped and resized: a batch of images and draws enter, the images leave changed.

`Image(augment=(...))` takes what changes single images: a callable ``(images, draws) → images``, f32[M, C, H, W] in
0..1 on the batch's device and stream, before normalisation; what has a true attribute ``normalized`` comes after it.
`LanceDataset(after=[...])` takes what mixes whole batches: ``(batch, draws) → batch``.

``draws.uniform("name", n)`` is f64[M, n], a NumPy array on the host: a function of (seed, epoch, row, name), the same
for any number of threads and ranks, any size of batches, and after a resume. Every row draws its own numbers.

Names, parameters and meaning are torchvision's; the arithmetic is that of ``torchvision.transforms.v2.functional`` for
float images.
"""

from gpuload.augment.auto import RandAugment, TrivialAugmentWide
from gpuload.augment.blur import GaussianBlur
from gpuload.augment.colour import ColorJitter, RandomGrayscale, RandomSolarize
from gpuload.augment.erase import RandomErasing
from gpuload.augment.mixing import CutMix, MixUp

__all__ = [
    "ColorJitter",
    "CutMix",
    "GaussianBlur",
    "MixUp",
    "RandAugment",
    "RandomErasing",
    "RandomGrayscale",
    "RandomSolarize",
    "TrivialAugmentWide",
]
