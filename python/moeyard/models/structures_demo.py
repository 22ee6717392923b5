"""structures-demo: pretrain the structure encoder on a folder of structures, or on the embedded list of molecules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from moeyard.data.batching import (
    AtomBudgetBatchSampler,
    ResidentBatches,
    ResidentLoader,
    ResidentTable,
    StructureBatch,
    own_gpu,
    structure_loader,
)
from moeyard.data.structures import StructureTable, embed_molecules, read_structures
from moeyard.data.structures.table import Progress
from moeyard.models.settings import Settings
from moeyard.models.structure_encoder import StructureEncoderConfig
from moeyard.models.structure_pretraining import PretrainingConfig, StructurePretraining


class StructuresData(Settings):
    """`folder` of PDB, mmCIF and SDF files, None for the embedded list; every batch has at most `max_atoms_per_batch`
    atoms; `evaluation_fraction` of the structures, drawn at random, are kept out of training."""

    folder: str | None = None
    max_atoms_per_batch: int = Field(default=2000, ge=1, lt=2**31)
    evaluation_fraction: float = Field(default=0.1, ge=0, lt=1)


class StructuresConfig(Settings):
    """The system's own settings."""

    data: StructuresData = StructuresData()
    encoder: StructureEncoderConfig = StructureEncoderConfig()
    pretraining: PretrainingConfig = PretrainingConfig()


class _Chosen:
    """The batches of a sampler over some structures of a table, in the table's ids."""

    def __init__(self, sampler: AtomBudgetBatchSampler, ids: Tensor) -> None:
        self.sampler, self.ids = sampler, ids.tolist()

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        return ([self.ids[i] for i in batch] for batch in self.sampler)


class StructuresDemoData:
    """Training and evaluation batches of a table.

    Args:
        table: all structures.
        max_atoms_per_batch: the budget; a larger structure is a batch of its own.
        evaluation_fraction: of the structures, rounded down.
        seed: of the order and of the choice.
        device: "cuda" keeps the structures on this process's GPU, where batches are then planned and gathered.
    """

    def __init__(
        self,
        table: StructureTable,
        *,
        max_atoms_per_batch: int,
        evaluation_fraction: float = 0.0,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.table, self.budget, self.seed = table, max_atoms_per_batch, seed
        self.domains: Sequence[str] = table.domains
        self.resident = None if device == "cpu" else ResidentTable(table, own_gpu())
        order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))
        count = int(evaluation_fraction * len(table))
        self._evaluation = order[:count].sort().values
        self.training_batches: Any = self._batches(order[count:].sort().values, shuffle=True)

    @property
    def fingerprint(self) -> str:
        return self.table.fingerprint

    @cached_property
    def evaluation_batches(self) -> Sequence[Any]:
        return list(self._batches(self._evaluation, shuffle=False))

    def loader(self, batches: Iterable[Any], *, num_workers: int, **options: Any) -> Iterable[StructureBatch]:
        if self.resident is not None:
            return ResidentLoader(self.resident, batches)
        return structure_loader(self.table, batches, num_workers=num_workers, **options)

    def _batches(self, ids: Tensor, *, shuffle: bool) -> _Chosen | ResidentBatches:
        options: Any = {"shuffle": shuffle, "seed": self.seed, "oversize": "own_batch"}
        if self.resident is not None:
            return ResidentBatches(self.resident, self.budget, ids=ids, **options)
        return _Chosen(AtomBudgetBatchSampler(self.table.sizes[ids], self.budget, **options), ids)


class StructuresDemo:
    """The system `moeyard train structures-demo`."""

    name = "structures-demo"
    Config = StructuresConfig
    defaults: Mapping[str, Any] = {
        "max_steps": 800,
        "optimizer": {"learning_rate": 2e-3},
        "schedule": {"warmup_steps": 30},
    }

    def open_data(self, config: Any, progress: Progress | None = None) -> StructuresDemoData:
        folder = config.data.folder
        stage = "structures embedded" if folder is None else "files read"

        def tell(done: int, total: int, what: str) -> None:
            # The name of the stage, not of each molecule or file.
            if progress is not None:
                progress(done, total, stage)

        if folder is None:
            table, skipped = embed_molecules(progress=tell, seed=config.seed)
        elif not Path(folder).exists():
            raise FileNotFoundError(f"data.folder: expected a folder of structure files; {folder} does not exist")
        else:
            table, skipped = read_structures(folder, progress=tell)
        if len(table) == 0:
            first = f"; the first of {len(skipped)} skipped: {': '.join(skipped[0])}" if skipped else ""
            raise ValueError(
                f"data.folder: no readable PDB, mmCIF or SDF structure in {folder or 'the embedded list'}{first}"
            )
        return StructuresDemoData(
            table,
            max_atoms_per_batch=config.data.max_atoms_per_batch,
            evaluation_fraction=config.data.evaluation_fraction,
            seed=config.seed,
            device=config.device,
        )

    def build_model(self, config: Any, data: StructuresDemoData) -> StructurePretraining:
        return StructurePretraining(
            config.encoder,
            config.pretraining,
            num_domains=len(data.domains),
            max_atoms_per_batch=config.data.max_atoms_per_batch,
        )


system = StructuresDemo()
