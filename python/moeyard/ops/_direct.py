"""When an op may be called without torch's dispatcher.

The dispatcher costs about 3 us a call, half as much again for every ten arguments or outputs, which is more than the
kernels need for small inputs. Where it could only end in the CPU implementation, we go there at once: for plain CPU
tensors, outside of `torch.compile`, export, `torch.func`, tracing, dispatch and function modes and the profiler.
Whatever is not certainly plain takes the dispatcher.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_C: Any = torch._C


def _key_set(*names: str) -> int:
    keys = _C.DispatchKeySet(getattr(_C.DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys.add(getattr(_C.DispatchKey, name))
    return int(keys.raw_repr())


try:
    # An ordinary CPU tensor, and one made under inference_mode. Subclasses, functorch's wrappers, sparse, quantized,
    # nested, zero tensors and lazy negations all carry more keys or others.
    _PLAIN = frozenset({_key_set("CPU", "ADInplaceOrView", "AutogradCPU", "AutocastCPU"), _key_set("CPU", "AutocastCPU")})
    # What this thread adds to every call: modes, transforms and tracers would stand here.
    _NO_MODE = frozenset({_key_set("BackendSelect", "ADInplaceOrView"), _key_set("BackendSelect")})
    _AUTOGRAD = _C.DispatchKey.AutogradCPU
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


def exact_types(kind: str, optional: bool) -> frozenset[type]:
    """What `is_direct` accepts for an argument of this schema type ("Tensor", "int", ...); nothing for a list."""
    exact = _EXACT.get(kind, frozenset())
    return exact | {type(None)} if exact and optional else exact


def is_direct(args: tuple[Any, ...], types: tuple[frozenset[type], ...]) -> bool:
    """Whether a call with these arguments can only end in the CPU implementation (under autograd, where that is on)."""
    if torch.compiler.is_compiling() or not _KNOWN:
        return False
    if _function_modes() or _is_profiling() or _keys_added().raw_repr() not in _NO_MODE:
        return False
    for arg, allowed in zip(args, types, strict=True):
        kind = type(arg)
        if kind not in allowed:
            return False
        if kind in _TENSORS:
            if _keys_of(arg).raw_repr() not in _PLAIN:
                return False
        elif kind is int and not -(2**63) <= arg < 2**63:
            return False
    return True


def autograd_is_on() -> bool:
    """False inside the implementation of another op, where gradients are that op's business."""
    return not _is_excluded(_AUTOGRAD)
