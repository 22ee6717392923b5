"""pack_batches: the contract, hand-made epochs, equality with plain Python, budgets, hostile input."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moeyard
from moeyard.ops.pack_batches import pack_batches_reference
from ops.compare import assert_equal
from ops.contract import Inputs, OpContract


class TestNextFit(OpContract):
    function = staticmethod(moeyard.pack_batches)
    reference = staticmethod(pack_batches_reference)
    dtypes = (torch.int64, torch.int32)
    lookahead = 0

    def inputs(self, dtype: torch.dtype, size: str = "small", seed: int = 0) -> Inputs:
        n = 50_000 if size == "large" else 60 + seed
        generator = torch.Generator().manual_seed(seed)
        return {
            "sizes": torch.randint(0, 50, (n,), generator=generator).to(dtype),
            "budget": 100,
            "order": torch.randperm(n, generator=generator)[: n - 3],
            "segments": (torch.arange(n) * 5 // n).to(dtype),
            "max_samples": 9,
            "sizes2": torch.randint(0, 30, (n,), generator=generator).to(dtype),
            "budget2": 28,
            "lookahead": self.lookahead,
            "oversize": "skip",
        }

    def empty_inputs(self) -> list[Inputs]:
        empty = torch.empty(0, dtype=torch.int64)
        return [
            {"sizes": empty, "budget": 5, "lookahead": self.lookahead},
            {"sizes": torch.ones(3, dtype=torch.int32), "budget": 5, "order": empty, "lookahead": self.lookahead},
            {"sizes": torch.full((3,), 9), "budget": 5, "oversize": "skip", "lookahead": self.lookahead},
        ]


class TestBestFit(TestNextFit):
    lookahead = 4


def batches(sizes: list[int], budget: int, **options: Any) -> list[list[int]]:
    tensors = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in options.items()}
    packing = moeyard.pack_batches(torch.tensor(sizes, dtype=torch.int64), budget, **tensors)
    ptr = packing.ptr.tolist()
    found = [packing.index[a:b].tolist() for a, b in pairwise(ptr)]
    assert packing.fill.tolist() == [sum(sizes[i] for i in batch) for batch in found]
    return found


# ---- hand-made epochs -------------------------------------------------------------------------------------------


def test_next_fit_by_hand() -> None:
    sizes = [4, 3, 5, 0, 6, 2, 10, 1]
    assert batches(sizes, 10) == [[0, 1], [2, 3], [4, 5], [6], [7]]
    assert batches(sizes, 10, order=[6, 3, 7, 1, 0]) == [[6, 3], [7, 1, 0]]
    assert batches(sizes, 10, max_samples=1) == [[i] for i in range(8)]
    assert batches(sizes, 10, sizes2=[1, 1, 1, 1, 1, 1, 1, 1], budget2=1) == [[i] for i in range(8)]


def test_best_fit_by_hand() -> None:
    # 3 goes to 7, which is then full and closes; 5 opens the third batch; 4 goes to 6 and not to 5.
    assert batches([6, 7, 3, 5, 4, 5], 10, lookahead=2) == [[0, 4], [1, 2], [3, 5]]
    # None fits 9 and two are open: the fullest (room 1) closes, though it was opened later.
    assert batches([5, 9, 8, 5, 1], 10, lookahead=2) == [[0, 3], [1], [2, 4]]
    # Equal rooms: the earliest opened takes the sample, and the earliest opened closes.
    assert batches([6, 6, 4], 10, lookahead=2) == [[0, 2], [1]]
    assert batches([6, 6, 7, 4], 10, lookahead=2) == [[0], [1, 3], [2]]


def test_zero_sizes() -> None:
    assert batches([0, 0, 0, 0, 0], 3) == [[0, 1, 2, 3, 4]]
    assert batches([0, 0, 0, 0, 0], 3, max_samples=2, lookahead=3) == [[0, 1], [2, 3], [4]]
    # Next-fit puts an empty sample into a full batch; best fit has closed it.
    assert batches([3, 0, 3], 3) == [[0, 1], [2]]
    assert batches([3, 0, 3], 3, lookahead=2) == [[0], [1, 2]]


def test_segments() -> None:
    ones = [1] * 8
    chunks = [7, 7, -5, -5, 7, 10**12, -5, 10**12]  # any ids: ranks 0, 1 and 2 by appearance
    assert batches(ones, 100, segments=chunks) == [[0, 1, 2, 3, 4], [5], [6, 7]]
    assert batches(ones, 100, segments=chunks, lookahead=2) == [[0, 1, 2, 3, 4, 6], [5, 7]]
    # Ranks follow the order, not the ids.
    assert batches(ones, 100, segments=[0, 0, 1, 1, 2, 2, 3, 3], order=[6, 7, 0, 1, 4, 5, 2, 3]) == [
        [6, 7, 0, 1],
        [4, 5, 2, 3],
    ]


def test_a_batch_closes_when_its_segments_are_over() -> None:
    # When 5 comes, the batch of 6 is over and leaves its place; else 5 would close that of 7, the fuller one.
    assert batches([6, 7, 5, 3], 10, segments=[0, 1, 2, 2], lookahead=2) == [[0], [1, 3], [2]]
    assert batches([6, 7, 5, 3], 10, segments=[0, 1, 2, 2], lookahead=70) == [[0], [1, 3], [2]]
    assert batches([6, 7, 5, 3, 1], 10, segments=[0, 1, 2, 2, 0], lookahead=2) == [[0, 4], [1], [2, 3]]
    # The second segment may be over before the first, and an oversize sample may be the last of its own.
    assert batches([6, 1, 6, 7, 5, 3], 10, segments=[0, 1, 0, 2, 3, 3], lookahead=2) == [[0, 1], [2], [3, 5], [4]]
    assert batches([6, 99, 7, 5, 3], 10, segments=[0, 1, 2, 3, 3], lookahead=2, oversize="own_batch") == [
        [0],
        [1],
        [2, 4],
        [3],
    ]


def test_oversize() -> None:
    sizes = torch.tensor([2, 11, 3, 12, 1])
    with pytest.raises(ValueError, match=r"sizes: expected every sample within budget = 10, got sample 1 of size 11"):
        moeyard.pack_batches(sizes, 10)
    with pytest.raises(ValueError, match=r"sizes2: .* budget2 = 11, got sample 3 of size 12"):
        moeyard.pack_batches(torch.ones(5).long(), 10, sizes2=sizes, budget2=11)
    assert moeyard.pack_batches(sizes, 10, order=torch.tensor([0, 2])).index.tolist() == [0, 2]
    assert batches([2, 11, 3, 12, 1], 10, oversize="own_batch") == [[0], [1], [2], [3], [4]]
    assert batches([2, 11, 3, 12, 1], 10, oversize="own_batch", lookahead=1) == [[0, 2, 4], [1], [3]]
    packing = moeyard.pack_batches(sizes, 10, oversize="skip", order=torch.tensor([3, 0, 1, 2, 4]))
    assert packing.index.tolist() == [0, 2, 4]
    assert packing.skipped.tolist() == [3, 1]


def test_no_overflow_at_the_largest_sizes() -> None:
    top = 2**63 - 1
    assert batches([top, top, 1, top - 1], top) == [[0], [1], [2, 3]]
    assert batches([top, top - 1, 1, top], top, lookahead=3) == [[0], [1, 2], [3]]
    assert batches([1, 1], 5, sizes2=[top, 1], budget2=top) == [[0], [1]]
    assert batches([top, 3], 1, oversize="own_batch") == [[0], [1]]
    assert batches([1, 2], top, lookahead=2**62, max_samples=2**62) == [[0, 1]]


# ---- equality with plain Python ---------------------------------------------------------------------------------

SIZES = st.lists(st.integers(0, 12), max_size=40)


@st.composite
def requests(draw: Any) -> dict[str, Any]:
    sizes = draw(SIZES)
    n = len(sizes)
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))

    def per_sample(low: int, high: int) -> Tensor:
        return torch.tensor(draw(st.lists(st.integers(low, high), min_size=n, max_size=n)), dtype=dtype)

    request: dict[str, Any] = {
        "sizes": torch.tensor(sizes, dtype=dtype),
        "budget": draw(st.integers(1, 20)),
        "lookahead": draw(st.sampled_from([0, 0, 1, 2, 3, 8, 100])),
        "max_samples": draw(st.none() | st.integers(1, 5)),
        "oversize": draw(st.sampled_from(["own_batch", "skip"])),
    }
    if draw(st.booleans()):
        order = draw(st.permutations(range(n)))
        request["order"] = torch.tensor(order[: draw(st.integers(0, n))], dtype=dtype)
    if draw(st.booleans()):
        request["segments"] = per_sample(-1, 3)
    if draw(st.booleans()):
        request |= {"sizes2": per_sample(0, 9), "budget2": draw(st.integers(1, 15))}
    return request


@settings(max_examples=400)
@given(requests())
def test_equals_the_reference(request: dict[str, Any]) -> None:
    packing = moeyard.pack_batches(**request)
    assert_equal(packing, pack_batches_reference(**request))
    check_budgets(packing, **request)


@pytest.mark.parametrize("lookahead", [0, 1, 15, 16, 17, 32, 63, 64, 65])
@pytest.mark.parametrize("scale", [1, 2**25 // 1000, 2**25 // 1000 + 1, 2**40])
@pytest.mark.parametrize("rules", ["none", "sizes2", "segments", "max_samples", "all"])
def test_equals_the_reference_over_many_blocks(lookahead: int, scale: int, rules: str) -> None:
    """Budgets and numbers of open batches on both sides of where the search changes; many batches stay open."""
    generator = torch.Generator().manual_seed(lookahead)
    n = 600
    request: dict[str, Any] = {
        "sizes": torch.randint(0, 700, (n,), generator=generator) * scale,
        "budget": 1000 * scale,
        "order": torch.randperm(n, generator=generator)[:-5],
        "lookahead": lookahead,
    }
    if rules in ("sizes2", "all"):
        top = 2**31 - 1 if lookahead % 2 else 2**31
        request |= {"sizes2": torch.randint(0, top // 3, (n,), generator=generator), "budget2": top}
    if rules in ("segments", "all"):
        request["segments"] = torch.arange(n) // 60 * (1 if lookahead % 2 else 2**40)
        request["order"] = request["order"].sort().values
    if rules in ("max_samples", "all"):
        request["max_samples"] = 3
    packing = moeyard.pack_batches(**request)
    assert_equal(packing, pack_batches_reference(**request))
    check_budgets(packing, **request)


@pytest.mark.parametrize("n", [127, 128, 129, 256, 257])
@pytest.mark.parametrize("lookahead", [0, 4, 100])
def test_errors_come_in_the_order_of_positions(n: int, lookahead: int) -> None:

    def error(*, out_of_range: int = -1, repeated: int = -1, large: int = -1) -> str:
        sizes, order = torch.ones(n, dtype=torch.int64), torch.arange(n)
        for position, bad in ((out_of_range, n), (repeated, 0)):
            if position >= 0:
                order[position] = bad
        if large >= 0:
            sizes[large] = 9
        with pytest.raises(ValueError, match="expected") as caught:
            moeyard.pack_batches(sizes, 5, order=order, lookahead=lookahead)
        return str(caught.value)

    for p in (1, n // 2, n - 2):
        assert f"got {n} at position {p}" in error(out_of_range=p, repeated=p + 1)
        assert f"got 0 again at position {p}" in error(repeated=p, out_of_range=p + 1)
        assert f"got sample {p} of size 9" in error(large=p, repeated=p + 1)
        assert f"got {n} at position {p}" in error(out_of_range=p, large=p + 1)


@pytest.mark.parametrize("lookahead", [0, 4])
@pytest.mark.parametrize("share", [300, 299, 7])
def test_skipped_of_an_order(share: int, lookahead: int) -> None:
    generator = torch.Generator().manual_seed(share)
    sizes, order = torch.randint(0, 20, (300,), generator=generator), torch.randperm(300, generator=generator)[:share]
    packing = moeyard.pack_batches(sizes, 15, order=order, lookahead=lookahead, oversize="skip")
    assert torch.equal(packing.skipped, order[sizes[order] > 15])
    assert packing.index.untyped_storage().nbytes() == 8 * len(packing.index)


def check_budgets(
    packing: moeyard.Packing,
    sizes: Tensor,
    budget: int,
    order: Tensor | None = None,
    max_samples: int | None = None,
    sizes2: Tensor | None = None,
    budget2: int | None = None,
    lookahead: int = 0,
    **_: Any,
) -> None:
    """Every id exactly once, every batch non-empty and within its budgets unless it is one oversize sample."""
    order = torch.arange(len(sizes)) if order is None else order.long()
    both = torch.cat([packing.index, packing.skipped])
    assert torch.equal(both.sort().values, order.sort().values)
    if lookahead == 0:
        skipped = torch.isin(order, packing.skipped)
        assert torch.equal(packing.index, order[~skipped])
    counts = packing.ptr.diff()
    assert (counts > 0).all()
    assert (counts <= (max_samples or len(sizes))).all()
    batch = torch.repeat_interleave(torch.arange(len(counts)), counts)
    for values, limit in ((sizes, budget), (sizes2, budget2)):
        if values is not None:
            total = torch.zeros(len(counts), dtype=torch.int64).index_add_(0, batch, values[packing.index].long())
            assert ((total <= limit) | (counts == 1)).all()


@given(SIZES, st.integers(12, 30))
def test_next_fit_is_the_naive_loop(sizes: list[int], budget: int) -> None:
    naive: list[list[int]] = []
    for i, size in enumerate(sizes):
        if not naive or sum(sizes[j] for j in naive[-1]) + size > budget:
            naive.append([])
        naive[-1].append(i)
    assert batches(sizes, budget) == naive


def test_best_fit_fills_batches() -> None:
    sizes = torch.from_numpy(np.random.default_rng(0).integers(5, 300, 20_000))
    fills = [moeyard.pack_batches(sizes, 2048, lookahead=k).fill.double().mean() / 2048 for k in (0, 16, 64)]
    assert fills[0] < 0.96
    assert fills[1] > 0.99
    assert fills[2] > 0.99


def test_many_open_batches() -> None:
    """Samples that only fit a fresh batch keep hundreds of batches open."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(400, 1000, (3000,), generator=generator)
    assert_equal(moeyard.pack_batches(sizes, 1000, lookahead=300), pack_batches_reference(sizes, 1000, lookahead=300))


