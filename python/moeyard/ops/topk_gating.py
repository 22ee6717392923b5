"""topk_gating: from router logits to chosen experts, their weights and the sums that auxiliary losses need.

    s = score(x)                      softmax, sigmoid or sqrt(softplus), elementwise or over E
    v = s + selection_bias            the selection value; x itself (+ bias) for "softmax_topk"
    i_1 .. i_k = the k best of v      descending, equal values by lower index
    w_j = scale * s[i_j] / Z          Z = sum_j s[i_j] with `renormalize`, else 1
    "softmax_topk":  w = scale * softmax(x[i_1 .. i_k])

Shape letters: T tokens, E experts, k experts per token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeyard import _native
from moeyard.ops import _check
from moeyard.ops._register import DTYPE_CODE, Gradient, address, compute_dtype, contiguous, device_and_stream, register

SCORES = ("softmax", "softmax_topk", "sigmoid", "sqrtsoftplus")
FORCED_WEIGHTS = ("score", "one")
MAX_EXPERTS = 8192
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_SCHEMA = (
    "topk_gating(Tensor logits, int k, str score, bool renormalize, Tensor? selection_bias, int? num_groups, "
    "int? topk_groups, int group_score_experts, float scale, Tensor? mask, Tensor? forced_experts, "
    "str forced_weights) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "topk_gating_backward(Tensor logits, Tensor experts, str score, bool renormalize, float scale, Tensor? mask, "
    "Tensor? grad_weights, Tensor? grad_score_sum, Tensor? grad_weight_sum, "
    "Tensor? grad_logsumexp_sq, Tensor? grad_entropy_sum) -> Tensor"
)


class Gating(NamedTuple):
    """What `topk_gating` returns. Floats are float32, for float64 logits float64; all but the integers carry gradients.

    The sums run over the rows whose mask is True.
    """

    weights: Tensor
    """[T, k] weight of each chosen expert."""
    experts: Tensor
    """[T, k] int32 ids in descending order of selection value; -1 in padding rows."""
    counts: Tensor
    """[E] int32: how many slots chose each expert."""
    score_sum: Tensor
    """[E] column sums of the scores of all experts (for "softmax_topk" of the softmax over all)."""
    weight_sum: Tensor
    """[E] column sums of the weights: the importance of each expert."""
    logsumexp_sq: Tensor
    """[] sum of logsumexp(logits)^2: T times the z-loss."""
    entropy_sum: Tensor
    """[] sum of the entropies, in nats, of the softmax over all experts."""


def topk_gating(
    logits: Tensor,
    k: int,
    *,
    score: str = "softmax",
    renormalize: bool = False,
    selection_bias: Tensor | None = None,
    num_groups: int | None = None,
    topk_groups: int | None = None,
    group_score_experts: int = 2,
    scale: float = 1.0,
    mask: Tensor | None = None,
    forced_experts: Tensor | None = None,
    forced_weights: str = "score",
) -> Gating:
    """Chooses k experts per row and weighs them, with the statistics of the auxiliary losses from the same pass.

    A logit of -inf masks an expert: score, weight and gradient 0. Masked experts, NaN logits and experts whose bias is
    -inf are chosen only when nothing else is left, lowest index first; the k ids of a row are always distinct. +inf
    counts as the largest finite number. A NaN logit has weight 0, and makes `logsumexp_sq`, its column of `score_sum`
    and its own gradient NaN, so that a diverged run is seen.

    Args:
        logits: [T, E] float32, bfloat16, float16 or float64; 1 <= E <= 8192.
        k: experts per row, 1 <= k <= E.
        score: "softmax" over all experts; "softmax_topk": the k best logits, then the softmax over those; "sigmoid";
            "sqrtsoftplus": sqrt(log(1 + exp(x))).
        renormalize: divide the chosen scores by their sum (0 when the sum is 0). Changes nothing for "softmax_topk".
        selection_bias: [E] any float dtype; added to the selection value, never to the weight; gets no gradient.
        num_groups, topk_groups: experts stand in `num_groups` equal consecutive groups, and only the best `topk_groups`
            stay eligible (ties: lower index). Both or neither; k <= topk_groups * E / num_groups.
        group_score_experts: a group's value is the sum of this many of its best selection values.
        scale: a finite number that multiplies all weights.
        mask: [T] bool; False = padding: ids -1, weights 0, in no statistic, no gradient.
        forced_experts: int32 or int64 ids, [T] for slot 0 or [T, k]; -1 = choose freely. Forced slots keep their place,
            whatever groups are kept; free slots follow in order without repeating a forced id.
        forced_weights: "score": weights from the scores of the experts, forced or not; "one": scale / k for every slot
            (needs `forced_experts`), which then carries no gradient.

    Returns:
        `Gating(weights, experts, counts, score_sum, weight_sum, logsumexp_sq, entropy_sum)`.

    Raises:
        TypeError, ValueError: wrong types, dtypes, shapes, devices or options; a NaN in `selection_bias`; an id outside
            [-1, E) or a repeated one in `forced_experts` (rows with mask False are not looked at). On a GPU such an id
            counts as -1 and a NaN as -inf, and `check_device_errors` tells of it.

    Determinism: bit-identical over runs, threads and SIMD levels; CPU and CUDA give the same integers. Without bias and
    groups the choice is made on the raw logits (all scores are monotone), otherwise on scores that both devices compute
    with the same rounding. Autocast: logits keep their dtype; everything is computed in float32 (float64 for float64).
    Gradient: first order, for `logits`.

    Source: Shazeer et al. 2017 (arXiv:1701.06538, importance), Fedus et al. 2021 (arXiv:2101.03961, load balancing),
    Zoph et al. 2022 (arXiv:2202.08906, z-loss), DeepSeek-AI 2024 (arXiv:2412.19437, sigmoid scores, bias, groups).
    """
    if isinstance(selection_bias, Tensor) and selection_bias.requires_grad:
        selection_bias = selection_bias.detach()
    groups = (num_groups, topk_groups, group_score_experts)
    return Gating(
        *_op(logits, k, score, renormalize, selection_bias, *groups, scale, mask, forced_experts, forced_weights)
    )


# ---- checks shared by the devices and the fake -----------------------------------------------------------------------


def _check_scale(scale: float, compute: torch.dtype) -> None:
    if isinstance(scale, (int, float)) and not abs(scale) <= torch.finfo(compute).max:
        raise ValueError(f"scale: expected a finite number in {compute}, got {scale}")


def _check_groups(E: int, k: int, num_groups: int | None, topk_groups: int | None, group_score_experts: int) -> None:
    if num_groups is None or topk_groups is None:
        if num_groups is not topk_groups:
            raise ValueError(f"num_groups, topk_groups: expected both or neither, got {num_groups} and {topk_groups}")
        if group_score_experts < 1:
            raise ValueError(f"group_score_experts: expected at least 1, got {group_score_experts}")
        return
    if num_groups < 1 or E % num_groups != 0:
        raise ValueError(f"num_groups: expected a divisor of the {E} experts, got {num_groups}")
    size = E // num_groups
    if not 1 <= topk_groups <= num_groups:
        raise ValueError(f"topk_groups: expected 1 to {num_groups} (num_groups), got {topk_groups}")
    if k > topk_groups * size:
        raise ValueError(f"k: expected at most {topk_groups * size} ({topk_groups} groups of {size} experts), got {k}")
    if not 1 <= group_score_experts <= size:
        raise ValueError(f"group_score_experts: expected 1 to {size} (experts per group), got {group_score_experts}")


def _validate(
    logits: Tensor,
    k: int,
    score: str,
    selection_bias: Tensor | None,
    groups: tuple[int | None, int | None, int],
    scale: float,
    mask: Tensor | None,
    forced_experts: Tensor | None,
    forced_weights: str,
) -> None:
    _check.dtype("logits", logits, _DTYPES)
    _check.rank("logits", logits, ("T", "E"))
    T, E = logits.shape
    if not 1 <= E <= MAX_EXPERTS:
        raise ValueError(f"logits: expected 1 to {MAX_EXPERTS} experts (columns), got {E}")
    if isinstance(T, int) and T > 2**31 - 1:
        raise ValueError(f"logits: expected at most 2^31 - 1 rows (counts are int32), got {T}")
    if not 1 <= k <= E:
        raise ValueError(f"k: expected 1 to {E} (the number of experts), got {k}")
    _check.option("score", score, SCORES)
    _check_groups(E, k, *groups)
    if scale != 1.0:
        _check_scale(scale, compute_dtype(logits.dtype))
    if selection_bias is not None:
        _check.dtype("selection_bias", selection_bias, _DTYPES)
        _check.shape("selection_bias", selection_bias, [E])
    if mask is not None:
        _check.dtype("mask", mask, [torch.bool])
        _check.shape("mask", mask, [T])
    _check.option("forced_weights", forced_weights, FORCED_WEIGHTS)
    if forced_experts is not None:
        _check.dtype("forced_experts", forced_experts, [torch.int32, torch.int64])
        _check.shape("forced_experts", forced_experts, [T] if forced_experts.dim() == 1 else [T, k])
    elif forced_weights == "one":
        raise ValueError('forced_weights: "one" needs forced_experts, got None')


def _validate_backward(
    logits: Tensor, experts: Tensor, score: str, scale: float, mask: Tensor | None, grads: tuple[Tensor | None, ...]
) -> None:
    _check.rank("logits", logits, ("T", "E"))
    _check.dtype("experts", experts, [torch.int32])
    _check.shape("experts", experts, [logits.shape[0], "k"])
    _validate(logits, experts.shape[1], score, None, (None, None, 1), scale, mask, None, "score")
    E = logits.shape[1]
    shapes: tuple[list[int], ...] = (list(experts.shape), [E], [E], [], [])
    names = ("grad_weights", "grad_score_sum", "grad_weight_sum", "grad_logsumexp_sq", "grad_entropy_sum")
    for name, grad, shape in zip(names, grads, shapes, strict=True):
        if grad is not None:
            _check.dtype(name, grad, [compute_dtype(logits.dtype)])
            _check.shape(name, grad, shape)


# ---- devices ---------------------------------------------------------------------------------------------------------


def _outputs(logits: Tensor, k: int) -> tuple[Tensor, ...]:
    T, E = logits.shape
    weights = logits.new_empty(T, k, dtype=compute_dtype(logits.dtype))
    experts = logits.new_empty(T, k, dtype=torch.int32)
    counts, score_sum, logsumexp_sq = experts.new_empty(E), weights.new_empty(E), weights.new_empty(size=())
    weight_sum, entropy_sum = torch.empty_like(score_sum), torch.empty_like(logsumexp_sq)
    return weights, experts, counts, score_sum, weight_sum, logsumexp_sq, entropy_sum


def _prepare(
    logits: Tensor,
    k: int,
    score: str,
    renormalize: bool,
    selection_bias: Tensor | None,
    num_groups: int | None,
    topk_groups: int | None,
    group_score_experts: int,
    scale: float,
    mask: Tensor | None,
    forced_experts: Tensor | None,
    forced_weights: str,
) -> tuple[Any, tuple[Tensor | None, ...], tuple[Tensor, ...]]:
    """The native problem, inputs and outputs: to be held until the call."""
    groups = (num_groups, topk_groups, group_score_experts)
    _validate(logits, k, score, selection_bias, groups, scale, mask, forced_experts, forced_weights)
    T, E = logits.shape
    bias = None if selection_bias is None else selection_bias.to(compute_dtype(logits.dtype)).contiguous()
    forced = None if forced_experts is None else forced_experts.to(torch.int64).contiguous()
    problem = _native.cpu.GatingProblem(
        DTYPE_CODE[logits.dtype],
        T,
        E,
        k,
        SCORES.index(score),
        renormalize,
        scale,
        num_groups or 0,
        topk_groups or 0,
        group_score_experts,
        0 if forced is None else 1 if forced.dim() == 1 else k,
        forced_weights == "one",
    )
    return problem, (logits.contiguous(), bias, contiguous(mask), forced), _outputs(logits, k)


def _cpu(*args: Any) -> tuple[Tensor, ...]:
    problem, inputs, out = _prepare(*args)
    addresses = [*map(address, inputs), *[o.data_ptr() for o in out]]
    _native.cpu.topk_gating(problem, *[*addresses, torch.get_num_threads()])
    return out


def _cuda(logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
    problem, inputs, out = _prepare(logits, *args)
    native, (device, stream) = _native.cuda(), device_and_stream(logits)
    workspace = logits.new_empty(native.topk_gating_workspace(problem), dtype=torch.uint8)
    native.topk_gating(
        problem,
        *map(address, inputs),
        *map(address, out),
        workspace.data_ptr(),
        native.device_errors(device),
        device,
        stream,
    )
    return out


def _prepare_backward(
    logits: Tensor,
    experts: Tensor,
    score: str,
    renormalize: bool,
    scale: float,
    mask: Tensor | None,
    *grads: Tensor | None,
) -> tuple[Any, tuple[Tensor | None, ...], Tensor]:
    _validate_backward(logits, experts, score, scale, mask, grads)
    T, E = logits.shape
    problem = _native.cpu.GatingProblem(
        DTYPE_CODE[logits.dtype],
        T,
        E,
        experts.shape[1],
        SCORES.index(score),
        renormalize,
        scale,
    )
    logits = logits.contiguous()
    inputs = (logits, experts.contiguous(), contiguous(mask), *map(contiguous, grads))
    return problem, inputs, torch.empty_like(logits)


def _cpu_backward(*args: Any) -> Tensor:
    problem, inputs, grad_logits = _prepare_backward(*args)
    addresses = [*map(address, inputs), grad_logits.data_ptr()]
    _native.cpu.topk_gating_backward(problem, *[*addresses, torch.get_num_threads()])
    return grad_logits


def _cuda_backward(logits: Tensor, *args: Any) -> Tensor:
    problem, inputs, grad_logits = _prepare_backward(logits, *args)
    native, (device, stream) = _native.cuda(), device_and_stream(logits)
    native.topk_gating_backward(
        problem, *map(address, inputs), grad_logits.data_ptr(), native.device_errors(device), device, stream
    )
    return grad_logits


def _fake(
    logits: Tensor,
    k: int,
    score: str,
    renormalize: bool,
    selection_bias: Tensor | None,
    num_groups: int | None,
    topk_groups: int | None,
    group_score_experts: int,
    scale: float,
    mask: Tensor | None,
    forced_experts: Tensor | None,
    forced_weights: str,
) -> tuple[Tensor, ...]:
    groups = (num_groups, topk_groups, group_score_experts)
    _validate(logits, k, score, selection_bias, groups, scale, mask, forced_experts, forced_weights)
    return _outputs(logits, k)


def _fake_backward(
    logits: Tensor,
    experts: Tensor,
    score: str,
    renormalize: bool,
    scale: float,
    mask: Tensor | None,
    *grads: Tensor | None,
) -> Tensor:
    _validate_backward(logits, experts, score, scale, mask, grads)
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


# ---- gradient --------------------------------------------------------------------------------------------------------


class _Gradient(Gradient):
    @staticmethod
    def save(ctx: Any, args: Any, out: Any) -> None:
        logits, _, score, renormalize, _, _, _, _, scale, mask, _, forced_weights = args
        weights, experts, counts, _, weight_sum, _, _ = out
        ctx.save_for_backward(logits, experts, mask)
        ctx.options = (score, renormalize, scale)
        ctx.set_materialize_grads(False)
        constant = (weights, weight_sum) if forced_weights == "one" else ()
        ctx.mark_non_differentiable(experts, counts, *constant)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        logits, experts, mask = ctx.saved_tensors
        score, renormalize, scale = ctx.options
        weights, _, _, score_sum, weight_sum, logsumexp_sq, entropy_sum = grads
        grad_logits = _backward_op(
            logits,
            experts,
            score,
            renormalize,
            scale,
            mask,
            weights,
            score_sum,
            weight_sum,
            logsumexp_sq,
            entropy_sum,
        )
        return (grad_logits, *[None] * 11)


_OPTIONS = {"score": SCORES, "forced_weights": FORCED_WEIGHTS}
_op = register(_SCHEMA, cpu=_cpu, cuda=_cuda, fake=_fake, gradient=_Gradient, options=_OPTIONS)
_backward_op = register(
    _BACKWARD_SCHEMA,
    cpu=_cpu_backward,
    cuda=_cuda_backward,
    fake=_fake_backward,
    gradient="topk_gating: second derivatives are not supported",
    options=_OPTIONS,
)
