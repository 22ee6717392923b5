"""Two epochs on each rank of torchrun, the ids of every batch kept: `two_ranks.py lightning|transformers DIR`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moeyard.data.batching import AtomBudgetBatchSampler
from moeyard.integrations.samplers import EpochLoader, SharedBatchSampler

SIZES = [5, 3, 8, 2, 7, 4, 6, 1]


def collate(ids: list[int]) -> dict[str, Tensor]:
    return {"ids": torch.tensor(ids)}


def loader() -> EpochLoader:
    sampler = AtomBudgetBatchSampler(SIZES, max_atoms_per_batch=20, seed=1)
    return EpochLoader(range(len(SIZES)), SharedBatchSampler(sampler), collate_fn=collate)


def train_lightning(folder: Path) -> list[list[int]]:
    import lightning

    class Model(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.seen = nn.Parameter(torch.zeros(8)), []

        def training_step(self, batch: dict[str, Tensor], step: int) -> Tensor:
            self.seen.append(batch["ids"].tolist())
            return (self.weight[batch["ids"]] - 1).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    model = Model()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    ranks = {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    lightning.Trainer(max_epochs=2, default_root_dir=folder, **ranks, **quiet).fit(model, loader())
    return model.seen


def train_transformers(folder: Path) -> list[list[int]]:
    import transformers

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.seen = nn.Parameter(torch.zeros(8)), []

        def forward(self, ids: Tensor) -> dict[str, Tensor]:
            self.seen.append(ids.tolist())
            return {"loss": (self.weight[ids] - 1).square().mean()}

    class Trainer(transformers.Trainer):
        def get_train_dataloader(self) -> EpochLoader:
            return loader()

    options = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "num_train_epochs": 2}
    model = Model()
    arguments = transformers.TrainingArguments(str(folder / "trainer"), **options)
    Trainer(model=model, args=arguments, train_dataset=range(len(SIZES)), data_collator=collate).train()
    return model.seen


if __name__ == "__main__":
    kind, directory = sys.argv[1], Path(sys.argv[2])
    found = {"lightning": train_lightning, "transformers": train_transformers}[kind](directory)
    (directory / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
