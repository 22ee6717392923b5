"""expert_ffn: the feed-forward networks of all experts over rows that lie sorted by expert.

    swiglu:  y = (silu(x G_e) * (x U_e)) D_e        gelu, relu:  y = act(x U_e) D_e

The one place that decides how the products of the experts are taken:

- float32 on AMD processors with AVX-512, swiglu or relu: own kernels, twice as fast as the BLAS behind torch, which
  runs at AVX2 width there;
- else on the CPU: torch's products, expert by expert in blocks of rows that stay in cache from the first product to
  the second (`torch.nn.functional.grouped_mm` is slower than such a loop and lacks float64);
- on CUDA: `grouped_mm` where torch, the dtype and the sizes allow it, else the loop.

Shape letters: R rows sorted by expert, E experts, H features, I hidden features, P = 2 for swiglu, else 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moeyard import _native
from moeyard.ops import _check
from moeyard.ops._register import Gradient, int_view, register

#: Width of the first product in units of I: swiglu holds gate and value side by side.
PARTS = {"swiglu": 2, "gelu": 1, "relu": 1}

_SCHEMA = (
    "expert_ffn(Tensor x, Tensor up, Tensor down, Tensor offsets, str activation, bool keep_hidden) -> (Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "expert_ffn_backward(Tensor grad, Tensor x, Tensor up, Tensor down, Tensor hidden, Tensor offsets, "
    "str activation, bool for_x, bool for_weights) -> (Tensor, Tensor, Tensor)"
)
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: Rows that go through both products at once: their hidden features stay in the second-level cache.
_BLOCK = 1024

_aten: Any = torch.ops.aten


def expert_ffn(
    x: Tensor, up: Tensor, down: Tensor, offsets: Tensor, activation: str = "swiglu", *, recompute: bool = False
) -> Tensor:
    """Runs every expert over its rows.

    Args:
        x: [R,H] rows sorted by expert, as `permute_tokens` gives them.
        up: [E,H,P*I], for swiglu gate and value side by side. down: [E,I,H].
        offsets: [E] integer END offsets of the experts' rows (`PermutationPlan.offsets`).
        activation: "swiglu", "gelu" or "relu".
        recompute: keep no hidden features for the backward, which takes the first product once more: R*P*I numbers
            less, for 17 % (swiglu: 22 %) more multiplications.

    Returns:
        [R,H]; rows past the last offset are zero, and so is their gradient.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; on the CPU, offsets that decrease or leave
            [0, R].

    Determinism: that of torch's matrix products; own kernels give the same bits for any number of threads.
    Autocast: runs in the autocast dtype, but for float64. Gradient: any order.
    Source: Shazeer 2020, "GLU variants improve Transformer" (arXiv:2002.05202).
    """
    for name, value in (("x", x), ("up", up), ("down", down)):
        _check.tensor(name, value)
    _check.flag("recompute", recompute)
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if on and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, up, down = x.to(dtype), up.to(dtype), down.to(dtype)
    keep = not recompute and torch.is_grad_enabled() and any(t.requires_grad for t in (x, up, down))
    y: Tensor = _op(x, up, down, offsets, activation, keep)[0]
    return y


def expert_ffn_reference(x: Tensor, up: Tensor, down: Tensor, offsets: Tensor, activation: str = "swiglu") -> Tensor:
    """The same in differentiable torch, expert by expert."""
    pieces, start = [], 0
    for e, stop in enumerate(offsets.tolist()):
        hidden = x[start:stop] @ up[e]
        if activation == "swiglu":
            gate, value = hidden.chunk(2, dim=-1)
            pieces.append((nn.functional.silu(gate) * value) @ down[e])
        else:
            act = nn.functional.gelu if activation == "gelu" else nn.functional.relu
            pieces.append(act(hidden) @ down[e])
        start = stop
    return torch.cat([*pieces, x.new_zeros(x.shape[0] - start, down.shape[2])])


# ---- below the dispatcher --------------------------------------------------------------------------------------------


def _validate(x: Tensor, up: Tensor, down: Tensor, offsets: Tensor, activation: str) -> None:
    _check.option("activation", activation, tuple(PARTS))
    _check.dtype("x", x, _FLOATS)
    _check.rank("x", x, ("R", "H"))
    _check.rank("up", up, ("E", "H", "P*I"))
    _check.rank("down", down, ("E", "I", "H"))
    for name, weight in (("up", up), ("down", down)):
        _check.dtype(name, weight, (x.dtype,))
    experts, hidden = down.shape[:2]
    _check.shape("up", up, [experts, x.shape[1], PARTS[activation] * hidden])
    _check.shape("down", down, [experts, hidden, x.shape[1]])
    _check.dtype("offsets", offsets, (torch.int32, torch.int64))
    _check.shape("offsets", offsets, [experts])


def _validate_backward(
    grad: Tensor, x: Tensor, up: Tensor, down: Tensor, hidden: Tensor, offsets: Tensor, activation: str
) -> None:
    _validate(x, up, down, offsets, activation)
    for name, value, width in (("grad", grad, x.shape[1]), ("hidden", hidden, up.shape[2])):
        _check.dtype(name, value, (x.dtype,))
        # No hidden features were kept: they are computed again.
        if name == "grad" or value.dim() != 1 or value.shape[0] != 0:
            _check.shape(name, value, [x.shape[0], width])


def _blocks(offsets: Tensor, rows: int) -> Iterator[tuple[int, slice]]:
    """Every expert's rows, cut into blocks; checks the offsets first."""
    stops = offsets.tolist()
    for before, stop in zip([0, *stops], [*stops, rows], strict=True):
        if not 0 <= before <= stop:
            raise ValueError(f"offsets: expected values that rise within [0, {rows}], got {before} before {stop}")
    for e, (start, stop) in enumerate(zip([0, *stops], stops, strict=False)):
        for first in range(start, stop, _BLOCK):
            yield e, slice(first, min(first + _BLOCK, stop))


