"""Batch samplers in a plain DataLoader, in Lightning and in the Trainer of transformers: two steps each, two epochs."""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from moeyard.data.batching import AtomBudgetBatchSampler
from moeyard.integrations.samplers import EpochLoader, SharedBatchSampler

SIZES = [5, 3, 8, 2, 7, 4, 6, 1]


class Structures(Dataset[int]):
    """Item i is its number; a batch carries the numbers as a tensor."""

    def __len__(self) -> int:
        return len(SIZES)

    def __getitem__(self, i: int) -> int:
        return i


def collate(ids: list[int]) -> dict[str, Tensor]:
    return {"ids": torch.tensor(ids)}


def sampler(budget: int = 20) -> AtomBudgetBatchSampler:
    return AtomBudgetBatchSampler(SIZES, budget, seed=1)


def planned(epochs: int) -> list[list[list[int]]]:
    """What each epoch should bring; the epochs differ."""
    plan, batches = sampler(), []
    for epoch in range(epochs):
        plan.set_epoch(epoch)
        batches.append(list(plan))
    assert batches[0] != batches[1]
    return batches


# ---- dealing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_ranks_share_every_sample_once(ranks: int) -> None:
    shares = [SharedBatchSampler(sampler(), num_replicas=ranks, rank=r) for r in range(ranks)]
    got = [list(share) for share in shares]
    assert {len(batches) for batches in got} == {len(shares[0])}
    assert sorted(i for batches in got for batch in batches for i in batch) == list(range(8))
    assert all(0 < sum(SIZES[i] for i in batch) <= 20 for batches in got for batch in batches)


def test_dealing_by_hand() -> None:
    batches = [[0, 1], [2, 3, 4], [5], [6, 7, 8]]
    got = [list(SharedBatchSampler(batches, num_replicas=3, rank=r)) for r in range(3)]
    # The last batch of three is halved, then the first: six batches, two for each of the three.
    assert got == [[[0, 1], [5]], [[2], [6]], [[3, 4], [7, 8]]]
    assert batches == [[0, 1], [2, 3, 4], [5], [6, 7, 8]]
    assert list(SharedBatchSampler([], num_replicas=3, rank=1)) == []


def test_one_process_has_the_samplers_own_batches() -> None:
    assert list(SharedBatchSampler(sampler())) == list(sampler())
    assert len(SharedBatchSampler(sampler())) == len(sampler())


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="num_replicas, rank: expected both or neither, got 2 and None"):
        SharedBatchSampler([[0]], num_replicas=2)
    with pytest.raises(ValueError, match="rank: expected 0 to 1, got 2"):
        SharedBatchSampler([[0]], num_replicas=2, rank=2)
    with pytest.raises(TypeError, match="rank: expected an int"):
        SharedBatchSampler([[0]], num_replicas=2, rank="0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_sampler: expected samples for 2 ranks, got 3 batches of one"):
        list(SharedBatchSampler([[0], [1], [2]], num_replicas=2, rank=0))


# ---- the three trainers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_plain_dataloader(workers: int) -> None:
    """Nothing of ours but the sampler."""
    plan, got = sampler(), []
    loader = DataLoader(Structures(), batch_sampler=plan, collate_fn=collate, num_workers=workers)
    for epoch in range(2):
        plan.set_epoch(epoch)
        got.append([batch["ids"].tolist() for batch in loader])
    assert got == planned(2)


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Model(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.seen = nn.Parameter(torch.zeros(8)), [[], []]

        def training_step(self, batch: dict[str, Tensor], step: int) -> Tensor:
            self.seen[self.current_epoch].append(batch["ids"].tolist())
            return (self.weight[batch["ids"]] - 1).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    model = Model()
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, EpochLoader(Structures(), SharedBatchSampler(sampler()), collate_fn=collate))
    assert model.seen == planned(2)
    assert trainer.global_step == sum(len(epoch) for epoch in planned(2))


def test_trainer_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    seen: list[list[int]] = []

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(8))

        def forward(self, ids: Tensor) -> dict[str, Tensor]:
            seen.append(ids.tolist())
            return {"loss": (self.weight[ids] - 1).square().mean()}

    class Trainer(transformers.Trainer):
        def get_train_dataloader(self) -> DataLoader[Any]:
            return EpochLoader(self.train_dataset, SharedBatchSampler(sampler()), collate_fn=self.data_collator)

    options = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "num_train_epochs": 2}
    trainer = Trainer(
        model=Model(),
        args=transformers.TrainingArguments(str(tmp_path), **options),
        train_dataset=Structures(),
        data_collator=collate,
    )
    trainer.train()
    assert seen == list(itertools.chain(*planned(2)))


# ---- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["lightning", "transformers"])
def test_two_ranks_train(trainer: str, tmp_path: Path) -> None:
    """Two epochs by torchrun: equally many batches, every sample once per epoch, new batches in the second."""
    pytest.importorskip(trainer)
    script = Path(__file__).with_name("two_ranks.py")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), trainer, str(tmp_path)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    epochs = [[], []]
    for rank in range(2):
        seen = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(seen) % 2 == 0
        for epoch, batches in enumerate((seen[: len(seen) // 2], seen[len(seen) // 2 :])):
            epochs[epoch].append(batches)
    for shares in epochs:
        assert len(shares[0]) == len(shares[1])
        assert sorted(i for share in shares for batch in share for i in batch) == list(range(8))
    assert epochs[0] != epochs[1]


def _rank(rank: int, port: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    share = SharedBatchSampler(sampler())
    share.set_epoch(1)
    torch.save(list(share), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_ranks_of_a_process_group(tmp_path: Path) -> None:
    """Without arguments the sampler asks torch.distributed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, (port, tmp_path), nprocs=2)
    got = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    want = []
    for rank in range(2):
        share = SharedBatchSampler(sampler(), num_replicas=2, rank=rank)
        share.set_epoch(1)
        want.append(list(share))
    assert got == want
