"""topk_gating's CUDA kernels beside the CPU's: the same integers and the same bits per row, whatever the schedule."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moeyard
from emulation import emulated
from engines import SCHEDULES, engine, examples, large, place
from ops.compare import assert_equal
from ops.test_topk_gating_oracles import DTYPES, FLOATS, INF, NAN, SCORES, random_mask_and_forced

#: Around the sizes of teams (32 to 1024 experts in powers of two), of packets, and of rows that take a block.
EXPERTS = (1, 2, 3, 4, 5, 8, 16, 31, 32, 33, 60, 64, 96, 100, 128, 160, 255, 256, 257, 384, 512, 1000, 1024, 1025)
#: Rounding of a sum over rows, whose order differs; gradients differ only by what they are rounded to.
TOLERANCE = {torch.float64: 1e-12}


def logits(T: int, E: int, r: random.Random, g: torch.Generator) -> Tensor:
    """With ties, and now and then with what is hostile."""
    x = torch.randn(T, E, generator=g, dtype=torch.float64) * r.choice([0.1, 2.0, 50.0])
    x = ((x * 2).round() / 2 if r.random() < 0.5 else x).to(r.choice(DTYPES))
    limits = torch.finfo(x.dtype)
    for value in (-INF, INF, NAN, limits.max, limits.min, limits.tiny / 4, -0.0):
        if r.random() < 0.15:
            x[torch.rand(T, E, generator=g) < r.choice([0.05, 0.5, 0.97])] = value
    return x


def options(x: Tensor, k: int, r: random.Random, g: torch.Generator) -> dict[str, Any]:
    """Any of them, ids in order and bias without NaN."""
    T, E = x.shape
    made: dict[str, Any] = {"score": r.choice(SCORES), "renormalize": r.random() < 0.5, "scale": r.choice([1.0, 2.5])}
    if r.random() < 0.5:
        bias = torch.randn(E, generator=g)
        made["selection_bias"] = bias = (bias * 2).round() / 4 if r.random() < 0.5 else bias
        if r.random() < 0.3:
            bias[torch.rand(E, generator=g) < 0.3] = r.choice([INF, -INF])
    if r.random() < 0.5:
        blocks = [E // 32] if E % 32 == 0 else []
        groups = r.choice(blocks * 20 + [n for n in range(1, E + 1) if E % n == 0])
        kept, best = r.randint(-(-k * groups // E), groups), min(E // groups, r.choice([1, 2, 2, 3]))
        made |= {"num_groups": groups, "topk_groups": kept, "group_score_experts": best}
    return made | random_mask_and_forced(T, E, k, r, g)


def gradient(out: moeyard.Gating, x: Tensor, seed: int) -> Tensor | None:
    """Of a random choice of the outputs, None where all of those are constants."""
    g = torch.Generator().manual_seed(seed)
    used = [o for o in (getattr(out, name) for name in FLOATS) if torch.rand((), generator=g) < 0.5]
    used = [o for o in used if o.requires_grad]
    upstream = [torch.randn(o.shape, generator=g, dtype=o.dtype).to(o.device) for o in used]
    return torch.autograd.grad(used, x, upstream)[0] if used else None


def compare(x: Tensor, k: int, made: dict[str, Any], seed: int, name: str = "emulated") -> None:
    """The CPU and another engine, forward and backward; the emulation on one of its schedules."""
    x = x.clone().requires_grad_()
    want = moeyard.topk_gating(x, k, **made)
    want_grad = gradient(want, x, seed)
    with engine.run(name, seed % (SCHEDULES + 2)):
        there = place(x)
        out = moeyard.topk_gating(there, k, **place(made))
        grad = gradient(out, there, seed)
        moeyard.check_device_errors()
    got, got_grad = moeyard.Gating(*(o.cpu() for o in out)), None if grad is None else grad.cpu()
    # Nothing of a row depends on other rows, nor its order of sums on the device: not even rounding may differ.
    assert_equal((got.experts, got.counts, got.weights), (want.experts, want.counts, want.weights))
    tolerance = TOLERANCE.get(x.dtype, 1e-5)
    for name in FLOATS[1:]:
        a, b = getattr(got, name), getattr(want, name)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
    if want_grad is not None:
        assert got_grad is not None
        torch.testing.assert_close(got_grad, want_grad, rtol=0, atol=0, equal_nan=True)


@st.composite
def calls(draw: st.DrawFn) -> tuple[Tensor, int, dict[str, Any], int]:
    seed, T, E = (
        draw(st.integers(0, 2**30)),
        draw(st.sampled_from([0, 1, 2, 3, 8, 17, 33])),
        draw(st.sampled_from(EXPERTS)),
    )
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    k = min(E, draw(st.sampled_from([1, 2, 3, 6, 8, 9, 16, 31, 32, 33, E])))
    x = logits(T if E < 300 else min(T, 3), E, r, g)
    return x, k, options(x, k, r, g), seed


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["emulated", "cuda"])
@settings(max_examples=examples(1000))
@given(call=calls())
def test_any_call(name: str, call: tuple[Tensor, int, dict[str, Any], int]) -> None:
    compare(*call, name)


@pytest.mark.parametrize("k", [1, 2, 8, "E"])
@pytest.mark.parametrize("E", [*EXPERTS, 8192])
def test_every_schedule(E: int, k: int | str) -> None:
    """Forward, backward and 20 shuffled orders of threads, warps and blocks: the same bits, sums included."""
    k = min(E, E if k == "E" else int(k))
    r, g = random.Random(E), torch.Generator().manual_seed(k)
    for T in (0, 1, 3, 33) if E < 1000 else (3,):
        x = logits(T, E, r, g).requires_grad_()
        made = options(x.detach(), k, r, g)
        results = []
        for seed in range(SCHEDULES + 2) if E < 8192 else (0, 1, 2, 3):
            with emulated(seed, poison=0x3C if seed % 4 < 2 else 0xFF):
                out = moeyard.topk_gating(x, k, **made)
                grad = gradient(out, x, 0)
                results.append(tuple(out) if grad is None else (*out, grad))
        for other in results[1:]:
            assert_equal(other, results[0])


@pytest.mark.parametrize("name", ["emulated", "cuda"])
@pytest.mark.parametrize("E", [5, 1025])
@pytest.mark.parametrize("seed", [0, *large(*range(1, len(SCORES)))])
def test_rows_that_follow_each_other_in_a_block(seed: int, E: int, name: str) -> None:
    """More rows than all blocks take at once; what one leaves in shared memory must not reach the next."""
    T = 9000 if E == 5 else 270
    x = torch.randn(T, E, generator=torch.Generator().manual_seed(6))
    # Seeds 0 and 3 differentiate the weights.
    compare(x, 3, {"score": SCORES[seed], "renormalize": False, "mask": torch.arange(T) % 7 > 0}, seed, name)


@pytest.mark.parametrize("options", [{}, {"num_groups": 8, "topk_groups": 4, "score": "sigmoid"}], ids=["", "groups"])
def test_an_unaligned_view(options: dict[str, Any]) -> None:
    """Rows that cannot be moved by 16 bytes."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(5 * 256 + 1, generator=torch.Generator().manual_seed(1)).to(dtype)[1:].view(5, 256)
        compare(x, 8, options, 3)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("E", [65, 96, 100, 128, 160, 255, 256])
