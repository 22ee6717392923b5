"""How an op is made known to torch: schema, one implementation per device, fake, autograd, vmap.

`torch.library.Library.define` + `impl` costs about 3 us a call where `torch.library.custom_op` costs 11 to 55, and an
own `autograd.Function` on the Autograd key about 10 us where `register_autograd` costs 18: that is why every op goes
through `register()` instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import FunctionMeta

from moeyard.ops import _check, _device_errors
from moeyard.ops._direct import DirectCalls, autograd_is_on


def _current_stream(index: int) -> int:
    return int(torch.cuda.current_stream(index).cuda_stream)


# torch's own short cut to the same, where it has one.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", _current_stream)

# A module global: an op lives as long as its Library object.
_LIBRARY = torch.library.Library("moeyard", "DEF")

#: All that `register()` and `named()` have made, so that tests can run CUDA implementations on CPU tensors.
OPS: list[Op] = []

#: Element types as the native code numbers them (csrc/common/dtype.hpp).
DTYPE_CODE = {
    torch.float32: 0,
    torch.float64: 1,
    torch.float16: 2,
    torch.bfloat16: 3,
    torch.int32: 4,
    torch.int64: 5,
}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What an op computes and accumulates in: float32, and float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def address(x: Tensor | None) -> int:
    """Where the elements of a contiguous tensor lie; 0, a null pointer to the native code, for None."""
    return 0 if x is None else x.data_ptr()


def int_view(x: Tensor | None) -> tuple[int, bool]:
    """The native IntView of a contiguous int32 or int64 tensor: its address, and whether it is int64."""
    return (0, True) if x is None else (x.data_ptr(), x.dtype == torch.int64)


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def device_and_stream(x: Tensor) -> tuple[int, int]:
    """Where the native code runs a kernel on `x`: the device's index and torch's current stream there. A CPU tensor
    gets this far only under the emulation of CUDA, which has one device, -1."""
    index = x.get_device()
    _device_errors.used.add(index)
    return index, _raw_stream(index) if index >= 0 else 0


class Gradient:
    """How an op is differentiated. `ctx` is that of `torch.autograd.Function`."""

    @staticmethod
    def save(ctx: Any, args: Any, out: Any) -> None:
        """Keeps what `backward` needs of the arguments and the outputs."""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients in the order of the arguments."""
        raise NotImplementedError


class Op:
    """One registered operator: `op(*args)` checks the types of its arguments and calls it."""

    def __init__(
        self,
        overload: Any,
        cpu: Callable[..., Any],
        cuda: Callable[..., Any],
        options: Mapping[str, Sequence[str]],
    ) -> None:
        #: What runs on CPU tensors: tests put `cuda` here for a while.
        self.cpu = cpu
        self.overload, self.cuda, self._options = overload, cuda, options
        self._apply: Callable[..., Any] | None = None
        arguments = overload._schema.arguments
        self._names = tuple(a.name for a in arguments)
        self._types = tuple(_schema_type(str(a.type)) for a in arguments)
        self._direct = DirectCalls(self._types)
        OPS.append(self)

    def run_on_cpu(self, *args: Any) -> Any:
        return self.cpu(*args)

    def differentiate(self, gradient: type[Gradient]) -> None:
        """Puts `gradient` on the Autograd key, and on the direct way."""
        name = self.overload._opname
        dispatched = _function(name, gradient, self._below_autograd)

        def entry(*args: Any) -> Any:
            return dispatched.apply(*args) if _asks_for_gradient(args) else self._below_autograd(*args)

        _LIBRARY.impl(self.overload._schema.name, entry, "Autograd")
        # What Function.apply would do first concerns functorch's wrappers, which no direct call has: 2 us.
        self._apply = super(torch.autograd.Function, _function(name, gradient, self.run_on_cpu)).apply  # type: ignore[misc]

    def named(self, *required: str, **names: str) -> Op:
        """The same op under another function: it must have the `required` arguments, and its errors call some arguments
        by other names than the schema does."""
        other = copy(self)
        other._types = tuple((k, o and n not in required) for n, (k, o) in zip(self._names, self._types, strict=True))
        other._direct = DirectCalls(other._types)
        other._names = tuple(names.get(name, name) for name in self._names)
        OPS.append(other)
        return other

    def __call__(self, *args: Any) -> Any:
        with_gradient = self._direct.with_gradient(args)
        if with_gradient is False:
            return self.cpu(*args)
        if with_gradient and self._apply is not None and autograd_is_on():
            return self._apply(*args)
        for name, (kind, optional), value in zip(self._names, self._types, args, strict=True):
            _check.argument(name, kind, optional, value, self._options.get(name, ()))
        _check.one_device(self._names, args)
        return self.overload(*args)

    def _below_autograd(self, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*args)


