"""gather_segments beside PyG's `Batch.from_data_list`, torch's default_collate and a plain copy of as many bytes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import _data
import _memory
import _peers
import moeyard
from _harness import ONE_CORE, UNITS, Peer, Suite, cases, main
from _machine import all_threads

MOLECULES, CHOSEN = 4000, 1000
CHUNKS = 8  # parts of the table of proteins that calls take in turn


@dataclass(frozen=True)
class Table:
    """Samples one after another, as on disk, and which of them make the batch. `edges` holds all sources, then all
    targets, so that a sample has two segments and a batch comes out as [2, M]."""

    pos: Tensor
    z: Tensor
    edges: Tensor
    ptr: Tensor
    edge_ptr: Tensor
    index: Tensor
    data: list[Any] = field(default_factory=list)


def table(count: int, atoms: int, chosen: int, make: Callable[[int, int, int], _data.Points], edges: bool) -> Any:
    def build(seed: int) -> Table:
        points = make(seed, count, atoms)
        random = torch.Generator().manual_seed(seed)
        z = torch.randint(1, 18, (atoms,), generator=random)
        index = torch.randperm(count, generator=random)[:chosen]
        found = torch.zeros(0, dtype=torch.int64)
        edge_ptr = torch.zeros(2 * count + 1, dtype=torch.int64)
        if edges:
            graph = moeyard.radius_graph(points.pos, _data.CUTOFF, points.batch, geometry=False)
            owner = points.batch[graph.edge_index[1]]
            found = (graph.edge_index - points.ptr[owner]).flatten()
            edge_ptr[1:] = torch.bincount(owner, minlength=count).repeat(2).cumsum(0)
        return Table(points.pos, z, found, points.ptr, edge_ptr, index)

    return build


def collate(t: Table, with_edges: bool) -> tuple[Tensor, ...]:
    """pos, z, edge_index, batch, ptr, as PyG has them."""
    pos = moeyard.gather_segments(t.pos, t.ptr, t.index)
    z = moeyard.gather_segments(t.z, t.ptr, t.index)
    if not with_edges:
        return pos.values, z.values, pos.batch, pos.ptr
    both = torch.cat([t.index, t.index + (len(t.ptr) - 1)])
    edges = moeyard.gather_segments(t.edges, t.edge_ptr, both, add=pos.ptr[:-1].repeat(2))
    return pos.values, z.values, pos.batch, pos.ptr, edges.values.view(2, -1)


@cases("positions and elements", "positions, elements and edges")
def bench_molecules(suite: Suite, case: str) -> None:
    """1,000 molecules out of 4,000; PyG gets its list of Data objects ready-made."""
    edges = case.endswith("edges")
    pyg = _peers.optional("torch_geometric.data")
    build = table(MOLECULES, MOLECULES * 18, CHOSEN, _data.make_molecules, edges)

    def make(seed: int) -> Table:
        t = build(seed)
        if pyg is not None:
            for i in t.index.tolist():
                a, b, c, d = *t.ptr[i : i + 2].tolist(), *t.edge_ptr[i : i + 2].tolist()
                pair = {"edge_index": t.edges.view(2, -1)[:, c:d].contiguous()} if edges else {}
                t.data.append(pyg.Data(pos=t.pos[a:b].clone(), z=t.z[a:b].clone(), **pair))
        return t

    def from_data_list(t: Table) -> Any:
        batch = pyg.Batch.from_data_list(t.data)
        return (batch.pos, batch.z, batch.batch, batch.ptr) + ((batch.edge_index,) if edges else ())

    def same(ours: Any, theirs: Any, inputs: Any) -> None:
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), "fields differ"
        assert all(a.is_contiguous() for a in ours), "a field is a strided view"

    peers = [Peer("PyG Batch.from_data_list", from_data_list if pyg else None, same, ">= 10 x")]
    suite.compare(f"gather_segments, 1,000 molecules: {case}", make, lambda t: collate(t, edges), peers)


def bench_equal_sizes(suite: Suite) -> None:
    """default_collate stacks samples of one shape: 1,000 x [18, 3]."""
    collate_fn = torch.utils.data.default_collate

    def make(seed: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        random = torch.Generator().manual_seed(seed)
        values = torch.randn(MOLECULES * 18, 3, generator=random)
        index = torch.randperm(MOLECULES, generator=random)[:CHOSEN]
        samples = [values[18 * i : 18 * i + 18].clone() for i in index.tolist()]
        return values, torch.arange(0, MOLECULES * 18 + 1, 18), index, samples

    def same(ours: moeyard.Segments, theirs: Tensor, inputs: Any) -> None:
        assert torch.equal(ours.values.view(-1, 18, 3), theirs), "values differ"

    peers = [Peer("default_collate", lambda inputs: collate_fn(inputs[3]), same)]
    row = "gather_segments, 1,000 samples of 18 atoms: positions"
    suite.compare(row, make, lambda inputs: moeyard.gather_segments(*inputs[:3]), peers)


@cases(1, "all")
def bench_proteins(suite: Suite, case: int | str) -> None:
    """64 proteins out of 512, in bytes read and written per second beside copies of as many positions."""
    threads = 1 if case == 1 else all_threads()
    row = "gather_segments, 64 proteins, 124,000 atoms: bandwidth"
    if case == "all" and threads == 1:
        suite.record(f"{row}, all threads", None, "GB/s", note=ONE_CORE)
        return
    build = table(64 * CHUNKS, 124_000 * CHUNKS, 64 * CHUNKS, _data.make_proteins, False)
    moved: list[tuple[int, int]] = []
    turn = itertools.count()

    def make(seed: int) -> tuple[Table, Tensor]:
        t = build(seed)
        return t, torch.ones(len(t.pos) // CHUNKS, 3)

    # Both sides read another part of the table every time, so that it comes from the cache as seldom for both.
    def ours(inputs: tuple[Table, Tensor]) -> moeyard.Segments:
        t = inputs[0]
        return moeyard.gather_segments(t.pos, t.ptr, t.index.view(CHUNKS, -1)[next(turn) % CHUNKS])

    def source(inputs: tuple[Table, Tensor]) -> Tensor:
        t, touched = inputs
        begin = next(turn) % CHUNKS * len(touched)
        return t.pos[begin : begin + len(touched)]

    def count_bytes(out: moeyard.Segments, theirs: Any, inputs: Any) -> None:
        t, touched = inputs
        every = moeyard.gather_segments(t.pos, t.ptr, t.index)
        rows = torch.cat([t.pos[t.ptr[i] : t.ptr[i + 1]] for i in t.index.tolist()])
        assert torch.equal(every.values, rows), "values differ"
        moved.append(((2 * rows.nbytes + every.batch.nbytes + every.ptr.nbytes) // CHUNKS, 2 * touched.nbytes))

    peers = [
        Peer("copy_ into touched memory", lambda inputs: inputs[1].copy_(source(inputs)) is None, count_bytes),
        Peer("clone", lambda inputs: source(inputs).clone(), count_bytes),
    ]
    scratch = Suite(quick=suite.quick, rounds=suite.rounds, echo=False)
    scratch.runner = suite.runner
    scratch.compare("", make, ours, peers, threads=threads)
    for found, target in zip(scratch.rows, (">= 0.7 x", None), strict=True):
        seconds = UNITS[found["unit"]]
        mine, plain = (n / found[side] / seconds / 1e9 for n, side in zip(moved[0], ("ours", "peer"), strict=True))
        suite.record(
            row + (f", {threads} threads" if threads > 1 else ""),
            mine,
            "GB/s",
            peer=plain,
            peer_name=found["peer_name"],
            ratio=mine / plain,
            target=target if threads == 1 else None,
            note=f"read + written; ours writes the batch vector too; {found['note']}",
        )


def bench_memory(suite: Suite) -> None:
    _memory.record(suite, __file__)


def memory_cases(quick: bool) -> dict[str, Callable[[], Any]]:
    t = table(500, 967_000, 400, _data.make_proteins, False)(1)
    return {"gather_segments, 400 proteins": lambda: moeyard.gather_segments(t.pos, t.ptr, t.index)}


if __name__ == "__main__":
    main(globals())
