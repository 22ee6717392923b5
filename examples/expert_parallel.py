"""Expert parallelism with moeyard's ops: every rank holds some experts, tokens travel to them and back.

    torchrun --nproc-per-node 2 examples/expert_parallel.py

Each rank routes its own tokens, sends the rows to the ranks that hold the chosen experts (one all-to-all), runs its
experts over what came in, and sends the results back. The script ends by comparing outputs and gradients with one
process that holds all experts and sees all tokens.

Shape letters: W ranks, T tokens of this rank, E experts in all, k experts per token, H features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import moeyard
from moeyard.nn import Experts, MoE, Router


class _AllToAll(torch.autograd.Function):
    """Rows to their ranks; in the backward their gradients come home the same way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        ctx.splits = send, receive
        out = rows.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), receive, send)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        send, receive = ctx.splits
        return _AllToAll.apply(grad, receive, send), None, None


class ExpertParallelMoE(nn.Module):
    """A mixture of experts whose experts are spread over the ranks: rank r holds E/W from r*E/W on."""

    def __init__(self, dim: int, hidden: int, num_experts: int, k: int) -> None:
        super().__init__()
        self.world = dist.get_world_size()
        if num_experts % self.world:
            raise ValueError(f"num_experts: expected a multiple of the {self.world} ranks, got {num_experts}")
        self.router = Router(dim, num_experts, k, renormalize=True)
        self.experts = Experts(num_experts // self.world, dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[T,H] -> [T,H]."""
        gating = self.router(x)
        plan = moeyard.plan_permutation(gating.experts, self.router.num_experts)
        rows = moeyard.permute_tokens(x, plan)  # sorted by expert, hence by rank

        counts = plan.counts.reshape(self.world, -1)  # [W,E/W]: what each of their experts gets from here
        incoming = torch.empty_like(counts)
        dist.all_to_all_single(incoming, counts.contiguous())
        send, receive = counts.sum(1).tolist(), incoming.sum(1).tolist()
        rows = _AllToAll.apply(rows, send, receive)

        # What came in is sorted by rank, then by expert; the experts want it sorted by expert alone.
        local = torch.arange(incoming.shape[1]).repeat(self.world).repeat_interleave(incoming.flatten())
        regroup = moeyard.plan_permutation(local[:, None], incoming.shape[1])
        rows = self.experts(moeyard.permute_tokens(rows, regroup), regroup.offsets)
        rows = moeyard.unpermute_tokens(rows, regroup)

        rows = _AllToAll.apply(rows, receive, send)
        return moeyard.unpermute_tokens(rows, plan, gating.weights)


def compare_with_one_process(moe: ExpertParallelMoE, x: Tensor, hidden: int) -> float:
    """The largest difference to a layer that holds everything, over outputs and all gradients."""
    k, dim = moe.router.k, x.shape[1]
    whole = MoE(dim, hidden, moe.router.num_experts, k, renormalize=True).to(x.dtype)
    everything = torch.cat(gather(x.detach())).requires_grad_()
    with torch.no_grad():
        assert whole.router is not None
        whole.router.weight.copy_(moe.router.weight)
        whole.experts.up.copy_(torch.cat(gather(moe.experts.up.detach())))
        whole.experts.down.copy_(torch.cat(gather(moe.experts.down.detach())))
    y = moe(x)
    y.square().sum().backward()
    want = whole(everything).output
    want.square().sum().backward()
    # The router is on every rank: its gradient is the sum over the ranks. An expert is on one rank, which saw all.
    dist.all_reduce(moe.router.weight.grad)
    pairs = [
        (torch.cat(gather(y.detach())), want.detach()),
        (torch.cat(gather(x.grad)), everything.grad),
        (moe.router.weight.grad, whole.router.weight.grad),
        (torch.cat(gather(moe.experts.up.grad)), whole.experts.up.grad),
        (torch.cat(gather(moe.experts.down.grad)), whole.experts.down.grad),
    ]
    return float(torch.stack([(a - b).abs().max() for a, b in pairs]).max())


def gather(x: Tensor) -> list[Tensor]:
    """The tensors of all ranks, of whatever length."""
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([x.shape[0]]))
    most = int(max(lengths))
    padded = torch.cat([x, x.new_zeros(most - x.shape[0], *x.shape[1:])])
    pieces = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(pieces, padded)
    return [p[: int(n)] for p, n in zip(pieces, lengths, strict=True)]


def main() -> None:
    dist.init_process_group("gloo")
    rank, dim, hidden = dist.get_rank(), 32, 24
    torch.manual_seed(0)  # the same router everywhere
    moe = ExpertParallelMoE(dim, hidden, num_experts=8, k=2).double()
    torch.manual_seed(1 + rank)  # experts and tokens of its own
    moe.experts.reset_parameters()
    x = torch.randn(100 + 30 * rank, dim, dtype=torch.float64, requires_grad=True)
    difference = compare_with_one_process(moe, x, hidden)
    if rank == 0:
        print(f"{dist.get_world_size()} ranks, {moe.router.num_experts} experts: largest difference {difference:.1e}")
    dist.destroy_process_group()
    if not difference < 1e-10:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
