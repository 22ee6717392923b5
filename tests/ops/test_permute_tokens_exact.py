"""permute_tokens, unpermute_tokens and plan_permutation to the last bit: every way through the CPU kernels (sizes on
both sides of each threshold, every SIMD level, odd widths) against the documented order of operations, in torch."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import moeyard
from engines import engine, large
from ops.levels import assert_same_on_all_levels

pytestmark = pytest.mark.usefixtures("engine")

Plan = moeyard.PermutationPlan
NAN, INF = float("nan"), float("inf")
HALVES = (torch.float16, torch.bfloat16)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_plan(tokens: int, k: int, experts: int = 7, seed: int = 0, **options: Any) -> Plan:
    ids = torch.randint(-1, experts, (tokens, k), generator=generator(seed), dtype=torch.int32)
    return moeyard.plan_permutation(ids, experts, **options)


def random_bits(dtype: torch.dtype, *shape: int, seed: int) -> Tensor:
    """Any bits at all for the 16-bit types (NaN, infinities and subnormals among them), else normal numbers."""
    if dtype in HALVES:
        words = torch.randint(-(2**15), 2**15, shape, generator=generator(seed), dtype=torch.int16)
        return words.view(dtype)
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


# ---- the documented order of operations ---------------------------------------------------------------------------


def spread(x: Tensor, plan: Plan, weights: Tensor | None = None) -> Tensor:
    slots = plan.slot_of_row.long()
    rows = x[slots.clamp(min=0) // plan.row_of_slot.shape[1]]
    if weights is not None:
        exact = torch.promote_types(x.dtype, torch.float32)
        rows = (rows.to(exact) * weights.to(exact).reshape(-1)[slots.clamp(min=0), None]).to(x.dtype)
    return torch.where((slots >= 0)[:, None], rows, torch.zeros((), dtype=x.dtype))


def combine(y: Tensor, plan: Plan, weights: Tensor | None = None) -> Tensor:
    exact = torch.promote_types(y.dtype, torch.float32)
    total = torch.zeros(plan.row_of_slot.shape[0], y.shape[1], dtype=exact)
    for j, row in enumerate(plan.row_of_slot.long().unbind(1)):
        term = y[row.clamp(min=0)].to(exact)
        if weights is not None:
            term = term * weights[:, j, None].to(exact)
        total = torch.where((row >= 0)[:, None], total + term, total)
    return total.to(y.dtype)


def dots(x: Tensor, y: Tensor, plan: Plan) -> Tensor:
    """Per 1,024 columns sixteen running sums and a tree over them; the blocks one after the other."""
    exact = torch.promote_types(x.dtype, torch.float32)
    result = torch.zeros(plan.row_of_slot.shape, dtype=exact)
    for j, row in enumerate(plan.row_of_slot.long().unbind(1)):
        for a, b in zip(x.split(1024, 1), y[row.clamp(min=0)].split(1024, 1), strict=True):
            product = a.to(exact) * b.to(exact)
            lanes = torch.zeros(x.shape[0], 16, dtype=exact)
            for part in product.split(16, 1):
                lanes[:, : part.shape[1]] += part
            while lanes.shape[1] > 1:
                half = lanes.shape[1] // 2
                lanes = lanes[:, :half] + lanes[:, half:]
            result[:, j] += torch.where(row >= 0, lanes[:, 0], torch.zeros((), dtype=exact))
    return result


def assert_same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def assert_dots(got: Tensor, x: Tensor, y: Tensor, plan: Plan) -> None:
    """The order of a dot's sum is the CPU's; elsewhere it may be another, with no more rounding than any order."""
    if engine.name == "cpu":
        return assert_same(got, dots(x, y, plan))
    rows = plan.row_of_slot.long()
    products = x.double()[:, None] * y.double()[rows.clamp(min=0)]
    exact, size = (torch.where(rows >= 0, terms.sum(2), 0.0) for terms in (products, products.abs()))
    finfo = torch.finfo(got.dtype)
    bound = x.shape[1] * finfo.eps * (size + finfo.smallest_normal)
    fits = size < finfo.max / 2  # false for NaN
    assert ((got.double() - exact).abs() <= bound)[fits].all()
    assert not got[~size.isfinite()].isfinite().any()
    return None


# ---- rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize(
    ("features", "k"), [(1, 1), (15, 3), (16, 4), (33, 5), (64, 8), (1024, 2), (1041, 9), (2100, 6)]
)
def test_sums_and_dots_to_the_last_bit(dtype: torch.dtype, features: int, k: int) -> None:
    plan = random_plan(19, k, seed=features, align=2, capacity=25)
    x, y = random_bits(dtype, 19, features, seed=1), random_bits(dtype, plan.slot_of_row.shape[0], features, seed=2)
    weights = random_bits(torch.promote_types(dtype, torch.float32), 19, k, seed=3)
    assert_same(moeyard.unpermute_tokens(y, plan, weights), combine(y, plan, weights))
    assert_same(moeyard.unpermute_tokens(y, plan), combine(y, plan))
    assert_same(moeyard.permute_tokens(x, plan, slot_weights=weights), spread(x, plan, weights))
    backward = torch.ops.moeyard
    for_y, for_weights = backward.unpermute_tokens_backward(x, y, *plan[:2], weights, True, True)
    assert_same(for_y, spread(x, plan, weights))
    assert_dots(for_weights, x, y, plan)
    for_x, for_weights = backward.permute_tokens_backward(y, x, *plan[:2], weights, True, True)
    assert_same(for_x, combine(y, plan, weights))
    assert_dots(for_weights, x, y, plan)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32, torch.int64])
def test_copies_in_either_order(k: int, dtype: torch.dtype) -> None:
    for tokens, features in ((1, 1), (300, 3), (999, 64), (257, 1000)):
        plan = random_plan(tokens, k, seed=tokens, align=4, capacity=tokens // 2 + 1)
        x = torch.randint(0, 127, (tokens, features), generator=generator(k)).to(dtype)
        assert torch.equal(moeyard.permute_tokens(x, plan), spread(x, plan))


STREAMED = 32 << 20  # larger outputs go past the caches of the CPU: to the emulation, the same lines once more
past_the_caches = pytest.mark.engines("cpu", "cuda")


@past_the_caches
@pytest.mark.parametrize("row_bytes", [508, 512, 516, 1021, 4096])
@pytest.mark.parametrize("k", [2, 5])
def test_copies_past_the_caches(row_bytes: int, k: int) -> None:
    for tokens in (STREAMED // row_bytes // k - 3, STREAMED // row_bytes // k + 3):
        plan = random_plan(tokens, k, align=8)
        x = torch.randint(0, 256, (tokens, row_bytes), generator=generator(k), dtype=torch.uint8)
        for start in (0, 1):  # whole cache lines of the output never meet whole ones of the input
            shifted = torch.cat([x.new_zeros(start), x.reshape(-1)])[start:].view(tokens, row_bytes)
            assert torch.equal(moeyard.permute_tokens(shifted, plan), spread(x, plan))


@past_the_caches
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("features", [300, 1100])
def test_weighted_rows_past_the_caches(dtype: torch.dtype, features: int) -> None:
    tokens = STREAMED // features // dtype.itemsize // 3 + 100
    plan = random_plan(tokens, 3, align=8)
    assert plan.slot_of_row.shape[0] * features * dtype.itemsize > STREAMED
    x, weights = random_bits(dtype, tokens, features, seed=1), random_bits(torch.float32, tokens, 3, seed=2)
    assert_same(moeyard.permute_tokens(x, plan, slot_weights=weights), spread(x, plan, weights))
    assert_same(moeyard.unpermute_tokens(spread(x, plan), plan, weights), combine(spread(x, plan), plan, weights))


LEVELS = """
import sys, torch
from ops.test_permute_tokens_exact import digest
torch.set_num_threads(int(sys.argv[1]))
print(digest())
"""


def digest() -> str:
    """Of all outputs and gradients for a mixture of types, widths and choices."""
    seen = hashlib.sha256()
    for dtype, features, k in itertools.product((torch.float32, torch.float64, *HALVES), (5, 96, 1300), (1, 4, 7)):
        plan = random_plan(300, k, seed=k, align=8, capacity=130)
        x, y = (
            random_bits(dtype, 300, features, seed=1),
            random_bits(dtype, plan.slot_of_row.shape[0], features, seed=2),
        )
        weights = torch.rand(300, k, generator=generator(3))
        op = torch.ops.moeyard
        heavy = moeyard.plan_permutation(plan.row_of_slot % 7, 7, capacity=40 * k, drop="weight", weights=weights)
        outputs = (
            *heavy,
            moeyard.permute_tokens(x, plan, slot_weights=weights),
            moeyard.unpermute_tokens(y, plan, weights),
            *op.unpermute_tokens_backward(x, y, *plan[:2], weights, True, True),
            *op.permute_tokens_backward(y, x, *plan[:2], weights, True, True),
        )
        for out in outputs:
            # Which NaN comes out of two is the processor's choice.
            seen.update(
                torch.where(out.isnan(), torch.ones_like(out), out).reshape(-1).view(torch.uint8).numpy().tobytes()
            )
    return seen.hexdigest()


@pytest.mark.engines("cpu")
def test_simd_levels_and_threads_give_the_same_bits() -> None:
    assert_same_on_all_levels(LEVELS, "3", "1")


# ---- plans --------------------------------------------------------------------------------------------------------


def by_sorting(ids: Tensor, experts: int, capacity: int | None, align: int, weights: Tensor | None) -> tuple[Any, ...]:
    """The plan by sorts; row_of_slot, slot_of_row without its tail, counts, offsets, dropped."""
    flat = ids.reshape(-1).long()
    order = torch.arange(flat.numel())
    if weights is not None:  # heaviest first, NaN last; equal weights in slot order
        exact = weights.reshape(-1).double()
        order = torch.argsort(torch.where(exact.isnan(), -INF, exact), descending=True, stable=True)
        order = order[torch.argsort(exact.isnan()[order].int(), stable=True)]
    order = order[torch.argsort(flat[order], stable=True)]
    routed = torch.bincount(flat[flat >= 0], minlength=experts)
    counts = routed if capacity is None else routed.clamp(max=capacity)
    offsets = ((counts + align - 1) // align * align).cumsum(0)
    row_of_slot = torch.full_like(flat, -1)
    slot_of_row = torch.full((int(offsets[-1]),), -1)
    place = int((flat < 0).sum())
    for e in range(experts):
        kept = order[place : place + int(counts[e])].sort().values
        start = 0 if e == 0 else int(offsets[e - 1])
        rows = torch.arange(start, start + kept.numel())
        row_of_slot[kept], slot_of_row[rows] = rows, kept
        place += int(routed[e])
    return row_of_slot.view(ids.shape), slot_of_row, counts, offsets, (routed - counts).sum()


def assert_plan(ids: Tensor, experts: int, capacity: int | None, align: int, weights: Tensor | None = None) -> None:
    options: dict[str, Any] = {} if weights is None else {"drop": "weight", "weights": weights}
    got = moeyard.plan_permutation(ids, experts, capacity=capacity, align=align, **options)
    row_of_slot, slot_of_row, counts, offsets, dropped = by_sorting(ids, experts, capacity, align, weights)
    assert torch.equal(got.row_of_slot.long(), row_of_slot)
    assert torch.equal(got.slot_of_row[: slot_of_row.numel()].long(), slot_of_row)
    assert (got.slot_of_row[slot_of_row.numel() :] == -1).all()
    assert torch.equal(got.counts.long(), counts)
    assert torch.equal(got.offsets.long(), offsets)
    assert int(got.dropped) == int(dropped)


# A strip has 2^13 slots, or 4 E, or a 256th of all; a task has four strips and takes eight slots at a time.
@pytest.mark.parametrize("slots", [1, 7, 8, 9, *large(8193, 24_576, 24_577, 32_768, 32_769, 57_345, 140_001)])
@pytest.mark.parametrize("experts", [1, 16, 17, 64])
@pytest.mark.parametrize("unrouted", [False, True])
def test_plans_of_any_number_of_strips(slots: int, experts: int, unrouted: bool) -> None:
    ids = torch.randint(-1 if unrouted else 0, experts, (slots, 1), generator=generator(slots))
    weights = torch.rand(slots, 1, generator=generator(1)).round(decimals=2)
    for dtype in (torch.int32, torch.int64):
        assert_plan(ids.to(dtype), experts, None, 1)
        assert_plan(ids.to(dtype), experts, slots // experts, 8)
    assert_plan(ids, experts, slots // experts, 4, weights)
    assert_plan(ids, experts, slots, 4, weights)


@pytest.mark.large
@pytest.mark.parametrize(("slots", "experts"), [(40, 8192), (9000, 3000), (60_000, 3000), (2_200_000, 5)])
def test_plans_of_few_and_of_many_slots_per_expert(slots: int, experts: int) -> None:
    ids = torch.randint(-1, experts, (slots // 2, 2), generator=generator(0), dtype=torch.int32)
    assert_plan(ids, experts, None, 2)
    assert_plan(ids, experts, slots // experts + 1, 1)


@pytest.mark.large
def test_plans_of_skewed_routing() -> None:
    ids = torch.zeros(50_000, 2, dtype=torch.int32)
    ids[::1000, 1] = 3
    assert_plan(ids, 4, None, 1)
    assert_plan(ids, 4, 60_000, 1, torch.rand(50_000, 2, generator=generator(0)))


@pytest.mark.engines("cpu")
def test_plans_do_not_depend_on_the_number_of_threads() -> None:
    ids = torch.randint(-1, 30, (50_000, 3), generator=generator(0))
    weights = torch.rand(50_000, 3, generator=generator(1))
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert_plan(ids, 30, 4000, 8)
        assert_plan(ids, 30, 4000, 8, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_the_heaviest_among_all_kinds_of_weights(dtype: torch.dtype) -> None:
    ids = torch.randint(0, 3, (3000, 2), generator=generator(0))
    special = torch.tensor([0.0, -0.0, NAN, -NAN, INF, -INF, 5e-324, 1e-45, -1e-45, 1.0, -1.0]).to(dtype)
    weights = special[torch.randint(0, special.numel(), (3000, 2), generator=generator(1))]
    ordinary = torch.randn(3000, 2, generator=generator(2), dtype=torch.float64).to(dtype)
    for capacity in (0, 1, 500, 1000, 1900):
        assert_plan(ids, 3, capacity, 1, weights)
        assert_plan(ids, 3, capacity, 1, ordinary)
        assert_plan(ids, 3, capacity, 1, torch.where(ids > 0, weights, ordinary))


def test_weights_that_differ_in_the_last_digit() -> None:
    for dtype in (torch.float32, torch.float64):
        steps = torch.randperm(1000, generator=generator(0)).to(dtype)
        weights = (1 + steps * torch.finfo(dtype).eps)[:, None]
        for capacity in (1, 255, 256, 257, 999):
            assert_plan(torch.zeros(1000, 1, dtype=torch.int32), 1, capacity, 1, weights)


@pytest.mark.engines("cpu")
def test_a_plan_is_refused_unless_its_maps_are_inverse() -> None:
    x = torch.ones(2, 3)
    for maps in itertools.product(range(-2, 3), repeat=4):
        row_of_slot, slot_of_row = maps[:2], maps[2:]
        valid = all(r == -1 or (0 <= r < 2 and slot_of_row[r] == s) for s, r in enumerate(row_of_slot)) and all(
            s == -1 or (0 <= s < 2 and row_of_slot[s] == r) for r, s in enumerate(slot_of_row)
        )
        numbers = torch.tensor([0, 0], dtype=torch.int32)
        plan = Plan(
            torch.tensor(row_of_slot, dtype=torch.int32)[:, None],
            torch.tensor(slot_of_row, dtype=torch.int32),
            numbers[:1],
            numbers[:1],
            numbers[0],
        )
        if valid:
            assert torch.equal(moeyard.permute_tokens(x, plan), spread(x, plan))
        else:
            with pytest.raises(ValueError, match="plan"):
                moeyard.permute_tokens(x, plan)
