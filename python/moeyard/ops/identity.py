"""identity: copies a tensor. The living template of an op; `ops/README.md` walks through it.

    out = x

Shape letters: any shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeyard import _native
from moeyard.ops._register import Gradient, device_and_stream, register

_SCHEMA = "identity(Tensor x) -> Tensor"


def identity(x: Tensor) -> Tensor:
    """A contiguous copy of `x`, made by a native kernel.

    Args:
        x: any shape, any dtype, on the CPU or a CUDA device.

    Returns:
        A new contiguous tensor equal to `x`.

    Raises:
        TypeError: `x` is no dense tensor.

    Determinism: bit-identical on every device. Autocast: `x` keeps its dtype. Gradient: the incoming one, copied.
    """
    out: Tensor = _op(x)
    return out


def identity_reference(x: Tensor) -> Tensor:
    """The same in plain torch."""
    return x.clone(memory_format=torch.contiguous_format)


def _cpu(x: Tensor) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    _native.cpu.identity(x.data_ptr(), out.data_ptr(), x.numel() * x.element_size(), torch.get_num_threads())
    return out


def _cuda(x: Tensor) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    _native.cuda().identity(x.data_ptr(), out.data_ptr(), x.numel() * x.element_size(), *device_and_stream(x))
    return out


def _fake(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class _Gradient(Gradient):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # The gradient is the op itself, so gradients of gradients work too.
        out: Tensor = _op(grad)
        return out


_op = register(_SCHEMA, cpu=_cpu, cuda=_cuda, fake=_fake, gradient=_Gradient)
