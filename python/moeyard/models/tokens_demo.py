"""tokens-demo: label the tokens of generated sequences, with a small mixture of experts.

    h_t = embedding[x_t] + embedding[x_0]        x_0 names the dialect d of the sequence
    h   = h + MoE(norm(h))                       L times, padding masked
    logits_t = W norm(h_t)                       the label of token v in dialect d is table[d, v], drawn at random

Everything is drawn from `data.seed` and the number of the sequence: nothing is downloaded or stored, and a sequence is
the same wherever it is made. Shape letters: B sequences, T tokens of the longest, V tokens, C labels, D dialects.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from moeyard.data.batching import AtomBudgetBatchSampler
from moeyard.models.settings import Settings
from moeyard.models.step import StepOutput
from moeyard.nn import MoE, expert_usage, switch_load_balancing
from moeyard.ops import Gating

#: The label of padding, and of the token that names the dialect.
NO_LABEL = -100


class TokensData(Settings):
    """Sequences to generate: `sequences` for training and `evaluation_sequences` others, `shortest` to `longest` tokens
    each, batched to at most `max_tokens_per_batch`."""

    seed: int = Field(default=0, ge=0, lt=2**31)
    sequences: int = Field(default=2000, ge=1)
    evaluation_sequences: int = Field(default=200, ge=0)
    shortest: int = Field(default=8, ge=2)
    longest: int = Field(default=32, ge=2)
    vocabulary: int = Field(default=64, ge=1)
    labels: int = Field(default=8, ge=2)
    dialects: int = Field(default=4, ge=1)
    max_tokens_per_batch: int = Field(default=512, ge=2)

    @model_validator(mode="after")
    def _lengths(self) -> TokensData:
        if not self.shortest <= self.longest <= self.max_tokens_per_batch:
            raise ValueError(
                "expected shortest <= longest <= max_tokens_per_batch, "
                f"got {self.shortest}, {self.longest}, {self.max_tokens_per_batch}"
            )
        return self


class TokensModel(Settings):
    """Sizes, and the weight of the balance loss."""

    dim: int = Field(default=32, ge=1)
    hidden: int = Field(default=32, ge=1)
    num_layers: int = Field(default=2, ge=1)
    num_experts: int = Field(default=4, ge=1, le=8192)
    experts_per_token: int = Field(default=2, ge=1)
    balance_weight: float = Field(default=0.01, ge=0)

    @model_validator(mode="after")
    def _experts(self) -> TokensModel:
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"expected experts_per_token <= num_experts = {self.num_experts}, got {self.experts_per_token}"
            )
        return self


class TokensConfig(Settings):
    """The system's own settings."""

    data: TokensData = TokensData()
    model: TokensModel = TokensModel()


class TokenBatch(NamedTuple):
    """tokens [B,T] int64; labels [B,T] int64, `NO_LABEL` where there is none; mask [B,T] bool, False = padding; domain
    [B] int64, the dialects."""

    tokens: Tensor
    labels: Tensor
    mask: Tensor
    domain: Tensor


class Sequences(Dataset[tuple[Tensor, Tensor]]):
    """The generated sequences: (tokens, labels) [T] each; those for training come first."""

    def __init__(self, config: TokensData) -> None:
        self.config = config
        generator = np.random.default_rng([config.seed, 0])
        self.table = torch.from_numpy(generator.integers(0, config.labels, (config.dialects, config.vocabulary)))
        count = config.sequences + config.evaluation_sequences
        self.lengths = torch.from_numpy(generator.integers(config.shortest, config.longest + 1, count))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        config = self.config
        generator = np.random.default_rng([config.seed, 1, index])
        dialect = int(generator.integers(config.dialects))
        words = torch.from_numpy(generator.integers(0, config.vocabulary, int(self.lengths[index]) - 1))
        # The dialects' names stand behind the words in the vocabulary.
        tokens = torch.cat([torch.tensor([config.vocabulary + dialect]), words])
        return tokens, torch.cat([torch.tensor([NO_LABEL]), self.table[dialect, words]])


