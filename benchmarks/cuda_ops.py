"""The ops on a GPU beside torch and transformers: `python benchmarks/cuda_ops.py --out FOLDER`.

Writes cuda_ops.json, cuda_ops.md and roofline.png into the folder. Times are those of cold calls (`_cuda.py` says how
they are taken); a share is that of the bandwidth which a large copy reaches in the same run. Without a GPU every row
runs once on the CPU, small, and is written down as not measured.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bench_moe
import cuda_structures
import moeyard
import report
from _cuda import CudaSuite, generator, launches, small
from _harness import Peer, benchmarks_of, cases, failed_row
from bench_topk_gating import compiled, same_choice, softmax_gate
from moeyard.nn import MoE

Make = Callable[[int], Any]
BF16 = torch.bfloat16


def equal(ours: Any, theirs: Any, inputs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def close(ours: Any, theirs: Any, inputs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


# ---- the ceiling -----------------------------------------------------------------------------------------------------


def bench_copy(suite: CudaSuite) -> None:
    """First of all: every share below refers to it."""
    full = 500_000_000
    count, moved = small(suite, full), 2 * 4 * full
    source = [torch.randn(count, device=suite.device, generator=generator(suite, s)) for s in range(3)]
    target = torch.full_like(source[0], float("nan"))
    times = suite.time(target.copy_, source)
    suite.copy_rate = moved / times.median
    suite.record("torch copy_ of 2 GB", suite.copy_rate / 1e9, "GB/s", note=f"{moved:,} bytes, read and written")
    assert torch.equal(moeyard.identity(source[0]), source[0])
    suite.share_of_copy("identity, 2 GB", moved, suite.time(moeyard.identity, source), ">= 85 %")


# ---- permutation -----------------------------------------------------------------------------------------------------


def routed(suite: CudaSuite, tokens: int, k: int, experts: int, seed: int) -> moeyard.PermutationPlan:
    """A plan of k distinct random experts per token."""
    scores = torch.rand(tokens, experts, device=suite.device, generator=generator(suite, seed))
    return moeyard.plan_permutation(scores.topk(k).indices.int(), experts)


def rows_of(suite: CudaSuite, seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, device=suite.device, generator=generator(suite, seed)).to(BF16)


@cases((16_384, 8, 128, 4096, None), (4096, 8, 128, 7168, "<= 0.15 ms"))
def bench_permute(suite: CudaSuite, case: tuple[int, int, int, int, str | None]) -> None:
    full, k, experts, features, limit = case
    tokens, moved = small(suite, full), (k + 1) * full * features * 2
    row = f"permute, T={full} H={features} k={k} E={experts} bf16"
    plan = routed(suite, tokens, k, experts, 1)
    token_of_row = plan.slot_of_row.long() // k
    peer = Peer("index_select", lambda x: x.index_select(0, token_of_row), equal)
    times = suite.compare(
        row, lambda seed: rows_of(suite, seed, tokens, features), lambda x: moeyard.permute_tokens(x, plan), [peer],
        limit=limit, note="published best 0.220 ms (TileOPs)" if limit else "",
    )  # fmt: skip
    suite.share_of_copy(f"{row}: share of a copy", moved, times, ">= 85 %")
    maps = (plan.row_of_slot, plan.slot_of_row)
    backward = torch.ops.moeyard.permute_tokens_backward

    def sum_of_rows(grad: Tensor) -> Tensor:
        return grad[plan.row_of_slot.long()].float().sum(1).to(BF16)

    times = suite.compare(
        f"{row}, backward", lambda seed: rows_of(suite, seed, tokens * k, features),
        lambda grad: backward(grad, None, *maps, None, True, False)[0], [Peer("gather and sum", sum_of_rows, close)],
    )  # fmt: skip
    suite.share_of_copy(f"{row}, backward: share of a copy", moved, times, ">= 85 %")


def bench_unpermute(suite: CudaSuite) -> None:
    full, k, experts, features = 16_384, 8, 128, 4096
    tokens, once = small(suite, full), full * features * 2
    row = f"unpermute with weights, T={full} H={features} k={k} bf16"
    plan = routed(suite, tokens, k, experts, 2)
    weights = torch.rand(tokens, k, device=suite.device, generator=generator(suite, 3)).softmax(-1)
    rows = plan.row_of_slot.long()
    token_of_row = plan.slot_of_row.long() // k
    flat_weights = weights.flatten()[plan.slot_of_row.long()][:, None]

    def gather(y: Tensor) -> Tensor:
        return (y[rows].float() * weights[:, :, None]).sum(1).to(BF16)

    def index_add(y: Tensor) -> Tensor:
        out = y.new_zeros(tokens, features, dtype=torch.float32)
        return out.index_add_(0, token_of_row, y.float() * flat_weights).to(BF16)

    times = suite.compare(
        row, lambda seed: rows_of(suite, seed, tokens * k, features),
        lambda y: moeyard.unpermute_tokens(y, plan, weights),
        [Peer("gather, multiply, sum", gather, close), Peer("index_add", index_add, close)],
    )  # fmt: skip
    suite.share_of_copy(f"{row}: share of a copy", (k + 1) * once, times, ">= 85 %")

    def make(seed: int) -> tuple[Tensor, Tensor]:
        return rows_of(suite, seed, tokens, features), rows_of(suite, seed + 1, tokens * k, features)

    def ours(case: tuple[Tensor, Tensor]) -> Any:
        grad, y = case
        backward = torch.ops.moeyard.unpermute_tokens_backward
        return backward(grad, y, plan.row_of_slot, plan.slot_of_row, weights, True, True)

    def theirs(case: tuple[Tensor, Tensor]) -> Any:
        grad, y = case
        back = grad[token_of_row]
        dots = (back.float() * y.float()).sum(1)
        return (back.float() * flat_weights).to(BF16), dots[rows]

    def same(mine: Any, his: Any, inputs: Any) -> None:
        torch.testing.assert_close(mine[0], his[0], rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(mine[1], his[1], rtol=1e-3, atol=1e-2)

    times = suite.compare(f"{row}, backward", make, ours, [Peer("gather, multiply, dot", theirs, same)])
    suite.share_of_copy(f"{row}, backward: share of a copy", (2 * k + 1) * once, times, ">= 80 %")


@cases(64, 128, 256)
def bench_plan(suite: CudaSuite, experts: int) -> None:
    full, k = 16_384, 8
    tokens = small(suite, full)

    def make(seed: int) -> Tensor:
        scores = torch.rand(tokens, experts, device=suite.device, generator=generator(suite, seed))
        return scores.topk(k).indices.int()

    def sort(ids: Tensor) -> tuple[Tensor, Tensor]:
        order = ids.flatten().argsort(stable=True)
        return order, torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))

    def same(ours: Any, theirs: Any, inputs: Any) -> None:
        assert torch.equal(ours.slot_of_row.long(), theirs[0]), "orders differ"

    row = f"permutation plan, {full * k:,} assignments, E={experts}"
    peers = [Peer("stable argsort + inverse", sort, same)]
    suite.compare(row, make, lambda ids: moeyard.plan_permutation(ids, experts), peers, limit="<= 10 us")
    ids = make(0)
    count = launches(lambda: moeyard.plan_permutation(ids, experts)) if suite.measures else 0
    suite.record(f"{row}: launches", count, "launches", target="<= 3 launches")


# ---- gating ----------------------------------------------------------------------------------------------------------

DEEPSEEK = {"score": "sigmoid", "renormalize": True, "num_groups": 8, "topk_groups": 4, "scale": 2.5}
GATES: dict[str, tuple[int, int, int, str | None, dict[str, Any]]] = {
    "T=16384 E=128 k=8": (16_384, 128, 8, "<= 10 us", {"renormalize": True}),
    "T=16384 E=256 k=8": (16_384, 256, 8, "<= 18 us", {"renormalize": True}),
    "T=16384 E=256 k=8, 8 groups, bias (DeepSeek-V3)": (16_384, 256, 8, "<= 20 us", DEEPSEEK),
    "T=256 E=256 k=8": (256, 256, 8, "<= 4 us", {"renormalize": True}),
    "T=16384 E=4 k=2": (16_384, 4, 2, None, {"score": "softmax_topk"}),
}


def logits(suite: CudaSuite, tokens: int, experts: int) -> Make:
    return lambda seed: torch.randn(tokens, experts, device=suite.device, generator=generator(suite, seed))


def gate(suite: CudaSuite, experts: int, k: int, options: dict[str, Any]) -> Callable[[Tensor], moeyard.Gating]:
    if "num_groups" in options:
        bias = 0.1 * torch.randn(experts, device=suite.device, generator=generator(suite, 5))
        options = {**options, "selection_bias": bias}
    return lambda x: moeyard.topk_gating(x, k, **options)


@cases(*GATES)
def bench_gate(suite: CudaSuite, case: str) -> None:
    full, experts, k, limit, options = GATES[case]
    tokens = small(suite, full)
    peers = []
    if options == {"renormalize": True}:
        peers.append(Peer("torch softmax, topk, bincount", lambda x: softmax_gate(x, k), same_choice))
        if suite.measures:  # compiling for the CPU is another benchmark's business
            fused = compiled(lambda x: softmax_gate(x, k))
            peers.append(Peer("the same under torch.compile", fused, same_choice))
    call = gate(suite, experts, k, options)
    times = suite.compare(f"gating forward, {case}", logits(suite, tokens, experts), call, peers, limit=limit)
    if full > 1000:
        moved = full * (4 * experts + 8 * k)
        suite.share_of_copy(f"gating forward, {case}: share of a copy", moved, times, None)


@cases("T=16384 E=128 k=8", "T=16384 E=256 k=8")
def bench_gate_backward(suite: CudaSuite, case: str) -> None:
    full, experts, k, _, options = GATES[case]
    tokens = small(suite, full)
    call = gate(suite, experts, k, options)

    def make(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        x = logits(suite, tokens, experts)(seed)
        grad = torch.randn(tokens, k, device=suite.device, generator=generator(suite, seed + 1))
        return x, call(x).experts, grad

    def ours(inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, ids, grad = inputs
        balance = torch.ones(experts, device=suite.device)
        backward = torch.ops.moeyard.topk_gating_backward
        return backward(x, ids, "softmax", True, 1.0, None, grad, balance, None, None, None)

    inputs = [make(seed) for seed in range(3)]
    times = suite.time(ours, inputs)
    moved = full * (8 * experts + 8 * k)
    limit = moved / suite.copy_rate if suite.copy_rate else float("nan")
    row = f"gating backward with a balance loss, {case}"
    suite.record(
        row, times.median / limit, "limits", target="<= 2.5 limits",
        note=f"{moved:,} bytes at the rate of a large copy; {times.text()}",
    )  # fmt: skip


@cases((5, 8), (60, 64), (100, 128), (200, 256), (384, 512))
def bench_uneven(suite: CudaSuite, case: tuple[int, int]) -> None:
    """Numbers of experts that are no power of two, beside the next one."""
    full, (uneven, even) = 16_384, case
    tokens = small(suite, full)
    k = min(8, uneven)
    times = [
        suite.time(gate(suite, experts, k, {}), [logits(suite, tokens, experts)(seed) for seed in range(3)]).median
        for experts in case
    ]
    row = f"gating forward, T={full} k={k}: E={uneven} beside E={even}"
    suite.record(row, times[0] / times[1], "times", target="<= 1.3 times")


# ---- the layer -------------------------------------------------------------------------------------------------------


def bench_moe_step(suite: CudaSuite) -> None:
    """Forward and backward in bf16, all gradients; transformers' Mixtral block with the same weights."""
    full, dim, hidden, experts, k = 8192, 1024, 512, 64, 8
    row = f"MoE forward+backward, T={full} H={dim} I={hidden} E={experts} k={k} bf16"
    tokens = small(suite, full)
    if not suite.measures:
        dim, hidden, experts, k = 64, 32, 8, 2
    torch.manual_seed(0)
    moe = MoE(dim, hidden, experts, k).to(suite.device, BF16)

    def make(seed: int) -> bench_moe.Case:
        x, grad = (rows_of(suite, seed + i, tokens, dim) for i in range(2))
        return bench_moe.Case(x, grad, torch.empty(0))

    step = bench_moe.ours(moe)
    case = make(0)
    step(case)
    if suite.measures:
        torch.cuda.set_sync_debug_mode("error")
    try:
        step(case)
    finally:
        if suite.measures:
            torch.cuda.set_sync_debug_mode("default")
    suite.record(f"{row}: host synchronisations", 0, "syncs", target="<= 0 syncs", note="sync debug mode raises")
    peers = [
        Peer(f"transformers Mixtral, {name}", bench_moe.mixtral(moe, name), None, target, why="not installed")
        for name, target in (("grouped_mm", ">= 1.2 x"), ("eager", None))
    ]
    suite.compare(row, make, step, peers)


