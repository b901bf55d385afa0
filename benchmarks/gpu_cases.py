"""The cases of bench_gpu.py by name, and the stages that they are measured in, the most valuable first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from gpu_limits import all_but_decoding, copy, engine
from gpu_peers import dali_pipeline, lance_workers, torchvision_loop
from gpu_setup import IMAGE, Pass, Setup
from gpu_training import ViT, resnet, training

from gpuload import LanceDataset


def gpuload_epoch(decoder: str, **options: Any) -> Callable[[Setup], Pass]:
    """From a Lance dataset."""

    def case(setup: Setup) -> Pass:
        chosen = {"columns": ["image"], "transforms": {"image": IMAGE}, "device": str(setup.device), **options}
        dataset = LanceDataset(setup.lance(), setup.batch_size, decoder=decoder, **chosen)
        return lambda: (batch.size for batch in dataset)

    return case


CASES: dict[str, Callable[[Setup], Pass]] = {
    "limit: engine": engine(planes=False),
    "limit: engine, planes": engine(planes=True),
    "limit: all but decoding": all_but_decoding,
    "limit: copy": copy,
    "gpuload nvjpeg": gpuload_epoch("nvjpeg"),
    "gpuload nvjpeg:alone": gpuload_epoch("nvjpeg:alone"),
    "gpuload nvjpeg shuffle=row": gpuload_epoch("nvjpeg", shuffle="row"),
    "gpuload nvjpeg:alone shuffle=row": gpuload_epoch("nvjpeg:alone", shuffle="row"),
    "gpuload nvimgcodec": gpuload_epoch("nvimgcodec"),
    "gpuload nvimgcodec:parity": gpuload_epoch("nvimgcodec:parity"),
    "gpuload dali": gpuload_epoch("dali"),
    "gpuload cpu": gpuload_epoch("cpu"),
    "dali pipeline, crops, 0.12": dali_pipeline(0.12),
    "dali pipeline, crops, 0.65": dali_pipeline(0.65),
    "dali pipeline, crops, 0.9": dali_pipeline(0.9),
    "dali pipeline, whole images, 0.9": dali_pipeline(0.9, region=False),
    "torchvision decode_jpeg": torchvision_loop,
    "lance.torch.data, workers": lance_workers,
    "training ResNet-50: synthetic": training(resnet, None),
    "training ResNet-50: fed": training(resnet, "auto"),
    "training ResNet-50: fed by nvjpeg:alone": training(resnet, "nvjpeg:alone"),
    "training ViT-S/16: synthetic": training(ViT, None),
    "training ViT-S/16: fed": training(ViT, "auto"),
    "training ViT-S/16: fed by nvjpeg:alone": training(ViT, "nvjpeg:alone"),
}


class Group(NamedTuple):
    """Cases on photos of one size in batches of one size; the first is what the others' ratios refer to."""

    megapixels: float
    batch_size: int
    cases: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.megapixels:g} MP, batch {self.batch_size}"


_ENGINE, _NVJPEG, _ALONE = "limit: engine", "gpuload nvjpeg", "gpuload nvjpeg:alone"
_ROWS = ("gpuload nvjpeg shuffle=row", "gpuload nvjpeg:alone shuffle=row")
_RATES = (_ENGINE, _NVJPEG, _ALONE, *_ROWS, "limit: all but decoding", "limit: engine, planes", "limit: copy")
_LARGE = (_ENGINE, _NVJPEG, _ALONE, "gpuload nvimgcodec", "gpuload cpu")
_DALI = tuple(name for name in CASES if name.startswith("dali pipeline"))
_OTHERS = ("gpuload nvimgcodec", "gpuload cpu", "torchvision decode_jpeg", "lance.torch.data, workers")
_SIZES = (_ENGINE, _NVJPEG, _ALONE, "dali pipeline, crops, 0.65")
STAGES: dict[str, tuple[Group, ...]] = {
    "rates": (Group(0.2, 128, _RATES),),
    "training": (Group(0.2, 128, tuple(name for name in CASES if name.startswith("training"))),),
    "large": (Group(1, 128, _LARGE), Group(12, 32, _LARGE)),
    "dali": (Group(0.2, 128, (_ENGINE, *_DALI, "gpuload dali")),),
    "peers": (Group(0.2, 128, (_ENGINE, *_OTHERS, "gpuload nvimgcodec:parity")),),
    "batches": (Group(0.2, 64, _SIZES), Group(0.2, 256, _SIZES)),
}
