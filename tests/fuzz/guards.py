"""Outputs and workspaces between guards: whatever an op takes from torch's allocator starts as garbage, and not a byte
before or after it may change."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

#: AddressSanitizer guards every allocation itself, and better (reads too): then nothing lies around ours.
_PAD = 0 if "asan" in os.environ.get("LD_PRELOAD", "") else 64
_ALLOCATORS = (
    (torch, "empty", False),
    (torch, "empty_like", False),
    (torch, "zeros", True),
    (torch.Tensor, "new_empty", False),
    (torch.Tensor, "new_zeros", True),
)


@contextmanager
def guarded(garbage: int) -> Iterator[None]:
    """Fills all fresh memory with the byte `garbage`; AssertionError at the end if a guard was written over."""
    buffers: list[Tensor] = []
    with (
        mock.patch.multiple(torch, **_patches(torch, garbage, buffers)),
        mock.patch.multiple(torch.Tensor, **_patches(torch.Tensor, garbage, buffers)),
    ):
        yield
    for buffer in buffers:
        for guard in (buffer[:_PAD], buffer[buffer.numel() - _PAD :]):
            assert bool((guard == garbage).all()), f"memory beside {buffer.numel() - 2 * _PAD} fresh bytes changed"


def _patches(owner: Any, garbage: int, buffers: list[Tensor]) -> dict[str, Any]:
    return {
        name: _guarding(getattr(owner, name), garbage, zero, buffers) for o, name, zero in _ALLOCATORS if o is owner
    }


def _guarding(
    allocate: Callable[..., Tensor], garbage: int, zero: bool, buffers: list[Tensor]
) -> Callable[..., Tensor]:
    def allocate_between_guards(*args: Any, **options: Any) -> Tensor:
        like = allocate(*args, **options)
        if like.device.type != "cpu" or not like.is_contiguous():
            return like
        size = like.numel() * like.element_size()
        buffer = torch.full((size + 2 * _PAD,), garbage, dtype=torch.uint8)
        buffers.append(buffer)
        inside = torch.tensor([], dtype=like.dtype)
        inside.set_(buffer.untyped_storage(), _PAD // like.element_size(), like.shape)
        return inside.zero_() if zero else inside

    return allocate_between_guards
