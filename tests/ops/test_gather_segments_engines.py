"""gather_segments on CUDA against the CPU, bit for bit: any lengths, widths, alignments, totals, repeats, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moeyard
from engines import engine, examples, place
from ops.compare import assert_equal

NAMES = pytest.mark.parametrize("name", ["emulated", "cuda"])
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


def outcome(values: torch.Tensor, arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    values = values.detach().requires_grad_(values.is_floating_point())
    out = moeyard.gather_segments(values, **arguments)
    found = tuple(t.detach().cpu() for t in out)
    if values.requires_grad:
        upstream = torch.linspace(-1, 1, max(out.values.numel(), 1), dtype=torch.float64)[: out.values.numel()]
        upstream = upstream.reshape(out.values.shape).to(values.dtype).to(values.device)
        found += tuple(g.cpu() for g in torch.autograd.grad(out.values, values, upstream))
    return found


def assert_agree(name: str, seed: int, values: torch.Tensor, arguments: dict[str, Any]) -> None:
    want = outcome(values, arguments)
    with engine.run(name, seed):
        got = outcome(place(values), place(arguments))
        moeyard.check_device_errors()
    assert_equal(got, want)


@st.composite
def requests(draw: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    segments, seed = draw(st.integers(1, 60)), draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    longest = draw(st.sampled_from([0, 1, 3, 20, 300, 3000 if segments < 9 else 40]))
    lengths = torch.randint(0, longest + 1, (segments,), generator=generator)
    if draw(st.booleans()):
        lengths *= torch.randint(0, 2, (segments,), generator=generator)
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    row = draw(st.sampled_from([(), (1,), (2,), (3,), (4,), (5, 3), (0,), (64,)]))
    integer = draw(st.booleans())
    dtype = draw(st.sampled_from(INTS if integer else FLOATS))
    values = (torch.randn(int(ptr[-1]) + draw(st.integers(0, 3)), *row, generator=generator) * 50).to(dtype)
    if values.numel() and draw(st.booleans()):  # a contiguous view that starts in the middle of a 16-byte word
        values = torch.cat([values.reshape(-1)[:1], values.reshape(-1)])[1:].reshape(values.shape)
    count = draw(st.integers(0, 2 * segments))
    index = torch.randint(0, segments, (count,), generator=generator)
    arguments: dict[str, Any] = {"ptr": ptr, "index": index}
    if integer and draw(st.booleans()):
        arguments["add"] = torch.randint(-(2**40), 2**40, (count,), generator=generator)
    if draw(st.booleans()):
        arguments["total"] = int(lengths[index].sum()) + draw(st.sampled_from([0, 1, 1500]))
    narrow = [key for key in ("ptr", "index") if draw(st.booleans())]
    return values, arguments | {key: arguments[key].int() for key in narrow}


@NAMES
@settings(max_examples=examples(120))
@given(request=requests(), seed=st.integers(0, 21))
def test_batches_agree(name: str, request: Any, seed: int) -> None:
    assert_agree(name, seed, *request)


@NAMES
@pytest.mark.parametrize("row", [5000, 70_001])
def test_rows_of_several_tiles_agree(name: str, row: int) -> None:
    """A row is longer than what one block copies."""
    values = torch.randn(7, row, generator=torch.Generator().manual_seed(row))
    index = torch.tensor([2, 0, 1, 2])
    assert_agree(name, row, values, {"ptr": torch.tensor([0, 1, 1, 4]), "index": index, "total": 9})


@NAMES
def test_more_segments_than_one_strip_agree(name: str) -> None:
    """Prefix sums in two launches, sorting by two digits."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 3, (5000,), generator=generator)
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    values = torch.randn(int(ptr[-1]), generator=generator)
    assert_agree(name, 4, values, {"ptr": ptr, "index": torch.randint(0, 5000, (6000,), generator=generator)})
