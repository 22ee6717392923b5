"""topk_gating beside torch, eager and compiled, and the gates of transformers.

The projection to logits is outside of all of them: the gates of transformers run with it taken out. Ours returns its
default outputs, statistics included; the peers return weights, ids and (torch) counts.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, SimpleNamespace
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
Z_LOSS = 0.1  # the z-loss beside a balance loss of weight 1
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


def transformers_gate(model: str, gate: str, **config: Any) -> tuple[Any, Callable[..., Any]] | None:
    """A router of transformers and its forward without the linear layer: the same code with another `F`."""
    module = _peers.optional(f"transformers.models.{model}.modeling_{model}")
    if module is None:
        return None
    router = getattr(module, gate)(SimpleNamespace(**config, hidden_size=config["num_local_experts"]))
    # A name of its own, or torch.compile would look F up in the module again.
    names = {**vars(module), "__name__": f"_{model}_gate", "F": SimpleNamespace(linear=lambda x, weight: x)}
    return router, FunctionType(type(router).forward.__code__, names)


def without_grad(forward: Callable[..., Any], router: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """logits -> (weights, ids)."""

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return forward(router, x)[1:]

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
        call = None if mixtral is None else without_grad(mixtral[1], mixtral[0])
        peers.append(Peer("transformers Mixtral gate", call, same_choice))
    suite.compare(row, logits(T, E), lambda x: moeyard.topk_gating(x, k, **options), peers, threads=threads)


def bench_deepseek(suite: Suite) -> None:
    T, E, k = 4096, 256, 8
    config = {"num_experts_per_tok": k, "num_local_experts": E, "routed_scaling_factor": DEEPSEEK["scale"],
              "n_group": 8, "topk_group": 4, "norm_topk_prob": True}  # fmt: skip
    gate = transformers_gate("deepseek_v3", "DeepseekV3TopkRouter", **config)
    bias = torch.randn(E) * 0.02
    eager = fast = None
    if gate is not None:
        router, forward = gate
        router.e_score_correction_bias.copy_(bias)
        eager, fast = without_grad(forward, router), without_grad(compiled(forward), router)
    peers = [
        Peer("transformers DeepSeek-V3 gate", eager, same_choice, ">= 10 x"),
        Peer("the same compiled", fast, same_choice),
    ]
    options: dict[str, Any] = {"score": "sigmoid", "renormalize": True, "selection_bias": bias, **DEEPSEEK}
    row = "gating forward, T=4096 E=256 k=8, 8 groups, bias (DeepSeek-V3)"
    suite.compare(row, logits(T, E), lambda x: moeyard.topk_gating(x, k, **options), peers)


def same_gradient(atol: float) -> Callable[[Tensor, Tensor, Any], None]:
    def same(ours: Tensor, theirs: Tensor, inputs: Any) -> None:
        differs = ((ours - theirs).abs() > atol + 1e-4 * theirs.abs()).any(-1)
        assert differs.float().mean() < 1e-3, f"{int(differs.sum())} rows have other gradients"

    return same


def softmax_gate_losses(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`softmax_gate` with the losses, all from one softmax."""
    (T, E), p = x.shape, x.softmax(-1)
    weights, experts = p.topk(k, -1)
    counts = torch.bincount(experts.flatten(), minlength=E)
    loss = (p.sum(0) * counts).sum() * (E / (T * k)) + Z_LOSS * x.logsumexp(-1).square().sum()
    return weights / weights.sum(-1, keepdim=True), loss


@cases("weights", "weights and balance losses")
def bench_backward(suite: Suite, case: str) -> None:
    """Forward and backward to the logits; the losses are Switch's balance loss and the z-loss, summed over the tokens.

    Means over the tokens would have gradients so small that no comparison sees them.
    """
    T, E, k = FIRST["E64"]
    losses = case != "weights"
    # One token that rounding sends elsewhere moves the balance gradient of all tokens by p E / (T k) < 2e-4; without
    # the balance loss it would be about 2e-3.
    same = same_gradient(2e-4 if losses else 1e-5)

    def make(seed: int) -> tuple[Tensor, Tensor]:
        return logits(T, E)(seed).requires_grad_(), logits(T, k)(seed + 1)

    def ours(inputs: tuple[Tensor, Tensor]) -> Tensor:
        x, grad = inputs
        gate = moeyard.topk_gating(x, k, renormalize=True)
        out, grads = [gate.weights], [grad]
        if losses:
            out.append((gate.score_sum * gate.counts).sum() * (E / (T * k)) + Z_LOSS * gate.logsumexp_sq)
            grads.append(torch.ones(()))
        return torch.autograd.grad(out, x, grads)[0]

    def peer(gate: Callable[..., Any]) -> Callable[[Any], Tensor]:
        def call(inputs: tuple[Tensor, Tensor]) -> Tensor:
            x, grad = inputs
            weights, *more = gate(x, k)
            out, grads = ([weights, *more], [grad, torch.ones(())]) if losses else ([weights], [grad])
            return torch.autograd.grad(out, x, grads)[0]

        return call

    gate = softmax_gate_losses if losses else softmax_gate
    peers = [
        Peer("torch eager", peer(gate), same, None if losses else ">= 6 x"),
        Peer("torch.compile", peer(compiled(gate)), same),
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
