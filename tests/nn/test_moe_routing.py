"""Forced and mixed routing, shared experts, capacity, and balancing by a bias."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moeyard.nn import Experts, MoE, Router, expert_ffn

H, E, T = 6, 5, 40


def tokens(seed: int = 0) -> Tensor:
    return torch.randn(T, H, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(**options: Any) -> MoE:
    torch.manual_seed(1)
    moe = MoE(H, 7, E, options.pop("k", 2), **options).double()
    if moe.router is not None:
        nn.init.normal_(moe.router.weight)
    return moe


def through(experts: Experts, e: int, x: Tensor) -> Tensor:
    up, down = experts.up[e : e + 1], experts.down[e : e + 1]
    return expert_ffn(x, up, down, torch.tensor([len(x)]), experts.activation)


def dense(moe: MoE, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Every expert over every token, then the chosen ones by weight."""
    every = torch.stack([through(moe.experts, e, x) for e in range(E)], dim=1)
    chosen = every.gather(1, ids.long().clamp(min=0)[:, :, None].expand(-1, -1, H))
    return (chosen * (weights * (ids >= 0))[:, :, None]).sum(1)


def test_forced_routing_is_the_callers_alone() -> None:
    moe, x = make(routing="forced", k=1), tokens()
    ids = torch.arange(T) % E
    output, gating, _ = moe(x, forced_experts=ids)
    torch.testing.assert_close(output, dense(moe, x, torch.ones(T, 1), ids[:, None]))
    assert gating.counts.tolist() == [8] * E
    assert {n.split(".")[0] for n, _ in moe.named_parameters()} == {"experts"}
    two = make(routing="forced", k=2)
    pairs = torch.stack([ids, (ids + 1) % E], dim=1)
    output, gating, _ = two(x, forced_experts=pairs)
    torch.testing.assert_close(output, dense(two, x, torch.full((T, 2), 0.5), pairs))
    assert gating.weight_sum.tolist() == [8.0] * E


def test_forced_routing_with_padding_and_tokens_without_an_expert() -> None:
    moe, x = make(routing="forced", k=1, shared_hidden=3), tokens()
    ids, mask = torch.arange(T) % E, torch.ones(T, dtype=torch.bool)
    ids[3], mask[7] = -1, False
    assert moe.shared is not None
    output, gating, _ = moe(x, mask=mask, forced_experts=ids)
    assert not output[7].any()
    torch.testing.assert_close(output[3:4], through(moe.shared, 0, x[3:4]))
    torch.testing.assert_close(output[9:10], through(moe.shared, 0, x[9:10]) + through(moe.experts, 4, x[9:10]))
    assert int(gating.counts.sum()) == T - 2


