"""What every result must satisfy, checked in plain torch. Cheap, and independent of the slow references."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeyard import Gating, Packing, PermutationPlan, RadiusGraph, Segments

Arguments = dict[str, Any]


def same_bits(a: Tensor, b: Tensor) -> bool:
    # Not contiguous(): one element with a stride of 2 counts as contiguous, but not to view().
    a, b = (t.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def identity(out: Tensor, a: Arguments) -> None:
    assert out.shape == a["x"].shape
    assert same_bits(out, a["x"])


def topk_gating(out: Gating, a: Arguments) -> None:
    T, E = a["logits"].shape
    k, mask, experts = a["k"], a.get("mask"), out.experts.long()
    real = torch.ones(T, dtype=torch.bool) if mask is None else mask
    assert out.weights.shape == experts.shape == (T, k)
    chosen = experts[real]
    assert bool(((chosen >= 0) & (chosen < E)).all())
    assert bool((experts[~real] == -1).all())
    assert bool((out.weights[~real] == 0).all())
    ids = chosen.sort(dim=1).values
    assert bool((ids[:, 1:] != ids[:, :-1]).all()), "an expert twice in a row"
    assert torch.equal(out.counts.long(), torch.bincount(chosen.reshape(-1), minlength=E))
    if abs(a.get("scale", 1.0)) <= 1e3:
        assert bool(out.weights.isfinite().all())


def plan_permutation(plan: PermutationPlan, a: Arguments) -> None:
    experts, E, capacity = a["experts"].long().reshape(-1), a["num_experts"], a.get("capacity")
    rows, slots, R = plan.row_of_slot.long().reshape(-1), plan.slot_of_row.long(), plan.slot_of_row.shape[0]
    placed = rows >= 0
    assert bool(((rows >= -1) & (rows < R)).all())
    assert bool(((slots >= -1) & (slots < experts.numel())).all())
    assert torch.equal(slots[rows[placed]], placed.nonzero()[:, 0])
    assert int((slots >= 0).sum()) == int(placed.sum()) == int(plan.counts.sum())
    assert torch.equal(plan.counts.long(), torch.bincount(experts[placed], minlength=E))
    assert int(plan.dropped) == int((experts >= 0).sum()) - int(placed.sum())
    assert bool((experts[placed] >= 0).all())
    ends = plan.offsets.long()
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    assert bool((ends - starts >= plan.counts).all())
    assert bool(((ends - starts) % a.get("align", 1) == 0).all())
    assert int(ends[-1]) <= R
    assert bool(((rows >= starts[experts]) & (rows < ends[experts]))[placed].all())
    assert capacity is None or int(plan.counts.max()) <= capacity


def permute_tokens(out: Tensor, a: Arguments) -> None:
    x, slots, k = a["x"], a["plan"].slot_of_row.long(), a["plan"].row_of_slot.shape[1]
    assert out.shape == (slots.shape[0], x.shape[1])
    assert out.dtype == x.dtype
    filled = slots >= 0
    assert same_bits(out[~filled], torch.zeros_like(out[~filled]))
    if a.get("slot_weights") is None and k:
        assert same_bits(out[filled], x[slots[filled] // k])


def unpermute_tokens(out: Tensor, a: Arguments) -> None:
    y, rows = a["y"], a["plan"].row_of_slot.long()
    assert out.shape == (rows.shape[0], y.shape[1])
    assert out.dtype == y.dtype
    if a.get("weights") is None and not y.dtype.is_floating_point:
        padded = torch.cat([y, y.new_zeros(1, y.shape[1])])
        expected = padded[torch.where(rows < 0, y.shape[0], rows)].sum(1, dtype=y.dtype)
        assert torch.equal(out, expected)


# ---- edges ----------------------------------------------------------------------------------------------------------


def radius_graph(out: RadiusGraph, a: Arguments) -> None:
    i, j = _edges(out, a, a["pos"].shape[0], a["pos"].shape[0], a["flow"] == "target_to_source")
    _near(out, a)
    graph = _graph_ids(a, "batch", "ptr", a["pos"].shape[0])
    assert torch.equal(graph[i], graph[j])
    plain = a.get("max_num_neighbors") is None and a.get("cell") is None and not a.get("half")
    if plain and not bool(out.overflow):
        near = _pairs_within(a["pos"], a["pos"], a["r"]) & (graph[:, None] == graph)
        if not a["loop"]:
            near.fill_diagonal_(False)
        assert torch.equal(torch.stack([i, j], 1), near.nonzero())


def radius(out: RadiusGraph, a: Arguments) -> None:
    x, y = a["x"], a["y"]
    i, j = _edges(out, a, y.shape[0], x.shape[0], True)
    _near(out, a)
    of_x = _graph_ids(a, "batch_x", "ptr_x", x.shape[0])
    of_y = _graph_ids(a, "batch_y", "ptr_y", y.shape[0])
    assert torch.equal(of_y[i], of_x[j])
    if a.get("max_num_neighbors") is None and a.get("cell") is None and not bool(out.overflow):
        near = _pairs_within(y, x, a["r"]) & (of_y[:, None] == of_x)
        assert torch.equal(torch.stack([i, j], 1), near.nonzero())


def knn_graph(out: RadiusGraph, a: Arguments) -> None:
    n = a["pos"].shape[0]
    i, j = _edges(out, a, n, n, a["flow"] == "target_to_source")
    graph = _graph_ids(a, "batch", "ptr", n)
    assert torch.equal(graph[i], graph[j])
    assert int(out.truncated) == 0
    if a.get("cell") is None:
        members = (graph[:, None] == graph).sum(1) - int(not a["loop"])
        assert torch.equal(out.num_neighbors.long(), members.clamp(max=a["k"]))


def _edges(out: RadiusGraph, a: Arguments, centres: int, points: int, first: bool) -> tuple[Tensor, Tensor]:
    """Centres and neighbours of the edges that are none of `max_edges`' padding: in range and in order."""
    M, capacity = out.edge_index.shape[1], a.get("max_edges")
    m = min(int(out.num_edges), M)
    i, j = out.edge_index[:, :m] if first else out.edge_index[:, :m].flip(0)
    assert out.num_neighbors.shape == (centres,)
    assert int(out.num_neighbors.sum()) == int(out.num_edges)
    assert int(out.num_edges if capacity is None else capacity) == M
    assert bool(out.overflow) == (int(out.num_edges) > M)
    assert bool((out.edge_index[:, m:] == 0).all())
    assert bool(((i >= 0) & (i < centres) & (j >= 0) & (j < points)).all())
    key = i * (points + 1) + j
    steps = key[1:] - key[:-1]
    assert bool((steps >= 0).all()) if a.get("cell") is not None else bool((steps > 0).all())
    assert out.cell_shift.shape == ((M, 3) if a.get("cell") is not None else (0, 3))
    assert out.distance.shape == ((M,) if a["geometry"] else (0,))
    assert out.vector.shape == ((M, 3) if a["geometry"] else (0, 3))
    return i, j


