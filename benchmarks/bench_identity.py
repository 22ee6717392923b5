"""What a call costs: every op at a tiny size, less the allocation of its outputs; and `identity` beside torch.clone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import moeyard
from _harness import Peer, Suite, _arrays, cases, fresh_seed, main

#: Every public op on tiny inputs, (inputs) -> outputs; the first tensor of the inputs is the one with a gradient.
Op = tuple[Callable[[int], tuple[Any, ...]], Callable[..., Any], bool]


def _random(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def _routed(seed: int, rows: int) -> tuple[Tensor, moeyard.PermutationPlan]:
    experts = _random(seed + 1, 8, 4).topk(2).indices.int()
    return _random(seed, rows, 4), moeyard.plan_permutation(experts, 4)


def _ragged(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    return _random(seed, 8, 3), torch.tensor([0, 3, 8]), torch.tensor([1, 0])


OPS: dict[str, Op] = {
    "identity": (lambda s: (_random(s, 16),), moeyard.identity, True),
    "topk_gating": (lambda s: (_random(s, 4, 8),), lambda x: moeyard.topk_gating(x, 2), True),
    "plan_permutation": (
        lambda s: (_random(s, 8, 4).topk(2).indices.int(),),
        lambda x: moeyard.plan_permutation(x, 4),
        False,
    ),
    "permute_tokens": (lambda s: _routed(s, 8), moeyard.permute_tokens, True),
    "unpermute_tokens": (lambda s: _routed(s, 16), moeyard.unpermute_tokens, True),
    "radius_graph": (lambda s: (_random(s, 4, 3),), lambda x: moeyard.radius_graph(x, 5.0), True),
    "radius": (lambda s: (_random(s, 4, 3), _random(s + 1, 2, 3)), lambda x, y: moeyard.radius(x, y, 5.0), True),
    "knn_graph": (lambda s: (_random(s, 4, 3),), lambda x: moeyard.knn_graph(x, 2), True),
    "pack_batches": (
        lambda s: ((_random(s, 8) * 10).long(),),
        lambda x: moeyard.pack_batches(x, 20),
        False,
    ),
    "gather_segments": (_ragged, moeyard.gather_segments, True),
}


@cases(*OPS, *(f"{name}, gradient" for name, op in OPS.items() if op[2]))
def bench_call(suite: Suite, case: str) -> None:
    """The public call at a tiny size, less `torch.empty` for each of its outputs."""
    name, _, gradient = case.partition(", ")
    make, op, _ = OPS[name]
    inputs = [make(fresh_seed()) for _ in range(3)]
    if gradient:
        for first, *_ in inputs:
            first.requires_grad_()
    outputs = [(tuple(out.shape), out.dtype) for out in _arrays(op(*inputs[0]))]

    def allocate(_: Any) -> list[Tensor]:
        return [torch.empty(shape, dtype=dtype) for shape, dtype in outputs]

    row = f"call overhead, {name}" + (", with gradient" if gradient else "")
    base = f"torch.empty of {len(outputs)} output{'s' if len(outputs) > 1 else ''}"
    target = "<= 12 us" if gradient else "<= 5 us"
    suite.difference(row, lambda x: op(*x), allocate, base, inputs, target)


def bench_copy(suite: Suite) -> None:
    def equal(ours: Tensor, theirs: Tensor, inputs: Any) -> None:
        assert torch.equal(ours, theirs), "copies differ"

    peers = [Peer("torch.clone", torch.clone, equal)]
    suite.compare("identity, 64 MB", lambda seed: _random(seed, 16_000_000), moeyard.identity, peers)


if __name__ == "__main__":
    main(globals())
