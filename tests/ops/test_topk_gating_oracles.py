"""topk_gating against slower truths: the plain-torch reference, the DeepSeek-V3 gate, losses written out, gradcheck,
and properties that hold for any input."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import grad as gradient

import moeyard
from engines import examples, large
from moeyard.ops._topk_gating_reference import topk_gating_reference

pytestmark = pytest.mark.usefixtures("engine")

INF, NAN = float("inf"), float("nan")
SCORES = ("softmax", "softmax_topk", "sigmoid", "sqrtsoftplus")
FLOATS = ("weights", "score_sum", "weight_sum", "logsumexp_sq", "entropy_sum")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FORWARD = {torch.float64: 1e-10}  # rtol and atol; float32 arithmetic for the rest
GRADIENT = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def random_case(seed: int) -> dict[str, Any]:
    """Any mixture of sizes, dtypes, ties, masks, NaN, bias, groups and forced ids."""
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    T, E = r.choice([0, 1, 2, 7, 30]), r.choice([1, 2, 3, 4, 6, 8, 12, 16, 33, 64, 65])
    k = min(r.randint(1, E), r.choice([1, 2, 4, 8, E]))
    x = torch.randn(T, E, generator=g, dtype=torch.float64) * r.choice([0.5, 2.0])
    x = ((x * 2).round() / 2 if r.random() < 0.5 else x).to(r.choice(DTYPES))
    case: dict[str, Any] = {"logits": x, "k": k, "score": r.choice(SCORES), "renormalize": r.random() < 0.5}
    case["scale"] = r.choice([1.0, 2.5])
    if r.random() < 0.4:
        x[torch.rand(T, E, generator=g) < 0.3] = -INF
    if r.random() < 0.2:
        x[torch.rand(T, E, generator=g) < 0.2] = NAN
    if r.random() < 0.4:
        case["selection_bias"] = (torch.randn(E, generator=g) * 4).round() / 8
        case["selection_bias"][0] *= r.choice([1.0, INF]) if case["selection_bias"][0] else 1.0
    if r.random() < 0.5:
        groups = r.choice([n for n in range(1, E + 1) if E % n == 0])
        kept, best = r.randint(-(-k * groups // E), groups), r.randint(1, E // groups)
        case |= {"num_groups": groups, "topk_groups": kept, "group_score_experts": best}
    return case | random_mask_and_forced(T, E, k, r, g)


def random_mask_and_forced(T: int, E: int, k: int, r: random.Random, g: torch.Generator) -> dict[str, Any]:
    """Now and then a mask, now and then forced ids, for slot 0 or for all slots."""
    made: dict[str, Any] = {}
    if r.random() < 0.4:
        made["mask"] = torch.rand(T, generator=g) < 0.7
    if r.random() < 0.4:
        ids = torch.rand(T, E, generator=g).argsort(1)[:, :k]
        ids = torch.where(torch.rand(T, k, generator=g) < 0.5, ids, -1)
        made["forced_experts"] = (ids if r.random() < 0.6 else ids[:, 0]).to(r.choice([torch.int32, torch.int64]))
        made["forced_weights"] = r.choice(["score", "one"])
    return made


def loss(out: moeyard.Gating) -> Tensor:
    """Depends on every finite float of the result, unevenly."""
    total = torch.zeros((), dtype=torch.float64)
    for name in FLOATS:
        value = getattr(out, name)
        weight = torch.linspace(0.5, 1.5, value.numel(), dtype=torch.float64).reshape(value.shape)
        total = total + (value.double() * weight).nansum()
    return total


@pytest.mark.parametrize("block", [0, 1, *large(*range(2, 8))])
def test_reference(block: int) -> None:
    """Ids and counts exactly, values and gradients to rounding."""
    for seed in range(block * 100, block * 100 + 100):
        case = random_case(seed)
        x = case.pop("logits")
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        got, want = moeyard.topk_gating(a, **case), topk_gating_reference(b, **case)
        assert torch.equal(got.experts, want.experts), seed
        assert torch.equal(got.counts, want.counts), seed
        tol = FORWARD.get(x.dtype, 2e-5)
        for name in FLOATS:
            torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=tol, atol=tol, equal_nan=True)
        (ga,), (gb,) = gradient(loss(got), a), gradient(loss(want), b)
        live = case.get("mask", torch.ones(len(x), dtype=torch.bool))
        assert torch.equal(ga.isnan(), x.isnan() & live[:, None]), seed
        clean = ~x.isnan().any(1)  # torch's own gradient of a NaN logsumexp is NaN everywhere
        tol = GRADIENT[x.dtype]
        torch.testing.assert_close(ga[clean], gb[clean], rtol=tol, atol=tol)


# ---- DeepSeek-V3 -----------------------------------------------------------------------------------------------------


def deepseek_v3_gate(
    logits: Tensor, bias: Tensor, k: int, groups: int, kept: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Equations 12 to 16 of arXiv:2412.19437 with node-limited routing, in the tensor style of the published gate."""
    scores = logits.sigmoid()
    choice = scores + bias
    per_group = choice.view(len(logits), groups, -1)
    group_scores = per_group.topk(2, dim=-1).values.sum(-1)
    keep = torch.zeros_like(group_scores).scatter(1, group_scores.topk(kept, dim=-1).indices, 1).bool()
    choice = per_group.masked_fill(~keep[..., None], -INF).flatten(1)
    experts = choice.topk(k, dim=-1).indices
    weights = scores.gather(1, experts)
    return experts, weights / weights.sum(-1, keepdim=True) * scale


