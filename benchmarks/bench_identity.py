"""identity beside torch's own copy: what one call costs, and what a large copy reaches."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import moeyard


@pytest.mark.parametrize("numbers", [16, 16_000_000], ids=["call-overhead", "64MB"])
@pytest.mark.parametrize("peer", ["moeyard", "torch.clone"])
def bench_copy(benchmark: BenchmarkFixture, peer: str, numbers: int) -> None:
    x = torch.randn(numbers)
    copy = moeyard.identity if peer == "moeyard" else torch.clone
    assert torch.equal(copy(x), x)
    benchmark.group = f"copy of {numbers} float32"
    benchmark(copy, x)
