"""transformers 5: our permutation and expert networks behind its experts hook, our gating behind its routers.

    register()
    model = AutoModelForCausalLM.from_config(config, experts_implementation="moeyard")  # from_pretrained takes it too
    with use_moeyard_gate(model):
        ...

A model that exists already changes over with `model.set_experts_implementation("moeyard")`, and back with "eager".

Shape letters: T tokens, k experts per token, E experts, H features, I hidden features, R = T * k rows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from importlib import metadata
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moeyard.nn import expert_ffn
from moeyard.ops import permute_tokens, plan_permutation, topk_gating, unpermute_tokens

__all__ = ["experts_forward", "register", "use_moeyard_gate"]

_HOOK = "transformers.integrations.moe"
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: Activation classes of transformers that `expert_ffn` knows, for experts with a gate and without.
_GATED = {"SiLU": "swiglu", "SiLUActivation": "swiglu"}
_PLAIN = {"GELUActivation": "gelu", "ReLU": "relu"}


def register(name: str = "moeyard") -> None:
    """Makes `experts_implementation=name` known to transformers. Calling it again changes nothing.

    Raises:
        ImportError: transformers is missing, or older than 5.0 and without the hook.
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        try:
            found = metadata.version("transformers")
        except metadata.PackageNotFoundError:
            found = "none"
        raise ImportError(
            f"register: expected transformers 5.0 or newer, which lets experts be replaced ({_HOOK}), got {found}: "
            'pip install "transformers>=5"'
        ) from error
    ALL_EXPERTS_FUNCTIONS.register(name, experts_forward)


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of an experts module of transformers: what `register` registers.

    Args:
        module: stacked weights `gate_up_proj` (or `up_proj`) and `down_proj`, and what `use_experts_implementation`
            says of them: `is_transposed`, `is_concatenated`, `has_gate`, `has_bias`, `has_post_expert_norm`.
        hidden_states: [T,H] float.
        top_k_index: [T,k] integer ids; ids from E on belong to other ranks of an expert-parallel model and add nothing.
        top_k_weights: [T,k] float.

    Returns:
        [T,H] in the dtype of `hidden_states`; rows are summed in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: weights that are missing or no floats (quantised experts bring an implementation of their
            own), an interleaved layout whose class has no `_apply_gate`.

    Determinism: that of the matrix products. Gradient: any order.
    """
    experts = module.num_experts
    plan = plan_permutation(top_k_index.masked_fill(top_k_index >= experts, -1), experts)
    rows = permute_tokens(hidden_states, plan)
    layout = _layout(module)
    if layout.activation is None:
        rows = _one_by_one(module, layout, rows, plan.offsets)
    else:
        up, down = layout.up, layout.down
        if not layout.transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        rows = expert_ffn(rows, up, down, plan.offsets, layout.activation)
    # Under autocast the products come in a half type: the weighted sum is taken in the caller's.
    return unpermute_tokens(rows.to(hidden_states.dtype), plan, top_k_weights)


class _Layout(NamedTuple):
    up: Tensor  # [E,2I,H], [E,I,H], or transposed
    down: Tensor  # [E,H,I], or transposed
    biases: tuple[Tensor, Tensor] | None
    transposed: bool
    gate: Callable[[Tensor], Tensor]  # from the first product's features to I
    activation: str | None  # that of `expert_ffn`, None for experts with anything that it does not have


def _layout(module: Any) -> _Layout:
    """What the hook says of the weights; flags that an older 5.x does not set have their default."""
    gated, biased = getattr(module, "has_gate", True), getattr(module, "has_bias", False)
    custom = gated and type(module)._apply_gate.__module__ != _HOOK
    if gated and not custom and not getattr(module, "is_concatenated", True):
        raise ValueError(
            f"is_concatenated=False: expected an `_apply_gate` of {type(module).__name__}'s own, which knows how gate "
            "and value interleave, got none"
        )
    name = "gate_up_proj" if gated else "up_proj"
    activation = None
    if not (biased or custom or getattr(module, "has_post_expert_norm", False)):
        activation = (_GATED if gated else _PLAIN).get(type(module.act_fn).__name__)
    return _Layout(
        up=_weight(module, name, 3),
        down=_weight(module, "down_proj", 3),
        biases=(_weight(module, f"{name}_bias", 2), _weight(module, "down_proj_bias", 2)) if biased else None,
        transposed=getattr(module, "is_transposed", False),
        gate=module._apply_gate if gated else module.act_fn,
        activation=activation,
    )


def _weight(module: Any, name: str, dims: int) -> Tensor:
    weight = getattr(module, name, None)
    where = f"{type(module).__name__}.{name}"
    if not isinstance(weight, Tensor):
        raise TypeError(f"{where}: expected one tensor for all experts, got {type(weight).__name__}")
    if weight.dtype not in _FLOATS or weight.dim() != dims:
        raise TypeError(f"{where}: expected {dims} dimensions of floats, got {list(weight.shape)} of {weight.dtype}")
    return weight


def _one_by_one(module: Any, layout: _Layout, rows: Tensor, offsets: Tensor) -> Tensor:
    """Biases, norms and gates of any kind, expert by expert in differentiable torch."""
    # unbind: its backward stacks E gradients once, where indexing would add E full-size ones.
    ups, downs = layout.up.unbind(), layout.down.unbind()
    none = (None,) * len(ups)
    up_biases, down_biases = (b.unbind() for b in layout.biases) if layout.biases else (none, none)
    pieces, start = [], 0
    for e, stop in enumerate(offsets.tolist()):
        # Expert 0 runs over no rows as well: weights of a batch without rows have zero gradients, not None.
        if stop > start or e == 0:
            hidden = layout.gate(_linear(rows[start:stop], ups[e], up_biases[e], layout.transposed))
            pieces.append(_linear(hidden, downs[e], down_biases[e], layout.transposed))
        start = stop
    out = torch.cat(pieces)
    if getattr(module, "has_post_expert_norm", False):
        out = module.post_expert_norm(out)
    return torch.cat([out, out.new_zeros(rows.shape[0] - start, out.shape[1])])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return nn.functional.linear(x, weight.t() if transposed else weight, bias)


# ---- routers ---------------------------------------------------------------------------------------------------------


def use_moeyard_gate(model: nn.Module) -> ExitStack:
    """Lets the routers of a transformers model choose their experts by `topk_gating`.

    The same experts and weights; those of a token stand in descending order, and of equal scores the lower expert wins.
    For the routers of Mixtral, MiniMax, Qwen2-MoE, Qwen3-MoE, Qwen3-Next, OLMoE, FlexOlmo, DeepSeek-V3, GLM-4-MoE and
    dots.1.

    Args:
        model: any module that contains such routers.

    Returns:
        A context manager; leaving it, or calling its `close()`, brings the routers' own forward back. Dropping it keeps
        the gate in place.

    Raises:
        ValueError: no router that is known; the message names those that are there.
    """
    routers = [m for m in model.modules() if type(m).__name__ in _GATES]
    if not routers:
        there = sorted({type(m).__name__ for m in model.modules() if "Router" in type(m).__name__}) or ["none"]
        raise ValueError(f"model: expected a router among {', '.join(_GATES)}, got {', '.join(there)}")
    undo = ExitStack()
    for router in routers:
        undo.callback(_restore, router, router.__dict__.get("forward"))
        router.forward = MethodType(_GATES[type(router).__name__], router)
    return undo


def _restore(router: nn.Module, forward: Any) -> None:
    del router.forward
    if forward is not None:
        router.forward = forward


def _mixtral(router: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax, renormalised; the weights stay in float32."""
    logits = nn.functional.linear(hidden_states.reshape(-1, router.hidden_dim), router.weight)
    # To float32 as the router does: a float64 model shall get the same numbers.
    gating = topk_gating(logits.float(), router.top_k, renormalize=True)
    return logits, gating.weights, gating.experts.long()


