"""The Megatron-style functions against their definitions in plain torch, and against megatron-core where it is."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from moeyard.integrations import megatron as ours

# ---- the definitions, loop by loop -----------------------------------------------------------------------------------


def rows_by_definition(routing_map: Tensor, capacity: int | None) -> list[tuple[int, int]]:
    """(expert, token) of every row."""
    rows = []
    for e in range(routing_map.shape[1]):
        wanted = [t for t in range(routing_map.shape[0]) if routing_map[t, e]]
        if capacity is not None:
            wanted = (wanted + [t for t in range(routing_map.shape[0]) if not routing_map[t, e]])[:capacity]
        rows += [(e, t) for t in wanted]
    return rows


def routing_by_definition(
    logits: Tensor,
    k: int,
    score: str,
    pre: bool,
    groups: tuple[int, int] | None,
    scale: float | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    probs, chosen_map = torch.zeros_like(logits), torch.zeros_like(logits, dtype=torch.bool)
    rows = []
    for x in logits:
        scores = x.sigmoid() if score == "sigmoid" else x.softmax(0) if pre else x
        value = (scores if bias is None else scores + bias).detach().clone()
        if groups is not None:
            members = value.reshape(groups[0], -1)
            best = members.topk(k // groups[1], dim=1).values.sum(1).topk(groups[1]).indices
            for g in range(groups[0]):
                if g not in best:
                    members[g] = -torch.inf
        chosen = value.topk(k).indices
        weights = scores[chosen]
        if score == "sigmoid":
            weights = weights / weights.sum() if k > 1 else weights
        elif not pre:
            weights = weights.softmax(0)
        rows.append((chosen, weights * (scale or 1.0)))
    for t, (chosen, weights) in enumerate(rows):
        probs = probs.index_put((torch.tensor(t), chosen), weights)
        chosen_map[t, chosen] = True
    return probs, chosen_map


def draw(tokens: int = 13, experts: int = 6, k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, map and probs; token 2 goes nowhere, expert 4 gets nobody, token 0 goes to all others."""
    rng = torch.Generator().manual_seed(0)
    routing_map = torch.zeros(tokens, experts, dtype=torch.bool)
    routing_map.scatter_(1, torch.rand(tokens, experts, generator=rng).argsort(1)[:, :k], True)
    routing_map[0], routing_map[2] = True, False
    routing_map[:, 4] = False
    x = torch.randn(tokens, 5, dtype=torch.float64, generator=rng)
    return x, routing_map, torch.rand(tokens, experts, dtype=torch.float64, generator=rng) * routing_map


# ---- permute and unpermute -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [None, 0, 3, 13])
@pytest.mark.parametrize("map_dtype", [torch.bool, torch.int32])
def test_permute(capacity: int | None, map_dtype: torch.dtype) -> None:
    x, routing_map, probs = draw()
    options: dict[str, Any] = {} if capacity is None else {"num_out_tokens": capacity * 6, "drop_and_pad": True}
    rows, weights, indices = ours.permute(x, routing_map.to(map_dtype), probs, **options)
    want = rows_by_definition(routing_map, capacity)
    assert indices.tolist() == [t for _, t in want]
    assert indices.dtype == torch.int64
    assert torch.equal(rows, x[indices])
    assert weights is not None
    assert weights.tolist() == [float(probs[t, e]) for e, t in want]
    assert ours.permute(x, routing_map)[1] is None