@pytest.mark.parametrize(("E", "k", "groups", "kept"), [(256, 8, 8, 4), (16, 4, 4, 2), (64, 6, 1, 1), (8, 2, 4, 3)])
def test_deepseek_v3(E: int, k: int, groups: int, kept: int) -> None:
    g = torch.Generator().manual_seed(E)
    logits = torch.randn(500, E, generator=g, dtype=torch.float64).requires_grad_()
    bias = torch.randn(E, generator=g, dtype=torch.float64) * 0.1
    experts, weights = deepseek_v3_gate(logits, bias, k, groups, kept, 2.5)
    options = {"score": "sigmoid", "renormalize": True, "scale": 2.5, "num_groups": groups, "topk_groups": kept}
    out = moeyard.topk_gating(logits, k, selection_bias=bias, **options)
    assert torch.equal(out.experts.long(), experts)
    torch.testing.assert_close(out.weights, weights, rtol=1e-12, atol=0)
    upstream = torch.randn(weights.shape, generator=g, dtype=torch.float64)
    torch.testing.assert_close(gradient(out.weights, logits, upstream), gradient(weights, logits, upstream))


# ---- losses from the statistics --------------------------------------------------------------------------------------


def losses_from_statistics(out: moeyard.Gating, T: int, E: int, k: int) -> dict[str, Tensor]:
    importance = out.weight_sum
    return {
        "switch": E * (out.counts / (T * k) * out.score_sum / T).sum(),
        "importance": importance.var(unbiased=False) / importance.mean() ** 2,
        "z": out.logsumexp_sq / T,
        "entropy": out.entropy_sum / T,
        "deviation": ((out.score_sum / T - 1 / E) ** 2).sum(),
    }


def losses_written_out(x: Tensor, k: int) -> dict[str, Tensor]:
    E = x.shape[1]
    p = x.softmax(1)
    top = p.topk(k, dim=1)
    chosen = torch.nn.functional.one_hot(top.indices, E).to(x.dtype)
    importance = (top.values[..., None] * chosen).sum((0, 1))
    return {
        "switch": E * (chosen.mean((0, 1)) * p.mean(0)).sum(),
        "importance": importance.var(unbiased=False) / importance.mean() ** 2,
        "z": x.logsumexp(1).square().mean(),
        "entropy": torch.distributions.Categorical(logits=x).entropy().mean(),
        "deviation": ((p.mean(0) - 1 / E) ** 2).sum(),
    }