def _activate(hidden: Tensor, activation: str, out: Tensor) -> None:
    if activation == "swiglu":
        gate, value = hidden.chunk(2, dim=1)
        _aten.silu.out(gate, out=out)
        out.mul_(value)
    elif activation == "gelu":
        _aten.gelu.out(hidden, out=out)
    else:
        torch.clamp_min(hidden, 0, out=out)


def _activate_backward(hidden: Tensor, activation: str, grad: Tensor, out: Tensor, grad_hidden: Tensor) -> None:
    """From the gradient of the activation, which it may spoil: `grad_hidden`; and the activation itself into `out`."""
    if activation == "swiglu":
        (gate, value), (grad_gate, grad_value) = hidden.chunk(2, dim=1), grad_hidden.chunk(2, dim=1)
        _aten.silu.out(gate, out=out)
        torch.mul(grad, out, out=grad_value)
        out.mul_(value)
        grad.mul_(value)
        _aten.silu_backward.grad_input(grad, gate, grad_input=grad_gate)
        return
    _activate(hidden, activation, out)
    if activation == "gelu":
        _aten.gelu_backward.grad_input(grad, hidden, grad_input=grad_hidden)
    else:
        _aten.threshold_backward.grad_input(grad, hidden, 0, grad_input=grad_hidden)


def _takes_native(x: Tensor, up: Tensor, down: Tensor, activation: str) -> bool:
    # Sixteen strides must fit into 32 bits: the kernels gather.
    near = all(stride < 2**27 for weights in (up, down) for stride in weights.stride()[1:])
    known = x.dtype == torch.float32 and activation in ("swiglu", "relu")
    return known and near and _native.cpu.expert_ffn_preferred()


def _problem(x: Tensor, up: Tensor, down: Tensor, offsets: Tensor, activation: str) -> Any:
    """The native request; `x` and `offsets` are contiguous, and all outlive it."""
    (rows, dim), (experts, hidden, _) = x.shape, down.shape
    up_stack, down_stack = ((w.data_ptr(), w.stride(0), w.stride(1), w.stride(2)) for w in (up, down))
    return _native.cpu.ExpertFfn(
        x.data_ptr(), up_stack, down_stack, int_view(offsets), rows, experts, dim, hidden, activation == "swiglu"
    )


def _cpu(
    x: Tensor, up: Tensor, down: Tensor, offsets: Tensor, activation: str, keep_hidden: bool
) -> tuple[Tensor, Tensor]:
    _validate(x, up, down, offsets, activation)
    if not _takes_native(x, up, down, activation):
        return _loop(x, up, down, offsets, activation, keep_hidden)
    x, offsets = x.contiguous(), offsets.contiguous()
    y = x.new_empty(x.shape[0], down.shape[2])
    hidden = x.new_empty(x.shape[0], up.shape[2]) if keep_hidden else x.new_empty(0)
    kept = hidden.data_ptr() if keep_hidden else 0
    problem = _problem(x, up, down, offsets, activation)
    _native.cpu.expert_ffn(problem, y.data_ptr(), kept, torch.get_num_threads())
    return y, hidden


