"""Lance's documented examples, word for word but for the import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import lance
import pytest
import torch
from making import by_pillow, captions, jpeg
from torch.utils.data import DataLoader

import gpuload
from gpuload import Batch, LanceDataset, ShardedFragmentSampler

ROWS, FRAGMENT = 300, 20

# https://lance.org/integrations/pytorch: the code of both examples
FIRST = """
dataset = lance.torch.data.LanceDataset(
    "diffusiondb_train.lance",
    columns=["image", "prompt"],
    batch_size=128,
    batch_readahead=8,  # Control multi-threading reads.
)

# Create a PyTorch DataLoader
dataloader = torch.utils.data.DataLoader(dataset)

# Inference loop
for batch in dataloader:
    inputs, targets = batch["prompt"], batch["image"]
    outputs = model(inputs)
"""
SECOND = """
# Load Lance dataset and use fragments for DDP
dataset = LanceDataset(
    "diffusiondb_train.lance",
    columns=["image", "prompt"],
    batch_size=128,
    batch_readahead=8,
    # Use sampler to load data for DDP
    sampler=ShardedFragmentSampler(rank=1, world_size=8),
)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds diffusiondb_train.lance, written from a Hugging Face dataset as Lance's documentation does."""
    folder = tmp_path_factory.mktemp("examples")
    features = datasets.Features({"image": datasets.Image(), "prompt": datasets.Value("string")})
    files = [{"bytes": jpeg(16, 16, seed=i), "path": None} for i in range(ROWS)]
    hf_ds = datasets.Dataset.from_dict({"image": files, "prompt": captions(ROWS)}, features=features)
    lance.write_dataset(hf_ds, folder / "diffusiondb_train.lance", max_rows_per_file=FRAGMENT)
    return folder


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(folder)
    return "diffusiondb_train.lance"


def test_first_example_runs_with_another_import(here: str) -> None:
    seen: list[Any] = []
    taken: list[Batch] = []
    names = {"gpuload": gpuload, "torch": torch, "model": seen.append, "taken": taken}
    exec(FIRST.replace("lance.torch.data", "gpuload") + "    taken.append(batch)\n", names)
    assert [len(inputs) for inputs in seen] == [128, 128, 44]
    assert [prompt for inputs in seen for prompt in inputs] == captions(ROWS)
    images = torch.cat([batch["image"] for batch in taken])
    assert images.shape == (ROWS, 3, 16, 16)
    assert images.dtype == torch.uint8
    for i in (0, 127, 128, ROWS - 1):
        assert (images[i].numpy() == by_pillow(jpeg(16, 16, seed=i))).all()


@pytest.mark.parametrize("sampler", [gpuload.ShardedFragmentSampler, lance.sampler.ShardedFragmentSampler])
def test_second_example_runs_with_either_sampler(here: str, sampler: Any) -> None:
    names: dict[str, Any] = {"LanceDataset": LanceDataset, "ShardedFragmentSampler": sampler}
    exec(SECOND, names)
    batches = list(DataLoader(names["dataset"]))
    rows = torch.cat([batch.rows[batch.valid] for batch in batches]).tolist()
    mine = [*range(FRAGMENT, 2 * FRAGMENT), *range(9 * FRAGMENT, 10 * FRAGMENT)]  # fragments 1 and 9 of 15
    assert rows == mine
    assert [text for batch in batches for text in batch["prompt"]] == [captions(ROWS)[row] for row in mine]


def test_the_second_example_of_every_rank_together_is_the_dataset(here: str) -> None:
    found: list[int] = []
    lengths = set()
    for rank in range(8):
        sampler = ShardedFragmentSampler(rank=rank, world_size=8)
        batches = list(LanceDataset(here, columns=["prompt"], batch_size=16, sampler=sampler))
        lengths.add(tuple(batch.size for batch in batches))
        found += [row for batch in batches for row in batch.rows[batch.valid].tolist()]
    assert sorted(found) == list(range(ROWS))
    assert len(lengths) == 1, "every rank has the same number of batches of the same size"


def test_a_single_column_comes_as_a_mapping_too(here: str) -> None:
    (batch,) = LanceDataset(here, columns=["prompt"], batch_size=ROWS)
    assert list(batch) == ["prompt"]