# ---- output ----------------------------------------------------------------------------------------------------------


def roofline(suite: CudaSuite, path: Path) -> None:
    """Achieved GB/s over bytes moved, under the line of a large copy."""
    from matplotlib import pyplot

    points = [
        (row["row"].partition(":")[0], *(float(part.replace(",", "")) for part in found))
        for row in suite.rows
        if (found := figures(row["note"]))
    ]
    if not points or suite.copy_rate is None:
        return
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    axes.axhline(suite.copy_rate / 1e9, color="black", linewidth=0.8, label="a large copy")
    for name, moved, rate in points:
        axes.plot(moved, rate, "o", color="#2b6ca3")
        axes.annotate(name, (moved, rate), fontsize=6, xytext=(4, 4), textcoords="offset points")
    axes.set(xscale="log", xlabel="bytes that have to be moved", ylabel="GB/s", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def figures(note: str) -> tuple[str, str] | None:
    match = re.match(r"([0-9,]+) bytes, read and written, at ([0-9,]+) GB/s", note)
    return (match[1], match[2]) if match else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the three files go")
    parser.add_argument("-k", default="", metavar="PART", help="only benchmarks whose name contains this")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    suite = CudaSuite(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    ran = True
    for name, function in benchmarks_of({**globals(), **vars(cuda_structures)}):
        if options.k not in name and name != "bench_copy":
            continue
        try:
            function(suite)
        except Exception as error:
            ran = False
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            suite.rows.append(failed_row(name, error))
        suite.write(options.out / "cuda_ops.json")  # what is measured is kept, whatever comes after
    (options.out / "cuda_ops.md").write_text(report.machine_page({"cuda_ops": suite.document()}))
    roofline(suite, options.out / "roofline.png")
    return 0 if ran else 1


if __name__ == "__main__":
    sys.exit(main())
