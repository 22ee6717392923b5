"""How radius_graph and its gradients hand tensors to the native code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeyard import _native

# Stand for arguments that were not given.
NO_POINTS = _native.cpu.PointSet(0, 0, 0, 0, 0)
NOT_PERIODIC = _native.cpu.Periodicity(0, -1, 0, -1)


# Stands for the address of an empty tensor, which is zero and would mean none to the native code. Nobody reads there.
_EMPTY = 64


def given(x: Tensor | None) -> int:
    """The address of a contiguous tensor; zero for None only."""
    return 0 if x is None else x.data_ptr() or _EMPTY


def ids(x: Tensor | None) -> Tensor | None:
    """Contiguous int64 ids."""
    return None if x is None else x.to(torch.int64).contiguous()


def point_set(xyz: Tensor | None, count: int, batch: Tensor | None, ptr: Tensor | None) -> Any:
    """The native PointSet of `count` points; without `xyz` it names sizes and graphs only. All tensors are contiguous
    and outlive it, as below."""
    if batch is None and ptr is None:  # one graph, often a small one: calls cost more than the comparison
        return _native.cpu.PointSet(given(xyz), count, 0, 0, 0)
    graphs = 0 if ptr is None else ptr.shape[0] - 1
    return _native.cpu.PointSet(given(xyz), count, given(batch), given(ptr), graphs)


def periodicity(cell: Tensor, pbc: Tensor | None) -> Any:
    """The native Periodicity; -1 for one cell, or one set of periodic axes, that all graphs share."""
    cells = cell.shape[0] if cell.dim() == 3 else -1
    axes = pbc.shape[0] if pbc is not None and pbc.dim() == 2 else -1
    return _native.cpu.Periodicity(given(cell), cells, given(pbc), axes)
