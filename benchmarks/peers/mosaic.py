"""MosaicML Streaming: local MDS shards, one worker a core, decoding with simplejpeg and torch in the workers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import data
import harness
from task import Task, one_thread


def _streaming() -> Any:
    """The package. It imports torchvision for vision datasets not used here, which need not be there for this."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        for name in ("torchvision", "torchvision.datasets", "torchvision.transforms.functional"):
            module = sys.modules[name] = ModuleType(name)
            module.__spec__, module.__path__ = ModuleSpec(name, None), []
            module.VisionDataset = module.CIFAR10 = module.to_tensor = object  # type: ignore[attr-defined]
    import streaming

    return streaming


def mosaic(settings: Any) -> harness.Job:
    streaming = _streaming()
    from torch.utils.data import DataLoader

    def write(path: Path) -> None:
        columns = {"image": "bytes", "caption": "str"}
        with streaming.MDSWriter(out=str(path), columns=columns, size_limit=1 << 25) as out:
            for image, caption in data.rows(settings):
                out.write({"image": image, "caption": caption})

    folder, task = data.made(settings, "mds", write), Task(settings)

    def collate(rows: list[dict[str, Any]]) -> int:
        return task.collate([(row["image"], row["caption"]) for row in rows])

    def job() -> Iterator[int]:
        streaming.base.util.clean_stale_shared_memory()
        rows = streaming.StreamingDataset(local=folder, shuffle=False, batch_size=settings.batch_size)
        yield from DataLoader(
            rows, settings.batch_size, collate_fn=collate, num_workers=data.CORES, worker_init_fn=one_thread
        )

    return job


CASES = {"MosaicML Streaming, a worker a core": mosaic}
