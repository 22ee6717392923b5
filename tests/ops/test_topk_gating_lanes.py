"""topk_gating takes blocks of rows, one per vector lane, and single rows where a block does not fit: the same bits."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import moeyard
from moeyard.ops._topk_gating_reference import topk_gating_reference
from ops.levels import assert_same_on_all_levels

pytestmark = pytest.mark.usefixtures("engine")

INF, NAN = float("inf"), float("nan")
SCORES = ("softmax", "softmax_topk", "sigmoid", "sqrtsoftplus")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FLOATS = ("weights", "score_sum", "weight_sum", "logsumexp_sq", "entropy_sum")
#: (T, E, k) around the widths of vectors (2 to 16), blocks (16 rows), chunks (256) and lists (16 slots, 1024 experts)
SIZES = [
    (1, 1, 1),
    (15, 2, 2),
    (16, 2, 1),
    (17, 3, 2),
    (33, 4, 2),
    (16, 5, 5),
    (40, 8, 2),
    (31, 9, 3),
    (16, 15, 7),
    (18, 16, 16),
    (5, 17, 16),
    (16, 17, 17),
    (20, 31, 6),
    (20, 32, 4),
    (35, 33, 8),
    (255, 64, 8),
    (256, 12, 2),
    (257, 64, 2),
    (600, 6, 3),
    (3, 1024, 8),
    (3, 1025, 8),
]
MARKED = [pytest.param(T, E, k, marks=[pytest.mark.large] * (T * E > 2000)) for T, E, k in SIZES]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def case(T: int, E: int, k: int, seed: int) -> tuple[Tensor, dict[str, Any]]:
    """Logits with ties, some of them masked, and any options that blocks take."""
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    x = torch.randn(T, E, generator=g, dtype=torch.float64) * 2
    x = ((x * 2).round() / 2 if r.random() < 0.5 else x).to(r.choice(DTYPES))
    if r.random() < 0.3:
        x[torch.rand(T, E, generator=g) < 0.1] = -INF
    if r.random() < 0.2:
        x[torch.rand(T, E, generator=g) < 0.05] = INF
    options: dict[str, Any] = {"k": k, "score": r.choice(SCORES), "renormalize": r.random() < 0.5, "scale": 1.5}
    if r.random() < 0.5:
        options["selection_bias"] = torch.randn(E, generator=g).to(torch.float32)
    if r.random() < 0.5:
        groups = r.choice([n for n in range(1, E + 1) if E % n == 0])
        kept, best = r.randint(-(-k * groups // E), groups), r.randint(1, E // groups)
        options |= {"num_groups": groups, "topk_groups": kept, "group_score_experts": best}
    if r.random() < 0.4:
        options["mask"] = torch.rand(T, generator=g) < 0.7
    return x, options


def gradient(out: moeyard.Gating, x: Tensor, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    used = [getattr(out, name) for name in FLOATS if torch.rand((), generator=g) < 0.7] or [out.weights]
    upstream = [torch.randn(o.shape, generator=g, dtype=o.dtype) for o in used]
    return torch.autograd.grad(used, x, upstream)[0]


@pytest.mark.parametrize(("T", "E", "k"), MARKED)
def test_reference_at_every_boundary(T: int, E: int, k: int) -> None:
    for seed in range(6):
        x, options = case(T, E, k, seed)
        got, want = moeyard.topk_gating(x, **options), topk_gating_reference(x, **options)
        assert torch.equal(got.experts, want.experts), seed
        assert torch.equal(got.counts, want.counts), seed
        for name in FLOATS:
            a, b = getattr(got, name), getattr(want, name)
            if b.isfinite().all():
                torch.testing.assert_close(a, b, rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize(("T", "E", "k"), MARKED)
def test_blocks_and_single_rows_give_the_same_bits(T: int, E: int, k: int) -> None:
    """Forced ids, none of which forces anything, send every row down the path of single rows."""
    for seed in range(100, 108):
        x, options = case(T, E, k, seed)
        nothing = torch.full((T,), -1)
        block = moeyard.topk_gating(x, **options)
        single = moeyard.topk_gating(x, forced_experts=nothing, **options)
        for name in block._fields:
            assert same_bits(getattr(block, name), getattr(single, name)), (seed, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("E", "k"), [(2, 1), (3, 2), (12, 12), (64, 8), (100, 6), (256, 8), (1024, 3)])
def test_neighbouring_numbers_are_told_apart(E: int, k: int, dtype: torch.dtype) -> None:
    """Keys that differ in nothing but their last bits, both signs and zeros; and ties among them."""
    g = torch.Generator().manual_seed(E)
    for spread in (2, 8, 1000):
        steps = torch.randint(0, spread, (48, E), generator=g)
        x = (1 + steps.double() * torch.finfo(dtype).eps).to(dtype) * (
            torch.randint(0, 2, (48, 1), generator=g) * 2 - 1
        )
        x[32:, ::3] = torch.where(steps[32:, ::3] % 2 == 0, 0.0, -0.0).to(dtype)
        want = x.double().sort(dim=-1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(moeyard.topk_gating(x, k).experts.long(), want), spread


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", range(1, 18))
def test_one_pair_of_neighbouring_numbers(k: int, dtype: torch.dtype) -> None:
    """All far apart but the numbers of two ranks, of which the larger comes later; also the last that is chosen and
    the first that is not."""
    E, g = 40, torch.Generator().manual_seed(k)
    for rank in sorted({0, k // 2, k - 1}):
        value = 2 - torch.arange(E, dtype=dtype) / E
        value[rank + 1] = torch.nextafter(value[rank], value[-1])
        column = torch.stack([torch.randperm(E, generator=g) for _ in range(32)])
        pair = column[:, rank : rank + 2]
        column[:, rank : rank + 2] = pair.sort(dim=-1, descending=True).values
        x = torch.empty(32, E, dtype=dtype).scatter_(1, column, value.expand(32, E))
        assert torch.equal(moeyard.topk_gating(x, k).experts.long(), column[:, :k]), rank


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_lowest_number_is_above_minus_infinity(dtype: torch.dtype) -> None:
    x = torch.full((32, 20), -INF, dtype=dtype)
    x[:, 0], x[:, 11], x[:16, 3] = 1.0, torch.finfo(dtype).min, torch.finfo(dtype).min
    want = torch.tensor([[0, 3, 11]] * 16 + [[0, 11, 1]] * 16, dtype=torch.int32)
    assert torch.equal(moeyard.topk_gating(x, 3).experts, want)


@pytest.mark.parametrize(("T", "E", "k"), [size for size in MARKED if size.values[0] >= 16])
def test_a_nan_changes_no_other_row(T: int, E: int, k: int) -> None:
    """A block with a NaN, or with too few candidates, is left to the path of single rows, backward too."""
    for seed in range(200, 206):
        x, options = case(T, E, k, seed)
        hit = torch.arange(T) % 16 == seed % 16
        broken = x.clone()
        broken[hit, -1] = NAN
        broken[hit & (torch.arange(T) % 32 < 16)] = -INF
        outs, grads = [], []
        for logits in (x.requires_grad_(), broken.requires_grad_()):
            outs.append(moeyard.topk_gating(logits, **options))
            grads.append(gradient(outs[-1], logits, seed))
        assert same_bits(outs[0].experts[~hit], outs[1].experts[~hit]), seed
        assert same_bits(outs[0].weights.detach()[~hit], outs[1].weights.detach()[~hit]), seed
        assert grads[0].isfinite().any()
        assert same_bits(grads[0][~hit], grads[1][~hit]), seed


@pytest.mark.parametrize("score", SCORES)
def test_masked_rows_may_hold_anything(score: str) -> None:
    g = torch.Generator().manual_seed(0)
    x, mask = torch.randn(300, 24, generator=g), torch.rand(300, generator=g) < 0.5
    clean, dirty = x.clone(), x.clone()
    dirty[~mask] = torch.tensor([NAN, INF, -INF]).repeat(8)
    a, b = (
        moeyard.topk_gating(v.requires_grad_(), 4, score=score, renormalize=True, mask=mask) for v in (clean, dirty)
    )
    for name in a._fields:
        assert same_bits(getattr(a, name).detach(), getattr(b, name).detach()), name
    assert same_bits(gradient(a, clean, 1), gradient(b, dirty, 1))
    assert same_bits(moeyard.topk_gating(x[mask], 4, score=score, renormalize=True).weights, b.weights.detach()[mask])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_of_weights_alone(dtype: torch.dtype) -> None:
    """Without other gradients only the chosen logits count, unless their scores vanish beside the row's largest."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(203, 24, generator=g, dtype=dtype)
    x[::7] *= 100 if dtype == torch.float32 else 1000  # rows whose smaller scores are 0
    x[3, 5], x[60, 1] = NAN, -INF
    bias = torch.zeros(24, dtype=dtype)
    bias[10:] = 2
    upstream = torch.randn(203, 4, generator=g, dtype=dtype)

    def grad(logits: torch.Tensor, others: bool, upstream: torch.Tensor = upstream) -> torch.Tensor:
        logits = logits.clone().requires_grad_()
        gate = moeyard.topk_gating(logits, 4, renormalize=True, selection_bias=bias)
        loss = (gate.weights * upstream).sum()
        if others:  # a gradient of zeros to the sums of all scores
            loss = loss + (gate.score_sum * torch.zeros(24, dtype=dtype)).nansum()
        return torch.autograd.grad(loss, logits)[0]

    alone, with_others = grad(x, False), grad(x, True)
    assert (with_others[::7] == 0).all(1).any()  # some rows have no gradient at all
    torch.testing.assert_close(alone, with_others, rtol=1e-5, atol=1e-7, equal_nan=True)
    # A row's bits do not depend on the rows beside it.
    assert same_bits(grad(x[50:], False, upstream[50:]), alone[50:])