@pytest.mark.parametrize("renormalize", [False, True])
def test_mixed_routing_adds_what_the_router_learned(renormalize: bool) -> None:
    moe, x = make(routing="mixed", k=3, renormalize=renormalize), tokens()
    assert moe.router is not None
    forced = torch.arange(T) % E
    output, gating, _ = moe(x, forced_experts=forced)
    scores = (x @ moe.router.weight.T).softmax(-1)
    others = scores.scatter(1, forced[:, None], -1.0).topk(2, dim=1).indices
    learned = scores.gather(1, others)
    if renormalize:
        learned = learned / learned.sum(1, keepdim=True)
    ids = torch.cat([forced[:, None], others], dim=1)
    assert torch.equal(gating.experts.long(), ids)
    want = dense(moe, x, torch.cat([torch.ones(T, 1, dtype=torch.float64), learned], dim=1), ids)
    torch.testing.assert_close(output, want)
    leaves = list(moe.parameters())
    seed = torch.randn_like(want)
    for got, expected in zip(
        torch.autograd.grad(output, leaves, seed), torch.autograd.grad(want, leaves, seed), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_a_single_learned_slot_keeps_its_score() -> None:
    """Divided by itself it would be 1, and the router would learn nothing."""
    x, ids = tokens(), torch.arange(T) % E
    for moe, forced in ((make(k=1), None), (make(routing="mixed", k=2), ids)):
        assert moe.router is not None
        assert not moe.router.renormalize
        moe(x, forced_experts=forced).output.square().sum().backward()
        assert float(moe.router.weight.grad.abs().max()) > 0  # type: ignore[union-attr]
    assert make(k=2).router.renormalize  # type: ignore[union-attr]


def test_mixed_routing_scales_and_sums_what_is_used() -> None:
    moe, x = make(routing="mixed", k=3, renormalize=True, scale=2.5), tokens()
    gating = moe(x, forced_experts=torch.arange(T) % E).gating
    torch.testing.assert_close(gating.weights[:, 1:].sum(1), torch.full((T,), 2.5, dtype=torch.float64))
    want = torch.zeros(E, dtype=torch.float64)
    for ids, weights in zip(gating.experts.tolist(), gating.weights.tolist(), strict=True):
        for e, w in zip(ids, weights, strict=True):
            want[e] += w
    torch.testing.assert_close(gating.weight_sum, want)


def test_a_layer_made_on_meta_can_be_reset() -> None:
    with torch.device("meta"):
        moe = MoE(H, 7, E, 2, bias_rate=0.1)
    moe.to_empty(device="cpu")
    for module in moe.modules():
        if isinstance(module, (Experts, Router)):
            module.reset_parameters()
    output = moe(torch.randn(5, H)).output
    assert output.isfinite().all()
    assert float(output.detach().abs().max()) > 0


def test_mixed_routing_leaves_padding_out() -> None:
    moe, x = make(routing="mixed"), tokens()
    mask = torch.arange(T) != 5
    output, gating, _ = moe(x, mask=mask, forced_experts=torch.zeros(T, dtype=torch.int64))
    assert not output[5].any()
    assert not gating.weights[5].any()


def test_shared_experts_are_added() -> None:
    moe, x = make(shared_hidden=9), tokens()
    bare = make()
    bare.load_state_dict({n: v for n, v in moe.state_dict().items() if not n.startswith("shared")})
    assert moe.shared is not None
    assert moe.shared.up.shape == (1, H, 18)
    torch.testing.assert_close(moe(x).output, bare(x).output + through(moe.shared, 0, x))


@pytest.mark.parametrize("drop", ["position", "weight"])
def test_capacity(drop: str) -> None:
    moe, x = make(capacity_factor=0.5, drop=drop, renormalize=False), tokens()
    output, gating, dropped = moe(x)
    capacity = 8  # half of 40 * 2 / 5
    kept = torch.zeros(T, 2, dtype=torch.bool)
    for e in range(E):
        slots = [(t, j) for t in range(T) for j in range(2) if gating.experts[t, j] == e]
        if drop == "weight":
            slots.sort(key=lambda s: -float(gating.weights[s].detach()))
        for slot in slots[:capacity]:
            kept[slot] = True
    assert int(dropped) == 2 * T - int(kept.sum()) > 0
    torch.testing.assert_close(output, dense(moe, x, gating.weights * kept, gating.experts))


def test_no_capacity_drops_nothing() -> None:
    assert int(make()(tokens()).dropped) == 0


def test_recompute_gives_the_same() -> None:
    x = tokens()
    results = []
    for recompute in (False, True):
        moe = make(recompute=recompute, shared_hidden=3)
        output = moe(x).output
        results.append([output, *torch.autograd.grad(output.square().sum(), list(moe.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_torch_checkpointing_gives_the_same() -> None:
    moe, x = make(bias_rate=0.1, score="sigmoid"), tokens().requires_grad_()
    plain = moe(x).output
    want = torch.autograd.grad(plain.square().sum(), [x, *moe.parameters()])
    again = torch.utils.checkpoint.checkpoint(lambda x: moe(x).output, x, use_reentrant=False)
    got = torch.autograd.grad(again.square().sum(), [x, *moe.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_bias_follows_the_load() -> None:
    moe, x = make(bias_rate=0.25, score="sigmoid"), tokens()
    assert moe.router is not None
    router = moe.router
    assert router.selection_bias is not None
    counts = moe(x).gating.counts.double() + moe(tokens(1)).gating.counts.double()
    router.update_selection_bias()
    want = 0.25 * torch.sign(counts.mean() - counts)
    assert torch.equal(router.selection_bias.double(), want)
    assert not router.load.any()
    router.update_selection_bias()  # no tokens since: nothing to learn from
    assert torch.equal(router.selection_bias.double(), want)
    moe.eval()
    moe(x)
    assert not router.load.any()


def test_the_bias_balances_without_a_loss() -> None:
    torch.manual_seed(0)
    router = Router(8, 6, 2, score="sigmoid", bias_rate=0.004)
    nn.init.normal_(router.weight)
    x = torch.randn(3000, 8) + 0.7

    def unevenness() -> float:
        counts = router(x).counts.float()
        return float(counts.max() / counts.mean())

    before = unevenness()
    for _ in range(300):
        router(x)
        router.update_selection_bias()
    assert before > 1.3
    assert unevenness() < 1.1


def test_the_bias_is_saved_and_stays_float32() -> None:
    router = Router(4, 3, 1, bias_rate=0.001)
    assert "selection_bias" in router.state_dict()
    assert "load" not in router.state_dict()
    assert "selection_bias" not in Router(4, 3, 1).state_dict()
    router(torch.randn(5, 4))
    router.to(torch.bfloat16).update_selection_bias()
    assert router.weight.dtype == torch.bfloat16
    assert float(router.selection_bias.abs().max()) == pytest.approx(0.001, rel=1e-6)  # type: ignore[union-attr]


def test_groups_and_scale_reach_the_gating() -> None:
    x = torch.randn(20, 4, dtype=torch.float64)
    router = Router(4, 6, 2, score="sigmoid", num_groups=3, topk_groups=1, scale=2.5, renormalize=True).double()
    gating = router(x)
    assert torch.equal(gating.experts[:, 0] // 2, gating.experts[:, 1] // 2)
    torch.testing.assert_close(gating.weights.sum(1), torch.full((20,), 2.5, dtype=torch.float64))


@pytest.mark.parametrize("routing", ["learned", "forced", "mixed"])
def test_compiles_in_one_graph(routing: str) -> None:
    moe, x = make(routing=routing, k=2, shared_hidden=3, capacity_factor=1.5).float(), tokens().float()
    ids = torch.stack([torch.arange(T) % E, (torch.arange(T) + 1) % E], dim=1)
    forced = {"learned": None, "forced": ids, "mixed": ids[:, 0]}[routing]
    compiled = torch.compile(lambda x: moe(x, forced_experts=forced).output, fullgraph=True, backend="aot_eager")
    leaves = list(moe.parameters())
    got, want = compiled(x), moe(x, forced_experts=forced).output
    torch.testing.assert_close(got, want)
    pairs = zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (got, want)), strict=True)
    for g, w in pairs:
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"routing": "hard"}, "routing: expected one of 'learned', 'forced', 'mixed', got 'hard'"),
        ({"routing": "mixed", "k": 1}, "k: expected at least 2 with routing='mixed'"),
        ({"routing": "forced", "score": "sigmoid"}, "score: expected no router option with routing='forced'"),
        ({"capacity_factor": 0.0}, "capacity_factor: expected None or a positive finite number, got 0.0"),
        ({"drop": "late"}, "drop: expected one of 'position', 'weight', got 'late'"),
        ({"shared_hidden": -1}, "shared_hidden: expected at least 0, got -1"),
        ({"bias_rate": -0.1}, "bias_rate: expected None or a positive finite number, got -0.1"),
        ({"k": 0}, "k: expected at least 1, got 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_bad_forced_experts() -> None:
    x = tokens()
    with pytest.raises(ValueError, match="forced_experts: expected ids, since routing='forced', got None"):
        make(routing="forced", k=1)(x)
    with pytest.raises(ValueError, match=r"forced_experts: expected shape \[40, 2\], got \[40, 1\]"):
        make(routing="forced")(x, forced_experts=torch.zeros(T, dtype=torch.int64))
    with pytest.raises(TypeError, match="forced_experts: expected dtype int32, int64, got float32"):
        make(routing="forced", k=1)(x, forced_experts=torch.zeros(T))
    for wrong in (5, 2**32 + 3, -2):
        with pytest.raises(ValueError, match="experts: expected ids in"):
            make(routing="forced", k=1)(x, forced_experts=torch.full((T,), wrong))
    with pytest.raises(ValueError, match=r"mask: expected shape \[40\], got \[1\]"):
        make(routing="forced", k=1)(x, mask=torch.tensor([False]), forced_experts=torch.zeros(T, dtype=torch.int64))
