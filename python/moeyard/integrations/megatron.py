"""`permute`, `unpermute` and `topk_routing_with_score_function` as megatron-core 0.16 has them; Megatron is not needed.

    from moeyard.integrations.megatron import permute, topk_routing_with_score_function, unpermute

    probs, routing_map = topk_routing_with_score_function(logits, topk=2)
    rows, _, sorted_indices = permute(tokens, routing_map)
    out = unpermute(experts(rows), sorted_indices, tokens.shape, probs, routing_map)

The signatures are those of `megatron/core/transformer/moe/moe_utils.py`, through which Megatron also reaches
Transformer Engine's (`fused=True`). Here `fused` is accepted and changes nothing: there is one implementation.

Shape letters: T tokens, H features, E experts, R rows, C capacity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moeyard.ops import PermutationPlan, _check, permute_tokens, plan_permutation, topk_gating, unpermute_tokens

__all__ = ["permute", "topk_routing_with_score_function", "unpermute"]


def permute(
    tokens: Tensor,
    routing_map: Tensor,
    probs: Tensor | None = None,
    num_out_tokens: int | None = None,
    fused: bool = False,
    drop_and_pad: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Copies every token to a row of each of its experts; rows lie sorted by expert, then by token.

    Args:
        tokens: [T,H] of any dtype of 1, 2, 4 or 8 bytes.
        routing_map: [T,E] bool or integer, nonzero where a token goes to an expert.
        probs: [T,E] the weight of each.
        num_out_tokens: with `drop_and_pad` E * C; else not needed, as the map says how many rows there are.
        fused: accepted and not needed.
        drop_and_pad: every expert has exactly C rows: the first C tokens of its column, and where it has fewer, the
            first tokens that it does not have.

    Returns:
        The rows [R,H], their weights [R] (None without `probs`), and `sorted_indices` [R] int64, the token of each row.

    Raises:
        TypeError, ValueError: shapes that do not fit; `drop_and_pad` without a `num_out_tokens` divisible by E.

    Determinism: bit-identical for any number of threads. Gradients for `tokens` and `probs`.
    """
    _check.rank("tokens", tokens, ("T", "H"))
    _check.shape("routing_map", routing_map, (tokens.shape[0], "E"))
    experts, sorted_indices = _rows(routing_map, num_out_tokens, drop_and_pad)
    permuted_probs = None
    if probs is not None:
        _check.shape("probs", probs, routing_map.shape)
        permuted_probs = probs[sorted_indices, experts]
    return permute_tokens(tokens, _plan(sorted_indices, tokens.shape[0])), permuted_probs, sorted_indices


def unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    restore_shape: Sequence[int],
    probs: Tensor | None = None,
    routing_map: Tensor | None = None,
    fused: bool = False,
    drop_and_pad: bool = False,
) -> Tensor:
    """Sums every token's rows, each multiplied by its weight.

    Args:
        permuted_tokens: [R,H] float32, float64, float16 or bfloat16.
        sorted_indices: [R] int64 from `permute`.
        restore_shape: (T, H).
        probs: [T,E] weights; None is 1 for every row.
        routing_map: [T,E], the map that `permute` took; needed with `probs`.
        fused: accepted and not needed.
        drop_and_pad: as in `permute`.

    Returns:
        [T,H] in the dtype of `permuted_tokens`; a token without a row is zero.

    Raises:
        TypeError, ValueError: shapes that do not fit, `probs` without `routing_map`, a token outside [0, T).

    Determinism: sums in row order in float32 (float64 for float64), bit-identical for any number of threads. Gradients
    for `permuted_tokens` and `probs`.
    """
    tokens, features = restore_shape
    _check.shape("permuted_tokens", permuted_tokens, ("R", features))
    _check.shape("sorted_indices", sorted_indices, [permuted_tokens.shape[0]])
    plan = _plan(sorted_indices, tokens)
    if probs is None:
        return unpermute_tokens(permuted_tokens, plan)
    if routing_map is None:
        raise ValueError("routing_map: expected the map that permute took, since probs are given, got None")
    _check.shape("probs", probs, (tokens, "E"))
    _check.shape("routing_map", routing_map, probs.shape)
    experts, _ = _rows(routing_map, sorted_indices.shape[0], drop_and_pad)
    _check.shape("sorted_indices (of this routing_map)", sorted_indices, experts.shape)
    weights = probs.new_zeros(plan.row_of_slot.numel())
    # Rows without a slot do not occur, so each slot is set once and the gradient of probs is a plain gather.
    weights = weights.index_put((plan.slot_of_row.long(),), probs[sorted_indices, experts])
    return unpermute_tokens(permuted_tokens, plan, weights.reshape(plan.row_of_slot.shape))


