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
from gpuload.fields.text import Text
from gpuload.images import HEADER, Decoder, Encoded, Ragged
from gpuload.images.transform import Image
from gpuload.order.buckets import Buckets
from gpuload.order.samplers import FullScanSampler, ShardedBatchSampler, ShardedFragmentSampler, ShuffleSampler
from gpuload.order.weighted import WeightedSampler
from gpuload.tables.mix import Mix

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Buckets",
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
    "Mix",
    "Ragged",
    "RowError",
    "ShardedBatchSampler",
    "ShardedFragmentSampler",
    "ShuffleSampler",
    "StateError",
    "Text",
    "TextError",
    "WeightedSampler",
]