def _qwen(router: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax, renormalised where the config says so; the weights take the logits' dtype."""
    logits = nn.functional.linear(hidden_states.reshape(-1, router.hidden_dim), router.weight)
    renormalize = getattr(router, "norm_topk_prob", True)
    gating = topk_gating(logits.float(), router.top_k, renormalize=renormalize)
    return logits, gating.weights.to(logits.dtype), gating.experts.long()


def _deepseek(router: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sigmoid scores, chosen with a bias among the best groups."""
    logits = nn.functional.linear(hidden_states.reshape(-1, router.hidden_dim).float(), router.weight.float())
    gating = topk_gating(
        logits,
        router.top_k,
        score="sigmoid",
        renormalize=router.norm_topk_prob,
        selection_bias=router.e_score_correction_bias,
        num_groups=router.num_group,
        topk_groups=router.topk_group,
        scale=float(router.routed_scaling_factor),
    )
    return logits, gating.weights, gating.experts.long()


_GATES: dict[str, Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "MixtralTopKRouter": _mixtral,
    "MiniMaxTopKRouter": _mixtral,
    "Qwen2MoeTopKRouter": _qwen,
    "Qwen3MoeTopKRouter": _qwen,
    "Qwen3NextTopKRouter": _qwen,
    "OlmoeTopKRouter": _qwen,
    "FlexOlmoTopKRouter": _qwen,
    "DeepseekV3TopkRouter": _deepseek,
    "Glm4MoeTopkRouter": _deepseek,
    "Dots1TopkRouter": _deepseek,
}
