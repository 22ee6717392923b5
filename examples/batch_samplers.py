"""One batch sampler in a plain DataLoader, in Lightning and in the Trainer of transformers: the same batches."""

import logging
import tempfile

import lightning
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader

from moeyard.data.batching import AtomBudgetBatchSampler
from moeyard.integrations.samplers import EpochLoader, SharedBatchSampler

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
sizes = torch.randint(5, 60, (200,), generator=torch.Generator().manual_seed(0))  # atoms per structure
structures = range(200)  # any dataset; here item i is the number i


def sampler() -> AtomBudgetBatchSampler:
    return AtomBudgetBatchSampler(sizes, max_atoms_per_batch=500, seed=7)


def collate(ids: list[int]) -> dict[str, torch.Tensor]:
    return {"ids": torch.tensor(ids)}


def loss_of(weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return (weight[ids] - 1).square().mean()


plain, plan = [], sampler()
for epoch in range(2):
    plan.set_epoch(epoch)
    plain += [batch["ids"].tolist() for batch in DataLoader(structures, batch_sampler=plan, collate_fn=collate)]
print(f"DataLoader    {len(plain)} batches in two epochs, {plan.fill:.1%} full")


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.zeros(200)), []

    def training_step(self, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        self.seen.append(batch["ids"].tolist())
        return loss_of(self.weight, batch["ids"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


module = Module()
loader = EpochLoader(structures, SharedBatchSampler(sampler()), collate_fn=collate)
quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
lightning.Trainer(max_epochs=2, accelerator="cpu", use_distributed_sampler=False, **quiet).fit(module, loader)
print(f"Lightning     the same batches: {module.seen == plain}")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.zeros(200)), []

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen.append(ids.tolist())
        return {"loss": loss_of(self.weight, ids)}


class Trainer(transformers.Trainer):
    def get_train_dataloader(self) -> DataLoader:
        return EpochLoader(self.train_dataset, SharedBatchSampler(sampler()), collate_fn=self.data_collator)


with tempfile.TemporaryDirectory() as folder:
    options = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "num_train_epochs": 2}
    arguments = transformers.TrainingArguments(folder, logging_strategy="no", **options)
    model = Model()
    Trainer(model=model, args=arguments, train_dataset=structures, data_collator=collate).train()
print(f"transformers  the same batches: {model.seen == plain}")

shares = [list(SharedBatchSampler(sampler(), num_replicas=3, rank=rank)) for rank in range(3)]
samples = sorted(i for share in shares for batch in share for i in batch)
print(f"three ranks   {[len(share) for share in shares]} batches, every sample once: {samples == list(range(200))}")
