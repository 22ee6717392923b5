"""Batching: which structures make a batch (`pack_batches`) and how they become one (`gather_segments`)."""

from moeyard.data.batching.collate import StructureBatch, collate
from moeyard.data.batching.dataset import StructureDataset, structure_loader
from moeyard.data.batching.resident import PlannedBatch, ResidentBatches, ResidentLoader, ResidentTable, own_gpu
from moeyard.data.batching.sampler import AtomBudgetBatchSampler

__all__ = [
    "AtomBudgetBatchSampler",
    "PlannedBatch",
    "ResidentBatches",
    "ResidentLoader",
    "ResidentTable",
    "StructureBatch",
    "StructureDataset",
    "collate",
    "own_gpu",
    "structure_loader",
]
