"""What torch's DataLoader does to a batch: nothing."""

from __future__ import annotations

import re

import pytest
import torch
from torch.utils.data import DataLoader

from gpuload import Batch, ConfigError, Image, LanceDataset


def test_data_loader_with_its_defaults_yields_the_same_batches(photos: str, device: str) -> None:
    dataset = LanceDataset(photos, 8, transforms={"image": Image(20, crop="random")}, device=device)
    for direct, loaded in zip(dataset, DataLoader(dataset), strict=True):
        assert isinstance(loaded, Batch)
        assert loaded["image"].shape == (direct.size, 3, 20, 20)
        assert loaded["image"].device.type == device
        assert torch.equal(loaded["image"], direct["image"])
        assert loaded["number"].shape == (direct.size,)
        assert loaded["prompt"] == direct["prompt"]
        assert torch.equal(loaded.rows, direct.rows)
        assert loaded.step == direct.step


def test_data_loader_without_automatic_batching_yields_the_same_batches(photos: str) -> None:
    dataset = LanceDataset(photos, 8, columns=["number"])
    numbers = [batch["number"].tolist() for batch in DataLoader(dataset, batch_size=None)]
    assert numbers == [batch["number"].tolist() for batch in dataset]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator")  # torch's
def test_pin_memory_does_no_harm(photos: str, device: str) -> None:
    dataset = LanceDataset(photos, 8, columns=["image", "prompt", "number"], device=device)
    batches = list(DataLoader(dataset, pin_memory=True))
    assert [batch.step for batch in batches] == list(range(len(dataset)))
    for pinned, plain in zip(batches, dataset, strict=True):
        assert isinstance(pinned, Batch)
        assert torch.equal(pinned["number"], plain["number"])
        assert all(torch.equal(a, b) for a, b in zip(pinned["image"], plain["image"], strict=True))


def test_batch_size_of_the_data_loader_says_what_to_do_instead(photos: str) -> None:
    for size in (4, 1000):  # more than there are: it has another number to collate, and must not say that one
        told = rf"got batch_size={size}: .*LanceDataset\(..., batch_size=...\)"
        with pytest.raises(ConfigError, match=told) as caught:
            next(iter(DataLoader(LanceDataset(photos, 8), batch_size=size)))
        assert re.findall(r"\d+", str(caught.value)) == [str(size)]
