"""The MoE layer, forward and backward, beside transformers' experts, dense layers and its own matrix products.

A step is one forward and one backward for tokens and weights, gradients included. All sides hold the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import _peers
from _harness import Peer, Suite, cases, main
from _machine import all_threads
from moeyard.nn import Experts, MoE

H, I, E, K = 256, 512, 16, 2
THREADS = ("1 thread", "all threads")


@dataclass
class Case:
    """Tokens, the gradient that comes back, and for forced routing every token's expert."""

    x: Tensor
    grad: Tensor
    ids: Tensor


def batch(tokens: int, *, one_expert: bool = False) -> Callable[[int], Case]:
    def make(seed: int) -> Case:
        g = torch.Generator().manual_seed(seed)
        ids = torch.randint(E, (tokens,), generator=g)
        ids = torch.full_like(ids, 3) if one_expert else ids
        return Case(torch.randn(tokens, H, generator=g), torch.randn(tokens, H, generator=g), ids)

    return make


def step(forward: Callable[[Tensor, Case], Tensor], weights: list[Tensor]) -> Callable[[Case], tuple[Tensor, ...]]:
    """Output and all gradients."""

    def call(case: Case) -> tuple[Tensor, ...]:
        x = case.x.detach().requires_grad_()
        y = forward(x, case)
        return y.detach(), *torch.autograd.grad(y, [x, *weights], case.grad)

    return call


def layer(**options: Any) -> MoE:
    torch.manual_seed(0)
    moe = MoE(H, I, E, options.pop("k", K), **options)
    if moe.router is not None:
        nn.init.normal_(moe.router.weight, std=H**-0.5)  # an uneven choice, as a trained router makes it
    return moe


def ours(moe: MoE) -> Callable[[Case], tuple[Tensor, ...]]:
    forced = moe.routing == "forced"
    parameters = [*([] if moe.router is None else [moe.router.weight]), moe.experts.up, moe.experts.down]
    return step(lambda x, case: moe(x, forced_experts=case.ids if forced else None).output, parameters)


# ---- peers -----------------------------------------------------------------------------------------------------------


def mixtral(moe: MoE, implementation: str) -> Callable[[Case], tuple[Tensor, ...]] | None:
    """transformers' Mixtral block with our weights; None where that transformers has no such experts."""
    module = _peers.optional("transformers.models.mixtral.modeling_mixtral")
    if module is None or not hasattr(module, "MixtralExperts") or moe.router is None:
        return None
    up = moe.experts.up
    experts, dim, both_halves = up.shape
    config = module.MixtralConfig(
        hidden_size=dim, intermediate_size=both_halves // 2, num_local_experts=experts, num_experts_per_tok=moe.k,
        num_attention_heads=4,
    )  # fmt: skip
    config._experts_implementation = implementation
    block = module.MixtralSparseMoeBlock(config).to(up.device, up.dtype)
    with torch.no_grad():
        block.gate.weight.copy_(moe.router.weight)
        block.experts.gate_up_proj.copy_(moe.experts.up.transpose(1, 2))
        block.experts.down_proj.copy_(moe.experts.down.transpose(1, 2))
    weights = [block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj]
    return step(lambda x, case: block(x[None])[0], weights)


