"""Router losses from the one-pass statistics against their textbook formulas, values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moeyard.nn import (
    importance_loss,
    router_z_loss,
    routing_entropy,
    squared_deviation,
    switch_load_balancing,
)
from moeyard.ops import topk_gating

T, E, K = 29, 5, 2


def logits() -> Tensor:
    return torch.randn(T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)


def switch_formula(x: Tensor) -> Tensor:
    p = x.softmax(-1)
    chosen = torch.zeros_like(p).scatter(1, p.topk(K).indices, 1.0).detach()
    return E * (chosen.mean(0) / K * p.mean(0)).sum()


def importance_formula(x: Tensor) -> Tensor:
    p = x.softmax(-1)
    top = p.topk(K)
    importance = torch.zeros_like(p).scatter(1, top.indices, top.values).sum(0)
    return importance.var(correction=0) / importance.mean() ** 2


def deviation_formula(x: Tensor) -> Tensor:
    top = x.softmax(-1).topk(K)
    mean = torch.zeros_like(x).scatter(1, top.indices, top.values).mean(0)
    return nn.functional.mse_loss(mean, mean.mean().expand(E))


CASES: list[tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]] = [
    (switch_load_balancing, switch_formula),
    (importance_loss, importance_formula),
    (squared_deviation, deviation_formula),
    (router_z_loss, lambda x: x.logsumexp(-1).square().mean()),
    (routing_entropy, lambda x: -(x.softmax(-1) * x.log_softmax(-1)).sum(-1).mean()),
]


@pytest.mark.parametrize(("loss", "formula"), CASES, ids=lambda f: getattr(f, "__name__", ""))
def test_equals_its_formula(loss: Callable[..., Tensor], formula: Callable[[Tensor], Tensor]) -> None:
    x = logits()
    got, want = loss(topk_gating(x, K)), formula(x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(v, x)[0] for v in (got, want)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", [c[0] for c in CASES])
def test_padding_counts_nowhere(loss: Callable[..., Tensor]) -> None:
    x = logits().detach()
    mask = torch.arange(T) % 3 != 0
    torch.testing.assert_close(loss(topk_gating(x, K, mask=mask)), loss(topk_gating(x[mask], K)))


@pytest.mark.parametrize("loss", [c[0] for c in CASES])
def test_no_tokens_give_zero(loss: Callable[..., Tensor]) -> None:
    x = torch.zeros(0, E, requires_grad=True)
    assert float(loss(topk_gating(x, K)).detach()) == 0.0


def test_hand_computed() -> None:
    """Even logits: P = 1/E, loss 1, entropy log E, z = (log E)^2; one expert for all: loss E."""
    even = topk_gating(torch.zeros(6, 4, dtype=torch.float64), 1)
    torch.testing.assert_close(switch_load_balancing(even).item(), 1.0)
    torch.testing.assert_close(routing_entropy(even).item(), torch.tensor(4.0).log().item())
    torch.testing.assert_close(router_z_loss(even).item(), torch.tensor(4.0).log().square().item())
    one = topk_gating(torch.tensor([[50.0, 0, 0, 0]] * 6, dtype=torch.float64), 1)
    torch.testing.assert_close(switch_load_balancing(one).item(), 4.0)
    torch.testing.assert_close(importance_loss(one).item(), 3.0)
    torch.testing.assert_close(squared_deviation(one).item(), (0.75**2 + 3 * 0.25**2) / 4)


def test_switch_loss_revives_a_dead_expert() -> None:
    x = torch.tensor([[3.0, 1.0, 0.0]] * 4, requires_grad=True)
    (grad,) = torch.autograd.grad(switch_load_balancing(topk_gating(x, 1)), x)
    assert (grad[:, 0] > 0).all()
    assert (grad[:, 2] < 0).all()
