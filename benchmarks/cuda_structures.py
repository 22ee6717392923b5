"""The ops of structures on a GPU: neighbour search, packing, collation. Run by cuda_ops.py.

Graphs of fixed capacity wait for nothing and are captured; a graph whose size is to be found is timed call by call, and
so is packing, which has to learn the number of batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import _data
import moeyard
from _cuda import CudaSuite, small
from _data import CUTOFF, Points
from _harness import Peer, cases


def on(suite: CudaSuite, points: Points) -> Points:
    return Points(*(t.to(suite.device) for t in (points.pos, points.ptr, points.batch)), points.most)


def same_edges(ours: moeyard.RadiusGraph, theirs: Tensor, points: Points) -> None:
    """Equal sets: peers leave the order open."""
    count, number = int(ours.num_edges), len(points.pos)
    mine, other = (edges[0].long() * number + edges[1].long() for edges in (ours.edge_index[:, :count], theirs))
    assert torch.equal(mine.sort().values, other.sort().values), "edges differ"


# ---- radius_graph ----------------------------------------------------------------------------------------------------


def capacity(suite: CudaSuite, points: Points) -> int:
    """As many edges as there are, and a few more."""
    found = int(moeyard.radius_graph(points.pos, CUTOFF, ptr=points.ptr, geometry=False).num_edges)
    return found + found // 50 + 64


def torch_cluster_graph() -> Callable[[Points], Tensor] | None:
    with contextlib.suppress(ImportError, OSError):
        import torch_cluster

        return lambda p: torch_cluster.radius_graph(p.pos, CUTOFF, p.batch, max_num_neighbors=p.most)
    return None


def all_pairs(points: Points) -> Tensor:
    """Molecules of at most 64 atoms: a dense table of distances per molecule."""
    sizes = points.ptr.diff()
    local = torch.arange(len(points.pos), device=points.pos.device) - points.ptr[points.batch]
    padded = points.pos.new_full((len(sizes), 64, 3), float("nan"))
    padded[points.batch, local] = points.pos
    distances = torch.cdist(padded, padded, compute_mode="donot_use_mm_for_euclid_dist")
    graph, i, j = (distances < CUTOFF).nonzero(as_tuple=True)
    keep = i != j
    return torch.stack([(points.ptr[graph] + j)[keep], (points.ptr[graph] + i)[keep]])


BATCHES: dict[str, tuple[str, Callable[[int], Points], str]] = {
    "molecules": ("1,000 molecules of about 18 atoms", _data.make_molecules, "<= 80 us"),
    "proteins": ("64 proteins of about 2,000 atoms", _data.make_proteins, "<= 150 us"),
}
QUICK: dict[str, Callable[[int], Points]] = {
    "molecules": lambda seed: _data.make_molecules(seed, 5, 90),
    "proteins": lambda seed: _data.make_proteins(seed, 2, 300),
}


@cases(*BATCHES)
def bench_radius_graph_batches(suite: CudaSuite, case: str) -> None:
    name, make, limit = BATCHES[case]
    make = make if suite.measures else QUICK[case]
    room = max(capacity(suite, on(suite, make(seed))) for seed in range(8))

    def search(points: Points) -> moeyard.RadiusGraph:
        return moeyard.radius_graph(points.pos, CUTOFF, ptr=points.ptr, geometry=False, max_edges=room)

    peers = [Peer("torch_cluster", torch_cluster_graph(), same_edges, ">= 5 x", why="not installed")]
    if case == "molecules":
        peers.append(Peer("torch cdist of padded molecules, nonzero", all_pairs, same_edges, ">= 5 x"))
    row = f"radius_graph, {name}, fixed capacity"
    suite.compare(row, lambda seed: on(suite, make(seed)), search, peers, limit=limit)


@cases(500_000, 1_000_000, 10_000_000)
def bench_radius_graph_large(suite: CudaSuite, full: int) -> None:
    """Against the time to write the edges at the rate of a large copy; with lengths and vectors, against without."""
    points = on(suite, _data.make_protein(0, small(suite, full)))
    room = capacity(suite, points)
    row = f"radius_graph, {full:,} atoms, edges only"

    def search(geometry: bool) -> Callable[[Points], Any]:
        return lambda p: moeyard.radius_graph(p.pos, CUTOFF, geometry=geometry, max_edges=room)

    times = suite.time(search(False), [points])
    written = 16 * room
    limit = written / suite.copy_rate if suite.copy_rate else float("nan")
    suite.record(
        row, times.median / limit, "limits", target="<= 3 limits" if full == 1_000_000 else None,
        note=f"{written:,} bytes of edges at the rate of a large copy; {times.text()}",
    )  # fmt: skip
    per_edge = 1e9 * times.median / room
    suite.record(f"{row}: time per edge", per_edge, "ns", note="linear in the number of atoms, if it stays the same")
    if full == 1_000_000:
        both = suite.time(search(True), [points])
        ratio = both.median / times.median
        suite.record(f"radius_graph, {full:,} atoms, with geometry", ratio, "times", target="<= 1.6 times")


# ---- packing and collation -------------------------------------------------------------------------------------------


def bench_pack_batches(suite: CudaSuite) -> None:
    full, budget = 10_000_000, 6800
    count = small(suite, full)

    def make(seed: int) -> tuple[Tensor, Tensor]:
        sizes = torch.from_numpy(_data.sample_sizes(seed, count))
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        return sizes.to(suite.device), order.to(suite.device)

    def pack(case: tuple[Tensor, Tensor]) -> moeyard.Packing:
        sizes, order = case
        return moeyard.pack_batches(sizes, budget, order=order)

    row = f"pack_batches, {full:,} sizes in random order"
    suite.compare(row, make, pack, [], limit="<= 2 ms", note="waits for the device, for the number of batches")


GATHERS: dict[str, tuple[str, Callable[..., Points], int, int, int]] = {
    "molecules": ("1,000 molecules of about 18 atoms", _data.make_molecules, 4000, 71_000, 1000),
    "proteins": ("512 proteins, 1 M atoms", _data.make_proteins, 1024, 2_000_000, 512),
}


@cases(*GATHERS)
def bench_gather_segments(suite: CudaSuite, case: str) -> None:
    """Positions: 12 bytes a row, and 8 more for the number of its structure."""
    name, build, graphs, atoms, chosen = GATHERS[case]
    if not suite.measures:
        graphs, atoms, chosen = 8, 160, 4
    points = on(suite, build(0, graphs, atoms))
    sizes = points.ptr.diff()

    def make(seed: int) -> tuple[Tensor, int]:
        index = torch.randperm(graphs, generator=torch.Generator().manual_seed(seed))[:chosen].to(suite.device)
        return index, int(sizes[index].sum())

    def gather(case: tuple[Tensor, int]) -> moeyard.Segments:
        index, total = case
        return moeyard.gather_segments(points.pos, points.ptr, index, total=total)

    def by_index(case: tuple[Tensor, int]) -> tuple[Tensor, Tensor, Tensor]:
        index, total = case
        chosen_sizes = sizes[index]
        ptr = torch.cat([chosen_sizes.new_zeros(1), chosen_sizes.cumsum(0)])
        batch = torch.repeat_interleave(torch.arange(len(index), device=suite.device), chosen_sizes, output_size=total)
        rows = torch.arange(total, device=suite.device) + (points.ptr[index] - ptr[:-1])[batch]
        return points.pos[rows], ptr, batch

    def same(ours: moeyard.Segments, theirs: tuple[Tensor, Tensor, Tensor], _: Any) -> None:
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), "batches differ"

    row, limit = f"gather_segments, {name}", "<= 30 us" if case == "molecules" else None
    times = suite.compare(row, make, gather, [Peer("torch indexing", by_index, same)], limit=limit)
    moved = round(atoms * chosen / graphs) * (2 * 12 + 8)
    suite.share_of_copy(f"{row}: share of a copy", moved, times, ">= 80 %" if case == "proteins" else None)
