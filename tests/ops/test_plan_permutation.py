"""plan_permutation: the contract, hand-computed plans, capacity and alignment, hostile input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import moeyard
from engines import large, place
from moeyard.ops._permute_tokens_reference import plan_permutation_reference
from moeyard.ops.plan_permutation import plan_rows
from ops.compare import assert_equal
from ops.contract import Inputs, OpContract, scattered

pytestmark = pytest.mark.usefixtures("engine")

NAN, INF = float("nan"), float("inf")


class TestPlanPermutation(OpContract):
    function = staticmethod(moeyard.plan_permutation)
    reference = staticmethod(plan_permutation_reference)
    dtypes = (torch.int64, torch.int32)

    def inputs(self, dtype: torch.dtype, size: str = "small", seed: int = 0) -> Inputs:
        tokens = 100_003 if size == "large" else 37 + seed
        generator = torch.Generator().manual_seed(seed)
        experts = torch.randint(-1, 7, (tokens, 3), generator=generator).to(dtype)
        weights = torch.randint(0, 9, (tokens, 3), generator=generator) / 8  # many ties
        capacity = 45_000 if size == "large" else 10
        return {
            "experts": experts,
            "num_experts": 7,
            "capacity": capacity,
            "drop": "weight",
            "weights": weights,
            "align": 8,
        }

    def empty_inputs(self) -> list[Inputs]:
        return [
            {"experts": torch.empty(0, 2, dtype=torch.int64), "num_experts": 3, "align": 16},
            {"experts": torch.empty(5, 0, dtype=torch.int32), "num_experts": 1},
            {"experts": torch.full((4, 2), -1), "num_experts": 2, "align": 4},
            {"experts": torch.zeros(4, 2, dtype=torch.int64), "num_experts": 2, "capacity": 0, "align": 4},
        ]


class TestByPosition(TestPlanPermutation):
    def inputs(self, dtype: torch.dtype, size: str = "small", seed: int = 0) -> Inputs:
        both = super().inputs(dtype, size, seed)
        return {**both, "drop": "position", "weights": None}


def plan(experts: list[list[int]], num_experts: int, **options: Any) -> tuple[Any, ...]:
    return tuple(t.tolist() for t in moeyard.plan_permutation(torch.tensor(experts), num_experts, **options))


def test_by_hand() -> None:
    experts = [[0, 2], [1, 0], [2, -1], [0, 1]]
    assert plan(experts, 4) == (
        [[0, 5], [3, 1], [6, -1], [2, 4]],
        [0, 3, 6, 2, 7, 1, 4, -1],  # the last row is the tail of the slot that is not routed
        [3, 2, 2, 0],
        [3, 5, 7, 7],
        0,
    )
    assert plan(experts, 4, capacity=2) == (
        [[0, 4], [2, 1], [5, -1], [-1, 3]],
        [0, 3, 2, 7, 1, 4, -1, -1],
        [2, 2, 2, 0],
        [2, 4, 6, 6],
        1,
    )
    assert plan(experts, 4, align=4) == (
        [[0, 8], [4, 1], [9, -1], [2, 5]],
        [0, 3, 6, -1, 2, 7, -1, -1, 1, 4, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1],
        [3, 2, 2, 0],
        [4, 8, 12, 12],
        0,
    )


def test_the_lightest_are_dropped() -> None:
    weights = torch.tensor([[0.5], [NAN], [0.9], [0.5], [-INF], [0.5]])
    rows = [plan([[0]] * 6, 1, capacity=c, drop="weight", weights=weights)[0] for c in range(7)]
    assert rows == [
        [[-1], [-1], [-1], [-1], [-1], [-1]],
        [[-1], [-1], [0], [-1], [-1], [-1]],
        [[0], [-1], [1], [-1], [-1], [-1]],  # ties keep the earlier slot
        [[0], [-1], [1], [2], [-1], [-1]],
        [[0], [-1], [1], [2], [-1], [3]],
        [[0], [-1], [1], [2], [3], [4]],  # NaN is lighter than -inf
        [[0], [1], [2], [3], [4], [5]],
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_float_type(dtype: torch.dtype) -> None:
    weights = torch.tensor([[0.25, 0.5], [1.0, 0.125]], dtype=dtype, requires_grad=True)
    assert plan([[0, 0], [0, 0]], 1, capacity=2, drop="weight", weights=weights)[0] == [[-1, 0], [1, -1]]


def test_float64_weights_are_compared_exactly() -> None:
    weights = torch.tensor([[1.0], [1.0 + 1e-12]], dtype=torch.float64)
    assert plan([[0], [0]], 1, capacity=1, drop="weight", weights=weights)[0] == [[-1], [0]]


CASES = st.integers(0, 6).flatmap(
    lambda k: st.tuples(
        st.integers(1, 9).flatmap(
            lambda e: st.tuples(
                st.just(e), st.lists(st.lists(st.integers(-1, e - 1), min_size=k, max_size=k), max_size=12)
            )
        ),
        st.just(k),
        st.none() | st.integers(0, 12),
        st.integers(1, 9),
    )
)


@given(CASES, st.booleans(), st.randoms())
def test_equals_the_reference(case: Any, by_weight: bool, random: Any) -> None:
    (num_experts, rows), k, capacity, align = case
    experts = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), k)
    options: dict[str, Any] = {"capacity": capacity, "align": align}
    if by_weight:
        values = [random.choice([0.0, -0.0, 0.5, 1.0, NAN, INF, -INF]) for _ in range(experts.numel())]
        options |= {"drop": "weight", "weights": torch.tensor(values).reshape(experts.shape)}
    got = moeyard.plan_permutation(experts, num_experts, **options)
    assert_equal(got, plan_permutation_reference(experts, num_experts, **options))
    # The blocks: aligned ends, room for every count, all within the static size.
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), got.offsets])[:-1]
    assert (got.offsets % align == 0).all()
    assert ((got.offsets - starts - got.counts) >= 0).all()
    assert ((got.offsets - starts - got.counts) < align).all()
    assert got.offsets[-1] <= got.slot_of_row.shape[0]
    assert int(got.counts.sum() + got.dropped) == int((experts >= 0).sum())


@pytest.mark.large
def test_many_experts_and_slots() -> None:
    experts = torch.randint(-1, 5000, (70_000, 3), generator=torch.Generator().manual_seed(0))
    got = moeyard.plan_permutation(experts, 5000, align=4)
    flat = experts.reshape(-1)
    order = torch.argsort(flat, stable=True)
    assert torch.equal(got.slot_of_row[got.slot_of_row >= 0].long(), order[int((flat < 0).sum()) :])
    assert torch.equal(got.counts.long(), torch.bincount(flat[flat >= 0], minlength=5000))


def test_rows_are_static() -> None:
    assert plan_rows(10, 2, 4, None, 1) == 20
    assert plan_rows(10, 2, 4, None, 8) == 48  # 20 + 4 * 7 = 48
    assert plan_rows(1, 2, 64, None, 8) == 16  # two slots pad two experts only
    assert plan_rows(10, 2, 4, 3, 1) == 12
    assert plan_rows(10, 2, 4, 3, 8) == 32
    assert plan_rows(10, 2, 4, 1000, 8) == 48
    assert plan_rows(0, 2, 4, 3, 8) == 0


# ---- hostile input ----------------------------------------------------------------------------------------------

IDS = torch.zeros(3, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"experts": [[0]]}, TypeError, "experts: expected a torch.Tensor, got list"),
        ({"experts": IDS[0]}, ValueError, r"experts: expected shape \[T, k\], got \[2\]"),
        ({"experts": IDS.float()}, TypeError, "experts: expected dtype int32, int64, got float32"),
        ({"experts": IDS.bool()}, TypeError, "experts"),
        ({"num_experts": 0}, ValueError, "num_experts: expected at least 1, got 0"),
        ({"num_experts": 4.0}, TypeError, "num_experts: expected an int, got float"),
        ({"num_experts": True}, TypeError, "num_experts"),
        ({"num_experts": 2**31}, ValueError, "num_experts: expected at most 2"),
        ({"capacity": -1}, ValueError, "capacity: expected at least 0, got -1"),
        ({"capacity": 1.25}, TypeError, "capacity: expected an int or None, got float"),
        ({"align": 0}, ValueError, "align: expected at least 1, got 0"),
        ({"align": "8"}, TypeError, "align"),
        ({"align": 2**31}, ValueError, "rows with padding: expected at most"),
        ({"align": 2**63 - 1}, ValueError, "rows with padding: expected at most"),
        ({"drop": "random"}, ValueError, "drop: expected one of 'position', 'weight', got 'random'"),
        ({"drop": "weight"}, ValueError, "weights: expected a tensor"),
        ({"weights": torch.ones(3, 2)}, ValueError, "weights: expected None unless"),
        ({"weights": torch.ones(3, 3), "drop": "weight"}, ValueError, r"weights: expected shape \[3, 2\]"),
        ({"weights": torch.ones(3, 2).int(), "drop": "weight"}, TypeError, "weights: expected dtype"),
        ({"weights": torch.ones(3, 2, device="meta"), "drop": "weight"}, ValueError, "weights: expected device"),
        ({"weights": 1.0, "drop": "weight"}, TypeError, "weights: expected a torch.Tensor or None"),
    ],
)
def test_hostile(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        moeyard.plan_permutation(**place({"experts": IDS, "num_experts": 4, **arguments}))


BAD_IDS = [
    ([[0, 1], [4, 0]], [[0, 1], [-1, 0]], r"experts.*\[-1, 4\), got 4 at row 1, slot 0"),
    ([[0, -2]], [[0, -1]], "got -2 at row 0, slot 1"),
    ([[2**32]], [[-1]], "got 4294967296 at row 0, slot 0"),
    ([[-(2**63), 3, 2**63 - 1]], [[-1, 3, -1]], "got -9223372036854775808 at row 0, slot 0"),
]


@pytest.mark.engines("cpu")
@pytest.mark.parametrize(("ids", "_", "message"), BAD_IDS)
def test_ids_out_of_range_are_named(ids: list[list[int]], _: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(ids, 4)


@pytest.mark.engines("emulated", "cuda")
@pytest.mark.parametrize(("ids", "clean", "_"), BAD_IDS)
@pytest.mark.parametrize("num_experts", [4, *large(2000)])
@pytest.mark.parametrize("by_weight", [False, True])
def test_ids_out_of_range_count_as_none(
    ids: list[list[int]], clean: list[list[int]], _: Any, num_experts: int, by_weight: bool
) -> None:
    if num_experts > 4:
        ids = [[num_experts if i == 4 else i for i in row] for row in ids]
    options = {"drop": "weight", "weights": torch.ones(len(ids), len(ids[0]))} if by_weight else {}
    got = plan(ids, num_experts, capacity=1, **options)
    with pytest.raises(ValueError, match="experts: expected ids"):
        moeyard.check_device_errors()
    assert got == plan(clean, num_experts, capacity=1, **options)
    moeyard.check_device_errors()  # -1 is no error


def test_more_slots_than_the_maps_hold() -> None:
    experts = torch.zeros(1, 1, dtype=torch.int32).expand(2**20, 2**11)
    with pytest.raises(ValueError, match=r"T \* k: expected at most 2\^31 - 1 .* got 2147483648"):
        moeyard.plan_permutation(experts, 4)


@pytest.mark.engines("cpu")
def test_the_first_bad_id_is_named_by_any_number_of_threads() -> None:
    experts = torch.zeros(400_000, 1, dtype=torch.int32)
    experts[[70_000, 150_000, 399_999]] = 9
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        with pytest.raises(ValueError, match="row 70000, slot 0"):
            moeyard.plan_permutation(experts, 4)


def test_huge_options_on_nothing() -> None:
    empty = torch.empty(0, 2, dtype=torch.int64)
    got = moeyard.plan_permutation(empty, 3, capacity=2**62, align=2**62)
    assert [t.tolist() for t in got] == [[], [], [0, 0, 0], [0, 0, 0], 0]


def test_strided_ids() -> None:
    experts: Tensor = torch.tensor([[0, 1], [2, 0], [1, 2]])
    assert_equal(moeyard.plan_permutation(scattered(experts), 3), moeyard.plan_permutation(experts, 3))
    assert_equal(moeyard.plan_permutation(experts.t(), 3), moeyard.plan_permutation(experts.t().contiguous(), 3))
