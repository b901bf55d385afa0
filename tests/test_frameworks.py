"""The dataset as the loader of other people's loops, each with its real package: epochs, places, no second sharding."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import lightning
import pytest
import torch
import transformers
from accelerate.data_loader import IterableDatasetShard
from accelerate.utils import DataLoaderConfiguration
from framework_ranks import OPTIONS, Net
from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from gpuload import Batch, ConfigError, FullScanSampler, LanceDataset

HERE = Path(__file__).parent
HELD = (0.5, 1.0)


@pytest.fixture
def dataset(photos: str) -> Iterator[LanceDataset]:
    """Seven batches an epoch: of 8 rows, the last of 2."""
    with LanceDataset(photos, 8, **OPTIONS) as opened:
        yield opened


def order(photos: str, epochs: int) -> list[int]:
    """Row numbers of the first epochs, in order."""
    rows: list[int] = []
    dataset = LanceDataset(photos, 8, columns=["number"], shuffle=True)
    for epoch in range(epochs):
        dataset.set_epoch(epoch)
        rows += [row for batch in dataset for row in batch["number"].tolist()]
    return rows


def test_two_ranks_see_each_row_once_in_every_framework(photos: str, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(HERE / "framework_ranks.py"), photos, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    expected = order(photos, 1)
    turns = [expected[i : i + 8] for i in range(0, 50, 8)]  # batch k is rank k % 2's
    first, second = (list(itertools.chain.from_iterable(turns[rank::2])) for rank in (0, 1))
    for name in ranks[0]:
        assert ranks[0][name] == first, name
        assert ranks[1][name][: len(second)] == second, name
        assert len(ranks[0][name]) == len(ranks[1][name]), "the short rank is filled up"


def in_order(photos: str, **options: Any) -> list[int]:
    """Row numbers of a dataset that is not shuffled."""
    return [row for batch in LanceDataset(photos, 8, columns=["number"], **options) for row in batch["number"].tolist()]


@pytest.fixture
def held(photos: str) -> Iterator[LanceDataset]:
    """About half of the rows, in order."""
    with LanceDataset(photos, 8, **{**OPTIONS, "shuffle": False}, split=HELD) as opened:
        yield opened


# -- torch ---------------------------------------------------------------------------------------------------------


def test_a_random_split_says_how_to_split(dataset: LanceDataset) -> None:
    with pytest.raises(ConfigError, match=r"got random_split.*split=\(0\.0, 0\.9\).*split=\(0\.9, 1\.0\)"):
        torch.utils.data.random_split(dataset, [0.8, 0.2])


@pytest.mark.parametrize("index", [0, -1, slice(3), "image"])
def test_an_index_says_how_to_split(dataset: LanceDataset, index: Any) -> None:
    with pytest.raises(ConfigError, match=r"Expected iteration, got dataset\[.*split=\(0\.0, 0\.9\)"):
        dataset[index]


def test_a_subset_says_how_to_split(dataset: LanceDataset) -> None:
    subset = torch.utils.data.Subset(dataset, [0, 1])
    for take in (lambda: subset[0], lambda: next(iter(DataLoader(subset)))):
        with pytest.raises(ConfigError, match=r"in place of random_split and Subset"):
            take()


# -- Accelerate ----------------------------------------------------------------------------------------------------


def test_accelerate_beside_the_dataset(dataset: LanceDataset, photos: str) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    net = Net()
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), 0.1))
    for epoch in range(2):
        dataset.set_epoch(epoch)
        for batch in dataset:
            accelerator.backward(model(**batch)["loss"])
            optimizer.step()
            optimizer.zero_grad()
    assert net.seen == order(photos, 2)


@pytest.mark.parametrize("batch_size", [1, None])
@pytest.mark.parametrize("dispatch", [None, True])
def test_accelerate_may_not_dispatch_through_rank_0(
    dataset: LanceDataset, batch_size: int | None, dispatch: bool | None
) -> None:
    settings = DataLoaderConfiguration(dispatch_batches=dispatch)
    loader = accelerate.Accelerator(cpu=True, dataloader_config=settings).prepare(DataLoader(dataset, batch_size))
    with pytest.raises(ConfigError, match=r"inside DataLoaderDispatcher.*Leave it out of accelerator\.prepare"):
        next(iter(loader))


def test_accelerate_may_not_shard_again(photos: str) -> None:
    mine = LanceDataset(photos, 8, rank=1, world_size=2, **OPTIONS)
    with pytest.raises(ConfigError, match=r"inside IterableDatasetShard.*divided by 2 once more"):
        next(iter(DataLoader(IterableDatasetShard(mine, 1, num_processes=2, process_index=1), None)))


def test_accelerate_may_shard_what_is_not_sharded(photos: str) -> None:
    whole = LanceDataset(photos, 8, columns=["number"], sampler=FullScanSampler())
    batches = list(IterableDatasetShard(whole, 1, num_processes=2, process_index=1))
    assert [batch.step for batch in batches] == [1, 3, 5, 0]


def test_a_batch_survives_being_rebuilt_from_its_columns(dataset: LanceDataset) -> None:
    batch = next(iter(dataset))
    rebuilt = accelerate.utils.recursively_apply(lambda tensor: tensor + 1, batch)
    assert isinstance(rebuilt, Batch)
    assert torch.equal(rebuilt["number"], batch["number"] + 1)
    assert rebuilt.rows.tolist() == [-1] * 8


@pytest.mark.parametrize("batch_size", [8, 3])
def test_a_data_loader_makes_no_batches_of_batches_whatever_its_collate_fn(
    dataset: LanceDataset, batch_size: int
) -> None:
    collate = transformers.default_data_collator  # would stack them without a word
    with pytest.raises(ConfigError, match=rf"got batch_size={batch_size}: LanceDataset yields whole batches"):
        next(iter(DataLoader(dataset, batch_size, collate_fn=collate)))


def test_accelerate_leaves_a_dataset_as_it_is_when_it_prepares(dataset: LanceDataset) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    assert accelerator.prepare(Net(), dataset)[1] is dataset


def test_accelerate_evaluates(photos: str) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(Net()).eval()
    held = LanceDataset(photos, 8, **{**OPTIONS, "shuffle": False}, split=HELD)
    found: list[int] = []
    with torch.no_grad():
        for batch in held:
            logits, number = accelerator.gather_for_metrics((model(**batch)["logits"], batch["number"]))
            assert len(logits) == batch.size
            found += number.tolist()
    assert found == in_order(photos, split=HELD)


def test_accelerate_saves_the_place_and_resumes(dataset: LanceDataset, photos: str, tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.register_for_checkpointing(dataset)
    for batch in dataset:
        if batch.step == 2:
            accelerator.save_state(str(tmp_path))
            break
    with LanceDataset(photos, 8, **OPTIONS) as fresh:
        resumed = accelerate.Accelerator(cpu=True)
        resumed.register_for_checkpointing(fresh)
        resumed.load_state(str(tmp_path))
        rest = [row for batch in fresh for row in batch["number"].tolist()]
    assert rest == order(photos, 1)[3 * 8 :]


@pytest.mark.parametrize("skip", [accelerate.skip_first_batches, accelerate.Accelerator(cpu=True).skip_first_batches])
def test_accelerate_does_not_skip_but_says_how_to_resume(dataset: LanceDataset, skip: Any) -> None:
    with pytest.raises(ConfigError, match=r"got skip_first_batches.*give it to dataset\.load_state_dict\(\)"):
        skip(dataset, 2)


def test_accelerate_may_skip_what_a_data_loader_reads(dataset: LanceDataset, photos: str) -> None:
    loader = accelerate.skip_first_batches(DataLoader(dataset, batch_size=None), 2)
    assert [row for batch in loader for row in batch["number"].tolist()] == order(photos, 1)[2 * 8 :]


# -- transformers --------------------------------------------------------------------------------------------------


class LanceTrainer(transformers.Trainer):
    def get_train_dataloader(self) -> Any:
        return self.train_dataset

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return eval_dataset or self.eval_dataset

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        return test_dataset


class SavePlace(transformers.TrainerCallback):
    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        place = json.dumps(others["train_dataloader"].state_dict())
        Path(args.output_dir, f"checkpoint-{state.global_step}", "loader.json").write_text(place)


def training(out: Path, **options: Any) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        str(out), num_train_epochs=2, use_cpu=True, report_to=[], logging_steps=1, save_steps=5, disable_tqdm=True,
        **options,
    )  # fmt: skip


def test_trainer_takes_the_dataset_as_its_loader_and_sets_its_epochs(
    dataset: LanceDataset, photos: str, tmp_path: Path
) -> None:
    net = Net()
    done = LanceTrainer(net, training(tmp_path), train_dataset=dataset).train()
    assert done.global_step == 14
    assert net.seen == order(photos, 2)


def test_trainer_resumes_in_the_middle_of_an_epoch(dataset: LanceDataset, photos: str, tmp_path: Path) -> None:
    LanceTrainer(Net(), training(tmp_path), train_dataset=dataset, callbacks=[SavePlace]).train()
    checkpoint = tmp_path / "checkpoint-10"
    with LanceDataset(photos, 8, **OPTIONS) as fresh:
        fresh.load_state_dict(json.loads((checkpoint / "loader.json").read_text()))
        net = Net()
        resumed = LanceTrainer(net, training(tmp_path / "b", ignore_data_skip=True), train_dataset=fresh)
        assert resumed.train(resume_from_checkpoint=str(checkpoint)).global_step == 14
    assert net.seen == order(photos, 2)[50 + 3 * 8 :]


def test_a_plain_trainer_says_what_to_do(dataset: LanceDataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"return it from get_train_dataloader\(\)"):
        transformers.Trainer(Net(), training(tmp_path), train_dataset=dataset).train()


def test_trainer_evaluates_between_epochs(
    dataset: LanceDataset, held: LanceDataset, photos: str, tmp_path: Path
) -> None:
    net = Net()
    arguments = training(tmp_path, eval_strategy="epoch", label_names=["number"], per_device_eval_batch_size=8)
    trainer = LanceTrainer(net, arguments, train_dataset=dataset, eval_dataset=held)
    trainer.train()
    both, rest = order(photos, 2), in_order(photos, split=HELD)
    assert net.seen == both[:50] + rest + both[50:] + rest
    assert [entry["eval_loss"] > 0 for entry in trainer.state.log_history if "eval_loss" in entry] == [True, True]


def test_trainer_evaluates_and_predicts(held: LanceDataset, photos: str, tmp_path: Path) -> None:
    seen: list[list[int]] = []

    def metrics(found: Any) -> dict[str, float]:
        seen.append(found.label_ids.tolist())
        return {"rows": len(found.predictions)}

    arguments = training(tmp_path, label_names=["number"])
    trainer = LanceTrainer(Net(), arguments, eval_dataset=held, compute_metrics=metrics)
    rest = in_order(photos, split=HELD)
    assert trainer.evaluate()["eval_rows"] == len(rest)
    predicted = trainer.predict(held)
    assert predicted.predictions.shape == (len(rest), 2)
    assert seen == [rest, rest]
    assert predicted.label_ids.tolist() == rest


@pytest.mark.parametrize("what", ["evaluate", "predict"])
def test_a_plain_trainer_says_which_methods_to_override(held: LanceDataset, tmp_path: Path, what: str) -> None:
    trainer = transformers.Trainer(Net(), training(tmp_path), eval_dataset=held)
    with pytest.raises(ConfigError, match=r"get_eval_dataloader\(\) or get_test_dataloader\(\)"):
        getattr(trainer, what)(held)


def test_trainer_that_would_skip_says_how_to_resume(dataset: LanceDataset, photos: str, tmp_path: Path) -> None:
    LanceTrainer(Net(), training(tmp_path), train_dataset=dataset, callbacks=[SavePlace]).train()
    with LanceDataset(photos, 8, **OPTIONS) as fresh:
        resumed = LanceTrainer(Net(), training(tmp_path / "b"), train_dataset=fresh)
        with pytest.raises(ConfigError, match=r"load_state_dict\(\) before the loop.*set ignore_data_skip=True"):
            resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))


# -- Lightning -----------------------------------------------------------------------------------------------------


class Data(lightning.LightningDataModule):
    def __init__(self, dataset: LanceDataset) -> None:
        super().__init__()
        self.dataset = dataset

    def train_dataloader(self) -> LanceDataset:
        self.dataset.set_epoch(self.trainer.current_epoch)
        return self.dataset


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.batches: list[Batch] = []

    def training_step(self, batch: Batch, index: int) -> torch.Tensor:
        self.batches.append(batch)
        loss: torch.Tensor = self.net(**batch)["loss"]
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Judged(Module):
    def validation_step(self, batch: Batch, index: int) -> None:
        self.net(**batch)

    test_step = validation_step

    def predict_step(self, batch: Batch, index: int) -> torch.Tensor:
        logits: torch.Tensor = self.net(**batch)["logits"]
        return logits


def alone(out: Path, **options: Any) -> lightning.Trainer:
    """A trainer that writes nothing."""
    return lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=out, **options,
    )  # fmt: skip


def fit(dataset: LanceDataset, out: Path, resume: str | None = None, **options: Any) -> Module:
    module = Module()
    saving = ModelCheckpoint(out, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=2, reload_dataloaders_every_n_epochs=1, logger=False, callbacks=[saving],
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=out, **options,
    )  # fmt: skip
    trainer.fit(module, datamodule=Data(dataset), ckpt_path=resume)
    return module


@pytest.mark.parametrize("replaces_samplers", [False, True])
def test_lightning_takes_the_dataset_as_its_loader(
    dataset: LanceDataset, photos: str, tmp_path: Path, replaces_samplers: bool
) -> None:
    module = fit(dataset, tmp_path, use_distributed_sampler=replaces_samplers)
    assert module.net.seen == order(photos, 2)
    assert all(isinstance(batch, Batch) and batch.valid.all() for batch in module.batches)


def test_lightning_has_a_new_order_each_epoch_without_a_word_about_epochs(
    dataset: LanceDataset, photos: str, tmp_path: Path
) -> None:
    module = Module()
    alone(tmp_path, max_epochs=2).fit(module, dataset)
    assert module.net.seen == order(photos, 2)


LOADERS = {
    "itself": lambda dataset: dataset,
    "DataLoader": DataLoader,
    "None": lambda dataset: DataLoader(dataset, None),
}
WRAPPED = pytest.mark.parametrize("wrap", LOADERS.values(), ids=LOADERS)
ADVICE = pytest.mark.filterwarnings(  # Lightning's, for DataLoaders
    "ignore:.*does not have many workers", "ignore:Your `IterableDataset` has `__len__` defined"
)


@WRAPPED
@ADVICE
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_lightning_validates_tests_and_predicts(
    held: LanceDataset, photos: str, tmp_path: Path, stage: str, wrap: Any
) -> None:
    module = Judged()
    found = getattr(alone(tmp_path), stage)(module, wrap(held))
    assert module.net.seen == in_order(photos, split=HELD)
    if stage == "predict":
        assert sum(map(len, found)) == len(module.net.seen)


@WRAPPED
@ADVICE
def test_lightning_fits_and_validates(
    dataset: LanceDataset, held: LanceDataset, photos: str, tmp_path: Path, wrap: Any
) -> None:
    module = Judged()
    alone(tmp_path, max_epochs=2, num_sanity_val_steps=1).fit(module, wrap(dataset), wrap(held))
    both, rest = order(photos, 2), in_order(photos, split=HELD)
    assert module.net.seen == rest[:8] + both[:50] + rest + both[50:] + rest


@pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices")  # batch.rows has them
def test_lightning_hands_predictions_to_a_writer(held: LanceDataset, photos: str, tmp_path: Path) -> None:
    rows: list[int] = []

    class Writer(BasePredictionWriter):
        def write_on_batch_end(
            self, trainer: Any, module: Any, found: Any, indices: Any, batch: Any, *where: Any
        ) -> None:
            rows.extend(batch["number"].tolist())

    alone(tmp_path, callbacks=[Writer("batch")]).predict(Judged(), held, return_predictions=False)
    assert rows == in_order(photos, split=HELD)


def test_lightning_overfits_the_first_batches(held: LanceDataset, photos: str, tmp_path: Path) -> None:
    module = Module()
    alone(tmp_path, max_epochs=2, overfit_batches=2).fit(module, held)
    assert module.net.seen == in_order(photos, split=HELD)[:16] * 2


def test_lightning_overfits_nothing_that_is_shuffled(dataset: LanceDataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"for overfit_batches.*Open it with shuffle=False"):
        alone(tmp_path, max_epochs=2, overfit_batches=2).fit(Module(), dataset)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # it does: it is resumed
def test_lightning_saves_the_place_and_resumes_in_the_middle_of_an_epoch(
    dataset: LanceDataset, photos: str, tmp_path: Path
) -> None:
    fit(dataset, tmp_path)
    with LanceDataset(photos, 8, **OPTIONS) as fresh:
        module = fit(fresh, tmp_path, resume=str(tmp_path / "step=10.ckpt"))
    assert [(batch.epoch, batch.step) for batch in module.batches] == [(1, 3), (1, 4), (1, 5), (1, 6)]
    assert module.net.seen == order(photos, 2)[50 + 3 * 8 :]


# -- torchdata -----------------------------------------------------------------------------------------------------


def test_stateful_data_loader_saves_and_resumes(dataset: LanceDataset, photos: str) -> None:
    loader = StatefulDataLoader(dataset, batch_size=None)
    running = iter(loader)
    for _ in range(3):
        next(running)
    state = json.loads(json.dumps(loader.state_dict()))
    with LanceDataset(photos, 8, **OPTIONS) as other:
        resumed = StatefulDataLoader(other, batch_size=None)
        resumed.load_state_dict(state)
        rest = [row for batch in resumed for row in batch["number"].tolist()]
    assert rest == order(photos, 1)[3 * 8 :]
