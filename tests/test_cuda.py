"""What only a GPU can show beyond the op contract. Skips visibly where there is none."""

from __future__ import annotations

import pytest
import torch

from engines import NO_GPU, has_gpu, no_synchronisation
from moeyard.nn import MoE

pytestmark = pytest.mark.skipif(not has_gpu(), reason=NO_GPU)


def moe_step(moe: MoE, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    y = moe(x).output
    return [y, *torch.autograd.grad(y, [x, *moe.parameters()], grad)]


@pytest.fixture
def layer() -> tuple[MoE, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    moe = MoE(64, 32, 8, 2).to("cuda", torch.bfloat16)
    x, grad = (torch.randn(300, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return moe, x.requires_grad_(), grad


def test_a_moe_step_does_not_synchronise(layer: tuple[MoE, torch.Tensor, torch.Tensor]) -> None:
    moe_step(*layer)
    with no_synchronisation():
        moe_step(*layer)


def test_a_moe_step_in_a_graph(layer: tuple[MoE, torch.Tensor, torch.Tensor]) -> None:
    moe, x, grad = layer
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        moe_step(*layer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = moe_step(*layer)
    for seed in range(3):
        with torch.no_grad():
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(captured, moe_step(moe, x, grad))