def _near(out: RadiusGraph, a: Arguments) -> None:
    if a["geometry"]:
        real = out.distance[: int(out.num_edges)]
        assert bool((real <= torch.tensor(a["r"], dtype=real.dtype)).all())


def _pairs_within(centres: Tensor, points: Tensor, r: float) -> Tensor:
    """The edge test of the contract, for all pairs."""
    d = points.detach()[None] - centres.detach()[:, None]
    square = torch.tensor(r, dtype=d.dtype).square()
    return (d[..., 0] * d[..., 0] + d[..., 1] * d[..., 1]) + d[..., 2] * d[..., 2] < square


def _graph_ids(a: Arguments, batch: str, ptr: str, n: int) -> Tensor:
    if a.get(batch) is not None:
        return a[batch].long()
    if a.get(ptr) is not None:
        return torch.repeat_interleave(torch.arange(a[ptr].shape[0] - 1), a[ptr].long().diff())
    return torch.zeros(n, dtype=torch.int64)


# ---- batches --------------------------------------------------------------------------------------------------------


def pack_batches(out: Packing, a: Arguments) -> None:
    sizes, n, budget = a["sizes"].tolist(), a["sizes"].shape[0], a["budget"]
    order = list(range(n)) if a.get("order") is None else a["order"].tolist()
    index, ptr, skipped = out.index.tolist(), out.ptr.tolist(), out.skipped.tolist()
    assert sorted(index + skipped) == sorted(order)
    assert ptr[0] == 0
    assert ptr[-1] == len(index)
    assert a["oversize"] == "skip" or not skipped
    for begin, end, fill in zip(ptr, ptr[1:], out.fill.tolist(), strict=False):
        assert begin < end, "an empty batch"
        batch = index[begin:end]
        assert fill == sum(sizes[i] for i in batch)
        assert fill <= budget or (len(batch) == 1 and a["oversize"] == "own_batch")
        assert len(batch) <= (a.get("max_samples") or n)
    assert len(out.fill) == len(ptr) - 1


def gather_segments(out: Segments, a: Arguments) -> None:
    values, ptr, index, total = a["values"].detach(), a["ptr"].tolist(), a["index"].tolist(), a.get("total")
    rows = [row for s in index for row in range(ptr[s], ptr[s + 1])]
    lengths = torch.tensor([ptr[s + 1] - ptr[s] for s in index], dtype=torch.int64)
    R = len(rows) if total is None else total
    assert out.values.shape == (R, *values.shape[1:])
    assert out.ptr.tolist() == [0, *lengths.cumsum(0).tolist()]
    assert torch.equal(out.batch[: len(rows)], torch.repeat_interleave(torch.arange(len(index)), lengths))
    assert bool((out.batch[len(rows) :] == len(index)).all())
    gathered = values[torch.tensor(rows, dtype=torch.int64)]
    if a.get("add") is not None:
        add = torch.repeat_interleave(a["add"].long(), lengths).view(-1, *[1] * (values.dim() - 1))
        gathered = (gathered.long() + add).to(values.dtype)
    assert same_bits(out.values[: len(rows)], gathered)
    assert same_bits(out.values[len(rows) :], torch.zeros_like(out.values[len(rows) :]))


def expert_ffn(out: Tensor, a: Arguments) -> None:
    x, offsets = a["x"], a["offsets"]
    assert out.shape == x.shape
    assert not out.detach()[int(offsets[-1]) if len(offsets) else 0 :].any()
