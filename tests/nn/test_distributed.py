"""DDP, FSDP2 and expert parallelism over gloo, each equal to one process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from moeyard.nn import ExpertOptimizer, MoE, expert_parameters

ROOT = Path(__file__).resolve().parents[2]
H, E, T, STEPS = 8, 6, 24, 4

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")


def model() -> MoE:
    torch.manual_seed(0)
    moe = MoE(H, 12, E, 2, shared_hidden=4, bias_rate=0.01, score="sigmoid").double()
    assert moe.router is not None
    nn.init.normal_(moe.router.weight)
    return moe


def tokens(step: int, rank: int) -> Tensor:
    """Tokens that reach some experts only, others on every rank: expert 5 is never chosen."""
    g = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(T, H, generator=g, dtype=torch.float64)


def forced(step: int, rank: int) -> Tensor:
    """Experts 0 and 1 on rank 0, 2 and 3 on rank 1; expert 4 in the first step only, 5 never."""
    first, second = ((0, 1), (2, 3))[rank]
    ids = torch.tensor([[first, second]]).repeat(T, 1)
    if step == 0:
        ids[0, 1] = 4
    return ids


def optimizer_of(moe: nn.Module) -> ExpertOptimizer:
    return ExpertOptimizer(torch.optim.AdamW(moe.parameters(), lr=0.01, weight_decay=0.1), expert_parameters(moe))


def train_alone() -> dict[str, Tensor]:
    """The mean of both ranks' losses, in one process."""
    moe = model()
    optimizer = optimizer_of(moe)
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = [moe(tokens(step, r), forced_experts=forced(step, r)).output.square().sum() for r in range(2)]
        (sum(losses) / 2).backward()
        optimizer.step()
        assert moe.router is not None
        moe.router.update_selection_bias()
    return {name: value.clone() for name, value in moe.state_dict().items()}


def train(moe: nn.Module, optimizer: ExpertOptimizer, rank: int, update: Callable[[], None]) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        moe(tokens(step, rank), forced_experts=forced(step, rank)).output.square().sum().backward()
        optimizer.step()
        update()


def ddp(rank: int) -> dict[str, Tensor]:
    inner = model()
    moe = nn.parallel.DistributedDataParallel(inner)
    assert inner.router is not None
    train(moe, optimizer_of(moe), rank, inner.router.update_selection_bias)
    return inner.state_dict()


def fsdp(rank: int) -> dict[str, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    moe = model()
    assert moe.router is not None
    fully_shard(moe, mesh=init_device_mesh("cpu", (2,)))
    train(moe, optimizer_of(moe), rank, moe.router.update_selection_bias)
    return {n: v.full_tensor() if hasattr(v, "full_tensor") else v for n, v in moe.state_dict().items()}


def worker(rank: int, folder: str, run: Callable[[int], dict[str, Tensor]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        result = run(rank)
        torch.save({name: value.clone() for name, value in result.items()}, f"{folder}/{rank}.pt")
        dist.barrier()  # a rank that leaves early can take the other's threads down with it
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("run", [ddp, fsdp], ids=["DDP", "FSDP2"])
def test_two_ranks_train_as_one_process(run: Callable[[int], dict[str, Tensor]], tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path), run), nprocs=2)
    want, start = train_alone(), model().state_dict()
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, value in want.items():
        torch.testing.assert_close(results[0][name], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
        assert torch.equal(results[0][name], results[1][name])
    for name in ("experts.up", "experts.down"):
        assert torch.equal(results[0][name][5], start[name][5])
        assert not torch.equal(results[0][name][4], start[name][4])


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_expert_parallel_example(ranks: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(ROOT / "examples" / "expert_parallel.py")],
        capture_output=True, text=True, timeout=110, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{ranks} ranks, 8 experts: largest difference ")
