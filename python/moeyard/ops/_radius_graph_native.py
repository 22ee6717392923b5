"""How radius_graph and its gradients hand tensors to the native code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeyard import _native

# Stand for arguments that were not given.
NO_POINTS = _native.cpu.PointSet(0, 0, 0, 0, 0)
NOT_PERIODIC = _native.cpu.Periodicity(0, -1, 0, -1)


class Addresses:
    """Addresses of contiguous copies; the copies live as long as this object."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def __call__(self, value: Tensor | None) -> int:
        """Zero means none to the native code, so an empty tensor gets an address as well."""
        if value is None:
            return 0
        self._kept.append(value.contiguous() if value.numel() else value.new_zeros(1))
        return self._kept[-1].data_ptr()

    def point_set(self, xyz: Tensor | None, count: int, batch: Tensor | None, ptr: Tensor | None) -> Any:
        """The native PointSet of `count` points; without `xyz` it names sizes and graphs only."""
        batch = None if batch is None else batch.to(torch.int64)
        ptr = None if ptr is None else ptr.to(torch.int64)
        graphs = 0 if ptr is None else ptr.shape[0] - 1
        return _native.cpu.PointSet(self(xyz), count, self(batch), self(ptr), graphs)

    def periodicity(self, cell: Tensor, pbc: Tensor | None) -> Any:
        """The native Periodicity; -1 for one cell, or one set of periodic axes, that all graphs share."""
        cells = cell.shape[0] if cell.dim() == 3 else -1
        axes = pbc.shape[0] if pbc is not None and pbc.dim() == 2 else -1
        return _native.cpu.Periodicity(self(cell), cells, self(pbc), axes)
