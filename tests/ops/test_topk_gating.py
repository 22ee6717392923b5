"""topk_gating: the contract every op must survive, and tables computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import moeyard
from moeyard.ops._topk_gating_reference import topk_gating_reference
from ops.contract import Inputs, OpContract, compiling
from ops.levels import assert_same_on_all_levels

pytestmark = pytest.mark.usefixtures("engine")

INF, NAN = math.inf, math.nan
SCORES = ("softmax", "softmax_topk", "sigmoid", "sqrtsoftplus")


class TestTopkGating(OpContract):
    function = staticmethod(moeyard.topk_gating)
    reference = staticmethod(topk_gating_reference)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    differentiable = ("logits",)

    def inputs(self, dtype: torch.dtype, size: str = "small", seed: int = 0) -> Inputs:
        T, E, k = (3000, 33, 4) if size == "large" else (5 + seed, 6, 2)
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(T, E, generator=generator, dtype=torch.float64).to(dtype)
        return {"logits": logits, "k": k, "mask": torch.arange(T) % 4 != 3}

    def empty_inputs(self) -> list[Inputs]:
        return [{"logits": torch.empty(0, 3), "k": 2}, {"logits": torch.zeros(2, 1), "k": 1}]


class TestTopkGatingGroups(TestTopkGating):
    """The DeepSeek-V3 gate: sigmoid scores, bias, groups, renormalised and scaled weights."""

    def inputs(self, dtype: torch.dtype, size: str = "small", seed: int = 0) -> Inputs:
        inputs = super().inputs(dtype, size, seed)
        logits = torch.nn.functional.pad(inputs["logits"], (0, 3)) if size == "large" else inputs["logits"]
        E, groups = logits.shape[1], 3
        bias = torch.linspace(-0.5, 0.5, E)[torch.randperm(E, generator=torch.Generator().manual_seed(seed))]
        options = {"score": "sigmoid", "renormalize": True, "scale": 2.5, "num_groups": groups, "topk_groups": 2}
        return {**inputs, "logits": logits, "selection_bias": bias, **options}

    def empty_inputs(self) -> list[Inputs]:
        return [{"logits": torch.empty(0, 4), "k": 1, "score": "sigmoid", "num_groups": 2, "topk_groups": 1}]


class TestTopkGatingForced(TestTopkGating):
    """Router replay: some slots forced, softmax over the chosen."""

    def inputs(self, dtype: torch.dtype, size: str = "small", seed: int = 0) -> Inputs:
        inputs = super().inputs(dtype, size, seed)
        T, k = inputs["logits"].shape[0], inputs["k"]
        forced = torch.where(torch.arange(k) == torch.arange(T)[:, None] % k, torch.arange(T)[:, None] % 6, -1)
        return {**inputs, "score": "softmax_topk", "forced_experts": forced.int()}

    def empty_inputs(self) -> list[Inputs]:
        return [{"logits": torch.empty(0, 3), "k": 2, "forced_experts": torch.empty(0, dtype=torch.int64)}]


class TestTopkGatingHardRouted(TestTopkGatingForced):
    """Weights that are constants: only score_sum and the row statistics carry a gradient."""

    def inputs(self, dtype: torch.dtype, size: str = "small", seed: int = 0) -> Inputs:
        return {**super().inputs(dtype, size, seed), "forced_weights": "one", "score": "sigmoid"}


# ---- by hand ---------------------------------------------------------------------------------------------------------

LN = math.log
#: softmax of the row is [1/2, 1/4, 1/8, 1/8]
HALVES = [LN(4), LN(2), 0.0, 0.0]


def gate(rows: list[list[float]], k: int, dtype: torch.dtype = torch.float32, **options: object) -> moeyard.Gating:
    return moeyard.topk_gating(torch.tensor(rows, dtype=dtype), k, **options)


def close(x: Tensor, expected: object) -> None:
    torch.testing.assert_close(x, torch.tensor(expected, dtype=x.dtype), equal_nan=True)


@pytest.mark.parametrize(
    ("score", "renormalize", "weights"),
    [
        ("softmax", False, [1 / 2, 1 / 4]),
        ("softmax", True, [2 / 3, 1 / 3]),
        ("softmax_topk", False, [2 / 3, 1 / 3]),
        ("softmax_topk", True, [2 / 3, 1 / 3]),
        ("sigmoid", False, [4 / 5, 2 / 3]),
        ("sigmoid", True, [6 / 11, 5 / 11]),
        ("sqrtsoftplus", False, [math.sqrt(LN(5)), math.sqrt(LN(3))]),
        (
            "sqrtsoftplus",
            True,
            [LN(5) ** 0.5 / (LN(5) ** 0.5 + LN(3) ** 0.5), LN(3) ** 0.5 / (LN(5) ** 0.5 + LN(3) ** 0.5)],
        ),
    ],
)
def test_weights(score: str, renormalize: bool, weights: list[float]) -> None:
    out = gate([HALVES], 2, score=score, renormalize=renormalize, scale=3.0)
    assert out.experts.tolist() == [[0, 1]]
    close(out.weights, [[3 * w for w in weights]])
    close(out.weight_sum, [3 * weights[0], 3 * weights[1], 0.0, 0.0])


@pytest.mark.parametrize(
    ("score", "sums"),
    [
        ("softmax", [1 / 2, 1 / 4, 1 / 8, 1 / 8]),
        ("softmax_topk", [1 / 2, 1 / 4, 1 / 8, 1 / 8]),
        ("sigmoid", [4 / 5, 2 / 3, 1 / 2, 1 / 2]),
        ("sqrtsoftplus", [LN(5) ** 0.5, LN(3) ** 0.5, LN(2) ** 0.5, LN(2) ** 0.5]),
    ],
)
def test_statistics(score: str, sums: list[float]) -> None:
    reverse = HALVES[::-1]
    out = gate(
        [HALVES, HALVES, reverse, [9.0, 9.0, 9.0, 9.0]], 1, score=score, mask=torch.tensor([True, True, True, False])
    )
    assert out.experts.tolist() == [[0], [0], [3], [-1]]
    assert out.counts.tolist() == [2, 0, 0, 1]
    close(out.score_sum, [2 * a + b for a, b in zip(sums, sums[::-1], strict=True)])
    close(out.logsumexp_sq, 3 * LN(8) ** 2)
    close(out.entropy_sum, 3 * 1.75 * LN(2))
    assert [o.dtype for o in out] == [torch.float32, torch.int32, torch.int32, *[torch.float32] * 4]


@pytest.mark.parametrize("score", SCORES)
def test_ties_go_to_the_lower_index(score: str) -> None:
    assert gate([[1, 3, 3, 1, 3.0]], 5, score=score).experts.tolist() == [[1, 2, 4, 0, 3]]
    assert gate([[0.0, -0.0, 0.0]], 3, score=score).experts.tolist() == [[0, 1, 2]]
    assert gate([[-0.0, 0.0, -0.0]], 2, score=score).experts.tolist() == [[0, 1]]


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_saturated_scores_still_rank_by_logit(score: str) -> None:
    """The choice is made on the raw logits, so rounding of the score cannot make a tie."""
    assert gate([[100.0, 200.0, 150.0, -300.0, -200.0]], 5, score=score).experts.tolist() == [[1, 2, 0, 4, 3]]


def test_bias_moves_the_choice_and_not_the_weight() -> None:
    bias = torch.tensor([0.0, 0.0, 0.2, 0.4])
    out = gate([HALVES], 2, score="sigmoid", selection_bias=bias)  # scores 0.8 0.667 0.5 0.5 -> 0.8 0.667 0.7 0.9
    assert out.experts.tolist() == [[3, 0]]
    close(out.weights, [[1 / 2, 4 / 5]])
    out = gate(
        [HALVES], 2, score="softmax_topk", selection_bias=torch.tensor([0.0, 0.0, 5.0, 0.0], dtype=torch.bfloat16)
    )
    assert out.experts.tolist() == [[2, 0]]
    close(out.weights, [[1 / 5, 4 / 5]])


def test_infinite_bias() -> None:
    """-inf takes an expert out of the choice; it fills up last, with its own score."""
    bias = torch.tensor([-INF, 0.0, 0.0, INF])
    out = gate([HALVES], 4, selection_bias=bias)
    assert out.experts.tolist() == [[3, 1, 2, 0]]
    close(out.weights, [[1 / 8, 1 / 4, 1 / 8, 1 / 2]])


def test_groups() -> None:
    # Logits as selection values: groups {0,1} {2,3} {4,5}; sums of two 5, 6, 6; best ones 5, 3, 4.
    row = [[5, 0, 3, 3, 4, 2.0]]
    options = {"score": "softmax_topk", "num_groups": 3}
    assert gate(row, 2, topk_groups=1, **options).experts.tolist() == [[2, 3]]
    assert gate(row, 4, topk_groups=2, **options).experts.tolist() == [[4, 2, 3, 5]]
    assert gate(row, 2, topk_groups=1, group_score_experts=1, **options).experts.tolist() == [[0, 1]]
    assert gate(row, 4, topk_groups=2, group_score_experts=1, **options).experts.tolist() == [[0, 4, 5, 1]]
    assert gate(row, 6, topk_groups=3, **options).experts.tolist() == [[0, 4, 2, 3, 5, 1]]


def test_groups_with_masked_experts() -> None:
    # A group's value counts its candidates only; one without any ranks last; fill-ups come from the kept groups.
    options = {"score": "softmax_topk", "num_groups": 3}
    out = gate([[-INF, -INF, -7, -INF, -9, -9.0]], 2, topk_groups=1, **options)
    assert out.experts.tolist() == [[2, 3]]
    close(out.weights, [[1.0, 0.0]])
    out = gate([[-INF, NAN, -7, -INF, -9, -9.0]], 4, topk_groups=2, **options)
    assert out.experts.tolist() == [[2, 4, 5, 3]]
    # Both finite groups overflow to -inf; they still rank before the empty one.
    out = gate([[-INF, -INF, -3e38, -3e38, -3e38, -3e38]], 2, topk_groups=1, **options)
    assert out.experts.tolist() == [[2, 3]]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("renormalize", [False, True])
def test_too_few_candidates(score: str, renormalize: bool) -> None:
    out = gate([[-INF, NAN, 2.0, -INF], [-INF] * 4, [NAN] * 4], 3, score=score, renormalize=renormalize)
    assert out.experts.tolist() == [[2, 0, 1], [0, 1, 2], [0, 1, 2]]
    assert out.weights.isfinite().all()
    assert out.weights[0, 0] > 0
    assert (out.weights[0, 1:] == 0).all()
    assert (out.weights[1:] == 0).all()
    assert out.counts.tolist() == [3, 3, 3, 0]


@pytest.mark.parametrize("score", SCORES)
def test_nan_is_seen(score: str) -> None:
    x = torch.tensor([[1.0, NAN, 2.0], [0.0, 1.0, 2.0]], requires_grad=True)
    out = moeyard.topk_gating(x, 3, score=score)
    assert out.experts.tolist() == [[2, 0, 1], [2, 1, 0]]
    assert out.weights.isfinite().all()
    assert out.weight_sum.isfinite().all()
    assert out.entropy_sum.isfinite()
    assert out.score_sum.isnan().tolist() == [False, True, False]
    assert out.logsumexp_sq.isnan()
    (grad,) = torch.autograd.grad(out.weights[:, 0].sum(), x)
    assert grad.isnan().tolist() == [[False, True, False], [False, False, False]]


@pytest.mark.parametrize("score", SCORES)
def test_infinite_logits(score: str) -> None:
    x = torch.tensor([[1.0, INF, -INF, 2.0]], requires_grad=True)
    out = moeyard.topk_gating(x, 4, score=score)
    assert out.experts.tolist() == [[1, 3, 0, 2]]
    assert out.weights.isfinite().all()
    assert out.score_sum.isfinite().all()
    assert out.logsumexp_sq == INF
    (grad,) = torch.autograd.grad(out.weights.sum() + out.entropy_sum + out.score_sum[0], x)
    assert grad.isfinite().all()
    assert grad[0, 2] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("score", SCORES)
def test_extreme_logits_stay_finite(score: str, dtype: torch.dtype) -> None:
    big = torch.finfo(dtype).max
    x = torch.tensor([[big, -big, 0.0, big], [-big] * 4], dtype=dtype, requires_grad=True)
    out = moeyard.topk_gating(x, 2, score=score, renormalize=True)
    assert out.experts.tolist() == [[0, 3], [0, 1]]
    close(out.weights[0], [0.5, 0.5])
    (grad,) = torch.autograd.grad(out.weights[:, 0].sum() + out.entropy_sum, x)
    assert grad.isfinite().all()


def test_a_row_without_candidates_is_in_no_statistic() -> None:
    row = [0.5, -1.0, 2.0]
    for score in SCORES:
        alone, both = gate([row], 1, score=score), gate([row, [-INF] * 3], 1, score=score)
        for name in ("score_sum", "weight_sum", "logsumexp_sq", "entropy_sum"):
            assert torch.equal(getattr(alone, name), getattr(both, name))


def test_mask_hides_everything() -> None:
    x = torch.tensor([[1.0, 2.0], [NAN, INF]], requires_grad=True)
    forced = torch.tensor([[0, -1], [77, 77]])
    out = moeyard.topk_gating(x, 2, mask=torch.tensor([True, False]), forced_experts=forced)
    assert out.experts.tolist() == [[0, 1], [-1, -1]]
    assert out.weights[1].tolist() == [0, 0]
    assert out.counts.tolist() == [1, 1]
    (grad,) = torch.autograd.grad(out.weights[:, 0].sum() + out.logsumexp_sq + out.score_sum[0], x)
    assert grad.isfinite().all()
    assert (grad[1] == 0).all()


# ---- forced experts --------------------------------------------------------------------------------------------------


def test_forced_slots_keep_their_place() -> None:
    forced = torch.tensor([[-1, 3, -1], [2, -1, 0], [-1, -1, -1], [1, 2, 3]], dtype=torch.int32)
    out = gate([HALVES] * 4, 3, forced_experts=forced)
    assert out.experts.tolist() == [[0, 3, 1], [2, 1, 0], [0, 1, 2], [1, 2, 3]]
    close(out.weights[0], [1 / 2, 1 / 8, 1 / 4])
    assert gate([HALVES] * 2, 2, forced_experts=torch.tensor([3, -1])).experts.tolist() == [[3, 0], [0, 1]]
    assert gate([HALVES], 1, forced_experts=torch.tensor([[2]])).experts.tolist() == [[2]]


def test_forced_weights_one() -> None:
    x = torch.tensor([HALVES, HALVES, HALVES], requires_grad=True)
    mask = torch.tensor([True, True, False])
    options = {"forced_experts": torch.tensor([3, -1, 2]), "forced_weights": "one", "scale": 3.0, "mask": mask}
    out = moeyard.topk_gating(x, 2, **options)
    assert out.experts.tolist() == [[3, 0], [0, 1], [-1, -1]]
    close(out.weights, [[1.5, 1.5], [1.5, 1.5], [0, 0]])
    close(out.weight_sum, [3.0, 1.5, 0.0, 1.5])
    assert not out.weights.requires_grad
    assert not out.weight_sum.requires_grad
    (grad,) = torch.autograd.grad(out.score_sum[0], x)
    close(grad[1], [1 / 4, -1 / 8, -1 / 16, -1 / 16])


def test_forced_outside_the_kept_groups() -> None:
    out = gate([[9, 8, 1, 0.0]], 2, num_groups=2, topk_groups=1, forced_experts=torch.tensor([3]), score="sigmoid")
    assert out.experts.tolist() == [[3, 0]]


def test_forced_masked_expert_has_no_weight() -> None:
    out = gate([[-INF, 1.0]], 1, forced_experts=torch.tensor([0]))
    assert out.experts.tolist() == [[0]]
    assert out.weights.tolist() == [[0.0]]


# ---- size, autocast, SIMD --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 32, 33, 4096, 8192])
def test_the_largest_number_of_experts(k: int) -> None:
    x = torch.randn(3, 8192, generator=torch.Generator().manual_seed(k)).bfloat16()  # many ties
    out = moeyard.topk_gating(x, k)
    expected = x.float().sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(out.experts.long(), expected)
    torch.testing.assert_close(out.weights, x.float().softmax(1).gather(1, expected))


@pytest.mark.large
def test_float32_sums_over_many_rows() -> None:
    x = torch.full((200_000, 2), 0.1)
    out = moeyard.topk_gating(x, 1, score="sigmoid")
    torch.testing.assert_close(
        out.score_sum.double(),
        torch.full((2,), 200_000 / (1 + math.exp(-x[0, 0].item())), dtype=torch.float64),
        rtol=1e-6,
        atol=0,
    )


@pytest.mark.engines("cpu")
def test_autocast_keeps_the_dtype() -> None:
    x = torch.randn(4, 8)
    plain = moeyard.topk_gating(x, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = moeyard.topk_gating(x, 2)
    for a, b in zip(plain, cast, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


_SIMD_SCRIPT = """
import hashlib, torch, moeyard
g = torch.Generator().manual_seed(0)
digest = hashlib.sha256()
for score in ("softmax", "softmax_topk", "sigmoid", "sqrtsoftplus"):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.randn(700, 40, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        out = moeyard.topk_gating(x, 6, score=score, num_groups=8, topk_groups=4, renormalize=True)
        total = sum((o * o).sum() for o in out if o.is_floating_point())
        for o in (*out, *torch.autograd.grad(total, x)):
            digest.update(bytes(o.detach().contiguous().reshape(-1).view(torch.uint8).tolist()))
print(digest.hexdigest())
"""


@pytest.mark.engines("cpu")
def test_simd_levels_give_the_same_bytes() -> None:
    assert_same_on_all_levels(_SIMD_SCRIPT)


# ---- export, sizes known only at run time ----------------------------------------------------------------------------


@pytest.mark.engines("cpu")
def test_export_with_a_dynamic_number_of_rows() -> None:
    class Router(torch.nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
            return moeyard.topk_gating(x, 2, mask=mask, score="sigmoid", num_groups=2, topk_groups=1)

    rows = torch.export.Dim("T")
    example = (torch.randn(5, 8), torch.ones(5, dtype=torch.bool))
    exported = torch.export.export(Router(), example, dynamic_shapes=({0: rows}, {0: rows}))
    x, mask = torch.randn(9, 8), torch.arange(9) % 2 == 0
    for a, b in zip(exported.module()(x, mask), Router()(x, mask), strict=True):
        assert torch.equal(a, b)


@pytest.mark.engines("cpu")
def test_compile_with_data_dependent_rows() -> None:
    def function(x: Tensor) -> Tensor:
        rows = x[x[:, 0] > 0]
        forced = torch.zeros(rows.shape[0], dtype=torch.int32)
        return moeyard.topk_gating(rows, 2, forced_experts=forced).weights[:, 1].sum()

    x = torch.randn(9, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with compiling():
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), function(x))
        got, want = (torch.autograd.grad(f(x), x)[0] for f in (compiled, function))
    torch.testing.assert_close(got, want)
