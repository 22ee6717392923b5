"""The permutation kernels for CUDA against those for the CPU, on sizes around every threshold of theirs and under many
schedules: plans integer for integer, rows bit for bit, dots to rounding. What a kernel forgets to write is poison."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moeyard
from emulation import emulated
from engines import SCHEDULES, engine, examples, place
from ops.compare import assert_equal

EXPERTS = (1, 2, 3, 64, 255, 256, 257, 1000, 1024, 1025)  # more than 1,024 are sorted digit by digit
TOKENS = (0, 1, 31, 32, 33)
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NAN, INF = float("nan"), float("inf")


def random_ids(tokens: int, k: int, experts: int, kind: str, generator: torch.Generator) -> Tensor:
    lowest = experts - 1 if kind == "one expert" else -1 if kind == "some unrouted" else 0
    step = 7 if kind == "experts without tokens" else 1
    ids = torch.randint(lowest, experts, (tokens, k), generator=generator)
    return torch.where(ids < 0, ids, ids // step * step)


def random_weights(shape: torch.Size, kind: str, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if kind == "special":
        special = torch.tensor([0.0, -0.0, NAN, -NAN, INF, -INF, 1e-45, -1e-45, 5e-324, 1.0, -1.0])
        return special[torch.randint(0, special.numel(), shape, generator=generator)].to(dtype)
    if kind == "ties":
        return torch.randint(0, 3, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


# ---- plans --------------------------------------------------------------------------------------------------------


def assert_plans_agree(name: str, seed: int, ids: Tensor, experts: int, **options: Any) -> None:
    want = moeyard.plan_permutation(ids, experts, **options)
    with engine.run(name, seed):
        got = moeyard.plan_permutation(place(ids), experts, **place(options))
        moeyard.check_device_errors()
    assert_equal(tuple(g.cpu() for g in got), want)


@pytest.mark.parametrize("name", ["emulated", "cuda"])
@settings(max_examples=examples(100))
@given(
    tokens=st.sampled_from(TOKENS) | st.integers(0, 1500),
    k=st.integers(1, 9),
    experts=st.sampled_from(EXPERTS) | st.integers(1, 3000),
    kind=st.sampled_from(["any", "some unrouted", "one expert", "experts without tokens"]),
    capacity=st.none() | st.sampled_from([0, 1]) | st.integers(0, 400),
    align=st.sampled_from([1, 8, 128]) | st.integers(1, 50),
    wide=st.booleans(),
    weights=st.none() | st.sampled_from(["special", "ties", "any"]),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 10**6),
)
def test_plans_agree(
    name: str,
    tokens: int,
    k: int,
    experts: int,
    kind: str,
    capacity: int | None,
    align: int,
    wide: bool,
    weights: str | None,
    dtype: torch.dtype,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = random_ids(tokens, k, experts, kind, generator).to(torch.int64 if wide else torch.int32)
    options: dict[str, Any] = {"capacity": capacity, "align": align}
    if weights:
        options |= {"drop": "weight", "weights": random_weights(ids.shape, weights, dtype, generator)}
    assert_plans_agree(name, seed % 100, ids, experts, **options)


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("by_weight", [False, True])
def test_plans_under_every_schedule(experts: int, by_weight: bool) -> None:
    generator = torch.Generator().manual_seed(experts)
    sizes = list(enumerate((*TOKENS, 700)))
    for i, tokens in sizes[1::2] if by_weight and experts > 64 else sizes:  # the others take seconds each
        ids = random_ids(tokens, 1 + (tokens + i) % 9, experts, ("some unrouted", "one expert")[i % 2], generator)
        options: dict[str, Any] = {"capacity": (None, 1, 0, 3, 5, 40)[i], "align": (1, 8, 128)[i % 3]}
        if by_weight:
            options |= {"drop": "weight", "weights": random_weights(ids.shape, "ties", torch.float32, generator)}
        want = moeyard.plan_permutation(ids, experts, **options)
        for seed in range(SCHEDULES + 2):
            with emulated(seed, poison=0x3C if seed % 4 < 2 else 0xFF):
                assert_equal(moeyard.plan_permutation(ids, experts, **options), want)


def test_strips_of_several_tiles() -> None:
    """Past 1,024 * 1,024 slots a block has more than one tile."""
    ids = torch.randint(-1, 5, (1_050_000, 1), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    assert_plans_agree("emulated", 2, ids, 5, align=8, capacity=200_000)


# ---- rows ---------------------------------------------------------------------------------------------------------


def all_passes(x: Tensor, y: Tensor, plan: moeyard.PermutationPlan, weights: Tensor | None) -> list[list[Tensor]]:
    """Rows, then dots, of the four passes, with each combination of what they may be asked for."""
    rows, dots = [moeyard.permute_tokens(x, plan)], []
    if x.dtype in (*FLOATS, torch.int32, torch.int64):
        rows.append(moeyard.unpermute_tokens(y, plan))
    if weights is not None:
        rows += [moeyard.permute_tokens(x, plan, slot_weights=weights), moeyard.unpermute_tokens(y, plan, weights)]
        for needed in ((True, True), (True, False), (False, True)):
            for backward, grad, source in (
                (torch.ops.moeyard.unpermute_tokens_backward, x, y),
                (torch.ops.moeyard.permute_tokens_backward, y, x),
            ):
                for_source, for_weights = backward(grad, source, *plan[:2], weights, *needed)
                rows.append(for_source)
                dots.append(for_weights)
    return [rows, dots]


def assert_passes_agree(got: list[list[Tensor]], want: list[list[Tensor]], features: int) -> None:
    assert_equal(tuple(got[0]), tuple(want[0]))
    for g, w in zip(got[1], want[1], strict=True):
        # Two orders of one sum of `features` products, each of them below 200.
        torch.testing.assert_close(g, w, rtol=0, atol=200 * features * torch.finfo(g.dtype).eps)


def random_rows(dtype: torch.dtype, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).clamp(-14, 14).to(dtype)
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


def random_case(
    tokens: int, k: int, features: int, dtype: torch.dtype, align: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, moeyard.PermutationPlan, Tensor | None]:
    ids = random_ids(tokens, k, 5, "some unrouted", generator)
    plan = moeyard.plan_permutation(ids, 5, capacity=max(1, tokens * k // 4), align=align)
    x = random_rows(dtype, (tokens, features), generator)
    y = random_rows(dtype, (plan.slot_of_row.shape[0], features), generator)
    y[plan.slot_of_row < 0] = NAN if dtype.is_floating_point else 7  # free rows are never read
    exact = torch.promote_types(dtype, torch.float32)
    return x, y, plan, random_weights(ids.shape, "any", exact, generator) if dtype.is_floating_point else None


DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64, *FLOATS)
# Rows of one word, of a part of a warp, of a warp, of several warps, of more than a block; odd ones.
FEATURES = (0, 1, 2, 3, 8, 31, 32, 33, 64, 129, 256, 1040, 4096)


@pytest.mark.parametrize("name", ["emulated", "cuda"])
@settings(max_examples=examples(100))
@given(
    tokens=st.sampled_from(TOKENS) | st.integers(0, 70),
    k=st.integers(0, 9) | st.just(17),
    features=st.sampled_from(FEATURES) | st.integers(0, 600),
    dtype=st.sampled_from(DTYPES),
    align=st.sampled_from([1, 8, 128]),
    shift=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_rows_agree(
    name: str, tokens: int, k: int, features: int, dtype: torch.dtype, align: int, shift: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y, plan, weights = random_case(tokens, k, features, dtype, align, generator)
    want = all_passes(x, y, plan, weights)
    with engine.run(name, seed % 100):
        x, y, plan, weights = place((x, y, plan, weights))
        if shift:  # no address is a multiple of more than an element
            x = torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)
        got = all_passes(x, y, plan, weights)
        moeyard.check_device_errors()
    assert_passes_agree([[t.cpu() for t in part] for part in got], want, features)


@pytest.mark.parametrize("features", [1, 8, 33, 264, 1056])
@pytest.mark.parametrize("k", [1, 8, 9])
def test_rows_under_every_schedule(features: int, k: int) -> None:
    sizes = list(zip(TOKENS, (*FLOATS, torch.bfloat16), strict=True))
    for tokens, dtype in sizes if features < 264 else sizes[2::2]:
        case = random_case(tokens, k, features, dtype, 8, torch.Generator().manual_seed(tokens))
        want = all_passes(*case)
        first = None
        for seed in range(SCHEDULES + 2):
            with emulated(seed, poison=0x3C if seed % 4 < 2 else 0xFF):
                got = all_passes(*case)
            assert_passes_agree(got, want, features)
            first = first or got
            assert_equal(tuple(got[1]), tuple(first[1]))


def test_many_free_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    for features in (3, 8, 1056):
        x = random_rows(torch.bfloat16, (5, features), generator)
        plan = moeyard.plan_permutation(torch.zeros(5, 2, dtype=torch.int32), 40, align=128)
        want = moeyard.permute_tokens(x, plan)
        for seed in range(4):
            with emulated(seed):
                assert_equal((moeyard.permute_tokens(x, plan),), (want,))
