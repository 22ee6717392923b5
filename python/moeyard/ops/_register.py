"""How an op is made known to torch: schema, one implementation per device, fake, autograd, vmap.

`torch.library.Library.define` + `impl` costs about 3 us a call where `torch.library.custom_op` costs 11 to 55, and an
own `autograd.Function` on the Autograd key about 10 us where `register_autograd` costs 18: that is why every op goes
through `register()` instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from moeyard import _native

# A module global: an op lives as long as its Library object.
_LIBRARY = torch.library.Library("moeyard", "DEF")

#: Element types as the native code numbers them (csrc/common/dtype.hpp).
DTYPE_CODE = {
    torch.float32: 0,
    torch.float64: 1,
    torch.float16: 2,
    torch.bfloat16: 3,
    torch.int32: 4,
    torch.int64: 5,
}


class Op:
    """One registered operator: `op(*args)` goes through the dispatcher, `op.below(*args)` starts below autograd."""

    def __init__(self, overload: Any) -> None:
        self.overload = overload

    def __call__(self, *args: Any) -> Any:
        return self.overload(*args)

    def below(self, *args: Any) -> Any:
        """Calls the op without autograd; what a forward inside `torch.autograd.Function` uses."""
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*args)


def register(
    schema: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any] | None = None,
    fake: Callable[..., Any],
    autograd: type[torch.autograd.Function] | None = None,
) -> Op:
    """Defines `moeyard::<schema>` and binds its implementations.

    Args:
        schema: a torch schema, such as "identity(Tensor x) -> Tensor".
        cpu, cuda: the implementations; they validate, allocate with torch and pass addresses on. Without `cuda` a CUDA
            tensor gets an error that says so.
        fake: shapes and dtypes of the outputs, for `torch.compile`, export and meta tensors.
        autograd: the function on the Autograd key; None for an op without a gradient.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, cpu, "CPU")
    _LIBRARY.impl(name, cuda or _no_cuda(name), "CUDA")
    torch.library.register_fake(f"moeyard::{name}", fake, lib=_LIBRARY)
    torch.library.register_vmap(f"moeyard::{name}", _no_vmap(name), lib=_LIBRARY)
    op = Op(getattr(torch.ops.moeyard, name).default)
    if autograd is not None:
        _LIBRARY.impl(name, _autograd_entry(op, autograd), "Autograd")
    return op


def _autograd_entry(op: Op, function: type[torch.autograd.Function]) -> Callable[..., Any]:
    def entry(*args: Any) -> Any:
        # Forward-mode AD goes the same way, so that torch answers with its error instead of dropping the tangent.
        if forward_ad._current_level >= 0 or (torch.is_grad_enabled() and _any_requires_grad(args)):
            return function.apply(*args)
        return op.below(*args)

    return entry


def _any_requires_grad(args: tuple[Any, ...]) -> bool:
    return any(isinstance(a, Tensor) and a.requires_grad for a in args)


def _no_cuda(name: str) -> Callable[..., Any]:
    def missing(*args: Any) -> Any:
        if not _native.cuda_built:
            _native.cuda()
        raise NotImplementedError(f"{name}: no CUDA kernel in this release; pass CPU tensors")

    return missing


def _no_vmap(name: str) -> Callable[..., Any]:
    def refuse(info: Any, in_dims: Any, *args: Any) -> Any:
        raise NotImplementedError(
            f"{name} does not support torch.vmap: it already works on a batch; stack the rows (or use `batch`/`ptr`) "
            "and call it once"
        )

    return refuse