def _loop(
    x: Tensor, up: Tensor, down: Tensor, offsets: Tensor, activation: str, keep_hidden: bool
) -> tuple[Tensor, Tensor]:
    rows, block = x.shape[0], min(x.shape[0], _BLOCK)
    y = x.new_empty(rows, down.shape[2])
    hidden = x.new_empty(rows if keep_hidden else block, up.shape[2])
    active = x.new_empty(block, down.shape[1])
    done = 0
    for e, part in _blocks(offsets, rows):
        done, size = part.stop, part.stop - part.start
        h, a = hidden[part] if keep_hidden else hidden[:size], active[:size]
        torch.mm(x[part], up[e], out=h)
        _activate(h, activation, a)
        torch.mm(a, down[e], out=y[part])
    y[done:].zero_()
    return y, hidden if keep_hidden else hidden.new_empty(0)


def _backward_cpu(
    grad: Tensor,
    x: Tensor,
    up: Tensor,
    down: Tensor,
    hidden: Tensor,
    offsets: Tensor,
    activation: str,
    for_x: bool,
    for_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _validate_backward(grad, x, up, down, hidden, offsets, activation)
    arguments = (x, up, down, hidden, offsets, activation, for_x, for_weights)
    if not _takes_native(x, up, down, activation):
        return _loop_backward(grad, *arguments)
    x, grad, hidden, offsets = x.contiguous(), grad.contiguous(), hidden.contiguous(), offsets.contiguous()
    nothing = x.new_empty(0)
    grad_x = x.new_empty(x.shape) if for_x else nothing
    grad_up, grad_down = (w.new_empty(w.shape) if for_weights else nothing for w in (up, down))
    problem = _problem(x, up, down, offsets, activation)
    kept = hidden.data_ptr() if hidden.dim() == 2 else 0
    to_x, to_up, to_down = (g.data_ptr() if g.numel() else 0 for g in (grad_x, grad_up, grad_down))
    _native.cpu.expert_ffn_backward(problem, grad.data_ptr(), kept, to_x, to_up, to_down, torch.get_num_threads())
    return grad_x, grad_up, grad_down


def _loop_backward(
    grad: Tensor,
    x: Tensor,
    up: Tensor,
    down: Tensor,
    hidden: Tensor,
    offsets: Tensor,
    activation: str,
    for_x: bool,
    for_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, block = x.shape[0], min(x.shape[0], _BLOCK)
    grad = grad.contiguous()
    grad_x = x.new_empty(x.shape if for_x else 0)
    grad_up, grad_down = (w.new_empty(w.shape if for_weights else 0) for w in (up, down))
    active, grad_active = x.new_empty(2, block, down.shape[1])
    recomputed, grad_hidden = x.new_empty(2, block, up.shape[2])
    done, reached = 0, -1
    for e, part in _blocks(offsets, rows):
        done, size = part.stop, part.stop - part.start
        a, da, dh = active[:size], grad_active[:size], grad_hidden[:size]
        h = hidden[part] if hidden.dim() == 2 else torch.mm(x[part], up[e], out=recomputed[:size])
        torch.mm(grad[part], down[e].t(), out=da)
        _activate_backward(h, activation, da, a, dh)
        if for_weights:
            more = float(e == reached)
            torch.addmm(grad_down[e], a.t(), grad[part], beta=more, out=grad_down[e])
            torch.addmm(grad_up[e], x[part].t(), dh, beta=more, out=grad_up[e])
            _zero_between(reached, e, grad_up, grad_down)
        if for_x:
            torch.mm(dh, up[e].t(), out=grad_x[part])
        reached = e
    if for_weights:
        _zero_between(reached, up.shape[0], grad_up, grad_down)
    if for_x:
        grad_x[done:].zero_()
    return grad_x, grad_up, grad_down


def _zero_between(before: int, after: int, *grads: Tensor) -> None:
    """The gradients of the experts between two that have rows."""
    if after > before + 1:
        for grad in grads:
            grad[before + 1 : after].zero_()


def _grouped_mm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """[R,K] x [E,K,N] -> [R,N], or [M,R] x [R,N] -> [E,M,N]: rows past the last offset are left uninitialised."""
    result: Tensor = nn.functional.grouped_mm(a, b, offs=offsets)
    return result


def _takes_grouped_mm(x: Tensor, up: Tensor, down: Tensor) -> bool:
    """bfloat16, and every row a multiple of 16 bytes: what the kernel of torch 2.10 and later asks for."""
    fits = all(
        w.numel() and w.data_ptr() % 16 == 0 and all(s == 1 or s % 8 == 0 for s in (*w.stride(), *w.shape[1:]))
        for w in (up, down)
    )
    return x.dtype == torch.bfloat16 and fits and hasattr(nn.functional, "grouped_mm")


def _cuda(
    x: Tensor, up: Tensor, down: Tensor, offsets: Tensor, activation: str, keep_hidden: bool
) -> tuple[Tensor, Tensor]:
    _validate(x, up, down, offsets, activation)
    if not _takes_grouped_mm(x, up, down):
        return _loop(x, up, down, offsets, activation, keep_hidden)
    stops = offsets.int()
    hidden = _grouped_mm(x.contiguous(), up, stops)
    active = hidden.new_empty(x.shape[0], down.shape[1])
    _activate(hidden, activation, active)
    y = _grouped_mm(active, down, stops)
    y.masked_fill_(_past(stops, x.shape[0]), 0)
    return y, hidden if keep_hidden else hidden.new_empty(0)


def _backward_cuda(
    grad: Tensor,
    x: Tensor,
    up: Tensor,
    down: Tensor,
    hidden: Tensor,
    offsets: Tensor,
    activation: str,
    for_x: bool,
    for_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _validate_backward(grad, x, up, down, hidden, offsets, activation)
    arguments = (x, up, down, hidden, offsets, activation, for_x, for_weights)
    if not _takes_grouped_mm(x, up, down):
        return _loop_backward(grad, *arguments)
    stops, x, grad = offsets.int(), x.contiguous(), grad.contiguous()  # a gradient of stride 0 is refused
    hidden = hidden if hidden.dim() == 2 else _grouped_mm(x, up, stops)
    grad_active = _grouped_mm(grad, down.transpose(1, 2), stops)
    active, grad_hidden = torch.empty_like(grad_active), torch.empty_like(hidden)
    _activate_backward(hidden, activation, grad_active, active, grad_hidden)
    grad_x = grad_up = grad_down = x.new_empty(0)
    if for_weights:
        grad_down = _grouped_mm(active.t(), grad, stops)
        grad_up = _grouped_mm(x.t(), grad_hidden, stops)
    if for_x:
        grad_x = _grouped_mm(grad_hidden, up.transpose(1, 2), stops)
        grad_x.masked_fill_(_past(stops, x.shape[0]), 0)
    return grad_x, grad_up, grad_down


def _past(stops: Tensor, rows: int) -> Tensor:
    """[R,1] bool: the rows past the last offset, found without waiting for the device."""
    return (torch.arange(rows, device=stops.device) >= stops[-1])[:, None]


def _fake(
    x: Tensor, up: Tensor, down: Tensor, offsets: Tensor, activation: str, keep_hidden: bool
) -> tuple[Tensor, Tensor]:
    _validate(x, up, down, offsets, activation)
    hidden = x.new_empty(x.shape[0], up.shape[2]) if keep_hidden else x.new_empty(0)
    return x.new_empty(x.shape[0], down.shape[2]), hidden


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    up: Tensor,
    down: Tensor,
    hidden: Tensor,
    offsets: Tensor,
    activation: str,
    for_x: bool,
    for_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _validate_backward(grad, x, up, down, hidden, offsets, activation)
    nothing = x.new_empty(0)
    weights = (up.new_empty(up.shape), down.new_empty(down.shape)) if for_weights else (nothing, nothing)
    return x.new_empty(x.shape) if for_x else nothing, *weights


class _Gradient(Gradient):
    @staticmethod
    def save(ctx: Any, args: Any, out: Any) -> None:
        x, up, down, offsets, ctx.activation, _ = args
        ctx.save_for_backward(x, up, down, offsets, out[1])
        ctx.mark_non_differentiable(out[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _hidden: Tensor) -> Any:
        x, up, down, offsets, hidden = ctx.saved_tensors
        for_x, for_up, for_down = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # create_graph: the derivative must have one itself
            # Copies in the graph's eyes: one of the three may itself depend on another, whose part the engine adds.
            x, up, down = (t.view_as(t) for t in (x, up, down))
            wanted = [t for t, needed in zip((x, up, down), ctx.needs_input_grad, strict=False) if needed]
            y = expert_ffn_reference(x, up, down, offsets, ctx.activation)
            found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
            return *(next(found) if needed else None for needed in (for_x, for_up, for_down)), None, None, None
        grads = _backward_op(grad, x, up, down, hidden, offsets, ctx.activation, for_x, for_up or for_down)
        needed = (for_x, for_up, for_down)
        return *(g if n else None for g, n in zip(grads, needed, strict=True)), None, None, None


_options = {"activation": tuple(PARTS)}
_op = register(_SCHEMA, cpu=_cpu, cuda=_cuda, fake=_fake, gradient=_Gradient, options=_options)
_backward_op = register(
    _BACKWARD_SCHEMA,
    cpu=_backward_cpu,
    cuda=_backward_cuda,
    fake=_backward_fake,
    gradient="expert_ffn: the gradient of its gradient is taken by expert_ffn itself",
    options=_options,
)
