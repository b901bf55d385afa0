"""Every Python block of README.md runs, in order, where its datasets are."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpuload import Image, LanceDataset
from gpuload.tools.demo import write_demo

README = Path(__file__).parent.parent / "README.md"
ROWS = 140
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [(README.read_text().count("\n", 0, m.start()) + 1, m.group(1)) for m in _BLOCK.finditer(README.read_text())]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the blocks so far have defined; the working directory holds shapes.lance."""
    folder, before = tmp_path_factory.mktemp("readme"), os.getcwd()
    os.chdir(folder)
    write_demo("shapes.lance", ROWS)
    yield {"__name__": "__main__"}
    os.chdir(before)


@pytest.fixture
def ray_cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One machine, two workers, for the block that needs them."""
    if "import ray" not in request.node.callspec.params["block"]:
        yield
        return
    import ray

    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


def colours(names: dict[str, Any]) -> None:
    """Ray's two workers together read what one process reads."""
    whole = torch.cat(
        [batch["image"].cpu() for batch in LanceDataset("shapes.lance", 32, transforms={"image": Image(32)})]
    )
    assert names["rows"] == ROWS
    assert torch.allclose(torch.tensor(names["mean"]), whole.mean((0, 2, 3)), atol=1e-4)


def trained(names: dict[str, Any]) -> None:
    assert names["trainer"].global_step == 2 * (ROWS // 32)


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {"TorchTrainer": colours, "lightning.Trainer": trained}


@pytest.mark.parametrize(("line", "block"), BLOCKS, ids=[f"line {line}" for line, _ in BLOCKS])
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed")  # lightning of its logger
@pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval")
@pytest.mark.filterwarnings("ignore:`(use|target)_.*` is deprecated")  # Ray of its own settings
@pytest.mark.filterwarnings("ignore:lance is not fork-safe")  # Ray forks to start other programs
def test_block_runs(names: dict[str, Any], line: int, block: str) -> None:
    exec(compile("\n" * line + block, str(README), "exec"), names)
    for word, check in CHECKS.items():
        if word in block:
            check(names)