@pytest.mark.parametrize("capacity", [None, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_there_and_back_with_gradients(capacity: int | None, weighted: bool) -> None:
    x, routing_map, probs = draw()
    options: dict[str, Any] = {} if capacity is None else {"drop_and_pad": True}
    total = {} if capacity is None else {"num_out_tokens": capacity * 6}
    leaves = [t.clone().requires_grad_() for t in (x, probs)]
    rows, _, indices = ours.permute(leaves[0], routing_map, **total, **options)
    how = {"probs": leaves[1], "routing_map": routing_map} if weighted else {}
    out = ours.unpermute(rows * torch.arange(len(rows))[:, None], indices, x.shape, **how, **options)

    plain = [t.clone().requires_grad_() for t in (x, probs)]
    want = torch.zeros_like(x)
    for r, (e, t) in enumerate(rows_by_definition(routing_map, capacity)):
        row = plain[0][t] * r * (plain[1][t, e] if weighted else 1.0)
        want = want.index_add(0, torch.tensor([t]), row[None])
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    for result in (out, want):
        result.square().sum().backward()
    for got, expected in zip(leaves[: 1 + weighted], plain, strict=False):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_output_keeps_the_dtype_of_the_rows(dtype: torch.dtype) -> None:
    x, routing_map, probs = draw()
    rows, _, indices = ours.permute(x.to(dtype), routing_map)
    out = ours.unpermute(rows, indices, x.shape, probs.float(), routing_map)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), x * probs.sum(1, keepdim=True), rtol=2e-2, atol=2e-2)


def test_nothing() -> None:
    rows, _, indices = ours.permute(torch.zeros(0, 5), torch.zeros(0, 6, dtype=torch.bool))
    assert rows.shape == (0, 5)
    assert ours.unpermute(rows, indices, (0, 5)).shape == (0, 5)
    rows, _, indices = ours.permute(torch.ones(4, 5), torch.zeros(4, 6, dtype=torch.bool))
    assert rows.shape == (0, 5)
    assert torch.equal(ours.unpermute(rows, indices, (4, 5)), torch.zeros(4, 5))


def test_bad_input() -> None:
    x, routing_map, probs = draw()
    with pytest.raises(ValueError, match=r"routing_map: expected shape \[13, E\], got \[12, 6\]"):
        ours.permute(x, routing_map[1:])
    with pytest.raises(ValueError, match=r"probs: expected shape \[13, 6\], got \[13, 5\]"):
        ours.permute(x, routing_map, probs[:, 1:])
    for total in (None, 7, 84):
        with pytest.raises(ValueError, match=f"num_out_tokens: expected a multiple of 6 .* up to 78, got {total}"):
            ours.permute(x, routing_map, num_out_tokens=total, drop_and_pad=True)
    rows, _, indices = ours.permute(x, routing_map)
    with pytest.raises(ValueError, match="routing_map: expected the map that permute took"):
        ours.unpermute(rows, indices, x.shape, probs)
    with pytest.raises(ValueError, match="sorted_indices: expected tokens from 0 to 9, got 0 to 12"):
        ours.unpermute(rows, indices, (10, 5))
    with pytest.raises(ValueError, match=r"sorted_indices \(of this routing_map\): expected shape"):
        ours.unpermute(rows, indices, x.shape, probs, ~routing_map)


# ---- routing ---------------------------------------------------------------------------------------------------------

ROUTING: dict[str, dict[str, Any]] = {
    "softmax of the chosen": {},
    "softmax before": {"use_pre_softmax": True},
    "softmax, groups": {"num_groups": 4, "group_topk": 2, "topk": 4},
    "softmax before, groups, scaled": {
        "use_pre_softmax": True,
        "num_groups": 2,
        "group_topk": 1,
        "scaling_factor": 2.5,
    },
    "sigmoid": {"score_function": "sigmoid"},
    "sigmoid of one": {"score_function": "sigmoid", "topk": 1},
    "sigmoid, bias": {"score_function": "sigmoid", "bias": True},
    "sigmoid, bias, groups": {"score_function": "sigmoid", "bias": True, "num_groups": 4, "group_topk": 2, "topk": 4},
}


def settings(name: str) -> dict[str, Any]:
    options = {"topk": 2, **ROUTING[name]}
    if options.pop("bias", False):
        options["expert_bias"] = torch.linspace(-0.3, 0.3, 8, dtype=torch.float64)
    return options


