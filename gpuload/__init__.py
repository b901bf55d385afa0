"""Lance datasets as batches of CUDA tensors: images decoded, prompts tokenized, in an exactly reproducible order."""

from gpuload import signals

if signals.command_line():  # a command imports what it needs once it can be interrupted, and help is there at once
    signals.listen()
else:
    from gpuload.batch import Batch
    from gpuload.dataset import LanceDataset
    from gpuload.errors import (
        ConfigError,
        DecodeError,
        DeviceError,
        ForkError,
        GpuloadError,
        RowError,
        StateError,
        TextError,
    )
    from gpuload.fields.text import Text
    from gpuload.images import HEADER, Decoder, Encoded, Ragged
    from gpuload.images.transform import Image
    from gpuload.order.samplers import FullScanSampler, ShardedBatchSampler, ShardedFragmentSampler, ShuffleSampler

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "ConfigError",
    "DecodeError",
    "Decoder",
    "DeviceError",
    "Encoded",
    "ForkError",
    "FullScanSampler",
    "GpuloadError",
    "HEADER",
    "Image",
    "LanceDataset",
    "Ragged",
    "RowError",
    "ShardedBatchSampler",
    "ShardedFragmentSampler",
    "ShuffleSampler",
    "StateError",
    "Text",
    "TextError",
]
