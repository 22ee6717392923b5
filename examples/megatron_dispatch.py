"""Megatron's route, permute, unpermute with moeyard underneath, beside the same in plain torch."""

import time

import torch

from moeyard.integrations.megatron import permute, topk_routing_with_score_function, unpermute

torch.manual_seed(0)
tokens, logits = torch.randn(8192, 256), torch.randn(8192, 16)


def ours() -> torch.Tensor:
    probs, routing_map = topk_routing_with_score_function(logits, topk=2)
    rows, _, sorted_indices = permute(tokens, routing_map)
    return unpermute(rows, sorted_indices, tokens.shape, probs, routing_map)  # experts would sit in between


def plain() -> torch.Tensor:
    best, chosen = logits.topk(2)
    probs = torch.zeros_like(logits).scatter(1, chosen, best.softmax(1))
    experts, index = (probs > 0).t().nonzero(as_tuple=True)
    return torch.zeros_like(tokens).index_add(0, index, tokens[index] * probs[index, experts, None])


def milliseconds(function: object) -> float:
    times = []
    for _ in range(10):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


print(f"outputs differ by at most {(ours() - plain()).abs().max():.1e}")
mine, theirs = milliseconds(ours), milliseconds(plain)
print(f"moeyard {mine:.1f} ms   plain torch {theirs:.1f} ms   ratio {theirs / mine:.1f}")
