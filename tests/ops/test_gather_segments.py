"""gather_segments: the contract, torch.cat of slices, memory-mapped values, fixed totals, hostile input."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moeyard
from engines import engine, examples, place
from moeyard.ops.gather_segments import gather_segments_reference
from ops.compare import assert_equal
from ops.contract import Inputs, OpContract

pytestmark = pytest.mark.usefixtures("engine")

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


class TestGather(OpContract):
    function = staticmethod(moeyard.gather_segments)
    reference = staticmethod(gather_segments_reference)
    dtypes = (*FLOATS, *INTS, torch.bool, torch.complex64)
    differentiable = ("values",)
    double_backward = True

    def inputs(self, dtype: torch.dtype, size: str = "small", seed: int = 0) -> Inputs:
        segments, longest = (2000, 90) if size == "large" else (6 + seed, 5)
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(0, longest, (segments,), generator=generator)
        ptr = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        values = torch.randn(int(ptr[-1]) + 2, 3, generator=generator) * 3
        index = torch.randint(0, segments, (2 * segments,), generator=generator)
        return {"values": values.to(dtype), "ptr": ptr, "index": index}

    def empty_inputs(self) -> list[Inputs]:
        none, ptr = torch.empty(0, dtype=torch.int64), torch.tensor([0, 2, 2])
        return [
            {"values": torch.ones(2, 3), "ptr": ptr, "index": none},
            {"values": torch.ones(2, 3), "ptr": ptr, "index": torch.tensor([1, 1])},
            {"values": torch.ones(2, 0), "ptr": ptr, "index": torch.tensor([0, 1, 0])},
            {"values": torch.ones(0, 3), "ptr": torch.zeros(1, dtype=torch.int64), "index": none},
            {"values": torch.ones(2, 3), "ptr": ptr, "index": none, "total": 4},
        ]


class TestGatherToATotal(TestGather):
    dtypes = FLOATS

    def inputs(self, dtype: torch.dtype, size: str = "small", seed: int = 0) -> Inputs:
        inputs = super().inputs(dtype, size, seed)
        return {**inputs, "total": 200_000 if size == "large" else 60 + seed}


class TestGatherWithAdd(TestGather):
    dtypes = INTS
    differentiable = ()

    def inputs(self, dtype: torch.dtype, size: str = "small", seed: int = 0) -> Inputs:
        inputs = super().inputs(dtype, size, seed)
        return {**inputs, "add": torch.arange(inputs["index"].shape[0]) * 37 - 50}

    def empty_inputs(self) -> list[Inputs]:
        return [
            {**inputs, "values": inputs["values"].long(), "add": torch.zeros(len(inputs["index"]), dtype=torch.int32)}
            for inputs in super().empty_inputs()
        ]


# ---- tables -----------------------------------------------------------------------------------------------------

VALUES = torch.tensor([10, 20, 30, 40, 50])
PTR = torch.tensor([0, 2, 2, 5])


def lists(out: moeyard.Segments) -> tuple[Any, ...]:
    return tuple(t.tolist() for t in out)


def test_by_hand() -> None:
    index = torch.tensor([2, 1, 0, 2])
    values, ptr = place((VALUES, PTR))
    got = lists(moeyard.gather_segments(values, ptr, index))
    assert got == ([30, 40, 50, 10, 20, 30, 40, 50], [0, 3, 3, 5, 8], [0, 0, 0, 2, 2, 3, 3, 3])
    got = lists(moeyard.gather_segments(values, ptr, index[:3], add=torch.tensor([1, 2, -3]), total=7))
    assert got == ([31, 41, 51, 7, 17, 0, 0], [0, 3, 3, 5], [0, 0, 0, 2, 2, 3, 3])
    assert lists(moeyard.gather_segments(values, ptr, index[:1], total=3)) == ([30, 40, 50], [0, 3], [0, 0, 0])


@pytest.mark.parametrize("dtype", INTS)
def test_add_wraps_around_like_torch(dtype: torch.dtype) -> None:
    top = torch.iinfo(dtype).max
    values = torch.tensor([top, 1], dtype=dtype)
    for number in (1, -5, 2**63 - 1, -(2**63)):
        got = moeyard.gather_segments(values, torch.tensor([0, 2]), torch.tensor([0]), add=torch.tensor([number]))
        assert torch.equal(got.values, values + torch.tensor(number).to(dtype))


@pytest.mark.engines("cpu")
@pytest.mark.parametrize("dtype", INTS)
def test_add_on_every_length(dtype: torch.dtype) -> None:
    """Lengths on both sides of every vector width, in values that start at an odd address."""
    lengths = torch.arange(140)
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    raw = torch.randint(0, 256, (int(ptr[-1]) * dtype.itemsize + 1,), dtype=torch.uint8)
    values = torch.frombuffer(raw.numpy(), dtype=dtype, offset=1, count=int(ptr[-1]))
    add = lengths * 1_000_003 - 7_000_000
    got = moeyard.gather_segments(values, ptr, lengths, add=add)
    assert torch.equal(got.values, values.clone() + torch.repeat_interleave(add, lengths).to(dtype))


@pytest.mark.engines("cpu", "cuda")
def test_large_outputs() -> None:
    """Beyond the last-level cache and in huge pages, where there are any."""
    values = torch.arange(3_000_000, dtype=torch.int32).reshape(-1, 3)
    ptr = torch.arange(0, 1_000_001, 1000)
    index = torch.arange(999, -1, -1)
    got = moeyard.gather_segments(values, ptr, index, add=index, total=1_000_100)
    want = (values.reshape(1000, -1).flip(0) + index[:, None]).reshape(-1, 3)
    assert torch.equal(got.values[:1_000_000], want.int())
    assert not got.values[1_000_000:].any()
    assert torch.equal(got.batch, torch.arange(1_000_100) // 1000)


def test_gradient_sums_repeats_in_float32() -> None:
    values = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    index = torch.zeros(1000, dtype=torch.int64)
    moeyard.gather_segments(values, torch.tensor([0, 1]), index).values.sum().backward()
    assert values.grad.item() == 1000.0  # a bfloat16 sum would stop at 256


def test_gradient_of_one_segment_over_many_pieces() -> None:
    values = torch.randn(1300, 3, dtype=torch.float64, requires_grad=True)
    ptr, index = torch.tensor([0, 100, 1300]), torch.tensor([1] * 200 + [0] * 3)
    out = moeyard.gather_segments(values, ptr, index).values
    upstream = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, values, upstream)
    (want,) = torch.autograd.grad(gather_segments_reference(values, ptr, index).values, values, upstream)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("segments", [3, 700, 5000])
def test_gradient_adds_in_the_order_of_index(dtype: torch.dtype, segments: int) -> None:
    """To the bit what a loop over the chosen gives, for any order of segments; values that were not chosen get 0."""
    generator = torch.Generator().manual_seed(segments)
    lengths = torch.randint(0, 4, (segments,), generator=generator)
    lengths[1] = 600  # more than the sum takes at once
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    values = torch.zeros(int(ptr[-1]) + 3, 2, dtype=dtype, requires_grad=True)
    index = torch.cat([torch.randint(0, segments, (segments // 2,), generator=generator), torch.tensor([1, 0, 1])])
    out = moeyard.gather_segments(values, ptr, index)
    upstream = torch.randn(out.values.shape, generator=generator, dtype=torch.float64).to(dtype)
    upstream[::7] = -0.0
    (got,) = torch.autograd.grad(out.values, values, upstream)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    want = torch.zeros(values.shape, dtype=wide)
    for m, s in enumerate(index.tolist()):
        want[ptr[s] : ptr[s + 1]] += upstream[out.ptr[m] : out.ptr[m + 1]].to(wide)
    assert torch.equal(got, want.to(dtype))
    assert not torch.signbit(got[got == 0]).any()


def test_gradient_of_nothing_chosen_is_zero() -> None:
    values = torch.randn(5, 3, requires_grad=True)
    out = moeyard.gather_segments(values, torch.tensor([0, 2, 2, 5]), torch.tensor([1, 1])).values
    assert torch.equal(torch.autograd.grad(out.sum(), values)[0], torch.zeros(5, 3))


def test_overlapping_segments_have_no_gradient() -> None:
    values = torch.arange(5.0).requires_grad_()
    out = moeyard.gather_segments(values, torch.tensor([0, 3, 1, 5]), torch.tensor([0, 2])).values
    assert out.tolist() == [0, 1, 2, 1, 2, 3, 4]
    total = out.sum()

    def backward() -> None:
        total.backward()
        moeyard.check_device_errors()

    with pytest.raises(ValueError, match="segments that do not overlap"):
        backward()


@settings(max_examples=examples(200))
@given(st.lists(st.integers(0, 5), min_size=1, max_size=9), st.data())
def test_equals_cat_of_slices(lengths: list[int], data: Any) -> None:
    ptr = torch.tensor([0, *np.cumsum(lengths).tolist()])
    index = torch.tensor(data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=12)), dtype=torch.int64)
    values = torch.randn(sum(lengths), *data.draw(st.sampled_from([(), (1,), (2, 3), (0,)])))
    total = data.draw(st.none() | st.integers(0, 5).map(lambda extra: sum(lengths[i] for i in index) + extra))
    narrow = data.draw(st.sampled_from([torch.int32, torch.int64]))
    got = moeyard.gather_segments(values, ptr.to(narrow), index.to(narrow), total=total)
    assert_equal(got, gather_segments_reference(values, ptr, index, total=total))


def test_collates_graphs_as_slices_do() -> None:
    """Positions, edges (atom numbers shifted per graph) and labels of chosen graphs."""
    atoms, edges = torch.tensor([0, 3, 3, 7]), torch.tensor([0, 4, 4, 10])
    pos = torch.randn(7, 3)
    edge = torch.randint(0, 3, (10, 2))
    chosen = torch.tensor([2, 0, 1, 2])
    nodes = moeyard.gather_segments(pos, atoms, chosen)
    links = moeyard.gather_segments(edge, edges, chosen, add=nodes.ptr[:-1])
    assert torch.equal(nodes.values, torch.cat([pos[3:7], pos[:3], pos[3:7]]))
    assert nodes.batch.tolist() == [0] * 4 + [1] * 3 + [3] * 4
    assert torch.equal(links.values, torch.cat([edge[4:10], edge[:4] + 4, edge[4:10] + 7]))


@pytest.mark.engines("cpu")
def test_memory_mapped_values_are_read_in_place(tmp_path: Path) -> None:
    """A file larger than what is read: nothing is copied, written or warned about."""
    path = tmp_path / "values.bin"
    rows = 20_000_000
    np.memmap(path, dtype=np.float32, mode="w+", shape=(rows, 4))[-3:] = 7
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about read-only arrays
        values = torch.from_numpy(np.memmap(path, dtype=np.float32, mode="r", shape=(rows, 4)))
    ptr = torch.arange(0, rows + 1, 1000, dtype=torch.int32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = resident_bytes()
        got = moeyard.gather_segments(values, ptr, torch.tensor([ptr.shape[0] - 2, 0]))
        assert resident_bytes() - before < 64e6
    assert got.values[:1000].sum() == 84
    assert got.values[1000:].sum() == 0


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


# ---- hostile input ----------------------------------------------------------------------------------------------

INDEX = torch.tensor([2, 0])


@pytest.mark.engines("cpu", "emulated")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"values": [1]}, TypeError, "values: expected a torch.Tensor, got list"),
        ({"values": torch.tensor(1)}, ValueError, r"values: expected shape \[n, \.\.\.\], got \[\]"),
        ({"values": VALUES.to(torch.complex128)}, TypeError, "values: expected a dtype of 1, 2, 4 or 8 bytes"),
        ({"values": VALUES.to(torch.complex64).requires_grad_()}, TypeError, "values .with a gradient."),
        ({"values": VALUES.to("meta")}, ValueError, "ptr: expected device meta"),
        ({"ptr": PTR[None]}, ValueError, r"ptr: expected shape \[S \+ 1\]"),
        ({"ptr": PTR[:0]}, ValueError, r"ptr: expected shape \[S \+ 1\], got \[0\]"),
        ({"ptr": PTR.float()}, TypeError, "ptr: expected dtype"),
        ({"index": torch.tensor([True])}, TypeError, "index: expected dtype"),
        ({"index": INDEX[:, None]}, ValueError, r"index: expected shape \[M\]"),
        ({"index": INDEX.to("meta")}, ValueError, "index: expected device cpu"),
        ({"add": 3}, TypeError, "add: expected a torch.Tensor or None"),
        ({"add": torch.tensor([1])}, ValueError, r"add: expected shape \[2\], got \[1\]"),
        ({"add": torch.tensor([1.0, 2.0])}, TypeError, "add: expected dtype"),
        ({"add": INDEX, "values": VALUES.float()}, TypeError, "values .with add.: expected dtype"),
        ({"add": INDEX, "values": VALUES.bool()}, TypeError, "values .with add.: expected dtype"),
        ({"total": -1}, ValueError, "total: expected at least 0"),
        *(({"total": n}, ValueError, r"total: expected fewer than 2\^63 bytes") for n in (2**62, 2**63 - 1)),
        ({"total": 5.0}, TypeError, "total: expected an int or None"),
    ],
)
def test_hostile(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        moeyard.gather_segments(**{"values": VALUES, "ptr": PTR, "index": INDEX, **arguments})


BAD_VALUES: list[tuple[dict[str, Any], str, list[int]]] = [
    # What the CPU says, and the pointers that a GPU gives: bad segments are empty there.
    ({"values": VALUES[:4]}, r"ptr: expected 0 <= ptr.*<= 4 .*got 2 and 5 for segment 2", [0, 0, 2]),
    ({"ptr": torch.tensor([-1, 2, 2, 5])}, "ptr: expected 0 <= .*got -1 and 2 for segment 0", [0, 3, 3]),
    ({"ptr": torch.tensor([0, 2, 4, 3])}, "ptr: expected 0 <= .*got 4 and 3 for segment 2", [0, 0, 2]),
    ({"ptr": torch.tensor([0, 2, -(2**62), 2**63 - 1])}, "ptr: expected 0 <= .*for segment 2", [0, 0, 2]),
    ({"index": torch.tensor([1, 3])}, r"index: expected segment ids in \[0, 3\), got 3 at position 1", [0, 0, 0]),
    ({"index": torch.tensor([-1, 2])}, "index: expected segment ids .*got -1 at position 0", [0, 0, 3]),
    ({"total": 4}, "total: expected at least 5 .*got 4", [0, 3, 4]),
]


@pytest.mark.parametrize(("arguments", "message", "ptr"), BAD_VALUES)
def test_bad_values(arguments: dict[str, Any], message: str, ptr: list[int]) -> None:
    case = place({"values": VALUES, "ptr": PTR, "index": INDEX, **arguments})
    if engine.name == "cpu":
        with pytest.raises(ValueError, match=message):
            moeyard.gather_segments(**case)
        return
    got = moeyard.gather_segments(**case)
    assert got.ptr.tolist() == ptr
    assert got.values.shape == got.batch.shape == (ptr[-1],)
    with pytest.raises(ValueError, match=message.partition(" ")[0] + " expected"):
        moeyard.check_device_errors()


def test_lengths_that_overflow() -> None:
    values = torch.empty(2**62, 0)
    total = 5 if engine.name == "cpu" else None  # elsewhere nobody knows in time, and the segments are cut
    with pytest.raises(ValueError, match="total length below"):
        moeyard.gather_segments(values, torch.tensor([0, 2**62]), torch.tensor([0, 0, 0]), total=total)


@pytest.mark.engines("cpu", "emulated")
def test_backward_checks_its_arguments() -> None:
    backward = torch.ops.moeyard.gather_segments_backward
    with pytest.raises(ValueError, match=r"num_values: expected fewer than 2\^63 bytes"):
        backward(torch.ones(5), PTR, INDEX, 2**62)
    with pytest.raises(TypeError, match="grad: expected dtype"):
        backward(torch.ones(5).int(), PTR, INDEX, 5)


@pytest.mark.engines("cpu")
def test_backward_checks_values() -> None:
    backward = torch.ops.moeyard.gather_segments_backward
    with pytest.raises(ValueError, match="grad: expected at least 5 rows"):
        backward(torch.ones(4), PTR, INDEX, 5)
    with pytest.raises(ValueError, match="for segment 2"):
        backward(torch.ones(5), PTR, INDEX, 4)


def test_only_chosen_entries_are_checked() -> None:
    broken = torch.tensor([0, 2, -9, 99])
    assert lists(moeyard.gather_segments(place(VALUES), broken, torch.tensor([0])))[0] == [10, 20]
    moeyard.check_device_errors()
