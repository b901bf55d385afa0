"""Lance datasets as batches of CUDA tensors: images decoded, prompts tokenized, in an exactly reproducible order."""

from gpuload import signals

if signals.command_line():  # a command imports what it needs once it can be interrupted, and help is there at once
    signals.listen()
else:
    from gpuload import augment as augment  # a module, for `gpuload.augment.MixUp`
    from gpuload.badrows import BadRow
    from gpuload.batch import Batch
    from gpuload.dataset import LanceDataset
    from gpuload.errors import (
        BadRowWarning,
        ConfigError,
        DecodeError,
        DeviceError,
        ForkError,
        GpuloadError,
        ReadError,
        RowError,
        StateError,
        TextError,
        VersionError,
    )
    from gpuload.fields.boxes import Boxes
    from gpuload.fields.mask import Mask
    from gpuload.fields.text import Text
    from gpuload.images import HEADER, Decoder, Encoded, Ragged
    from gpuload.images.transform import Image
    from gpuload.order.buckets import Buckets
    from gpuload.order.samplers import FullScanSampler, ShardedBatchSampler, ShardedFragmentSampler, ShuffleSampler
    from gpuload.order.weighted import WeightedSampler
    from gpuload.tables.mix import Mix

__version__ = "0.1.0"

__all__ = [
    "BadRow",
    "BadRowWarning",
    "Batch",
    "Boxes",
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
    "Mask",
    "Mix",
    "Ragged",
    "ReadError",
    "RowError",
    "ShardedBatchSampler",
    "ShardedFragmentSampler",
    "ShuffleSampler",
    "StateError",
    "Text",
    "TextError",
    "VersionError",
    "WeightedSampler",
]