def topk_routing_with_score_function(
    logits: Tensor,
    topk: int,
    use_pre_softmax: bool = False,
    num_groups: int | None = None,
    group_topk: int | None = None,
    scaling_factor: float | None = None,
    score_function: str = "softmax",
    expert_bias: Tensor | None = None,
    fused: bool = False,
    router_replay: Any = None,
) -> tuple[Tensor, Tensor]:
    """Chooses `topk` experts per token and weighs them.

    Args:
        logits: [T,E] float32, bfloat16, float16 or float64.
        topk: k, experts per token.
        use_pre_softmax: softmax over all experts before the choice; False: over the chosen ones, so they sum to 1.
        num_groups, group_topk: choose among the best `group_topk` of `num_groups` equal groups, a group's value being
            the sum of its k // group_topk best.
        scaling_factor: multiplies the weights; None and 0 are 1.
        score_function: "softmax", or "sigmoid", whose weights are divided by their sum for k > 1.
        expert_bias: [E] added to the sigmoid scores for the choice alone.
        fused: accepted and not needed.
        router_replay: must be None; `moeyard.topk_gating` replays with `forced_experts`.

    Returns:
        The weights [T,E] in the logits' dtype, zero where not chosen, and the map [T,E] bool.

    Raises:
        TypeError, ValueError: as `moeyard.topk_gating`; a bias with softmax; a replay.

    Determinism: see `moeyard.topk_gating`; of equal scores the lower expert wins. Scores are not rounded to a half type
    before the choice, so with half logits close calls are decided by the logits themselves.
    """
    _check.option("score_function", score_function, ("softmax", "sigmoid"))
    sigmoid = score_function == "sigmoid"
    if router_replay is not None:
        raise ValueError(f"router_replay: expected None (see forced_experts of topk_gating), got {router_replay!r}")
    if expert_bias is not None and not sigmoid:
        raise ValueError('expert_bias: expected None unless score_function="sigmoid", got a tensor')
    groups: dict[str, int | None] = {}
    if group_topk:
        groups = {"num_groups": num_groups, "topk_groups": group_topk, "group_score_experts": topk // group_topk}
    gating = topk_gating(
        logits,
        topk,
        score="sigmoid" if sigmoid else "softmax" if use_pre_softmax else "softmax_topk",
        renormalize=sigmoid and topk > 1,
        selection_bias=expert_bias,
        scale=float(scaling_factor or 1.0),
        **groups,  # type: ignore[arg-type]  # None only where num_groups is missing, which topk_gating reports
    )
    chosen = gating.experts.long()
    probs = torch.zeros_like(logits).scatter(1, chosen, gating.weights.to(logits.dtype))
    return probs, torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, True)


# ---- rows and their plan ---------------------------------------------------------------------------------------------


def _rows(routing_map: Tensor, num_out_tokens: int | None, drop_and_pad: bool) -> tuple[Tensor, Tensor]:
    """The expert and the token of every row, [R] int64 each."""
    by_expert = routing_map.bool().t()
    if not drop_and_pad:
        expert_of_row, token_of_row = by_expert.nonzero(as_tuple=True)
        return expert_of_row, token_of_row
    experts, tokens = by_expert.shape
    if num_out_tokens is None or num_out_tokens % experts or num_out_tokens > experts * tokens:
        limit = experts * tokens
        raise ValueError(
            f"num_out_tokens: expected a multiple of {experts} (experts) up to {limit}, got {num_out_tokens}"
        )
    capacity = num_out_tokens // experts
    # Stable, so that both the tokens of an expert and those that pad it keep their order.
    token_of_row = by_expert.char().argsort(dim=1, descending=True, stable=True)[:, :capacity].flatten()
    return torch.arange(experts, device=token_of_row.device).repeat_interleave(capacity), token_of_row


def _plan(token_of_row: Tensor, tokens: int) -> PermutationPlan:
    """The plan whose row r belongs to token `token_of_row[r]`; a token's slots are its rows in their order."""
    rows = token_of_row.shape[0]
    low, high = (int(token_of_row.min()), int(token_of_row.max())) if rows else (0, -1)
    if low < 0 or high >= tokens:
        raise ValueError(f"sorted_indices: expected tokens from 0 to {tokens - 1}, got {low} to {high}")
    # Rows sorted by token, which is a permutation with tokens in the place of experts.
    by_token = plan_permutation(token_of_row[:, None], max(tokens, 1))
    order, number = by_token.slot_of_row.long(), torch.arange(rows, dtype=torch.int32, device=token_of_row.device)
    k = max(int(by_token.counts.max()), 1)
    slot_of_row = torch.empty_like(by_token.slot_of_row)
    first = by_token.offsets - by_token.counts
    token = token_of_row[order]
    slot_of_row[order] = token.int() * k + number - first[token]
    row_of_slot = slot_of_row.new_full((tokens * k,), -1)
    row_of_slot[slot_of_row.long()] = number
    none = row_of_slot.new_zeros(0)
    return PermutationPlan(row_of_slot.reshape(tokens, k), slot_of_row, none, none, none)
