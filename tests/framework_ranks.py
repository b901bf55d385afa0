"""What tests/test_frameworks.py starts under torchrun with two ranks: each framework in turn says which rows it saw."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from gpuload import Image, LanceDataset

OPTIONS: dict[str, Any] = {
    "shuffle": True,
    "transforms": {"image": Image(8)},
    "columns": ["image", "number"],
    "device": "cpu",
}
PIXELS = 3 * 8 * 8


class Net(nn.Module):
    """Takes a batch's columns, as transformers wants it; notes which rows came."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(PIXELS, 2)
        self.seen: list[int] = []

    def forward(self, image: torch.Tensor, number: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen += number.tolist()
        logits = self.out(image.flatten(1))
        return {"loss": F.cross_entropy(logits, number % 2), "logits": logits}


def with_accelerate(path: str) -> list[int]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    net = Net()
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), 0.1))
    for batch in LanceDataset(path, 8, **OPTIONS):
        accelerator.backward(model(**batch)["loss"])
        optimizer.step()
        optimizer.zero_grad()
    return net.seen


def with_transformers(path: str, predict: bool = False) -> list[int]:
    from transformers import Trainer, TrainingArguments

    class LanceTrainer(Trainer):
        def get_train_dataloader(self) -> Any:
            return self.train_dataset

        def get_test_dataloader(self, test_dataset: Any) -> Any:
            return test_dataset

    net = Net()
    arguments = TrainingArguments(
        f"{path}-transformers", num_train_epochs=1, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        label_names=["number"],
    )  # fmt: skip
    trainer = LanceTrainer(net, arguments, train_dataset=LanceDataset(path, 8, **OPTIONS))
    if not predict:
        trainer.train()
        return net.seen
    found = trainer.predict(LanceDataset(path, 8, **OPTIONS))
    assert len(found.predictions) == len(found.label_ids) == len(net.seen) * 2, "both ranks', the rows that fill up too"
    return net.seen


def with_transformers_predict(path: str) -> list[int]:
    return with_transformers(path, predict=True)


def with_lightning(path: str, test: bool = False) -> list[int]:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self.net(**batch)["loss"]

        def test_step(self, batch: Any, index: int) -> None:
            self.net(**batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    module = Module()
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, use_distributed_sampler=False, **options
    )
    (trainer.test if test else trainer.fit)(module, LanceDataset(path, 8, **OPTIONS))
    return module.net.seen


def with_lightning_test(path: str) -> list[int]:
    return with_lightning(path, test=True)


def main(path: str, out: str) -> None:
    dist.init_process_group("gloo")
    ways: list[Callable[[str], list[int]]] = [
        with_accelerate, with_transformers, with_transformers_predict, with_lightning, with_lightning_test,
    ]  # fmt: skip
    seen = {way.__name__: way(path) for way in ways}
    Path(out, f"{dist.get_rank()}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
