"""pack_batches beside the samplers of fairchem, multipack, axolotl and PyG: a shuffled epoch, one core.

The peers are asked for their planning alone: fairchem's `get_batches` and multipack's `allocate` get the shuffled sizes
ready-made, and neither the shuffling nor the mapping back to sample ids is charged to them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import _data
import _memory
import _peers
import moeyard
from _harness import Peer, Suite, fresh_seed, main

BUDGET = 6800  # next-fit fills about 95.4 % of it
RANKS = 8  # multipack packs for all ranks at once and keeps one rank's share
MULTIPACK = "not installed: not on PyPI; put multipack_sampler.py into build/peers/multipack_sampler"


@dataclass(frozen=True)
class Epoch:
    """Sizes [N] by sample id, a shuffled order, and the sizes in that order."""

    sizes: Tensor
    order: Tensor
    in_order: np.ndarray

    @property
    def sums(self) -> np.ndarray:
        return np.cumsum(self.in_order)


def epoch(samples: int) -> Callable[[int], Epoch]:
    def make(seed: int) -> Epoch:
        sizes = _data.sample_sizes(seed, samples)
        order = np.random.default_rng(seed + 1).permutation(samples)
        return Epoch(torch.from_numpy(sizes), torch.from_numpy(order), sizes[order])

    return make


def plan(lookahead: int) -> Callable[[Epoch], moeyard.Packing]:
    return lambda e: moeyard.pack_batches(e.sizes, BUDGET, order=e.order, lookahead=lookahead)


def fill(packing: moeyard.Packing) -> float:
    return float(packing.fill.double().mean()) / BUDGET


def sample_count(suite: Suite) -> int:
    return suite.size(10_000_000, 300_000)


def sized(samples: int) -> str:
    return f"{samples // 1_000_000} M samples" if samples >= 1_000_000 else f"{samples:,} samples"


def limit(seconds: float, samples: int) -> str:
    """A limit for 10 M samples, in proportion."""
    return f"<= {seconds * samples / 10_000_000:g} s"


def same_batches(ours: moeyard.Packing, theirs: Any, e: Epoch) -> None:
    """Next-fit leaves no choice: the same batches."""
    batches, counts, filtered = theirs
    assert filtered == 0
    assert ours.fill.tolist() == list(counts), "batches are filled differently"
    lengths = [len(batch) for batch in batches]
    assert np.array_equal(ours.ptr.diff().numpy(), lengths), "batches have other lengths"
    assert batches[1] == ours.index[lengths[0] : lengths[0] + lengths[1]].tolist(), "batches hold other samples"


def bench_next_fit(suite: Suite) -> None:
    samples = sample_count(suite)
    module = _peers.fairchem_sampler()

    def fairchem(e: Epoch) -> Any:
        return module.get_batches(e.in_order, e.order.numpy(), BUDGET, 0)

    peers = [Peer("fairchem max-atoms sampler", fairchem if module else None, same_batches, ">= 6 x")]
    row = f"pack_batches, {sized(samples)}, exact next-fit"
    suite.compare(row, epoch(samples), plan(0), peers, limit=limit(0.25, samples))


def bench_best_fit(suite: Suite) -> None:
    """Bounded best fit with 64 open batches beside multipack, which sorts within a few batches at a time."""
    samples = sample_count(suite)
    packing = plan(64)(epoch(samples)(fresh_seed()))
    assert torch.equal(packing.index.sort().values, torch.arange(samples)), "not every sample once"
    assert int(packing.fill.max()) <= BUDGET, "a batch over the budget"
    row = f"pack_batches, {sized(samples)}, lookahead=64, random order"
    suite.record(f"{row}: fill", fill(packing) * 100, "%", target=">= 99.6 %")
    module = _peers.multipack_sampler()
    fills: list[float] = []

    def multipack(e: Epoch) -> Any:
        return module.allocate(e.in_order, e.sums, 0, BUDGET, RANKS)

    def fits(ours: moeyard.Packing, theirs: Any, e: Epoch) -> None:
        rank_batches, used, slots = theirs
        assert all(e.in_order[batch].sum() <= BUDGET for batch in rank_batches[:1000]), "a batch over the budget"
        fills.append(used / slots)

    peers = [Peer("multipack", multipack if module else None, fits, ">= 8 x", MULTIPACK)]
    suite.compare(row, epoch(samples), plan(64), peers, limit=limit(0.6, samples), note="fill in the row above")
    if fills:
        suite.rows[-1]["note"] += f"; multipack fills {fills[0]:.1%}"


class Sizes(torch.utils.data.Dataset[Any]):
    """What PyG's sampler asks a dataset for: one object per sample that knows its number of nodes."""

    class Sample:
        __slots__ = ("num_nodes",)

        def __init__(self, num_nodes: int) -> None:
            self.num_nodes = num_nodes

    def __init__(self, sizes: np.ndarray) -> None:
        self.samples = [self.Sample(int(n)) for n in sizes]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> Any:
        return self.samples[i]


def bench_slower_samplers(suite: Suite) -> None:
    """Those that would need minutes for 10 M samples."""
    samples = suite.size(1_000_000, 100_000)
    axolotl, loader = _peers.axolotl_sampler(), _peers.optional("torch_geometric.loader")
    fills: dict[str, float] = {}

    def first_fit(e: Epoch) -> Any:
        lengths = e.in_order.astype(np.int32)
        return axolotl.pack_parallel(lengths, BUDGET, group_size=100_000, bin_size=samples, num_processes=1)

    def first_fit_fits(ours: Any, theirs: Any, e: Epoch) -> None:
        totals = [e.in_order[batch].sum() for batch in theirs]
        assert max(totals) <= BUDGET
        fills["axolotl"] = float(np.mean(totals)) / BUDGET

    def make(seed: int) -> tuple[Epoch, Sizes]:
        e = epoch(samples)(seed)
        return e, Sizes(e.in_order)

    def dynamic(inputs: tuple[Epoch, Sizes]) -> Any:
        return list(iter(loader.DynamicBatchSampler(inputs[1], BUDGET)))

    def next_fit(ours: moeyard.Packing, theirs: Any, inputs: Any) -> None:
        position = torch.empty(samples, dtype=torch.int64)
        position[inputs[0].order] = torch.arange(samples)
        assert list(itertools.chain.from_iterable(theirs)) == position[ours.index].tolist(), "another order"
        assert [len(batch) for batch in theirs] == ours.ptr.diff().tolist(), "batches have other lengths"

    peers = [Peer("PyG DynamicBatchSampler", dynamic if loader else None, next_fit)]
    row = f"pack_batches, {sized(samples)}, next-fit"
    suite.compare(row, make, lambda inputs: plan(0)(inputs[0]), peers)
    peers = [Peer("axolotl first-fit", first_fit if axolotl else None, first_fit_fits)]
    row = f"pack_batches, {sized(samples)}, lookahead=64"
    suite.compare(row, epoch(samples), plan(64), peers, note=f"ours fills {fill(plan(64)(epoch(samples)(0))):.2%}")
    if fills:
        suite.rows[-1]["note"] += f"; axolotl fills {fills['axolotl']:.2%}"


def bench_memory(suite: Suite) -> None:
    _memory.record(suite, __file__)


def memory_cases(quick: bool) -> dict[str, Callable[[], Any]]:
    samples = 1_000_000 if quick else 10_000_000
    e = epoch(samples)(1)
    return {
        f"pack_batches, {sized(samples)}, next-fit": lambda: plan(0)(e),
        f"pack_batches, {sized(samples)}, lookahead=64": lambda: plan(64)(e),
    }


if __name__ == "__main__":
    main(globals())
