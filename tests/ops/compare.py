"""Comparison without tolerance."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_equal(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        assert g.shape == w.shape
        assert torch.equal(bits(g), bits(w))


def bits(x: Tensor) -> Tensor:
    """The bytes of a tensor: comparing them tells -0 from 0 and NaN from everything else."""
    return x.detach().contiguous().reshape(-1).view(torch.uint8)
