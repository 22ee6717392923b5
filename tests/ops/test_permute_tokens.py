"""permute_tokens and unpermute_tokens: the contract, tables, a loop over experts, round trips, hostile plans."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moeyard
from engines import examples, place
from moeyard.ops._permute_tokens_reference import permute_tokens_reference, unpermute_tokens_reference
from ops.compare import assert_equal
from ops.contract import Inputs, OpContract

pytestmark = pytest.mark.usefixtures("engine")

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float16: (2e-3, 1e-3), torch.bfloat16: (1e-2, 1e-2)}
Plan = moeyard.PermutationPlan


def random(dtype: torch.dtype, *shape: int, seed: int) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def make_plan(tokens: int, k: int = 3, experts: int = 5, seed: int = 0, **options: Any) -> Plan:
    ids = torch.randint(-1, experts, (tokens, k), generator=torch.Generator().manual_seed(seed))
    return moeyard.plan_permutation(ids, experts, **options)


class TestPermute(OpContract):
    function = staticmethod(moeyard.permute_tokens)
    reference = staticmethod(permute_tokens_reference)
    dtypes = (*FLOATS, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64)
    differentiable = ("x", "slot_weights")
    double_backward = True
    tolerance = TOLERANCE

    def inputs(self, dtype: torch.dtype, size: str = "small", seed: int = 0) -> Inputs:
        tokens, features = (3001, 129) if size == "large" else (9 + seed, 3)
        plan = make_plan(tokens, seed=seed, capacity=tokens // 2, align=4)
        inputs: Inputs = {"x": random(dtype, tokens, features, seed=seed), "plan": plan}
        if dtype in FLOATS:
            precise = torch.promote_types(dtype, torch.float32)
            inputs["slot_weights"] = random(precise, tokens, 3, seed=seed + 1)
        return inputs

    def empty_inputs(self) -> list[Inputs]:
        cases = [(0, 2, 3), (4, 2, 0), (4, 0, 3)]
        return [
            {"x": torch.ones(t, h), "plan": make_plan(t, k, align=8), "slot_weights": torch.ones(t, k)}
            for t, k, h in cases
        ]


class TestPermuteWithoutWeights(TestPermute):
    differentiable = ("x",)
    dtypes = FLOATS

    def inputs(self, dtype: torch.dtype, size: str = "small", seed: int = 0) -> Inputs:
        return {**super().inputs(dtype, size, seed), "slot_weights": None}


class TestUnpermute(OpContract):
    function = staticmethod(moeyard.unpermute_tokens)
    reference = staticmethod(unpermute_tokens_reference)
    dtypes = (*FLOATS, torch.int32, torch.int64)
    differentiable = ("y", "weights")
    double_backward = True
    tolerance = TOLERANCE

    def inputs(self, dtype: torch.dtype, size: str = "small", seed: int = 0) -> Inputs:
        inputs = TestPermute.inputs(self, dtype, size, seed)
        plan, weights = inputs["plan"], inputs.get("slot_weights")
        features = inputs["x"].shape[1]
        y = random(dtype, plan.slot_of_row.shape[0], features, seed=seed)
        return {"y": y, "plan": plan, "weights": weights}

    def empty_inputs(self) -> list[Inputs]:
        cases = [(0, 2, 3), (4, 2, 0), (4, 0, 3)]
        plans = [make_plan(t, k, align=8) for t, k, _ in cases]
        return [
            {"y": torch.ones(p.slot_of_row.shape[0], h), "plan": p, "weights": torch.ones(t, k)}
            for p, (t, k, h) in zip(plans, cases, strict=True)
        ]


class TestUnpermuteWithoutWeights(TestUnpermute):
    differentiable = ("y",)
    dtypes = (torch.float32,)

    def inputs(self, dtype: torch.dtype, size: str = "small", seed: int = 0) -> Inputs:
        return {**super().inputs(dtype, size, seed), "weights": None}


# ---- tables -----------------------------------------------------------------------------------------------------

HAND = moeyard.plan_permutation(torch.tensor([[1, 0], [0, -1], [1, 1]]), 2, capacity=4, align=4)


def hand() -> Plan:
    plan: Plan = place(HAND)
    return plan


def test_by_hand() -> None:
    x = torch.tensor([[1, 2], [3, 4], [5, 6]])
    rows = [[1, 2], [3, 4], [0, 0], [0, 0], [1, 2], [5, 6], [5, 6], [0, 0]]
    got = moeyard.permute_tokens(x, hand())
    assert got.tolist() == rows
    assert moeyard.unpermute_tokens(got, hand()).tolist() == [[2, 4], [3, 4], [10, 12]]
    weights = torch.tensor([[0.5, 2.0], [-1.0, 7.0], [0.25, 0.0]])
    weighted = moeyard.permute_tokens(x.float(), hand(), slot_weights=weights)
    assert weighted.tolist() == [[2, 4], [-3, -4], [0, 0], [0, 0], [0.5, 1], [1.25, 1.5], [0, 0], [0, 0]]
    assert moeyard.unpermute_tokens(got.float(), hand(), weights).tolist() == [[2.5, 5], [-3, -4], [1.25, 1.5]]


def test_padding_never_leaks() -> None:
    """Free rows may hold anything (grouped_mm leaves them uninitialised); their gradient is zero, not garbage."""
    y = moeyard.permute_tokens(torch.ones(3, 2), hand())
    free = hand().slot_of_row < 0
    y[free] = float("nan")
    y.requires_grad_()
    weights = torch.ones(3, 2, requires_grad=True)
    out = moeyard.unpermute_tokens(y, hand(), weights)
    out.sum().backward()
    assert out.isfinite().all()
    assert weights.grad.tolist() == [[2, 2], [2, 0], [2, 2]]
    assert torch.equal(y.grad, (~free)[:, None].float().expand(-1, 2))


def test_integers_wrap_around() -> None:
    y = torch.full((2, 1), 2**31 - 1, dtype=torch.int32)
    plan = moeyard.plan_permutation(torch.tensor([[0, 0]]), 1)
    assert moeyard.unpermute_tokens(y, plan).tolist() == [[-2]]


def test_accumulates_in_float32_and_in_slot_order() -> None:
    y = torch.tensor([[2048.0], [1.0], [1.0], [-2048.0]], dtype=torch.float16)
    plan = moeyard.plan_permutation(torch.tensor([[0, 0, 0, 0]]), 1)
    assert moeyard.unpermute_tokens(y, plan).tolist() == [[2.0]]  # float16 sums would give 0
    big = torch.tensor([[1e8], [1.0], [-1e8], [1.0]])
    assert moeyard.unpermute_tokens(big, plan).tolist() == [[1.0]]


def test_lazy_conjugates_and_negatives() -> None:
    x = torch.randn(3, 2, dtype=torch.complex64)
    for lazy in (x.conj(), x.conj().imag):
        assert torch.equal(moeyard.permute_tokens(lazy, hand())[0], lazy[0])


def test_weight_gradient_has_the_weights_dtype() -> None:
    for dtype in FLOATS:
        weights = torch.ones(3, 2, dtype=dtype, requires_grad=True)
        x = torch.ones(3, 2, requires_grad=True)
        y = moeyard.permute_tokens(x, hand(), slot_weights=weights)
        moeyard.unpermute_tokens(y, hand(), weights).sum().backward()
        assert weights.grad.dtype == dtype
        assert x.grad.dtype == torch.float32
        assert weights.grad.tolist() == [[4, 4], [4, 0], [4, 4]]


def test_only_the_weights_need_a_gradient() -> None:
    weights = torch.ones(3, 2, requires_grad=True)
    moeyard.permute_tokens(torch.full((3, 5), 2.0), hand(), slot_weights=weights).sum().backward()
    assert weights.grad.tolist() == [[10, 10], [10, 0], [10, 10]]


@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("to_rows", [True, False])
def test_second_derivatives_of_each_input(needed: tuple[bool, bool], to_rows: bool) -> None:
    source = random(torch.float64, 3 if to_rows else 8, 2, seed=0).requires_grad_(needed[0])
    weights = random(torch.float64, 3, 2, seed=1).requires_grad_(needed[1])

    def function(source: Tensor, weights: Tensor) -> Tensor:
        if to_rows:
            return moeyard.permute_tokens(source, hand(), slot_weights=weights)
        return moeyard.unpermute_tokens(source, hand(), weights)

    assert torch.autograd.gradcheck(function, (source, weights))
    assert torch.autograd.gradgradcheck(function, (source, weights))


@pytest.mark.parametrize(("features", "k"), [(1, 1), (7, 40), (1023, 2), (1025, 2), (2500, 3)])
def test_odd_widths_and_many_slots(features: int, k: int) -> None:
    plan = make_plan(11, k, experts=64, align=2)
    x, w = random(torch.float64, 11, features, seed=1), random(torch.float64, 11, k, seed=2)
    y = random(torch.float64, plan.slot_of_row.shape[0], features, seed=3)
    results = []
    for permute, unpermute in (
        (moeyard.permute_tokens, moeyard.unpermute_tokens),
        (permute_tokens_reference, unpermute_tokens_reference),
    ):
        leaves = [t.clone().requires_grad_() for t in (x, w, y)]
        out = permute(leaves[0], plan, slot_weights=leaves[1])
        back = unpermute(leaves[2], plan, leaves[1])
        results.append((out, back, *torch.autograd.grad((out**2).sum() + (back**2).sum(), leaves)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


# ---- the use: experts on sorted rows ----------------------------------------------------------------------------


def dense(x: Tensor, matrices: Tensor, experts: Tensor, kept: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], matrices.shape[2], dtype=x.dtype)
    for e in range(matrices.shape[0]):
        chosen = ((experts == e) & kept) * weights
        out = out + chosen.sum(1, keepdim=True) * (x @ matrices[e])
    return out


def sparse(x: Tensor, matrices: Tensor, plan: Plan, weights: Tensor, before: bool) -> Tensor:
    rows = moeyard.permute_tokens(x, plan, slot_weights=weights if before else None)
    out, start = torch.full((rows.shape[0], matrices.shape[2]), torch.nan, dtype=x.dtype), 0
    parts = []
    for e, end in enumerate(plan.offsets.tolist()):
        parts.append(rows[start:end] @ matrices[e])
        start = end
    out = torch.cat([*parts, out[start:]])  # rows past the last offset stay uninitialised, as in grouped_mm
    return moeyard.unpermute_tokens(out, plan, None if before else weights)


@pytest.mark.parametrize("align", [1, 8, 16])
@pytest.mark.parametrize(("capacity", "drop"), [(None, "position"), (6, "position"), (6, "weight"), (0, "position")])
@pytest.mark.parametrize("before", [False, True])
def test_equals_a_loop_over_experts(align: int, capacity: int | None, drop: str, before: bool) -> None:
    generator = torch.Generator().manual_seed(align)
    experts = torch.stack([torch.randperm(5, generator=generator)[:2] for _ in range(23)])
    experts[::7, 1] = -1
    x, matrices, weights = (
        torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in ((23, 6), (5, 6, 4), (23, 2))
    )
    by_weight = {"weights": weights} if drop == "weight" else {}
    plan = moeyard.plan_permutation(experts, 5, capacity=capacity, drop=drop, align=align, **by_weight)
    assert (capacity is None) == (int(plan.dropped) == 0)
    results = []
    for out in (
        sparse(x, matrices, plan, weights, before),
        dense(x, matrices, experts, plan.row_of_slot >= 0, weights),
    ):
        results.append((out, *torch.autograd.grad((out * out.detach().cos()).sum(), (x, matrices, weights))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@settings(max_examples=examples(50))
@given(st.integers(0, 9), st.integers(1, 5), st.integers(0, 20), st.integers(1, 9), st.integers(0, 10**6))
def test_round_trip(tokens: int, k: int, features: int, align: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    experts = torch.randint(0, 6, (tokens, k), generator=generator)
    plan = moeyard.plan_permutation(experts, 6, align=align)
    x = torch.randn(tokens, features, generator=generator, dtype=torch.float64)
    back = moeyard.unpermute_tokens(moeyard.permute_tokens(x, plan), plan, torch.full((tokens, k), 1 / k))
    torch.testing.assert_close(back, x, rtol=1e-6, atol=1e-6)
    # Adjoint: <permute(x), y> = <x, unpermute(y)>.
    y = torch.randn(plan.slot_of_row.shape[0], features, generator=generator, dtype=torch.float64)
    w = torch.randn(tokens, k, generator=generator, dtype=torch.float64)
    left = (moeyard.permute_tokens(x, plan, slot_weights=w) * y).sum()
    torch.testing.assert_close(left, (x * moeyard.unpermute_tokens(y, plan, w)).sum(), rtol=1e-9, atol=1e-9)


def test_whole_layer_compiles() -> None:
    def layer(x: Tensor, experts: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        plan = moeyard.plan_permutation(experts, 4, capacity=x.shape[0] // 2, align=8)
        return moeyard.unpermute_tokens(moeyard.permute_tokens(x, plan).sin(), plan, weights), plan.counts

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (6, 9, 14):
        x = torch.randn(tokens, 3, requires_grad=True)
        experts, weights = torch.randint(0, 4, (tokens, 2)), torch.rand(tokens, 2, requires_grad=True)
        results = []
        for function in (compiled, layer):
            out = function(x, experts, weights)
            results.append((*out, *torch.autograd.grad(out[0].sum(), (x, weights))))
        assert_equal(*results)


def test_exports_with_a_dynamic_number_of_tokens() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, experts: Tensor) -> Tensor:
            plan = moeyard.plan_permutation(experts, 4, align=8)
            return moeyard.unpermute_tokens(moeyard.permute_tokens(x, plan), plan)

    tokens = torch.export.Dim("tokens", min=2, max=1000)
    example = (torch.randn(6, 3), torch.randint(0, 4, (6, 2)))
    exported = torch.export.export(Layer(), example, dynamic_shapes=({0: tokens}, {0: tokens}))
    x, experts = torch.randn(17, 3), torch.randint(0, 4, (17, 2))
    assert torch.equal(exported.module()(x, experts), Layer()(x, experts))


# ---- hostile input ----------------------------------------------------------------------------------------------

X, W = torch.ones(3, 2), torch.ones(3, 2)


def changed(**fields: Any) -> Plan:
    return HAND._replace(**fields)


def map_with(field: str, at: Any, value: int) -> Plan:
    values = getattr(HAND, field).clone()
    values[at] = value
    return changed(**{field: values})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": None}, TypeError, "x: expected a torch.Tensor"),
        ({"x": X[0]}, ValueError, r"x: expected shape \[T, H\], got \[2\]"),
        ({"x": torch.ones(4, 2)}, ValueError, r"plan.row_of_slot: expected shape \[4, k\], got \[3, 2\]"),
        ({"x": X.to(torch.complex128)}, TypeError, "x: expected a dtype of 1, 2, 4 or 8 bytes"),
        ({"x": X.to("meta")}, ValueError, "plan.row_of_slot: expected device meta"),
        ({"x": X.to(torch.complex64).requires_grad_()}, TypeError, "x .with a gradient.: expected dtype"),
        ({"x": X.int(), "slot_weights": W}, TypeError, "x .with slot_weights.: expected dtype"),
        ({"plan": tuple(HAND)}, TypeError, "plan: expected a PermutationPlan, got tuple"),
        ({"plan": changed(row_of_slot=None)}, TypeError, "plan.row_of_slot: expected a torch.Tensor"),
        ({"plan": changed(row_of_slot=HAND.row_of_slot.long())}, TypeError, "plan.row_of_slot: expected dtype int32"),
        ({"plan": changed(slot_of_row=HAND.slot_of_row[None])}, ValueError, r"plan.slot_of_row: expected shape \[R\]"),
        ({"slot_weights": 1.0}, TypeError, "slot_weights: expected a torch.Tensor or None"),
        ({"slot_weights": W[:, :1]}, ValueError, r"slot_weights: expected shape \[3, 2\]"),
        ({"slot_weights": W.long()}, TypeError, "slot_weights: expected dtype"),
        ({"slot_weights": W.to("meta")}, ValueError, "slot_weights: expected device"),
    ],
)
def test_hostile_permute(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        moeyard.permute_tokens(**place({"x": X, "plan": HAND, **arguments}))


Y = torch.ones(8, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"y": [1.0]}, TypeError, "y: expected a torch.Tensor"),
        ({"y": Y[0]}, ValueError, r"y: expected shape \[R, H\]"),
        ({"y": Y[:7]}, ValueError, r"plan.slot_of_row: expected shape \[7\], got \[8\]"),
        ({"y": Y.bool()}, TypeError, "y: expected dtype"),
        ({"y": Y.int(), "weights": W}, TypeError, "y .with weights.: expected dtype"),
        ({"plan": None}, TypeError, "plan: expected a PermutationPlan"),
        ({"weights": torch.ones(6)}, ValueError, r"weights: expected shape \[3, 2\], got \[6\]"),
        ({"weights": W.bool()}, TypeError, "weights: expected dtype"),
    ],
)
def test_hostile_unpermute(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        moeyard.unpermute_tokens(**place({"y": Y, "plan": HAND, **arguments}))


# ---- plans that contradict themselves ---------------------------------------------------------------------------


@pytest.mark.engines("cpu")
@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (map_with("row_of_slot", (1, 0), 8), r"\[-1, 8\), got 8 at token 1, slot 0"),
        (map_with("row_of_slot", (2, 1), -2), "got -2 at token 2, slot 1"),
        (map_with("slot_of_row", 3, 6), r"plan.slot_of_row.*\[-1, 6\), got 6 at row 3"),
        (map_with("slot_of_row", 7, -9), "got -9 at row 7"),
        (map_with("slot_of_row", 2, 3), "inverse of slot_of_row"),
        (map_with("row_of_slot", (1, 1), 0), "inverse of row_of_slot"),
        (map_with("row_of_slot", (0, 0), -1), "inverse of slot_of_row"),
        (map_with("row_of_slot", (0, 0), 2**31 - 1), "plan.row_of_slot"),
    ],
)
def test_bad_plans_are_named(plan: Plan, message: str) -> None:
    for call in (lambda: moeyard.permute_tokens(X, plan), lambda: moeyard.unpermute_tokens(Y, plan, W)):
        with pytest.raises(ValueError, match=message):
            call()


OUTSIDE = (-(2**31), -2, 8, 2**31 - 1)  # of the rows, and of the slots as well


@pytest.mark.engines("emulated", "cuda")
@pytest.mark.parametrize("row", OUTSIDE)
def test_rows_out_of_range_count_as_none(row: int) -> None:
    bad, clean = (place(map_with("row_of_slot", (1, 0), r)) for r in (row, -1))
    x, y, w = place((X, Y.clone(), W))
    y[:, 0] = torch.arange(8)
    calls = (
        lambda plan: (moeyard.unpermute_tokens(y, plan),),
        lambda plan: (moeyard.unpermute_tokens(y, plan, w),),
        lambda plan: torch.ops.moeyard.permute_tokens_backward(y, x, *plan[:2], w, True, True),
        lambda plan: torch.ops.moeyard.unpermute_tokens_backward(x, y, *plan[:2], w, False, True)[1:],
    )
    for call in calls:
        assert_equal(call(bad), call(clean))
        with pytest.raises(ValueError, match="plan: expected"):
            moeyard.check_device_errors()
        moeyard.check_device_errors()  # told once
    # The row that no slot claims holds anything: nobody has written it.
    others = [r for r in range(8) if r != 1]
    for weights in (None, w):
        spread = [moeyard.permute_tokens(x, plan, slot_weights=weights)[others] for plan in (bad, clean)]
        assert_equal(spread[:1], spread[1:])
        with pytest.raises(ValueError, match="plan: expected"):
            moeyard.check_device_errors()


@pytest.mark.engines("emulated", "cuda")
@pytest.mark.parametrize("slot", OUTSIDE)
def test_slots_out_of_range_count_as_none(slot: int) -> None:
    bad, clean = (place(map_with("slot_of_row", 3, s)) for s in (slot, -1))
    x, w = place((X, W))
    for weights in (None, w):
        spread = [moeyard.permute_tokens(x, plan, slot_weights=weights) for plan in (bad, clean)]
        assert_equal(spread[:1], spread[1:])
        with pytest.raises(ValueError, match="plan: expected"):
            moeyard.check_device_errors()


def test_backward_checks_its_arguments() -> None:
    backward = torch.ops.moeyard.permute_tokens_backward
    plan = place(HAND[:2])
    with pytest.raises(ValueError, match="need_weights: expected x"):
        backward(place(Y), None, *plan, place(W), True, True)
    with pytest.raises(TypeError, match="x: expected dtype float32, got float64"):
        backward(*place((Y, X.double())), *plan, place(W), True, True)
    with pytest.raises(ValueError, match=r"x: expected shape \[3, 2\], got \[3, 1\]"):
        backward(*place((Y, X[:, :1])), *plan, place(W), True, True)


@pytest.mark.parametrize("weights", [None, torch.ones(3, 2)])
def test_backward_asked_for_nothing(weights: Tensor | None) -> None:
    for op, grad in (("permute_tokens_backward", Y), ("unpermute_tokens_backward", X)):
        out = getattr(torch.ops.moeyard, op)(place(grad), None, *place(HAND[:2]), place(weights), False, False)
        assert [o.numel() for o in out] == [0, 0]
