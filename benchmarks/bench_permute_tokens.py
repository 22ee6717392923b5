"""plan_permutation, permute_tokens, unpermute_tokens beside argsort, index_select, index_add and Megatron-Core."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import _memory
import _peers
import moeyard
from _harness import ONE_CORE, Peer, Suite, cases, line, main
from _machine import all_threads

T, E = 16_384, 64
MOVES = {"k=2 float32": (2, torch.float32), "k=8 bf16": (8, torch.bfloat16)}
H = 1024


@dataclass(frozen=True)
class Routed:
    """A routing and what the peers want of it ready-made: int64 maps, a dense map, touched memory."""

    x: Tensor
    y: Tensor
    experts: Tensor
    weights: Tensor
    plan: moeyard.PermutationPlan
    row_of_slot: Tensor
    token_of_row: Tensor
    weight_of_row: Tensor
    routing_map: Tensor
    probs: Tensor
    touched: Tensor


def routing(seed: int, tokens: int, k: int) -> tuple[Tensor, Tensor]:
    """Distinct experts per token, some busier than others, as a router gives them."""
    random = torch.Generator().manual_seed(seed)
    scores = torch.randn(tokens, E, generator=random) + 0.5 * torch.randn(E, generator=random)
    weights, experts = scores.softmax(-1).topk(k, -1)
    return (weights / weights.sum(-1, keepdim=True)).contiguous(), experts.int()


def tokens_of(suite: Suite) -> int:
    return suite.size(T, T // 4)


def routed(case: str, tokens: int = T) -> Callable[[int], Routed]:
    k, dtype = MOVES[case]

    def make(seed: int) -> Routed:
        weights, experts = routing(seed, tokens, k)
        plan = moeyard.plan_permutation(experts, E)
        random = torch.Generator().manual_seed(seed + 1)
        x = torch.randn(tokens, H, generator=random).to(dtype)
        y = torch.randn(tokens * k, H, generator=random).to(dtype)
        slots = plan.slot_of_row.long()
        routing_map = torch.zeros(tokens, E, dtype=torch.bool).scatter_(1, experts.long(), True)
        probs = torch.zeros(tokens, E).scatter_(1, experts.long(), weights)
        return Routed(
            x, y, experts, weights, plan, plan.row_of_slot.long(), slots // k, weights.flatten()[slots],
            routing_map, probs, torch.ones_like(y),
        )  # fmt: skip

    return make


def argsort_plan(experts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    flat = experts.flatten()
    slot_of_row = flat.argsort(stable=True)
    row_of_slot = torch.empty_like(slot_of_row)
    row_of_slot[slot_of_row] = torch.arange(len(flat))
    return row_of_slot, slot_of_row, torch.bincount(flat, minlength=E)


def same_plan(ours: moeyard.PermutationPlan, theirs: Any, inputs: Any) -> None:
    for mine, other in zip((ours.row_of_slot.flatten(), ours.slot_of_row, ours.counts), theirs, strict=True):
        assert torch.equal(mine.long(), other), "the maps differ"


@cases(1, "all")
def bench_plan(suite: Suite, case: int | str) -> None:
    threads = 1 if case == 1 else all_threads()
    row = "permutation plan, 131,072 assignments, E=64"
    if case == "all" and threads == 1:
        suite.record(f"{row}, all threads", None, "ms", note=ONE_CORE)
        return
    fast = torch.compile(argsort_plan, dynamic=False)
    peers = [
        Peer("stable argsort + bincount + inverse", argsort_plan, same_plan, ">= 8 x" if threads == 1 else None),
        Peer("the same under torch.compile", fast, same_plan),
    ]
    row += f", {threads} threads" if threads > 1 else ""
    suite.compare(
        row, lambda seed: routing(seed, T, 8)[1], lambda x: moeyard.plan_permutation(x, E), peers, threads=threads
    )


def equal(ours: Tensor, theirs: Tensor, inputs: Any) -> None:
    assert torch.equal(ours, theirs), "rows differ"


def same_size(ours: Tensor, theirs: Tensor, inputs: Any) -> None:
    assert ours.shape == theirs.shape


@cases(*MOVES)
def bench_permute(suite: Suite, case: str) -> None:
    peers = [
        Peer("index_select", lambda r: r.x.index_select(0, r.token_of_row), equal, ">= 1 x"),
        Peer("a plain copy into touched memory", lambda r: r.touched.copy_(r.y), same_size, ">= 0.8 x"),
    ]
    row = f"permute, T={tokens_of(suite)} H=1024, {case}"
    suite.compare(row, routed(case, tokens_of(suite)), lambda r: moeyard.permute_tokens(r.x, r.plan), peers)


@cases(*MOVES)
def bench_plan_and_permute(suite: Suite, case: str) -> None:
    """From the routing to permuted rows: Megatron-Core does both in one function."""
    megatron = _peers.optional("megatron.core.transformer.moe.moe_utils")
    k = MOVES[case][0]

    def unfused(r: Routed) -> Tensor:
        rows: Tensor = megatron.permute(r.x, r.routing_map, num_out_tokens=r.experts.numel())[0]
        return rows

    def ours(r: Routed) -> Tensor:
        return moeyard.permute_tokens(r.x, moeyard.plan_permutation(r.experts, E))

    def in_torch(r: Routed) -> Tensor:
        return r.x.index_select(0, argsort_plan(r.experts)[1] // k)

    peers = [
        Peer("argsort + index_select", in_torch, equal),
        Peer("Megatron-Core unfused permute", unfused if megatron else None, equal),
    ]
    suite.compare(f"plan and permute, T={tokens_of(suite)} H=1024, {case}", routed(case, tokens_of(suite)), ours, peers)


def index_add(r: Routed) -> Tensor:
    weighted = r.y * r.weight_of_row.to(r.y.dtype).unsqueeze(-1)
    return torch.zeros_like(r.x).index_add_(0, r.token_of_row, weighted)


def gather_sum(r: Routed) -> Tensor:
    gathered = r.y.index_select(0, r.row_of_slot.flatten()).view(*r.weights.shape, H)
    return (gathered * r.weights.to(r.y.dtype).unsqueeze(-1)).sum(1)


def embedding_bag(r: Routed) -> Tensor:
    return torch.nn.functional.embedding_bag(r.row_of_slot, r.y, mode="sum", per_sample_weights=r.weights.to(r.y.dtype))


def close(ours: Tensor, theirs: Tensor, inputs: Any) -> None:
    # bf16 peers round after every step, ours once at the end.
    loose = 0.1 if ours.dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=loose, atol=loose)


@cases(*MOVES, "k=2 float32, all threads")
def bench_unpermute(suite: Suite, case: str) -> None:
    threads = all_threads() if case.endswith("threads") else 1
    key = case.removesuffix(", all threads")
    megatron = _peers.optional("megatron.core.transformer.moe.moe_utils")

    def unfused(r: Routed) -> Tensor:
        out: Tensor = megatron.unpermute(
            r.y, r.token_of_row, r.x.shape, probs=r.probs.to(r.y.dtype), routing_map=r.routing_map
        )
        return out

    target = ">= 3 x" if threads == 1 else None
    peers = [
        Peer("index_add", index_add, close, target),
        Peer("gather, multiply, sum", gather_sum, close, target),
        Peer("embedding_bag", embedding_bag, close),
        Peer("Megatron-Core unfused unpermute", unfused if megatron else None, close),
    ]
    row = f"unpermute with weights, T={tokens_of(suite)} H=1024, {key}"
    if threads == 1 and key != case:
        suite.record(f"{row}, all threads", None, "ms", note=ONE_CORE)
        return
    row += f", {threads} threads" if threads > 1 else ""
    make = routed(key, tokens_of(suite))
    suite.compare(row, make, lambda r: moeyard.unpermute_tokens(r.y, r.plan, r.weights), peers, threads=threads)


@cases(*MOVES)
def bench_unpermute_backward(suite: Suite, case: str) -> None:
    """Forward and backward, to the rows and to the weights."""

    def make(seed: int) -> Routed:
        r = routed(case, tokens_of(suite))(seed)
        r.y.requires_grad_()
        r.weights.requires_grad_()
        return r

    def ours(r: Routed) -> tuple[Tensor, ...]:
        out = moeyard.unpermute_tokens(r.y, r.plan, r.weights)
        return torch.autograd.grad(out, (r.y, r.weights), r.x)

    def peer(r: Routed) -> tuple[Tensor, ...]:
        return torch.autograd.grad(gather_sum(r), (r.y, r.weights), r.x)

    def same(ours: Any, theirs: Any, r: Any) -> None:
        loose = 0.05 if r.y.dtype == torch.bfloat16 else 1e-3
        for mine, other in zip(ours, theirs, strict=True):
            gap = (mine.float() - other.float()).abs().max()
            assert gap <= loose * other.float().abs().max(), f"gradients differ by {gap:.2g}"

    row = f"unpermute with weights forward+backward, T={tokens_of(suite)} H=1024, {case}"
    suite.compare(row, make, ours, [Peer("gather, multiply, sum", peer, same)])


# What a process can ask of its memory. By default every large output is new memory, which the system clears first.
_HUGE_PAGES = ("huge pages for torch too", {"THP_MEM_ALLOC_ENABLE": "1"})
_RECYCLED = ("malloc keeps memory", {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)})
OTHER_MEMORY = {
    "permute, huge pages": ("bench_permute[", *_HUGE_PAGES),
    "unpermute, huge pages": ("bench_unpermute[", *_HUGE_PAGES),
    "permute, recycled": ("bench_permute[", *_RECYCLED),
}


@cases(*OTHER_MEMORY)
def bench_other_memory(suite: Suite, case: str) -> None:
    """The same in a process with other memory, for both sides: what is left of the ratios is the kernels'."""
    part, what, settings = OTHER_MEMORY[case]
    if suite.quick:
        suite.record(case, None, "ms", note="not in a quick run")
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "-k", part, "--json", str(file)]
        subprocess.run(command, env=os.environ | settings, stdout=subprocess.DEVNULL, check=True)
        for row in json.loads(file.read_text())["rows"]:
            suite.rows.append(row | {"row": f"{row['row']}, {what}", "target": None, "holds": None})
            print(line(suite.rows[-1]), flush=True)


def bench_memory(suite: Suite) -> None:
    _memory.record(suite, __file__)


def memory_cases(quick: bool) -> dict[str, Callable[[], Any]]:
    r = routed("k=2 float32")(1)
    b = routed("k=8 bf16")(1)
    y, weights = r.y.clone().requires_grad_(), r.weights.clone().requires_grad_()

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(moeyard.unpermute_tokens(y, r.plan, weights), (y, weights), r.x)

    def by_weight() -> moeyard.PermutationPlan:
        return moeyard.plan_permutation(b.experts, E, capacity=2048, drop="weight", weights=b.weights)

    return {
        "plan_permutation, 131,072 assignments": lambda: moeyard.plan_permutation(b.experts, E),
        "plan_permutation by weight, 131,072 assignments": by_weight,
        "permute, k=2 float32": lambda: moeyard.permute_tokens(r.x, r.plan),
        "unpermute with weights, k=2 float32": lambda: moeyard.unpermute_tokens(r.y, r.plan, r.weights),
        "unpermute with weights, k=8 bf16": lambda: moeyard.unpermute_tokens(b.y, b.plan, b.weights),
        "unpermute with weights forward+backward, k=2 float32": backward,
    }


if __name__ == "__main__":
    main(globals())
