"""When an op may be called without torch's dispatcher.

The dispatcher costs about 3 us a call, half as much again for every ten arguments or outputs, which is more than the
kernels need for small inputs. Where it could only end in the CPU implementation, we go there at once: for plain CPU
tensors, outside of `torch.compile`, export, `torch.func`, tracing, dispatch and function modes and the profiler.
Whatever is not certainly plain takes the dispatcher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from moeyard import _native

_C: Any = torch._C


def _key_set(*names: str) -> int:
    keys = _C.DispatchKeySet(getattr(_C.DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys.add(getattr(_C.DispatchKey, name))
    return int(keys.raw_repr())


try:
    # An ordinary CPU tensor, and one made under inference_mode. Subclasses, functorch's wrappers, sparse, quantized,
    # nested, zero tensors and lazy negations all carry more keys or others.
    _PLAIN = [_key_set("CPU", "ADInplaceOrView", "AutogradCPU", "AutocastCPU"), _key_set("CPU", "AutocastCPU")]
    # What this thread adds to every call: modes, transforms and tracers would stand here.
    _NO_MODE = [_key_set("BackendSelect", "ADInplaceOrView"), _key_set("BackendSelect")]
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

_TENSORS: list[type] = [Tensor, torch.nn.Parameter]
#: The exact Python types that an argument of each schema type may have here.
_EXACT: dict[str, list[type]] = {
    "Tensor": _TENSORS,
    "int": [int],
    "float": [float, int],
    "bool": [bool],
    "str": [str],
}


class DirectCalls:
    """Tells the calls of one op that can only end in its CPU implementation (under autograd, where that is on).

    Args:
        kinds: the schema types of the arguments, such as ("Tensor", False), and whether None is allowed.
    """

    def __init__(self, kinds: Sequence[tuple[str, bool]]) -> None:
        self._plain_calls = None
        if _KNOWN:
            allowed = [[*_EXACT.get(kind, []), *([type(None)] if optional else [])] for kind, optional in kinds]
            self._plain_calls = _native.cpu.PlainCalls(allowed, _TENSORS, _keys_of, _PLAIN, _keys_added, _NO_MODE)

    def with_gradient(self, args: tuple[Any, ...]) -> bool | None:
        """Whether such a call asks for a gradient; None for any other call."""
        if is_compiling() or self._plain_calls is None or forward_ad._current_level >= 0:
            return None
        if _function_modes() or _is_profiling():
            return None
        requires_grad: bool | None = self._plain_calls(args)
        return requires_grad and torch.is_grad_enabled()


def autograd_is_on() -> bool:
    """False inside the implementation of another op, where gradients are that op's business."""
    return not _is_excluded(_AUTOGRAD)