def test_no_negative_zero_depends_on_the_block() -> None:
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    dirty = x.clone()
    dirty[5, 0] = NAN  # sends its block to the path of single rows
    grads = []
    for logits in (x.requires_grad_(), dirty.requires_grad_()):
        weights = moeyard.topk_gating(logits, 2, score="softmax_topk").weights
        grads.append(torch.autograd.grad(weights, logits, torch.full((32, 2), -0.0))[0])
    keep = torch.arange(32) != 5
    assert same_bits(grads[0][keep], grads[1][keep])


_LEVELS_SCRIPT = """
import hashlib
from ops.test_topk_gating_lanes import SIZES, case, gradient
import moeyard, torch
digest = hashlib.sha256()
for seed in range(8):
    for T, E, k in SIZES:
        x, options = case(T, E, k, 1000 + seed)
        out = moeyard.topk_gating(x.requires_grad_(), **options)
        for o in (*out, gradient(out, x, seed)):
            o = torch.where(o.isnan(), 7.0, o) if o.is_floating_point() else o
            digest.update(bytes(o.detach().contiguous().reshape(-1).view(torch.uint8).tolist()))
print(digest.hexdigest())
"""


@pytest.mark.engines("cpu")
def test_simd_levels_give_the_same_bytes() -> None:
    assert_same_on_all_levels(_LEVELS_SCRIPT)
