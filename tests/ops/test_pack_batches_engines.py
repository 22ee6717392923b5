"""pack_batches on CUDA, next-fit only: the contract, and the CPU's results and errors, word for word."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moeyard
from engines import engine, examples, place
from ops import test_pack_batches as on_the_cpu
from ops.compare import assert_equal

TOP = 2**63 - 1


@pytest.mark.usefixtures("engine")
class TestNextFit(on_the_cpu.TestNextFit):
    """On all engines."""


def outcome(request: dict[str, Any]) -> Any:
    try:
        return tuple(t.cpu() for t in moeyard.pack_batches(**request))
    except ValueError as e:
        return str(e)


def assert_agree(name: str, seed: int, request: dict[str, Any]) -> None:
    want = outcome(request)
    with engine.run(name, seed):
        got = outcome(place(request))
    if isinstance(want, str):
        assert got == want
    else:
        assert_equal(got, want)


@st.composite
def requests(draw: Any, most: int) -> dict[str, Any]:
    """Any epoch: random, sorted or constant sizes, shuffled parts of it, segments in runs or mixed, and now and then a
    value that is wrong."""
    n = draw(st.integers(0, most))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)

    def ints(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high + 1, (n,), generator=generator)

    budget = draw(st.sampled_from([1, 7, 20, 300, 2**31, 2**62, TOP]))
    least = draw(st.sampled_from([0, 0, 1])) if draw(st.integers(0, 19)) else -1
    sizes = ints(least, max(least, draw(st.sampled_from([1, 9, 40]))))
    if draw(st.booleans()):
        sizes = sizes * (budget // 20 + 1) if budget < TOP // 50 else sizes * (TOP // 50)
    dtype = torch.int32 if int(sizes.max() if n else 0) < 2**31 and draw(st.booleans()) else torch.int64
    request: dict[str, Any] = {
        "sizes": sizes.to(dtype),
        "budget": budget,
        "max_samples": draw(st.none() | st.integers(1, 5) | st.just(TOP)),
        "oversize": draw(st.sampled_from(["own_batch", "skip", "error"])),
    }
    if draw(st.booleans()):
        order = torch.randperm(n, generator=generator)[: draw(st.integers(0, n))]
        if len(order) and draw(st.integers(0, 9)) == 0:
            order[draw(st.integers(0, len(order) - 1))] = draw(st.sampled_from([-1, n, int(order[0])]))
        request["order"] = order.to(dtype) if draw(st.booleans()) else order
    if draw(st.booleans()):
        kind, chunks = draw(st.sampled_from(["runs", "mixed"])), draw(st.integers(1, 6))
        segments = ints(0, chunks) if kind == "mixed" else torch.arange(n) * chunks // max(n, 1)
        request["segments"] = segments * draw(st.sampled_from([1, -(2**50)])) + draw(st.sampled_from([0, -7]))
    if draw(st.booleans()):
        request |= {"sizes2": ints(0, 9), "budget2": draw(st.sampled_from([3, 9, 15, TOP]))}
    return request


@pytest.mark.parametrize("name", ["emulated", "cuda"])
@settings(max_examples=examples(150))
@given(request=requests(60), seed=st.integers(0, 21))
def test_small_epochs_agree(name: str, request: dict[str, Any], seed: int) -> None:
    assert_agree(name, seed, request)


@pytest.mark.parametrize("name", ["emulated", "cuda"])
@settings(max_examples=examples(10))
@given(request=requests(9000), seed=st.integers(0, 21))
def test_epochs_of_several_tiles_agree(name: str, request: dict[str, Any], seed: int) -> None:
    assert_agree(name, seed, request)


@pytest.mark.parametrize("name", ["emulated", "cuda"])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 127, 128, 129])
def test_one_sample_per_batch_and_all_in_one(name: str, n: int) -> None:
    """The most and the fewest starts to find."""
    ones = torch.ones(n, dtype=torch.int64)
    assert_agree(name, n, {"sizes": ones, "budget": 1})
    assert_agree(name, n, {"sizes": ones, "budget": n + 1})
    assert_agree(name, n, {"sizes": 0 * ones, "budget": 1})


@pytest.mark.parametrize("name", ["emulated", "cuda"])
def test_more_strips_than_one(name: str) -> None:
    """So long that prefix sums take two launches, with ranks that alternate, return and leap."""
    n = 5000
    segments = torch.tensor([3, 3, 9, 3, 9, 4, 9, 3, 3, 4, 4, 1])[torch.arange(n) // 7 % 12]
    segments[n // 2 :] += 20
    sizes = torch.arange(n) % 5
    for budget in (4, 60, 10_000):
        assert_agree(name, budget, {"sizes": sizes, "budget": budget, "segments": segments})


@pytest.mark.usefixtures("engine")
@pytest.mark.engines("emulated", "cuda")
def test_best_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="lookahead: expected 0 on a GPU, where there is next-fit only, got 3"):
        moeyard.pack_batches(torch.tensor([1]), 5, lookahead=3)
