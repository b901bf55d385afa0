"""Lance datasets as batches of CUDA tensors: images decoded, prompts tokenized, in an exactly reproducible order."""

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
from gpuload.images.transform import Image, Text
from gpuload.order.samplers import FullScanSampler, ShardedBatchSampler, ShardedFragmentSampler, ShuffleSampler

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "ConfigError",
    "DecodeError",
    "DeviceError",
    "ForkError",
    "FullScanSampler",
    "GpuloadError",
    "Image",
    "LanceDataset",
    "RowError",
    "ShardedBatchSampler",
    "ShardedFragmentSampler",
    "ShuffleSampler",
    "StateError",
    "Text",
    "TextError",
]
