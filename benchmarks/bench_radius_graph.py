"""radius_graph beside every neighbour search for the CPU, at r = 5 without a limit, until a [2, M] int64 edge_index.

Ours is sorted by (centre, neighbour); most peers leave the order open. Peers that know single systems are called once
per graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import _data
import _memory
import _peers
import moeyard
from _data import CUTOFF, Points
from _harness import ONE_CORE, UNITS, Peer, Suite, cases, main
from _machine import all_threads

SIZES: dict[str, tuple[str, Callable[[int], Points], str]] = {
    "molecules": ("1,000 molecules, 17,784 atoms", _data.make_molecules, ">= 8 x"),
    "protein": ("one protein, 5,000 atoms", _data.make_protein, ">= 7 x"),
    "proteins": ("64 proteins, 123,803 atoms", _data.make_proteins, ">= 7 x"),
    "50k": ("50,000 atoms", lambda seed: _data.make_protein(seed, 50_000), ">= 6 x"),
    "500k": ("500,000 atoms", lambda seed: _data.make_protein(seed, 500_000), ">= 6 x"),
}
# What a quick run has in their place.
QUICK: dict[str, tuple[str, Callable[[int], Points]]] = {
    "molecules": ("250 molecules, 4,446 atoms", lambda seed: _data.make_molecules(seed, 250, 4446)),
    "proteins": ("8 proteins, 15,475 atoms", lambda seed: _data.make_proteins(seed, 8, 15_475)),
    "50k": ("20,000 atoms", lambda seed: _data.make_protein(seed, 20_000)),
    "500k": ("50,000 atoms", lambda seed: _data.make_protein(seed, 50_000)),
}


def case_of(suite: Suite, case: str) -> tuple[str, Callable[[int], Points], str]:
    name, make, target = SIZES[case]
    if suite.quick and case in QUICK:
        name, make = QUICK[case]
    return name, make, target


def search(points: Points) -> moeyard.RadiusGraph:
    return moeyard.radius_graph(points.pos, CUTOFF, points.batch, geometry=False)


def with_geometry(points: Points) -> moeyard.RadiusGraph:
    return moeyard.radius_graph(points.pos, CUTOFF, points.batch)


def same_edges(ours: moeyard.RadiusGraph, theirs: tuple[Any, ...], points: Points) -> None:
    """Equal edge sets, but for pairs within rounding of the cutoff: many peers compute in float64."""
    number = len(points.pos)
    mine, other = (_peers.edge_keys(edges, number) for edges in (ours.edge_index, theirs[0]))
    if torch.equal(mine, other):
        return
    assert len(other) > 0, "no edges"
    both = torch.cat([mine, other])
    keys, counts = both.unique(return_counts=True)
    odd = keys[counts == 1]
    assert (counts <= 2).all(), "an edge comes twice"
    ends = points.pos.double()
    gap = ((ends[odd // number] - ends[odd % number]).norm(dim=1) - CUTOFF).abs()
    assert gap.max() < 1e-5, f"{len(odd)} edges differ, the furthest {gap.max():.2g} from the cutoff"


def same_geometry(ours: moeyard.RadiusGraph, theirs: tuple[Any, ...], points: Points) -> None:
    """Both against the coordinates, then the distances of the edges that both have."""
    same_edges(ours, theirs, points)
    between = points.pos[ours.edge_index[0]] - points.pos[ours.edge_index[1]]  # neighbour less centre
    torch.testing.assert_close(ours.vector, between, rtol=0, atol=0)
    torch.testing.assert_close(ours.distance, between.norm(dim=1), rtol=1e-5, atol=1e-6)
    edges, *geometry = theirs
    distance = next(x for x in geometry if x.dim() == 1).float()
    vector = next(x for x in geometry if x.dim() == 2).float()
    between = points.pos[edges[0]] - points.pos[edges[1]]
    sign = -1 if len(vector) and (vector[0] * between[0]).sum() < 0 else 1  # peers differ, but each has one direction
    torch.testing.assert_close(sign * vector, between, rtol=1e-4, atol=1e-4)
    keys, order = (ours.edge_index[0] * len(points.pos) + ours.edge_index[1]).sort()
    others, place = (edges[0] * len(points.pos) + edges[1]).sort()
    mine, his = ours.distance[order], distance[place]
    if not torch.equal(keys, others):
        mine, his = mine[torch.isin(keys, others)], his[torch.isin(others, keys)]
    torch.testing.assert_close(his, mine, rtol=1e-4, atol=1e-4)


def peers(geometry: bool, points: Points, threads: int = 1) -> list[Peer]:
    """All of them (with two threads and more: that have threads), but for the slowest where a call takes seconds."""
    same = same_geometry if geometry else same_edges
    largest = max(end - begin for begin, end in points.graphs)
    too_slow = {
        "nvalchemiops naive": (largest > 10_000, "left out: quadratic, over 10,000 atoms in one graph"),
        "matscipy": (len(points.pos) > 20_000, "left out over 20,000 atoms: see the rows with fewer"),
        "freud": (len(points.pos) > 20_000, "left out over 20,000 atoms: see the rows with fewer"),
    }
    found = []
    for name, call in _peers.radius_peers(geometry, threads).items():
        left_out, why = too_slow.get(name, (False, ""))
        if call is not None and left_out:
            found.append(Peer(name, None, same, why=why))
        else:
            found.append(Peer(name, call, same))
    return found


def counted(make: Callable[[int], Points]) -> Callable[[int], Points]:
    """Peers with a fixed capacity get exactly what they need."""

    def call(seed: int) -> Points:
        points = make(seed)
        return Points(points.pos, points.ptr, points.batch, int(search(points).num_neighbors.max()))

    return call


@cases(*SIZES)
def bench_edges(suite: Suite, case: str) -> None:
    name, make, target = case_of(suite, case)

    suite.compare(f"radius_graph edges: {name}", counted(make), search, peers(False, make(0)), best=target)


@cases(*SIZES)
def bench_geometry(suite: Suite, case: str) -> None:
    name, make, _ = case_of(suite, case)

    row = f"radius_graph edges, distances and vectors: {name}"
    suite.compare(row, counted(make), with_geometry, peers(True, make(0)), best=">= 3.5 x")


@cases("proteins", "50k", "500k")
def bench_all_threads(suite: Suite, case: str) -> None:
    """Two threads beside one, and beside the peers that have threads."""
    name, make, _ = case_of(suite, case)

    def threads(number: int) -> Callable[[Points], moeyard.RadiusGraph]:
        def call(points: Points) -> moeyard.RadiusGraph:
            torch.set_num_threads(number)
            return search(points)

        return call

    if all_threads() < 2:
        row = f"radius_graph edges, 2 threads: {name}"
        suite.record(row, None, "ms", target=">= 1.6 x", note=ONE_CORE)
        return
    one = Peer("moeyard, 1 thread", threads(1), same_bits, ">= 1.6 x")
    row = f"radius_graph edges, 2 threads: {name}"
    suite.compare(row, make, threads(2), [one], threads=2)
    suite.compare(row, make, search, peers(False, make(0), threads=2), threads=2)


def same_bits(ours: moeyard.RadiusGraph, theirs: moeyard.RadiusGraph, points: Points) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), "the bits differ"


@cases("proteins", "50k", "500k")
def bench_shuffled(suite: Suite, case: str) -> None:
    name, make, _ = case_of(suite, case)

    def both(seed: int) -> tuple[Points, Points]:
        points = make(seed)
        return points, _data.shuffled(points, seed)

    ordered = Peer("moeyard, in chain order", lambda pair: search(pair[0]), same_relabelled, ">= 0.714 x")
    row = f"radius_graph edges, atoms shuffled: {name}"
    suite.compare(row, both, lambda pair: search(pair[1]), [ordered], note="at most 1.4 times as long")


def same_relabelled(ours: moeyard.RadiusGraph, theirs: moeyard.RadiusGraph, pair: tuple[Points, Points]) -> None:
    """The same edges once the shuffled atoms have their old numbers, which their coordinates tell."""
    ordered, mixed = (torch.from_numpy(np.lexsort((*p.pos.numpy().T, p.batch.numpy()))) for p in pair)
    old = torch.empty_like(ordered)
    old[mixed] = ordered
    assert torch.equal(pair[0].pos[old], pair[1].pos), "the shuffled atoms are others"
    mine, other = (_peers.edge_keys(edges, len(old)) for edges in (old[ours.edge_index], theirs.edge_index))
    assert torch.equal(mine, other), "the edges differ"


@cases(50_000, 100_000)
def bench_linear(suite: Suite, case: int) -> None:
    """Time per edge must not grow with N, but for this: the edges of 50,000 atoms come to 19 MB, which malloc recycles,
    those of 100,000 to 38 MB, which the system clears for every call."""
    many = suite.size(500_000, 2 * case)

    def both(seed: int) -> tuple[Points, Points]:
        return _data.make_protein(seed, many), _data.make_protein(seed, case)

    edges = [len(search(points).edge_index[0]) for points in both(1)]
    small = Peer(f"moeyard, {case:,} atoms, scaled", lambda pair: search(pair[1]), None)
    scratch = Suite(quick=suite.quick, rounds=suite.rounds, echo=False)
    scratch.runner = suite.runner
    scratch.compare("", both, lambda pair: search(pair[0]), [small])
    row = scratch.rows[0]
    scale = UNITS[row["unit"]] * 1e9
    ours, peer = row["ours"] * scale / edges[0], row["peer"] * scale / edges[1]
    suite.record(
        f"radius_graph edges, time per edge: {many:,} atoms",
        ours,
        "ns",
        peer=peer,
        peer_name=f"moeyard, {case:,} atoms",
        ratio=peer / ours,
        target=">= 0.8 x",
        note=f"linear in N would be 1; malloc recycles up to 32 MB, more is cleared by the system; {row['note']}",
    )


@cases(False, True)
def bench_real_proteins(suite: Suite, case: bool) -> None:
    name = "radius_graph edges" + (", distances and vectors" if case else "")
    points = "not in a quick run" if suite.quick else _data.real_proteins()
    if isinstance(points, str):
        suite.record(f"{name}: real proteins", None, "ms", note=f"not measured: {points}")
        return
    most = int(search(points).num_neighbors.max())
    points = Points(points.pos, points.ptr, points.batch, most)

    def make(seed: int) -> Points:
        noise = torch.randn(points.pos.shape, generator=torch.Generator().manual_seed(seed)) * 0.05
        return Points(points.pos + noise, points.ptr, points.batch, points.most + 8)

    row = f"{name}: {len(points.ptr) - 1} AlphaFold models, {len(points.pos):,} atoms"
    target = ">= 3.5 x" if case else ">= 7 x"
    note = "real coordinates with 0.05 angstrom of noise"
    suite.compare(row, make, with_geometry if case else search, peers(case, points), best=target, note=note)


def bench_memory(suite: Suite) -> None:
    _memory.record(suite, __file__, output_share=1.5, extra_mb=0)


def memory_cases(quick: bool) -> dict[str, Callable[[], Any]]:
    points = _data.make_protein(1, 100_000 if quick else 500_000)
    many, centres = _data.make_molecules(1), points.pos[::10].contiguous()
    return {
        f"radius_graph edges: {len(points.pos):,} atoms": lambda: search(points),
        f"radius_graph edges, distances and vectors: {len(points.pos):,} atoms": lambda: with_geometry(points),
        "radius_graph edges: 1,000 molecules": lambda: search(many),
        f"radius edges, every tenth atom as centre: {len(points.pos):,} atoms": lambda: moeyard.radius(
            points.pos, centres, CUTOFF, geometry=False
        ),
        f"knn_graph edges, k=16: {len(points.pos):,} atoms": lambda: moeyard.knn_graph(points.pos, 16, geometry=False),
        f"knn_graph edges, distances and vectors, k=16: {len(points.pos):,} atoms": lambda: moeyard.knn_graph(
            points.pos, 16
        ),
    }


if __name__ == "__main__":
    main(globals())
