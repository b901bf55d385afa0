"""What the training scripts share: ranks, data, a loop with checkpoints of model and loader together, a log of losses.

One process by itself, or many under torchrun: gloo on CPUs, NCCL on GPUs. A checkpoint holds the model, the optimizer
and the loader's place, is written by rank 0 after the step it names, and a run that finds one goes on behind it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gpuload import Batch, LanceDataset
from gpuload.tools.demo import write_demo

Loss = Callable[[nn.Module, Batch], torch.Tensor]


def arguments(description: str | None, **defaults: Any) -> argparse.Namespace:
    """The command line of a training script; `defaults` are its own options, or other values of these."""
    options: dict[str, Any] = {
        "rows": 4096,  # pictures to draw
        "epochs": 10,
        "batch_size": 64,  # per rank
        "size": 64,  # pixels a side
        "lr": 2e-3,
        "out": "/tmp/gpuload-training/run",
        "checkpoint_every": 0,  # steps; 0 is never
        "kill_at": -1,  # this step ends with SIGKILL, to see the next run resume
        **defaults,
    }
    parser = argparse.ArgumentParser(description=description)
    for option, default in options.items():
        parser.add_argument(
            f"--{option.replace('_', '-')}", type=str if default is None else type(default), default=default
        )
    return parser.parse_args()


def start() -> torch.device:
    """The device of this process, its process group joined if torchrun started it."""
    cuda = torch.cuda.is_available()
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    return device


def first() -> bool:
    """Whether this is rank 0, which writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def drawn(settings: argparse.Namespace, rows: int, seed: int = 0) -> str:
    """Path of a dataset of pictures with captions, drawn once by rank 0."""
    path = Path(settings.out).parent / f"drawn-{rows}-{seed}.lance"
    if first() and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_demo(path, rows, seed)
    if dist.is_initialized():
        dist.barrier()
    return str(path)


def train(model: nn.Module, dataset: LanceDataset, loss_of: Loss, settings: argparse.Namespace) -> list[float]:
    """The loop; returns this run's losses, mean of all ranks, one a step. Rank 0 appends them to ``losses.jsonl``."""
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.05)
    epoch, step = _resume(out / "checkpoint.pt", model, optimizer, dataset)
    total, losses, started = settings.epochs * len(dataset), [], time.perf_counter()
    while epoch < settings.epochs:
        dataset.set_epoch(epoch)
        for batch in dataset:
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * _schedule(step, total)
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(wrapped, batch)
            loss.backward()
            optimizer.step()
            losses.append(_mean(loss))
            step += 1
            if first():
                _log(out / "losses.jsonl", batch, losses[-1])
                if settings.checkpoint_every and step % settings.checkpoint_every == 0:
                    _save(out / "checkpoint.pt", model, optimizer, dataset, step)
            if step == settings.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        epoch += 1
    if first():
        seconds = time.perf_counter() - started
        rows = len(losses) * settings.batch_size * (dist.get_world_size() if dist.is_initialized() else 1)
        print(f"{len(losses)} steps, {rows / max(seconds, 1e-9):.0f} rows/s, loss {sum(losses[-10:]) / 10:.4f}")
    return losses


def _schedule(step: int, total: int) -> float:
    """Warm-up over a twentieth of the steps, then half a cosine."""
    return min(1.0, (step + 1) / max(1, total // 20)) * 0.5 * (1 + math.cos(math.pi * step / total))


def _mean(loss: torch.Tensor) -> float:
    value = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return float(value)


def _log(path: Path, batch: Batch, loss: float) -> None:
    with path.open("a") as file:
        file.write(json.dumps({"epoch": batch.epoch, "step": batch.step, "loss": loss}) + "\n")


def _save(path: Path, model: nn.Module, optimizer: Any, dataset: LanceDataset, step: int) -> None:
    """Whole or not at all: written beside, then renamed."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "loader": dataset.state_dict(),  # the same on every rank
        "step": step,
    }
    torch.save(state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def _resume(path: Path, model: nn.Module, optimizer: Any, dataset: LanceDataset) -> tuple[int, int]:
    """(epoch, step) to go on with."""
    if not path.exists():
        return 0, 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    dataset.load_state_dict(state["loader"])
    return state["loader"]["epoch"], state["step"]


def finish() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
