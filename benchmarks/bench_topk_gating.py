"""topk_gating beside torch, eager and compiled, and the gates of transformers.

The projection to logits is outside of all of them: the gates of transformers run with it taken out. Ours returns its
default outputs, statistics included; the peers return weights, ids and (torch) counts.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import _memory
import _peers
import moeyard
from _harness import ONE_CORE, Peer, Suite, cases, main
from _machine import all_threads

FIRST = {"E64": (16_384, 64, 8), "E4": (16_384, 4, 2)}
NAMES = {"E64": "gating forward, T=16384 E=64 k=8", "E4": "gating forward, T=16384 E=4 k=2 (CheMoE)"}
DEEPSEEK = {"num_groups": 8, "topk_groups": 4, "scale": 2.5}


def logits(T: int, E: int) -> Callable[[int], Tensor]:
    return lambda seed: torch.randn(T, E, generator=torch.Generator().manual_seed(seed))


def softmax_gate(x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """softmax, top-k, renormalised, counted."""
    weights, experts = x.softmax(-1).topk(k, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    return weights, experts, torch.bincount(experts.flatten(), minlength=x.shape[1])


def topk_softmax_gate(x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """top-k, softmax over the chosen, counted: CheMoE."""
    values, experts = x.topk(k, -1)
    return values.softmax(-1), experts, torch.bincount(experts.flatten(), minlength=x.shape[1])


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False)


def transformers_gate(model: str, gate: str, **config: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    """A router of transformers as logits -> (weights, ids); its linear layer is replaced by nothing."""
    module = _peers.optional(f"transformers.models.{model}.modeling_{model}")
    if module is None:
        return None
    router = getattr(module, gate)(SimpleNamespace(**config, hidden_size=config["num_local_experts"]))
    kept = module.F if hasattr(module, "F") else module.nn.functional

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        module.F = SimpleNamespace(linear=lambda x, weight: x)
        try:
            with torch.no_grad():
                return router(x)[1:]
        finally:
            module.F = kept

    call.router = router  # type: ignore[attr-defined]
    return call


def same_choice(ours: Any, theirs: Any, inputs: Any) -> None:
    """The same ids with the same weights, but for rows where rounding decides between two experts."""
    weights, experts = theirs[:2]
    order, other = ours.experts.long().argsort(-1), experts.argsort(-1)
    differs = (ours.experts.long().gather(1, order) != experts.gather(1, other)).any(-1)
    assert differs.float().mean() < 1e-3, f"{int(differs.sum())} rows chose other experts"
    mine, his = ours.weights.gather(1, order)[~differs], weights.float().gather(1, other)[~differs]
    torch.testing.assert_close(mine, his, rtol=1e-4, atol=1e-6)
    if len(theirs) > 2:
        assert (ours.counts - theirs[2]).abs().sum() <= 2 * int(differs.sum()) * experts.shape[1], "counts differ"


@cases("E64", "E4", "E64, all threads")
def bench_forward(suite: Suite, case: str) -> None:
    threads = all_threads() if case.endswith("threads") else 1
    key = case.split(",")[0]
    T, E, k = FIRST[key]
    row = NAMES[key] + (f", {threads} threads" if threads > 1 else "")
    if case.endswith("threads") and threads == 1:
        suite.record(f"{NAMES[key]}, all threads", None, "ms", note=ONE_CORE)
        return
    gate = softmax_gate if key == "E64" else topk_softmax_gate
    options: dict[str, Any] = {"renormalize": True} if key == "E64" else {"score": "softmax_topk"}
    fast = compiled(gate)
    target = ">= 10 x" if threads == 1 else None
    peers = [
        Peer("torch eager", lambda x: gate(x, k), same_choice, target),
        Peer("torch.compile", lambda x: fast(x, k), same_choice),
    ]
    if key == "E64" and threads == 1:
        mixtral = transformers_gate("mixtral", "MixtralTopKRouter", num_experts_per_tok=k, num_local_experts=E)
        peers.append(Peer("transformers Mixtral gate", mixtral, same_choice))
    suite.compare(row, logits(T, E), lambda x: moeyard.topk_gating(x, k, **options), peers, threads=threads)


def bench_deepseek(suite: Suite) -> None:
    T, E, k = 4096, 256, 8
    config = {"num_experts_per_tok": k, "num_local_experts": E, "routed_scaling_factor": DEEPSEEK["scale"],
              "n_group": 8, "topk_group": 4, "norm_topk_prob": True}  # fmt: skip
    gate = transformers_gate("deepseek_v3", "DeepseekV3TopkRouter", **config)
    bias = torch.randn(E) * 0.02
    if gate is not None:
        gate.router.e_score_correction_bias.copy_(bias)  # type: ignore[attr-defined]
    fast = compiled(gate.router) if gate is not None else None

    def compiled_gate(x: Tensor) -> Any:
        # The compiled router keeps its linear layer: with the unit matrix as weight it gives the same.
        assert fast is not None
        with torch.no_grad():
            return fast(x)[1:]

    if gate is not None:
        with torch.no_grad():
            gate.router.weight.copy_(torch.eye(E))  # type: ignore[attr-defined]
    peers = [
        Peer("transformers DeepSeek-V3 gate", gate, same_choice, ">= 10 x"),
        Peer("the same compiled, with its linear layer", None if fast is None else compiled_gate, same_choice),
    ]
    options: dict[str, Any] = {"score": "sigmoid", "renormalize": True, "selection_bias": bias, **DEEPSEEK}
    row = "gating forward, T=4096 E=256 k=8, 8 groups, bias (DeepSeek-V3)"
    suite.compare(row, logits(T, E), lambda x: moeyard.topk_gating(x, k, **options), peers)


def same_gradient(ours: Tensor, theirs: Tensor, inputs: Any) -> None:
    differs = ((ours - theirs).abs() > 1e-5 + 1e-3 * theirs.abs()).any(-1)
    assert differs.float().mean() < 1e-3, f"{int(differs.sum())} rows have other gradients"


@cases("weights", "weights and balance losses")
def bench_backward(suite: Suite, case: str) -> None:
    """Forward and backward to the logits; the balance losses are Switch's and the z-loss."""
    T, E, k = FIRST["E64"]
    losses = case != "weights"

    def make(seed: int) -> tuple[Tensor, Tensor]:
        return logits(T, E)(seed).requires_grad_(), logits(T, k)(seed + 1)

    def ours(inputs: tuple[Tensor, Tensor]) -> Tensor:
        x, grad = inputs
        gate = moeyard.topk_gating(x, k, renormalize=True)
        out, grads = [gate.weights], [grad]
        if losses:
            out.append((gate.score_sum * gate.counts).sum() * E / (T * T * k) + gate.logsumexp_sq / T)
            grads.append(torch.ones(()))
        return torch.autograd.grad(out, x, grads)[0]

    def torch_losses(x: Tensor, counts: Tensor) -> Tensor:
        return (x.softmax(-1).sum(0) * counts).sum() * E / (T * T * k) + x.logsumexp(-1).square().sum() / T

    def peer(gate: Callable[..., Any], extra: Callable[..., Tensor]) -> Callable[[Any], Tensor]:
        def call(inputs: tuple[Tensor, Tensor]) -> Tensor:
            x, grad = inputs
            weights, _, counts = gate(x, k)
            out, grads = [weights], [grad]
            if losses:
                out.append(extra(x, counts))
                grads.append(torch.ones(()))
            return torch.autograd.grad(out, x, grads)[0]

        return call

    fast, fast_losses = compiled(softmax_gate), compiled(torch_losses)
    peers = [
        Peer("torch eager", peer(softmax_gate, torch_losses), same_gradient, None if losses else ">= 6 x"),
        Peer("torch.compile", peer(fast, fast_losses), same_gradient),
    ]
    row = "gating forward+backward, T=16384 E=64 k=8" + (", with balance and z-loss" if losses else "")
    suite.compare(row, make, ours, peers)


def bench_memory(suite: Suite) -> None:
    _memory.record(suite, __file__)


def memory_cases(quick: bool) -> dict[str, Callable[[], Any]]:
    T, E, k = FIRST["E64"]
    x = logits(T, E)(1)
    grad = x.clone().requires_grad_()

    def both() -> Any:
        gate = moeyard.topk_gating(grad, k, renormalize=True)
        return gate, torch.autograd.grad(gate.weights.sum(), grad)

    return {
        "topk_gating, T=16384 E=64 k=8": lambda: moeyard.topk_gating(x, k, renormalize=True),
        "topk_gating forward+backward, T=16384 E=64 k=8": both,
    }


if __name__ == "__main__":
    main(globals())
