"""What only a GPU can show. Skips visibly where there is none."""

from __future__ import annotations

import pytest
import torch

import moeyard
from moeyard import _native

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and _native.cuda_built), reason="needs a GPU and a build with CUDA"
)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 1_000_003])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.complex128], ids=str)
def test_identity(count: int, dtype: torch.dtype) -> None:
    x = torch.randint(0, 100, (count,), device="cuda").to(dtype)
    assert torch.equal(moeyard.identity(x), x)


def test_identity_of_an_unaligned_view() -> None:
    x = torch.arange(1001, dtype=torch.uint8, device="cuda")[1:]
    assert torch.equal(moeyard.identity(x), x)


def test_the_current_stream_is_used() -> None:
    x = torch.zeros(50_000_000, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x.fill_(3.0)
        y = moeyard.identity(x)
    stream.synchronize()
    assert bool((y == 3).all())


def test_graph_capture() -> None:
    x = torch.zeros(1000, device="cuda")
    moeyard.identity(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = moeyard.identity(x)
    x.fill_(7.0)
    graph.replay()
    torch.cuda.synchronize()
    assert bool((y == 7).all())


def test_no_hidden_synchronisation() -> None:
    x = torch.randn(1000, device="cuda", requires_grad=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        moeyard.identity(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_op_without_a_cuda_kernel_says_so() -> None:
    with pytest.raises(NotImplementedError, match="no CUDA kernel"):
        moeyard.radius_graph(torch.randn(4, 3, device="cuda"), 1.0)
