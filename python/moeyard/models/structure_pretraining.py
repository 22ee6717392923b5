"""Self-supervised pretraining of the structure encoder: remove the noise, name the hidden elements.

    x~ = x + sigma eps        loss = w_n mean |eps^ - eps|^2 / 3 + w_e CE(masked elements) + balance and z losses

Source: Zaidi et al. 2022 (arXiv:2206.00133), Hu et al. 2020 (arXiv:1905.12265).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moeyard.data.batching import StructureBatch
from moeyard.models.step import StepOutput
from moeyard.models.structure_encoder import (
    MASK_ELEMENT,
    StructureEncoder,
    StructureEncoderConfig,
    StructureEncoding,
)
from moeyard.nn import expert_usage, router_z_loss, switch_load_balancing

#: Stands for the element of an atom that is not hidden.
_NOT_ASKED = -100


@dataclass(frozen=True)
class PretrainingConfig:
    """What is learned. `noise_std` in Å; the weights multiply the parts of the loss."""

    noise_std: float = 0.1
    mask_fraction: float = 0.15
    noise_weight: float = 1.0
    element_weight: float = 1.0
    balance_weight: float = 0.03
    z_weight: float = 0.001

    def __post_init__(self) -> None:
        if not self.noise_std > 0:
            raise ValueError(f"noise_std: expected a positive length in Å, got {self.noise_std}")
        if not 0 <= self.mask_fraction <= 1:
            raise ValueError(f"mask_fraction: expected 0 to 1, got {self.mask_fraction}")


class Corruption(NamedTuple):
    """A batch made hard: what the model sees, and what it is asked for."""

    positions: Tensor  # [n,3] noised
    elements: Tensor  # [n], 0 where masked
    noise: Tensor  # [n,3] standard normal
    masked: Tensor  # [n] bool


def corrupt(
    positions: Tensor, elements: Tensor, *, noise_std: float, mask_fraction: float, generator: torch.Generator
) -> Corruption:
    """Adds Gaussian noise to every position and hides a share of the elements.

    Args:
        positions: [n,3] float, Å. elements: [n] integer.
        noise_std: standard deviation per coordinate, Å.
        mask_fraction: chance of each atom to be hidden.
        generator: draws happen on its device, in float32.
    """
    noise = torch.randn(positions.shape, generator=generator, device=generator.device).to(positions)
    chance = torch.rand(elements.shape, generator=generator, device=generator.device)
    masked = (chance < mask_fraction).to(elements.device)
    return Corruption(positions + noise_std * noise, elements.masked_fill(masked, MASK_ELEMENT), noise, masked)


class StructurePretraining(nn.Module):
    """Trains a `StructureEncoder` on `StructureBatch`es.

    Args:
        encoder: the encoder's sizes.
        config: the losses.
        num_domains: D, for the usage counts per domain.
        max_atoms_per_batch: the budget that the batches' fill is measured against, None for no such measure. A
            structure larger than the budget is a batch of its own and counts as full.
    """

    def __init__(
        self,
        encoder: StructureEncoderConfig,
        config: PretrainingConfig,
        *,
        num_domains: int = 1,
        max_atoms_per_batch: int | None = None,
    ) -> None:
        super().__init__()
        self.config, self.num_domains, self.max_atoms = config, num_domains, max_atoms_per_batch
        self.encoder = StructureEncoder(encoder)

    @property
    def experts_per_token(self) -> int:
        return self.encoder.config.experts_per_token

    def training_step(self, batch: StructureBatch, generator: torch.Generator) -> StepOutput:
        """Corrupts, encodes and scores a batch."""
        corruption = corrupt(
            batch.positions,
            batch.elements,
            noise_std=self.config.noise_std,
            mask_fraction=self.config.mask_fraction,
            generator=generator,
        )
        encoding = self.encoder(corruption.positions, corruption.elements, batch.ptr, batch.domain)
        metrics = self.losses(encoding, corruption, batch.elements)
        atoms = len(batch.positions)
        return StepOutput(
            loss=metrics.pop("loss"),
            metrics=metrics,
            sizes={"atoms": atoms, "structures": len(batch.ptr) - 1, "edges": encoding.num_edges},
            usage=self.usage(encoding, batch.domain[batch.batch]),
            batch_fill=None if self.max_atoms is None else min(1.0, atoms / self.max_atoms),
            weight=atoms,
        )

    def losses(self, encoding: StructureEncoding, corruption: Corruption, elements: Tensor) -> dict[str, Tensor]:
        """The parts of the loss and their weighted sum, as scalars."""
        config, masked = self.config, corruption.masked
        # Predicting zero gives a noise loss of 1, whatever noise_std is. No atoms or masks give 0, not NaN.
        noise = (encoding.noise - corruption.noise).square().sum() / max(corruption.noise.numel(), 1)
        target, count = elements.masked_fill(~masked, _NOT_ASKED), masked.sum().clamp(min=1)
        logits = encoding.element_logits
        element = nn.functional.cross_entropy(logits, target, reduction="sum", ignore_index=_NOT_ASKED) / count
        balance = torch.stack([switch_load_balancing(g) for g in encoding.gatings]).mean()
        z = torch.stack([router_z_loss(g) for g in encoding.gatings]).mean()
        weighted = config.noise_weight * noise + config.element_weight * element
        return {
            "loss": weighted + config.balance_weight * balance + config.z_weight * z,
            "loss_noise": noise,
            "loss_element": element,
            "loss_balance": balance,
            "loss_z": z,
            "element_accuracy": (logits.argmax(1) == target).sum() / count,
        }

    def usage(self, encoding: StructureEncoding, domain: Tensor) -> Tensor:
        """[L,D,E] int64: slots that each layer's experts got from each domain."""
        experts = self.encoder.config.num_experts
        return torch.stack([expert_usage(g.experts, experts, domain, self.num_domains) for g in encoding.gatings])