@pytest.mark.parametrize("lookahead", [0, 64])
def test_ten_million_samples(lookahead: int) -> None:
    n = 10_000_000
    generator = torch.Generator().manual_seed(0)
    sizes, order = torch.randint(5, 300, (n,), generator=generator), torch.randperm(n, generator=generator)
    packing = moeyard.pack_batches(sizes, 2048, order=order, lookahead=lookahead)
    assert int(packing.fill.sum()) == int(sizes.sum())
    assert int(packing.fill.max()) <= 2048
    if lookahead == 0:
        assert torch.equal(packing.index, order)
    else:
        assert packing.fill.double().mean() > 0.999 * 2048


# ---- hostile input ----------------------------------------------------------------------------------------------

SMALL = torch.tensor([3, 1, 2])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sizes": [1, 2]}, TypeError, "sizes: expected a torch.Tensor, got list"),
        ({"sizes": SMALL[None]}, ValueError, r"sizes: expected shape \[N\], got \[1, 3\]"),
        ({"sizes": SMALL.float()}, TypeError, "sizes: expected dtype int32, int64, got float32"),
        ({"sizes": torch.tensor([3, -1, 2])}, ValueError, "sizes: expected sizes of at least 0, got -1 for sample 1"),
        ({"budget": 0}, ValueError, "budget: expected at least 1, got 0"),
        ({"budget": 2.5}, TypeError, "budget: expected an int, got float"),
        ({"budget": 2**63}, ValueError, "budget: expected at most 2"),
        ({"order": torch.tensor([0, 3])}, ValueError, r"order: .*\[0, 3\), got 3 at position 1"),
        ({"order": torch.tensor([-1])}, ValueError, "order: .*got -1 at position 0"),
        ({"order": torch.tensor([2, 0, 2])}, ValueError, "order: expected distinct .* got 2 again at position 2"),
        ({"order": torch.tensor([2, 0, 1, 0])}, ValueError, "order: expected at most 3 ids"),
        ({"order": torch.tensor([0.0])}, TypeError, "order: expected dtype"),
        ({"order": SMALL[:, None]}, ValueError, r"order: expected shape \[L\]"),
        ({"order": SMALL.to("meta")}, ValueError, "order: expected device cpu"),
        ({"segments": torch.tensor([0, 0])}, ValueError, r"segments: expected shape \[3\], got \[2\]"),
        ({"segments": SMALL.bool()}, TypeError, "segments: expected dtype"),
        ({"max_samples": 0}, ValueError, "max_samples: expected at least 1"),
        ({"max_samples": True}, TypeError, "max_samples"),
        ({"sizes2": SMALL}, ValueError, "budget2: expected a value together with sizes2, got None"),
        ({"budget2": 4}, ValueError, "sizes2: expected a value together with budget2, got None"),
        ({"sizes2": SMALL, "budget2": 0}, ValueError, "budget2: expected at least 1"),
        ({"sizes2": -SMALL, "budget2": 4}, ValueError, "sizes2: expected sizes of at least 0, got -3 for sample 0"),
        ({"sizes2": SMALL[:2], "budget2": 4}, ValueError, r"sizes2: expected shape \[3\]"),
        ({"lookahead": -1}, ValueError, "lookahead: expected at least 0"),
        ({"lookahead": None}, TypeError, "lookahead: expected an int"),
        ({"oversize": "drop"}, ValueError, "oversize: expected one of 'error', 'own_batch', 'skip', got 'drop'"),
    ],
)
def test_hostile(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        moeyard.pack_batches(**{"sizes": SMALL, "budget": 10, **arguments})