def gate(function: Any, logits: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    probs, routing_map = function(logits, **options)
    (probs * torch.arange(probs.numel()).reshape(probs.shape).cos()).sum().backward()
    return probs.detach(), routing_map, logits.grad


@pytest.mark.parametrize("name", ROUTING)
def test_routing(name: str) -> None:
    options = settings(name)
    logits = torch.randn(17, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    got = gate(ours.topk_routing_with_score_function, logits, options)

    def definition(logits: Tensor, **o: Any) -> tuple[Tensor, Tensor]:
        groups = (o["num_groups"], o["group_topk"]) if o.get("group_topk") else None
        rest = (o.get("use_pre_softmax", False), groups, o.get("scaling_factor"), o.get("expert_bias"))
        return routing_by_definition(logits, o["topk"], o.get("score_function", "softmax"), *rest)

    want = gate(definition, logits, options)
    assert torch.equal(got[1], want[1])
    for i in (0, 2):
        torch.testing.assert_close(got[i], want[i], rtol=1e-10, atol=1e-12)


def test_routing_dtypes_and_bad_input() -> None:
    logits = torch.randn(5, 8).bfloat16()
    probs, routing_map = ours.topk_routing_with_score_function(logits, 2)
    assert (probs.dtype, routing_map.dtype) == (torch.bfloat16, torch.bool)
    with pytest.raises(ValueError, match=r"score_function: expected one of 'softmax', 'sigmoid', got 'tanh'"):
        ours.topk_routing_with_score_function(logits, 2, score_function="tanh")
    with pytest.raises(ValueError, match="expert_bias: expected None unless"):
        ours.topk_routing_with_score_function(logits, 2, expert_bias=torch.zeros(8))
    with pytest.raises(ValueError, match="router_replay: expected None"):
        ours.topk_routing_with_score_function(logits, 2, router_replay=object())
    with pytest.raises(ValueError, match="num_groups, topk_groups: expected both or neither"):
        ours.topk_routing_with_score_function(logits, 2, group_topk=2)


# ---- megatron-core itself --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs() -> Any:
    pytest.importorskip("megatron.core")
    return importlib.import_module("megatron.core.transformer.moe.moe_utils")


@pytest.mark.parametrize("name", ours.__all__)
def test_signatures_are_megatrons(theirs: Any, name: str) -> None:
    mine, its = (inspect.signature(getattr(room, name)).parameters for room in (ours, theirs))
    assert [(p.name, p.default) for p in mine.values()] == [(p.name, p.default) for p in its.values()]


@pytest.mark.parametrize("name", ROUTING)
def test_routing_is_megatrons(theirs: Any, name: str) -> None:
    options = settings(name)
    if "expert_bias" in options:
        options["expert_bias"] = options["expert_bias"].float()
    logits = torch.randn(17, 8, generator=torch.Generator().manual_seed(4))
    got = gate(ours.topk_routing_with_score_function, logits, options)
    want = gate(theirs.topk_routing_with_score_function, logits, options)
    assert torch.equal(got[1], want[1])
    for i in (0, 2):
        torch.testing.assert_close(got[i], want[i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("capacity", [None, 3])
def test_permutation_is_megatrons(theirs: Any, capacity: int | None) -> None:
    results = []
    for room in (ours, theirs):
        x, routing_map, probs = draw()
        x, probs = x.requires_grad_(), probs.requires_grad_()
        pad: dict[str, Any] = {} if capacity is None else {"drop_and_pad": True}
        total = None if capacity is None else capacity * 6
        rows, weights, indices = room.permute(x, routing_map, probs, total, **pad)
        out = room.unpermute(rows.tanh(), indices, x.shape, probs, routing_map, **pad)
        (out.square().sum() + weights.sin().sum()).backward()
        results.append([rows.detach(), weights.detach(), indices, out.detach(), x.grad, probs.grad])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