class TokensDemoData:
    """Training and evaluation batches of `Sequences`, by a budget of tokens."""

    def __init__(self, config: TokensData, seed: int) -> None:
        self.config, self.sequences = config, Sequences(config)
        self.domains: Sequence[str] = tuple(f"dialect {d}" for d in range(config.dialects))
        self.training_batches = AtomBudgetBatchSampler(
            self.sequences.lengths[: config.sequences], config.max_tokens_per_batch, seed=seed
        )

    @cached_property
    def evaluation_batches(self) -> Sequence[list[int]]:
        config = self.config
        lengths = self.sequences.lengths[config.sequences :]
        batches = AtomBudgetBatchSampler(lengths, config.max_tokens_per_batch, shuffle=False)
        return [[config.sequences + i for i in batch] for batch in batches]

    def loader(self, batches: Iterable[list[int]], *, num_workers: int, **options: Any) -> DataLoader[Any]:
        return DataLoader(
            self.sequences, batch_sampler=batches, collate_fn=self._collate, num_workers=num_workers, **options
        )

    def _collate(self, items: Sequence[tuple[Tensor, Tensor]]) -> TokenBatch:
        pad = nn.utils.rnn.pad_sequence
        tokens = pad([t for t, _ in items], batch_first=True)
        labels = pad([y for _, y in items], batch_first=True, padding_value=NO_LABEL)
        lengths = torch.tensor([len(t) for t, _ in items])
        mask = torch.arange(tokens.shape[1]) < lengths[:, None]
        return TokenBatch(tokens, labels, mask, tokens[:, 0] - self.config.vocabulary)


class TokenClassifier(nn.Module):
    """See the head of this file."""

    def __init__(self, data: TokensData, config: TokensModel) -> None:
        super().__init__()
        self.data, self.config = data, config
        self.embedding = nn.Embedding(data.vocabulary + data.dialects, config.dim)
        self.norms = nn.ModuleList(nn.LayerNorm(config.dim) for _ in range(config.num_layers))
        self.layers = nn.ModuleList(
            MoE(config.dim, config.hidden, config.num_experts, config.experts_per_token)
            for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, data.labels)

    @property
    def experts_per_token(self) -> int:
        return self.config.experts_per_token

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, list[Gating]]:
        """Logits [B,T,C] and the routing of each layer."""
        h = self.embedding(tokens) + self.embedding(tokens[:, :1])
        gatings = []
        for norm, layer in zip(self.norms, self.layers, strict=True):
            update, gating, _ = layer(norm(h), mask=mask.reshape(-1))
            h = h + update
            gatings.append(gating)
        return self.head(self.norm(h)), gatings

    def training_step(self, batch: TokenBatch, generator: torch.Generator) -> StepOutput:
        """Cross-entropy over the labelled tokens, and the balance loss."""
        logits, gatings = self(batch.tokens, batch.mask)
        labelled = batch.labels != NO_LABEL
        count = int(labelled.sum())
        label = nn.functional.cross_entropy(logits[labelled], batch.labels[labelled])
        balance = torch.stack([switch_load_balancing(gating) for gating in gatings]).mean()
        correct = (logits[labelled].argmax(-1) == batch.labels[labelled]).float().mean()
        tokens = int(batch.mask.sum())
        domain = batch.domain[:, None].expand_as(batch.tokens).reshape(-1)
        experts, domains = self.config.num_experts, self.data.dialects
        return StepOutput(
            loss=label + self.config.balance_weight * balance,
            metrics={"loss_label": label, "loss_balance": balance, "accuracy": correct},
            sizes={"tokens": tokens, "sequences": len(batch.tokens)},
            usage=torch.stack([expert_usage(g.experts, experts, domain, domains) for g in gatings]),
            batch_fill=tokens / self.data.max_tokens_per_batch,
            weight=count,
        )


class TokensDemo:
    """The system `moeyard train tokens-demo`: half a minute to almost every label right."""

    name = "tokens-demo"
    Config = TokensConfig
    #: Two batches per step: one process or two of torchrun give the same losses.
    defaults: Mapping[str, Any] = {
        "max_steps": 400,
        "accumulate": 2,
        "optimizer": {"learning_rate": 3e-3},
        "schedule": {"name": "cosine", "warmup_steps": 20},
        "eval_every": 50,
        "checkpoint_every": 50,
    }

    def open_data(self, config: Any, progress: Any = None) -> TokensDemoData:
        return TokensDemoData(config.data, config.seed)

    def build_model(self, config: Any, data: TokensDemoData) -> TokenClassifier:
        return TokenClassifier(config.data, config.model)


system = TokensDemo()