@pytest.mark.parametrize("name", ["switch", "importance", "z", "entropy", "deviation"])
def test_losses(name: str) -> None:
    x = torch.randn(300, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    got = losses_from_statistics(moeyard.topk_gating(x, 4), 300, 16, 4)[name]
    want = losses_written_out(x, 4)[name]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradient(got, x), gradient(want, x))


# ---- gradcheck -------------------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mask": {"mask": torch.tensor([True, False, True, True])},
    "bias and groups": {
        "selection_bias": torch.linspace(0.3, -0.3, 6),
        "num_groups": 3,
        "topk_groups": 2,
        "scale": 2.5,
    },
    "forced": {"forced_experts": torch.tensor([[1, -1], [-1, 0], [5, 2], [-1, -1]])},
    "one": {"forced_experts": torch.tensor([1, -1, 5, 0]), "forced_weights": "one"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("renormalize", [False, *large(True)])
@pytest.mark.parametrize("score", SCORES)
def test_gradcheck(score: str, renormalize: bool, variant: str) -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 2
    x[0, 4] = -20.0
    options = {n: o.to(x.device) if isinstance(o, Tensor) else o for n, o in VARIANTS[variant].items()}

    def function(x: Tensor) -> tuple[Tensor, ...]:
        out = moeyard.topk_gating(x, 2, score=score, renormalize=renormalize, **options)
        return tuple(o for o in out if o.requires_grad)

    assert torch.autograd.gradcheck(function, x.requires_grad_())


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("score", SCORES)
def test_one_gradient_alone(score: str, name: str) -> None:
    """Outputs that nobody uses arrive as None, not as zeros."""
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64).requires_grad_()
    got, want = moeyard.topk_gating(x, 3, score=score), topk_gating_reference(x, 3, score=score)
    torch.testing.assert_close(gradient(getattr(got, name).sum(), x), gradient(getattr(want, name).sum(), x))


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_renormalized_gradient_of_tiny_scores_under_a_loss_scale(score: str) -> None:
    """The scores' sum is near the smallest float32; weights, and so gradients, are of the order of 1."""
    row = [-86.0, -86.5, -87.0, 0.0 if score == "softmax" else -87.0]
    if score == "sqrtsoftplus":
        row = [2 * x for x in row]  # a root vanishes at twice the logit
    grads = []
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([row], dtype=dtype, requires_grad=True)
        options = {"score": score, "renormalize": True, "forced_experts": torch.tensor([[0, 1]])}
        out = moeyard.topk_gating(x, 2, **options)
        (65536 * (out.weights[0, 0] - 2 * out.weight_sum[1])).backward()
        grads.append(x.grad.double())
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-2)
    assert grads[1][0, 0] > 1e4


def test_masked_logits_get_no_gradient() -> None:
    x = torch.tensor([[1.0, -INF, 0.5], [-INF] * 3], requires_grad=True)
    for score in SCORES:
        (g,) = gradient(loss(moeyard.topk_gating(x, 3, score=score)), x)
        assert g.isfinite().all()
        assert (g[x == -INF] == 0).all()


def test_the_bias_gets_no_gradient() -> None:
    bias = torch.zeros(3, requires_grad=True)
    assert not moeyard.topk_gating(torch.randn(2, 3), 1, selection_bias=bias).weights.requires_grad
    x = torch.randn(2, 3, requires_grad=True)
    out = moeyard.topk_gating(x, 1, selection_bias=bias)
    assert gradient(out.weights.sum(), [x, bias], allow_unused=True)[1] is None