def test_many_rows_share_their_warps(E: int, score: str) -> None:
    """With few rows each has a warp, and no call above gets to the kernels for more of them."""
    r, g = random.Random(E), torch.Generator().manual_seed(E)
    x = logits(1030, E, r, g)
    compare(x, 8, options(x, 8, r, g) | {"score": score}, 4)


@pytest.mark.parametrize("T", [9, 1030])
@pytest.mark.parametrize("E", [5, 64, 128, 256, 1000])
def test_keys_that_differ_in_their_last_bits(E: int, T: int) -> None:
    """Kernels choose by the keys' upper bits as long as those tell; here only the last do, or only for some slots."""
    if E == 1000 and T > 9:
        pytest.skip("no other kernel than with few rows")
    g = torch.Generator().manual_seed(E)
    order = torch.rand(T, E, generator=g).argsort(1).int()
    for value in (1.0, -3.0, 1e-30):
        k = min(E, 8)
        near = (torch.full((T, E), value).view(torch.int32) + order).view(torch.float32)
        two = torch.where(order < E - k - 1, -1e3, near)
        # Of the last, only the choice of the last slot hangs on them.
        for x in (near, torch.where(order % 8 == 0, value, near), torch.where(order > E - k, 1e2 + order, two)):
            compare(x, k, {}, 5)
            compare(x, k, {"score": "sigmoid", "selection_bias": torch.zeros(E)}, 6)


