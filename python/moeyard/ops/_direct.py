"""When an op may be called without torch's dispatcher.

The dispatcher costs about 3 us a call, half as much again for every ten arguments or outputs, which is more than the
kernels need for small inputs. Where it could only end in the CPU implementation, we go there at once: for plain CPU
tensors, outside of `torch.compile`, export, `torch.func`, tracing, dispatch and function modes and the profiler.
Whatever is not certainly plain takes the dispatcher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

_C: Any = torch._C


def _key_set(*names: str) -> int:
    keys = _C.DispatchKeySet(getattr(_C.DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys.add(getattr(_C.DispatchKey, name))
    return int(keys.raw_repr())


try:
    # An ordinary CPU tensor, and one made under inference_mode. Subclasses, functorch's wrappers, sparse, quantized,
    # nested, zero tensors and lazy negations all carry more keys or others.
    _PLAIN = frozenset(
        {_key_set("CPU", "ADInplaceOrView", "AutogradCPU", "AutocastCPU"), _key_set("CPU", "AutocastCPU")}
    )
    # What this thread adds to every call: modes, transforms and tracers would stand here.
    _NO_MODE = frozenset({_key_set("BackendSelect", "ADInplaceOrView"), _key_set("BackendSelect")})
    _AUTOGRAD = _C.DispatchKey.AutogradOther  # stands for every autograd key in what a thread excludes
    _keys_of, _keys_added, _is_excluded = (
        _C._dispatch_keys,
        _C._dispatch_tls_local_include_set,
        _C._dispatch_tls_is_dispatch_key_excluded,
    )
    _function_modes, _is_profiling = _C._len_torch_function_stack, _C._autograd._profiler_enabled
    _KNOWN = True
except AttributeError:  # a torch whose internals have other names: every call takes the dispatcher
    _KNOWN = False

_TENSORS = frozenset({Tensor, torch.nn.Parameter})
#: The exact Python types that an argument of each schema type may have here.
_EXACT: dict[str, frozenset[type]] = {
    "Tensor": _TENSORS,
    "int": frozenset({int}),
    "float": frozenset({float, int}),
    "bool": frozenset({bool}),
    "str": frozenset({str}),
}


@dataclass
class _Layout:
    fits: bool
    tensors: list[int]
    ints: list[int]


class DirectCalls:
    """Tells the calls of one op that can only end in its CPU implementation (under autograd, where that is on).

    Args:
        kinds: the schema types of the arguments, such as ("Tensor", False), and whether None is allowed.
    """

    def __init__(self, kinds: Sequence[tuple[str, bool]]) -> None:
        self._exact = [
            _EXACT.get(kind, frozenset()) | ({type(None)} if optional else set()) for kind, optional in kinds
        ]
        self._layouts: dict[tuple[type, ...], _Layout] = {}  # for each combination of argument types seen

    def with_gradient(self, args: tuple[Any, ...]) -> bool | None:
        """Whether such a call asks for a gradient; None for any other call."""
        if is_compiling() or not _KNOWN or forward_ad._current_level >= 0:
            return None
        if _function_modes() or _is_profiling() or _keys_added().raw_repr() not in _NO_MODE:
            return None
        types = tuple(map(type, args))
        layout = self._layouts.get(types) or self._learn(types)
        requires_grad = False
        for i in layout.tensors:
            tensor = args[i]
            if _keys_of(tensor).raw_repr() not in _PLAIN:
                return None
            requires_grad = requires_grad or tensor.requires_grad
        for i in layout.ints:
            if not -(2**63) <= args[i] < 2**63:
                return None
        if not layout.fits:
            return None
        return requires_grad and torch.is_grad_enabled()

    def _learn(self, types: tuple[type, ...]) -> _Layout:
        fits = all(have in allowed for have, allowed in zip(types, self._exact, strict=True))
        tensors = [i for i, have in enumerate(types) if fits and have in _TENSORS]
        ints = [i for i, have in enumerate(types) if fits and have is int]
        self._layouts[types] = _Layout(fits, tensors, ints)
        return self._layouts[types]


def autograd_is_on() -> bool:
    """False inside the implementation of another op, where gradients are that op's business."""
    return not _is_excluded(_AUTOGRAD)