def test_second_derivatives_raise() -> None:
    """Also where the incoming gradient is a constant, and a second derivative could get lost in a sum."""
    x = torch.randn(2, 3, requires_grad=True)
    (first,) = gradient(moeyard.topk_gating(x, 2).weights[:, 0].sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        gradient((first * x).sum(), x)


def test_opcheck_with_gradient() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    args = (x, 2, "sigmoid", True, torch.zeros(6), 3, 2, 2, 1.0, torch.ones(4, dtype=torch.bool), None, "score")
    torch.library.opcheck(torch.ops.moeyard.topk_gating.default, args)


# ---- properties ------------------------------------------------------------------------------------------------------


@st.composite
def routers(draw: st.DrawFn) -> tuple[Tensor, int, dict[str, Any]]:
    """Distinct finite logits of a few shapes, with options."""
    T, E = draw(st.integers(1, 9)), draw(st.sampled_from([2, 4, 8, 40]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    x = torch.stack([torch.randperm(2 * E, generator=g)[:E] for _ in range(T)]) / 8.0 - 1
    options: dict[str, Any] = {"score": draw(st.sampled_from(SCORES)), "renormalize": draw(st.booleans())}
    groups = draw(st.sampled_from([None, 1, 2]))
    if groups:
        options |= {"num_groups": groups, "topk_groups": groups, "group_score_experts": 1}
    return x, draw(st.integers(1, E)), options


@settings(max_examples=examples(60))
@given(routers(), st.randoms(use_true_random=False))
def test_permuting_rows_permutes_rows(router: tuple[Tensor, int, dict[str, Any]], r: random.Random) -> None:
    x, k, options = router
    order = torch.tensor(r.sample(range(len(x)), len(x)))
    out, moved = moeyard.topk_gating(x, k, **options), moeyard.topk_gating(x[order], k, **options)
    assert torch.equal(moved.experts, out.experts[order])
    assert torch.equal(moved.weights, out.weights[order])
    assert torch.equal(moved.counts, out.counts)
    for name in FLOATS[1:]:
        torch.testing.assert_close(getattr(moved, name), getattr(out, name))


@settings(max_examples=examples(60))
@given(routers(), st.data())
def test_splitting_the_batch(router: tuple[Tensor, int, dict[str, Any]], data: st.DataObject) -> None:
    x, k, options = router
    cut = data.draw(st.integers(0, len(x)))
    out = moeyard.topk_gating(x, k, **options)
    a, b = (moeyard.topk_gating(part, k, **options) for part in (x[:cut], x[cut:]))
    assert torch.equal(torch.cat([a.experts, b.experts]), out.experts)
    assert torch.equal(torch.cat([a.weights, b.weights]), out.weights)
    assert torch.equal(a.counts + b.counts, out.counts)
    for name in FLOATS[1:]:
        torch.testing.assert_close(getattr(a, name) + getattr(b, name), getattr(out, name))


@settings(max_examples=examples(60))
@given(routers(), st.randoms(use_true_random=False))
def test_relabelling_experts(router: tuple[Tensor, int, dict[str, Any]], r: random.Random) -> None:
    """Without ties (and with all groups kept) the ids move with their columns."""
    x, k, options = router
    E = x.shape[1]
    order = torch.tensor(r.sample(range(E), E))
    out, moved = moeyard.topk_gating(x, k, **options), moeyard.topk_gating(x[:, order].contiguous(), k, **options)
    assert torch.equal(order[moved.experts.long()], out.experts.long())
    torch.testing.assert_close(moved.weights, out.weights)
    assert torch.equal(moved.counts, out.counts[order])
    torch.testing.assert_close(moved.score_sum, out.score_sum[order])


@settings(max_examples=examples(60))
@given(routers())
def test_what_always_holds(router: tuple[Tensor, int, dict[str, Any]]) -> None:
    x, k, options = router
    T, E = x.shape
    out = moeyard.topk_gating(x, k, **options)
    assert all(len(set(row)) == k and min(row) >= 0 and max(row) < E for row in out.experts.tolist())
    assert out.counts.sum() == T * k
    chosen = x.gather(1, out.experts.long())
    assert (chosen[:, 1:] <= chosen[:, :-1]).all()
    torch.testing.assert_close(out.weight_sum.sum(), out.weights.sum())
    if options["renormalize"] or options["score"] == "softmax_topk":
        torch.testing.assert_close(out.weights.sum(1), torch.ones(T))
    if options["score"].startswith("softmax"):
        torch.testing.assert_close(out.score_sum.sum(), torch.tensor(float(T)))
