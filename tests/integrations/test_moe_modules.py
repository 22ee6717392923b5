"""The CheMoE building blocks against their formula: every expert on every sample, times weights mostly zero."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from moeyard.integrations.moe_modules import FusionMoE, MoELayer, SparseGatingNetwork


def samples(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def weights_by_formula(gating: SparseGatingNetwork, x: Tensor, k: int) -> Tensor:
    """softmax over all, the k best kept and divided by their sum."""
    probs = gating.gate(x).softmax(1)
    best, indices = probs.topk(k, dim=1)
    return torch.zeros_like(probs).scatter(1, indices, best / best.sum(1, keepdim=True))


def layer_by_formula(layer: MoELayer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and balance loss."""
    weights = weights_by_formula(layer.gating, x, layer.top_k)
    every = torch.stack([expert(x) for expert in layer.experts], dim=1)
    return (every * weights[:, :, None]).sum(1), 0.01 * (weights.mean(0) - 1 / layer.num_experts).square().mean()


def gradients(module: nn.Module, x: Tensor, loss: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss, [x, *module.parameters()], allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip([x, *module.parameters()], found, strict=True)]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_gating(k: int) -> None:
    gating, x = SparseGatingNetwork(6, 4, hidden_dim=8).double().eval(), samples(9, 6)
    weights, indices = gating(x, k)
    torch.testing.assert_close(weights, weights_by_formula(gating, x, k), rtol=1e-10, atol=1e-12)
    assert indices.shape == (9, k)
    assert indices.dtype == torch.int64
    torch.testing.assert_close(weights.sum(1), torch.ones(9, dtype=torch.float64))
    assert torch.equal(weights.gather(1, indices), weights.sort(1, descending=True).values[:, :k])


def test_gating_by_hand() -> None:
    """The gate's last product is a table here: logits log 1, log 2, log 5; of the best two, weights 5/7 and 2/7."""
    gating = SparseGatingNetwork(2, 3, hidden_dim=4, dropout=0.0)
    with torch.no_grad():
        gating.gate[-1].weight.zero_()
        gating.gate[-1].bias.copy_(torch.tensor([1.0, 2.0, 5.0]).log())
    weights, indices = gating(torch.ones(1, 2))
    torch.testing.assert_close(weights, torch.tensor([[0.0, 2 / 7, 5 / 7]]))
    assert indices.tolist() == [[2, 1]]


@pytest.mark.parametrize("hidden", [(7, 5), (4,), ()], ids=str)
@pytest.mark.parametrize("layernorm", [False, True])
def test_layer_values_and_gradients(hidden: tuple[int, ...], layernorm: bool) -> None:
    layer = MoELayer(6, 3, 4, 2, expert_hidden_dims=hidden, dropout=0.0, use_layernorm=layernorm).double()
    x = samples(20, 6).requires_grad_()
    out = layer(x)
    balance = layer.compute_load_balance_loss()
    want, want_balance = layer_by_formula(layer, x)
    torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(balance, want_balance, rtol=1e-10, atol=1e-14)
    got_grads = gradients(layer, x, out.square().sum() + 100 * balance)
    want_grads = gradients(layer, x, want.square().sum() + 100 * want_balance)
    for got, expected in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_only_chosen_experts_see_a_sample() -> None:
    layer, rows = MoELayer(6, 3, 4, 2, dropout=0.0), []
    for expert in layer.experts:
        expert.register_forward_hook(lambda m, args, out: rows.append(args[0].shape[0]))
    layer(torch.randn(50, 6))
    assert len(rows) == 4
    assert sum(rows) == 100
    assert layer.last_gating is not None
    assert layer.last_gating.counts.tolist() == rows


def test_leading_dimensions_and_no_samples() -> None:
    layer = MoELayer(6, 3, 4, 2).double().eval()
    x = samples(2, 5, 6)
    torch.testing.assert_close(layer(x), layer(x.reshape(10, 6)).reshape(2, 5, 3))
    out = layer(x[:0])
    assert out.shape == (0, 5, 3)
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.experts.parameters())


def test_balance_losses() -> None:
    layer = MoELayer(6, 3, 4, 1, dropout=0.0)
    assert layer.compute_load_balance_loss() == 0
    with torch.no_grad():
        layer.gating.gate[-1].weight.zero_()
        layer.gating.gate[-1].bias.copy_(torch.tensor([50.0, 0.0, 0.0, 0.0]))
    layer(torch.randn(8, 6))
    # All on one of four: mean of (3/4)^2 and three (1/4)^2; Switch's loss is E.
    torch.testing.assert_close(layer.compute_load_balance_loss(2.0), torch.tensor(2 * 0.1875))
    torch.testing.assert_close(layer.compute_load_balance_loss(1.0, "switch"), torch.tensor(4.0))
    with pytest.raises(ValueError, match="kind: expected one of 'squared_deviation', 'switch', got 'mse'"):
        layer.compute_load_balance_loss(kind="mse")


def test_fusion() -> None:
    fusion, z, embed = FusionMoE(4, 3, dropout=0.0).double(), samples(8, 4), samples(8, 3)
    want, balance = layer_by_formula(fusion.moe, torch.cat([z, embed], 1))
    assert fusion(z, embed).shape == (8, 7)
    torch.testing.assert_close(fusion(z, embed), want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(fusion.compute_load_balance_loss(), balance)
    assert FusionMoE(4, 3, output_dim=2, expert_hidden_dims=(5,))(z.float(), embed.float()).shape == (8, 2)


def test_a_used_layer_can_be_copied() -> None:
    """An EMA copies the model in the middle of training."""
    layer = MoELayer(6, 3)
    layer(torch.randn(4, 6))
    twin = copy.deepcopy(layer)
    assert twin.last_gating is None
    assert layer.last_gating is not None
    x = torch.randn(4, 6)
    assert torch.equal(twin.eval()(x), layer.eval()(x))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="top_k: expected 1 <= top_k <= num_experts = 4, got 5"):
        MoELayer(6, 3, 4, 5)
    with pytest.raises(ValueError, match="input_dim: expected at least 1, got 0"):
        MoELayer(0, 3)
    with pytest.raises(TypeError, match="output_dim: expected an int"):
        MoELayer(6, 3.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expert_hidden_dims: expected at least 1, got 0"):
        MoELayer(6, 3, expert_hidden_dims=(0,))
    with pytest.raises(ValueError, match="embed_dim: expected at least 1, got 0"):
        FusionMoE(3, 0)
