"""The MoE layer against a loop over experts: values and gradients in float64, masks, forced ids, empty input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moeyard.nn import Experts, MoE, Router, collapse_warnings, expert_usage


def expert(experts: Experts, e: int, x: Tensor) -> Tensor:
    hidden = x @ experts.up[e]
    if experts.activation == "swiglu":
        half = hidden.shape[-1] // 2
        gate, value = hidden[..., :half], hidden[..., half:]
        return (gate * torch.sigmoid(gate) * value) @ experts.down[e]
    return nn.functional.gelu(hidden) @ experts.down[e]


def loop(moe: MoE, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Every token through every one of its experts, one by one."""
    rows = []
    for t in range(x.shape[0]):
        y = torch.zeros(x.shape[1], dtype=x.dtype)
        for w, e in zip(weights[t], ids[t].tolist(), strict=True):
            if e >= 0:
                y = y + w * expert(moe.experts, e, x[t])
        rows.append(y)
    return torch.stack(rows)


def gate(moe: MoE, x: Tensor) -> tuple[Tensor, Tensor]:
    """softmax, top k, renormalised, in plain torch."""
    weights, ids = (x @ moe.router.weight.T).softmax(-1).topk(moe.router.k, dim=-1)
    if moe.router.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids


def make(activation: str = "swiglu", **options: object) -> tuple[MoE, Tensor]:
    torch.manual_seed(3)
    moe = MoE(12, 10, 6, 2, activation=activation, **options).double()
    # Logits far from each other: the choice must not hang on rounding.
    nn.init.normal_(moe.router.weight)
    return moe, torch.randn(37, 12, dtype=torch.float64)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_equals_a_loop_over_experts(activation: str, renormalize: bool) -> None:
    moe, x = make(activation, renormalize=renormalize)
    leaves = [x.requires_grad_(), *moe.parameters()]
    output, gating, _ = moe(x)
    weights, ids = gate(moe, x)
    want = loop(moe, x, weights, ids)
    assert torch.equal(gating.experts.long(), ids)
    torch.testing.assert_close(output, want, rtol=0, atol=1e-10)
    seed = torch.randn_like(want)
    got_grads = torch.autograd.grad(output, leaves, seed)
    want_grads = torch.autograd.grad(want, leaves, seed)
    for got, expected in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_leading_dimensions_are_kept() -> None:
    moe, x = make()
    flat = moe(x[:36]).output
    assert torch.equal(moe(x[:36].reshape(4, 9, 12)).output, flat.reshape(4, 9, 12))


def test_permuting_tokens_permutes_the_output() -> None:
    moe, x = make()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(moe(x[order]).output, moe(x).output[order], rtol=0, atol=1e-12)


def test_forced_experts_lead_and_take_their_weight() -> None:
    moe, x = make(renormalize=False)
    forced = torch.arange(len(x)) % 6
    output, gating, _ = moe(x, forced_experts=forced)
    assert torch.equal(gating.experts[:, 0].long(), forced)
    assert (gating.experts[:, 1] != gating.experts[:, 0]).all()
    scores = (x @ moe.router.weight.T).softmax(-1)
    torch.testing.assert_close(output, loop(moe, x, scores.gather(1, gating.experts.long()), gating.experts))
    one = moe(x, forced_experts=gating.experts, forced_weights="one")
    half = torch.full((len(x), 2), 0.5, dtype=torch.float64)
    torch.testing.assert_close(one.output, loop(moe, x, half, gating.experts))


def test_masked_tokens_give_zero_and_leave_the_others_alone() -> None:
    moe, x = make()
    mask = torch.ones(len(x), dtype=torch.bool)
    mask[5:9] = False
    output, gating, _ = moe(x, mask=mask)
    assert not output[~mask].any()
    assert int(gating.counts.sum()) == 2 * int(mask.sum())
    torch.testing.assert_close(output[mask], moe(x[mask]).output, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [0, 1])
def test_few_tokens(rows: int) -> None:
    moe, x = make()
    output, _, _ = moe(x[:rows])
    assert output.shape == (rows, 12)
    grads = torch.autograd.grad(output.sum(), list(moe.experts.parameters()))
    assert all(g.isfinite().all() for g in grads)


def test_experts_leave_the_tail_zero() -> None:
    experts = Experts(3, 4, 5).double()
    x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    y = experts(x, torch.tensor([2, 2, 5], dtype=torch.int32))
    torch.testing.assert_close(y[:2], expert(experts, 0, x[:2]))
    torch.testing.assert_close(y[2:5], expert(experts, 2, x[2:5]))
    assert not y[5:].any()
    assert not torch.autograd.grad(y.sum(), x)[0][5:].any()


def test_autocast_keeps_the_router_in_float32() -> None:
    moe = MoE(16, 8, 4, 2)
    x = torch.randn(20, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, gating, _ = moe(x)
    assert gating.weights.dtype == torch.float32
    assert torch.equal(gating.experts, moe.router(x).experts)
    assert output.isfinite().all()


def test_bad_arguments_name_themselves() -> None:
    with pytest.raises(ValueError, match="k: expected 1 <= k <= num_experts = 4, got 5"):
        Router(8, 4, 5)
    with pytest.raises(ValueError, match="activation: expected one of 'swiglu', 'gelu', 'relu', got 'relu6'"):
        Experts(2, 4, 4, activation="relu6")


def test_usage_per_domain() -> None:
    ids = torch.tensor([[0, 1], [1, 2], [-1, -1], [2, 0]], dtype=torch.int32)
    assert expert_usage(ids, 3).tolist() == [[2, 2, 2]]
    by_domain = expert_usage(ids, 3, torch.tensor([0, 1, 1, 1]), 2)
    assert by_domain.tolist() == [[1, 1, 0], [1, 1, 2]]


@pytest.mark.parametrize(
    ("counts", "k", "lines"),
    [
        ([25, 25, 25, 25], 1, []),
        ([61, 13, 13, 13], 1, ["expert 0 takes 61% of the tokens"]),
        ([60, 20, 20, 0], 1, ["expert 3 got no token"]),
        ([100, 0, 0], 1, ["expert 0 takes 100% of the tokens", "experts 1, 2 got no token"]),
        ([50, 50], 2, []),
        ([90, 60, 30, 20], 2, ["expert 0 takes 90% of the tokens"]),
        ([0, 0], 1, []),
    ],
)
def test_collapse_alarm(counts: list[int], k: int, lines: list[str]) -> None:
    assert collapse_warnings(torch.tensor(counts), k) == lines


@pytest.mark.parametrize(
    ("experts", "domain", "message"),
    [(4, 0, r"experts: expected values in \[-1, 4\), got 4"), (3, 2, "domain: .*got 2"), (3, -1, "domain: .*got -1")],
)
def test_usage_refuses_what_would_count_for_another(experts: int, domain: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expert_usage(torch.tensor([[experts]]), 4, torch.tensor([domain]), 2)


@pytest.mark.parametrize(("k", "error", "message"), [(2.0, TypeError, "k: expected an int"), (0, ValueError, "k: ")])
def test_router_arguments(k: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Router(8, 4, k)


def test_wrong_number_of_features_is_named() -> None:
    with pytest.raises(ValueError, match=r"x: expected 8 features in the last dimension, got \[5, 7\]"):
        MoE(8, 16, 4, 2)(torch.randn(5, 7))