def loop(moe: MoE) -> Callable[[Case], tuple[Tensor, ...]]:
    """softmax, top-k, and every expert over the tokens that chose it, in plain torch."""
    assert moe.router is not None

    def forward(x: Tensor, case: Case) -> Tensor:
        weights, experts = (x @ moe.router.weight.t()).softmax(-1).topk(moe.k, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(experts == e)
            gate, value = (x[token] @ moe.experts.up[e]).chunk(2, -1)
            out = (nn.functional.silu(gate) * value) @ moe.experts.down[e]
            y = y.index_add(0, token, out * weights[token, slot, None])
        return y

    return step(forward, [moe.router.weight, moe.experts.up, moe.experts.down])


def dense(hidden: int) -> Callable[[Case], tuple[Tensor, ...]]:
    """One SwiGLU layer for all tokens."""
    torch.manual_seed(1)
    up = (torch.randn(H, 2 * hidden) * H**-0.5).requires_grad_()
    down = (torch.randn(hidden, H) * hidden**-0.5).requires_grad_()

    def forward(x: Tensor, case: Case) -> Tensor:
        gate, value = (x @ up).chunk(2, -1)
        return (nn.functional.silu(gate) * value) @ down

    return step(forward, [up, down])


def dense_here(hidden: int) -> Callable[[Case], tuple[Tensor, ...]]:
    """The dense layer as one expert: what is left of a ratio when both sides multiply with the same kernels."""
    torch.manual_seed(1)
    experts = Experts(1, H, hidden)
    return step(lambda x, case: experts(x, torch.tensor([len(x)])), [experts.up, experts.down])


def experts_alone(moe: MoE, tokens: int) -> Callable[[Case], Any]:
    """The part of the layer that is matrix products and the activation between them, on rows in their order."""
    assert moe.router is not None
    counts = moe.router(batch(tokens)(0).x).counts
    rows, grad = torch.randn(2, K * tokens, H)
    rows.requires_grad_()
    weights = [moe.experts.up, moe.experts.down]

    def call(case: Case) -> Any:
        return torch.autograd.grad(moe.experts(rows, counts.cumsum(0)), [rows, *weights], grad)

    return call


def products(moe: MoE, tokens: int) -> Callable[[Case], None]:
    """The layer's matrix products alone: all six of every expert, on rows as they lie after a permutation, into memory
    that was touched before."""
    assert moe.router is not None
    counts = moe.router(batch(tokens)(0).x).counts.tolist()
    most = max(counts)
    x, y, hidden, active = (torch.randn(most, width) for width in (H, H, 2 * I, I))
    grad_up, grad_down = torch.empty(H, 2 * I), torch.empty(I, H)

    def call(case: Case) -> None:
        with torch.no_grad():
            for e, n in enumerate(counts):
                up, down = moe.experts.up[e], moe.experts.down[e]
                torch.mm(x[:n], up, out=hidden[:n])
                torch.mm(active[:n], down, out=y[:n])
                torch.mm(x[:n], down.t(), out=active[:n])
                torch.mm(active[:n].t(), x[:n], out=grad_down)
                torch.mm(x[:n].t(), hidden[:n], out=grad_up)
                torch.mm(hidden[:n], up.t(), out=y[:n])

    return call


def same_step(ours: Any, theirs: Any, inputs: Any) -> None:
    """Output and gradient of the tokens, but for tokens whose choice hangs on rounding; and every expert's gradients by
    their norm, since weights lie differently with some peers."""
    differ = torch.zeros(len(ours[0]), dtype=torch.bool)
    for mine, his in zip(ours[:2], theirs[:2], strict=True):
        differ |= ~torch.isclose(mine, his, rtol=1e-3, atol=1e-3).all(1)
    assert differ.float().mean() < 1e-3, f"{int(differ.sum())} tokens differ"
    for mine, his in zip(ours[2:], theirs[2:], strict=True):
        torch.testing.assert_close(mine.flatten(1).norm(dim=1), his.flatten(1).norm(dim=1), rtol=2e-2, atol=1e-3)


# ---- rows ------------------------------------------------------------------------------------------------------------


def named(row: str, threads: int) -> str:
    return row if threads == 1 else f"{row}, {threads} threads"


def threads_of(case: str) -> int:
    return 1 if case == "1 thread" else all_threads()


@cases(*THREADS)
def bench_against_experts(suite: Suite, case: str) -> None:
    tokens, threads, moe = suite.size(8192, 1024), threads_of(case), layer()
    row = named(f"MoE forward+backward, T={tokens} H={H} I={I} E={E} k={K}", threads)
    peers = [
        Peer("transformers Mixtral, eager experts", mixtral(moe, "eager"), same_step, ">= 1.15 x"),
        Peer("transformers Mixtral, grouped_mm", mixtral(moe, "grouped_mm"), same_step),
        Peer("a loop over experts", loop(moe), same_step),
        Peer("its experts alone (expert_ffn)", experts_alone(moe, tokens), None, ">= 0.85 x"),
        Peer("the same matrix products in torch, alone", products(moe, tokens), None),
    ]
    suite.compare(row, batch(tokens), ours(moe), peers, threads=threads)


@cases(*THREADS)
def bench_against_dense(suite: Suite, case: str) -> None:
    tokens, threads = suite.size(8192, 1024), threads_of(case)
    # "At most 1.15 times its time", as a ratio.
    peers = [
        Peer("a dense layer of equal active size", dense(K * I), None, f">= {1 / 1.15:.4f} x"),
        Peer("the same on our kernels", dense_here(K * I), None),
    ]
    suite.compare(named(f"MoE forward+backward, T={tokens} E={E} k={K}", threads), batch(tokens), ours(layer()), peers,
                  threads=threads)  # fmt: skip


@cases(*THREADS)
def bench_forced(suite: Suite, case: str) -> None:
    tokens, threads = suite.size(8192, 1024), threads_of(case)
    for what, one_expert in (("a random expert each", False), ("one expert for all", True)):
        peers = [
            Peer("the dense layer of one expert", dense(I), None, f">= {1 / 1.05:.4f} x"),
            Peer("the same on our kernels", dense_here(I), None),
        ]
        row = named(f"forced routing forward+backward, T={tokens}, {what}", threads)
        moe = layer(k=1, routing="forced")
        suite.compare(row, batch(tokens, one_expert=one_expert), ours(moe), peers, threads=threads)


if __name__ == "__main__":
    main(globals())
