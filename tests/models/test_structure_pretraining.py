"""Pretraining: the corruption, the losses by hand, usage counts."""

from __future__ import annotations

import math

import pytest
import torch

from moeyard.data.batching import collate
from moeyard.models import StructureEncoderConfig
from moeyard.models.structure_pretraining import PretrainingConfig, StructurePretraining, corrupt
from train.tiny import tiny_table

SIZES = StructureEncoderConfig(dim=16, num_layers=2, num_basis=8, num_experts=4, expert_hidden=16)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def module(seed: int = 0, **changes: float) -> StructurePretraining:
    torch.manual_seed(seed)
    return StructurePretraining(SIZES, PretrainingConfig(**changes), num_domains=2)


def test_corruption_does_what_it_says() -> None:
    positions = torch.randn(20_000, 3)
    elements = torch.full((20_000,), 8)
    before = positions.clone()
    got = corrupt(positions, elements, noise_std=0.2, mask_fraction=0.15, generator=generator())
    assert torch.equal(positions, before)
    assert (elements == 8).all()
    torch.testing.assert_close(got.positions, positions + 0.2 * got.noise)
    assert got.noise.std().item() == pytest.approx(1.0, abs=0.02)
    assert got.masked.float().mean().item() == pytest.approx(0.15, abs=0.01)
    assert torch.equal(got.elements == 0, got.masked)


def test_losses_equal_their_formulas() -> None:
    model = module(noise_weight=2.0, element_weight=0.5, balance_weight=0.1, z_weight=0.01)
    table = tiny_table(copies=8)
    batch = collate(table, torch.arange(len(table)))
    corruption = corrupt(batch.positions, batch.elements, noise_std=0.1, mask_fraction=0.3, generator=generator())
    encoding = model.encoder(corruption.positions, corruption.elements, batch.ptr)
    got = model.losses(encoding, corruption, batch.elements)
    noise = torch.nn.functional.mse_loss(encoding.noise, corruption.noise)
    element = torch.nn.functional.cross_entropy(
        encoding.element_logits[corruption.masked], batch.elements[corruption.masked]
    )
    torch.testing.assert_close(got["loss_noise"], noise)
    torch.testing.assert_close(got["loss_element"], element)
    want = 2.0 * noise + 0.5 * element + 0.1 * got["loss_balance"] + 0.01 * got["loss_z"]
    torch.testing.assert_close(got["loss"], want)


def test_nothing_masked_is_no_loss_of_elements() -> None:
    model = module(mask_fraction=0.0)
    table = tiny_table(copies=2)
    out = model.training_step(collate(table, torch.arange(len(table))), generator())
    assert out.metrics["loss_element"] == 0
    assert out.loss.isfinite()


def test_usage_counts_every_slot_of_every_domain() -> None:
    model = module()
    table = tiny_table(copies=4)
    usage = model.training_step(collate(table, torch.arange(len(table))), generator()).usage
    assert usage.shape == (2, 2, 4)
    # 4 waters and 4 methanes have 32 atoms, 4 benzenes 48; each atom fills two slots.
    assert usage.sum(2).tolist() == [[64, 96], [64, 96]]


@pytest.mark.parametrize("changes", [{"noise_std": 0.0}, {"noise_std": math.nan}, {"mask_fraction": 1.5}])
def test_bad_configuration(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        PretrainingConfig(**changes)
