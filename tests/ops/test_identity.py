"""identity, the template op."""

from __future__ import annotations

import pytest
import torch

import moeyard
from moeyard.ops.identity import identity_reference
from ops.contract import Inputs, OpContract

pytestmark = pytest.mark.usefixtures("engine")


class TestIdentity(OpContract):
    function = staticmethod(moeyard.identity)
    reference = staticmethod(identity_reference)
    dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool)
    differentiable = ("x",)
    double_backward = True

    def inputs(self, dtype: torch.dtype, size: str = "small", seed: int = 0) -> Inputs:
        n = 1_000_003 if size == "large" else 3
        x = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed)) * 3
        return {"x": x.to(dtype)}

    def empty_inputs(self) -> list[Inputs]:
        return [{"x": torch.empty(0)}, {"x": torch.empty(4, 0)}]


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 1000])
def test_unaligned_views(count: int) -> None:
    x = torch.arange(count + 1).to(torch.uint8)[1:]
    assert torch.equal(moeyard.identity(x), x)


def test_a_copy_not_a_view() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    y = moeyard.identity(x.t())
    assert y.is_contiguous()
    assert y.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("x", [None, 3, [1.0], "x"])
def test_wrong_type(x: object) -> None:
    with pytest.raises(TypeError, match=r"x: expected a torch.Tensor, got"):
        moeyard.identity(x)


def test_sparse_is_refused() -> None:
    with pytest.raises(TypeError, match="dense"):
        moeyard.identity(torch.eye(3).to_sparse())