# ---- what kernels cannot throw ---------------------------------------------------------------------------------------

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
#: per kind of row: a team of lanes, a block
WIDTHS = pytest.mark.parametrize("E", [6, 1100])


@contextmanager
def device_error(message: str) -> Iterator[None]:
    with emulated():
        yield
        with pytest.raises(ValueError, match=message):
            moeyard.check_device_errors()
        moeyard.check_device_errors()


def wide(E: int) -> Tensor:
    return torch.nn.functional.pad(X, (0, E - 6), value=-9.0)


@WIDTHS
@pytest.mark.parametrize("bad", [-2, 2**31, 2**32 + 1, 2**63 - 1, -(2**63), "E"])
def test_a_forced_id_out_of_range_counts_as_free(E: int, bad: int | str) -> None:
    forced = torch.tensor([[0, 1], [-1, -1], [3, E if bad == "E" else bad]])
    meant = torch.where(forced == forced[2, 1], -1, forced)
    with device_error("forced_experts: expected ids in"):
        out = moeyard.topk_gating(wide(E), 2, forced_experts=forced)
        assert_equal(tuple(out), tuple(moeyard.topk_gating(wide(E), 2, forced_experts=meant)))
    with emulated():
        moeyard.topk_gating(wide(E), 2, forced_experts=forced, mask=torch.tensor([True, True, False]))
        moeyard.check_device_errors()


@WIDTHS
def test_the_second_of_two_equal_forced_ids_counts_as_free(E: int) -> None:
    forced, meant = (
        torch.tensor([[0, 1, 0], [4, 4, 4], [-1, 5, 5]]),
        torch.tensor([[0, 1, -1], [4, -1, -1], [-1, 5, -1]]),
    )
    with device_error("forced_experts: expected distinct ids"):
        out = moeyard.topk_gating(wide(E), 3, forced_experts=forced)
        assert_equal(tuple(out), tuple(moeyard.topk_gating(wide(E), 3, forced_experts=meant)))


@WIDTHS
def test_a_nan_bias_counts_as_minus_infinity(E: int) -> None:
    bias, meant = torch.zeros(E), torch.zeros(E)
    bias[4], meant[4] = NAN, -INF
    with device_error("selection_bias: expected no NaN"):
        out = moeyard.topk_gating(wide(E), 2, selection_bias=bias)
        assert_equal(tuple(out), tuple(moeyard.topk_gating(wide(E), 2, selection_bias=meant)))
    with device_error("selection_bias: expected no NaN"):
        moeyard.topk_gating(wide(E)[:0], 2, selection_bias=bias)


@WIDTHS
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("bad", [-1, "E", 2**31 - 1])
def test_the_backward_op_passes_over_a_bad_id(E: int, bad: int | str, score: str) -> None:
    """As if the row had been gated with one slot less."""
    ids = torch.tensor([[0, 1], [2, E if bad == "E" else bad], [4, 5]], dtype=torch.int32)
    upstream = torch.randn(3, 2, generator=torch.Generator().manual_seed(3))

    def backward(ids: Tensor, upstream: Tensor, rows: slice) -> Tensor:
        op = torch.ops.moeyard.topk_gating_backward
        return op(wide(E)[rows], ids, score, True, 2.0, None, upstream, *[None] * 4)

    with device_error("experts: expected the ids that topk_gating returned"):
        got = backward(ids, upstream, slice(0, 3))
    assert_equal((got[::2],), (backward(ids[::2], upstream[::2], slice(0, 3, 2)),))
    assert_equal((got[1:2] + 0,), (backward(ids[1:2, :1], upstream[1:2, :1], slice(1, 2)) + 0,))


@WIDTHS
def test_repeated_ids_in_the_backward_op_add_up(E: int) -> None:
    """The forward pass never returns such. To rounding: a sum's factor may stand before it or behind it."""
    ids = torch.tensor([[1, 1, 1, 0]] * 3, dtype=torch.int32)
    g = torch.Generator().manual_seed(4)
    grads = (torch.randn(3, 4, generator=g), torch.randn(E, generator=g), None, None, None)
    for score in SCORES:
        args = (wide(E), ids, score, False, 1.0, None, *grads)
        want = torch.ops.moeyard.topk_gating_backward(*args)
        with emulated():
            torch.testing.assert_close(torch.ops.moeyard.topk_gating_backward(*args), want)
