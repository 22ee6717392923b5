"""The steps of one training batch, each with our op and with plain PyTorch, on the demo's own structures.

    collate -> radius graph -> gate -> permute -> experts -> unpermute

Both sides get the same inputs and their results are compared before anything is timed. No gradients.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from moeyard.data.batching import AtomBudgetBatchSampler
from moeyard.data.structures import StructureTable
from moeyard.nn import Experts
from moeyard.ops import (
    PermutationPlan,
    gather_segments,
    permute_tokens,
    plan_permutation,
    radius_graph,
    topk_gating,
    unpermute_tokens,
)
from moeyard.train.module import random_state_apart

ROUNDS = 7
LONGEST = 2.0  # seconds for one step, then fewer rounds have to do
LARGEST = 10_000  # atoms of a structure whose distances plain PyTorch is asked for


@dataclass(frozen=True)
class StepComparison:
    """Median milliseconds of one step of a batch, ours and plain PyTorch's."""

    step: str
    ours_ms: float
    plain_ms: float

    @property
    def ratio(self) -> float:
        return self.plain_ms / self.ours_ms


@torch.no_grad()
def compare_steps(
    table: StructureTable,
    *,
    max_atoms_per_batch: int,
    cutoff: float,
    dim: int,
    hidden: int,
    num_experts: int,
    experts_per_token: int,
    seed: int = 0,
) -> list[StepComparison]:
    """Times every step of the first batch of `table`, both ways.

    Args:
        table: the structures.
        max_atoms_per_batch: the batch's budget.
        cutoff: of the radius graph, Å; without a limit of neighbours, which plain PyTorch would pay dearly for.
        dim, hidden, num_experts, experts_per_token: sizes of the mixture of experts.
        seed: of the batch, the features and the weights.

    Raises:
        ValueError: the two sides disagree.
    """
    sampler = AtomBudgetBatchSampler(table.sizes, max_atoms_per_batch, shuffle=True, seed=seed, oversize="own_batch")
    index = torch.tensor(next(iter(sampler)))
    atoms = gather_segments(table.positions, table.ptr, index)
    found = [_timed("collate", lambda: atoms_of(table, index), lambda: plain_atoms(table, index))]
    positions, ptr = atoms.values, atoms.ptr
    if int((ptr[1:] - ptr[:-1]).max()) <= LARGEST:
        found.append(
            _timed(
                "radius graph",
                lambda: radius_graph(positions, cutoff, ptr=ptr, geometry=False).edge_index,
                lambda: plain_radius_graph(positions, cutoff, ptr),
            )
        )
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(len(positions), dim, generator=generator)
    logits = torch.randn(len(positions), num_experts, generator=generator)
    gating = topk_gating(logits, experts_per_token, renormalize=True)
    found.append(_timed("gate", lambda: gate(logits, experts_per_token), lambda: plain_gate(logits, experts_per_token)))
    plan = plan_permutation(gating.experts, num_experts)
    found.append(
        _timed("permute", lambda: permute(h, gating.experts, num_experts), lambda: plain_permute(h, gating.experts))
    )
    with random_state_apart():
        torch.manual_seed(seed)
        experts = Experts(num_experts, dim, hidden)
    rows, slots = permute_tokens(h, plan), plan.slot_of_row.long()
    found.append(_timed("experts", lambda: experts(rows, plan.offsets), lambda: plain_experts(experts, rows, plan)))
    found.append(
        _timed(
            "unpermute",
            lambda: unpermute_tokens(rows, plan, gating.weights),
            lambda: plain_unpermute(rows, slots, gating.weights),
        )
    )
    return found


def _timed(step: str, ours: Callable[[], Any], plain: Callable[[], Any]) -> StepComparison:
    try:
        torch.testing.assert_close(ours(), plain(), rtol=1e-4, atol=1e-5)
    except AssertionError as error:
        raise ValueError(f"{step}: ours and plain PyTorch disagree: {error}") from error
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    begun_all = time.perf_counter()
    while len(seconds["ours"]) < ROUNDS and (not seconds["ours"] or time.perf_counter() - begun_all < LONGEST):
        for name, call in (("plain", plain), ("ours", ours)):
            begun = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begun)
    return StepComparison(step, *(1e3 * statistics.median(seconds[name]) for name in ("ours", "plain")))


# ---- ours, in the form that is compared ------------------------------------------------------------------------------


def atoms_of(table: StructureTable, index: Tensor) -> tuple[Tensor, Tensor]:
    """Positions, and the structure of every atom."""
    atoms = gather_segments(table.positions, table.ptr, index)
    return atoms.values, atoms.batch


def gate(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, ids and counts."""
    gating = topk_gating(logits, k, renormalize=True)
    return gating.weights, gating.experts.long(), gating.counts.long()


def permute(h: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    return permute_tokens(h, plan_permutation(experts, num_experts))


# ---- plain PyTorch ---------------------------------------------------------------------------------------------------


def plain_atoms(table: StructureTable, index: Tensor) -> tuple[Tensor, Tensor]:
    parts = [table.positions[table.ptr[i] : table.ptr[i + 1]] for i in index.tolist()]
    lengths = torch.tensor([len(p) for p in parts])
    return torch.cat(parts), torch.repeat_interleave(torch.arange(len(parts)), lengths)


def plain_radius_graph(positions: Tensor, cutoff: float, ptr: Tensor) -> Tensor:
    """All distances within every structure, then those below the cutoff: [2,M], sorted by centre and neighbour."""
    limit = torch.tensor(cutoff, dtype=positions.dtype).square()
    edges = [torch.empty(2, 0, dtype=torch.int64)]
    for start, stop in pairwise(ptr.tolist()):
        x = positions[start:stop]
        for first in range(0, len(x), 1024):  # a large structure's distances would not fit into memory at once
            dx, dy, dz = (x[first : first + 1024, None] - x).unbind(-1)
            centre, neighbour = ((dx * dx + dy * dy) + dz * dz < limit).nonzero(as_tuple=True)
            pairs = torch.stack([neighbour, centre + first])
            edges.append(pairs[:, pairs[0] != pairs[1]] + start)
    return torch.cat(edges, dim=1)


def plain_gate(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    # Chosen by logits: two that differ by a bit can have equal probabilities.
    experts = logits.topk(k, -1).indices
    weights = logits.softmax(-1).gather(1, experts)
    counts = torch.bincount(experts.flatten(), minlength=logits.shape[1])
    return weights / weights.sum(-1, keepdim=True), experts, counts


def plain_permute(h: Tensor, experts: Tensor) -> Tensor:
    return h.index_select(0, experts.flatten().argsort(stable=True) // experts.shape[1])


def plain_experts(experts: Experts, rows: Tensor, plan: PermutationPlan) -> Tensor:
    pieces = []
    for e, part in enumerate(rows.split(plan.counts.tolist())):
        active, value = (part @ experts.up[e]).chunk(2, -1)
        pieces.append((nn.functional.silu(active) * value) @ experts.down[e])
    return torch.cat(pieces)


def plain_unpermute(rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    weighted = rows * weights.flatten()[slots, None]
    return rows.new_zeros(len(weights), rows.shape[1]).index_add(0, slots // weights.shape[1], weighted)