def _function(name: str, gradient: type[Gradient], run: Callable[..., Any]) -> type[torch.autograd.Function]:
    def forward(ctx: Any, *args: Any) -> Any:
        out = run(*args)
        gradient.save(ctx, args, out)
        return out

    # The name is what `grad_fn` shows, with "Backward" behind it.
    members = {"forward": staticmethod(forward), "backward": staticmethod(gradient.backward)}
    function: Any = FunctionMeta(name, (torch.autograd.Function,), members)
    return cast("type[torch.autograd.Function]", function)


def _schema_type(text: str) -> tuple[str, bool]:
    """("Tensor", True) for "Optional[Tensor]"."""
    optional = text.startswith("Optional[")
    return (text.removeprefix("Optional[").removesuffix("]"), True) if optional else (text, False)


def register(
    schema: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
    gradient: type[Gradient] | str | None = None,
    options: Mapping[str, Sequence[str]] | None = None,
) -> Op:
    """Defines `moeyard::<schema>` and binds its implementations.

    Args:
        schema: a torch schema, such as "identity(Tensor x) -> Tensor".
        cpu, cuda: the implementations; they validate, allocate with torch and pass addresses on. Under the emulation of
            CUDA, which tests use, `cuda` gets CPU tensors.
        fake: shapes and dtypes of the outputs, for `torch.compile`, export and meta tensors.
        gradient: None for an op without one; for an op whose derivative is not supported, the message of the
            NotImplementedError that asking for it raises.
        options: what the arguments of type str may be.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    overload = getattr(torch.ops.moeyard, name).default
    names = [a.name for a in overload._schema.arguments]
    if _device_errors.CHECK_AT_ONCE:
        cuda = _device_errors.checked(cuda)
    op = Op(overload, cpu, cuda, options or {})
    _LIBRARY.impl(name, op.run_on_cpu, "CPU")
    _LIBRARY.impl(name, _on_one_device(names, cuda), "CUDA")
    torch.library.register_fake(f"moeyard::{name}", _on_one_device(names, fake), lib=_LIBRARY)
    torch.library.register_vmap(f"moeyard::{name}", _no_vmap(name), lib=_LIBRARY)
    if isinstance(gradient, str):
        gradient = _refusing(gradient)
    if gradient is not None:
        op.differentiate(gradient)
    return op


def _on_one_device(names: Sequence[str], run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` for callers of torch.ops, whom no Op has checked. torch calls `cpu` for CPU tensors alone."""

    def checked(*args: Any) -> Any:
        _check.one_device(names, args)
        return run(*args)

    return checked


def _refusing(message: str) -> type[Gradient]:
    """Stays in the graph and raises. `once_differentiable` would not do: it looks at the incoming gradients, which are
    often constants under `create_graph=True`, and the dependence on the other inputs would be lost without a word."""

    class Refusing(Gradient):
        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise NotImplementedError(message)

    return Refusing


def _asks_for_gradient(args: tuple[Any, ...]) -> bool:
    # Forward-mode AD goes the same way, so that torch answers with its error instead of dropping the tangent.
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)


def _no_vmap(name: str) -> Callable[..., Any]:
    def refuse(info: Any, in_dims: Any, *args: Any) -> Any:
        raise NotImplementedError(
            f"{name} does not support torch.vmap: it already works on a batch; stack the rows (or use `batch`/`ptr`) "
            "and call it once"
        )

    return refuse
