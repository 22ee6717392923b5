"""One builder per public op, and per backward op (callers of torch.ops reach those directly): arguments that are mostly
well formed and full of hostile values. `Hostile.spoil` breaks their form afterwards.

Sizes stay where a call takes milliseconds under a sanitizer, or go far beyond what any machine holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import moeyard
from fuzz import invariants
from fuzz.hostile import COPIED, FLOATS, INTS, Hostile
from moeyard._native import cpu
from moeyard.ops.expert_ffn import expert_ffn as ops_expert_ffn

Arguments = dict[str, Any]
_NAN, _INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Case:
    function: Callable[..., Any]
    arguments: Callable[[Hostile], Arguments]
    #: AssertionError if a result contradicts its arguments
    check: Callable[[Any, Arguments], None] = lambda result, arguments: None
    differentiable: tuple[str, ...] = ()
    #: the public functions check Python types; below them torch's schema does, with errors of its own
    public: bool = True


def identity(h: Hostile) -> Arguments:
    return {"x": h.of_dtype([h.size(9, 4000) for _ in range(h.number(0, 3))][:3] or [2], h.pick(*COPIED))}


# ---- gating and permutation ------------------------------------------------------------------------------------------


def _experts(h: Hostile) -> int:
    return h.pick(8, 1, 2, 3, 4, 7, 15, 16, 17, 31, 32, 33, 60, 64, 65, 100, 128, 256, 257, h.pick(0, 700, 8192, 8193))


def topk_gating(h: Hostile) -> Arguments:
    E, T = _experts(h), h.size(20, 400)
    T = T if E <= 700 else T % 3
    k = h.number(1, min(E, 12)) if not h.rarely() else h.pick(E, E + 1, E // 2)
    dtype = h.pick(*FLOATS)
    arguments: Arguments = {
        "logits": h.floats([T, E], dtype),
        "k": k,
        "score": h.pick("softmax", "softmax_topk", "sigmoid", "sqrtsoftplus"),
        "renormalize": h.pick(False, True),
        "scale": h.pick(1.0, 2.5, 0.0, -3, 1e30, 1e-40) if not h.rarely(30) else h.pick(_INF, _NAN, 1e300),
    }
    if h.rarely(3):
        arguments["selection_bias"] = h.floats([E], h.pick(*FLOATS), specials=h.rarely(3))
    if h.rarely(3) and E:
        groups = h.pick(*[g for g in (1, 2, 3, 4, 8, E) if E % g == 0 or h.rarely(40)])
        topk_groups = h.number(1, groups)
        most = topk_groups * E // groups
        arguments |= {"num_groups": groups, "topk_groups": topk_groups, "group_score_experts": h.pick(1, 2)}
        arguments["k"] = k if h.rarely(20) else max(1, min(k, most))
    if h.rarely(3):
        arguments["mask"] = h.of_dtype([T], torch.bool)
    if h.rarely(3):
        shape = h.pick([T], [T, arguments["k"]]) if arguments["k"] < 50 else [T]
        forced = h.ints(shape, -1, 0 if len(shape) == 2 and h.rarely(2) else E)
        arguments |= {"forced_experts": forced, "forced_weights": h.pick("score", "one")}
    return arguments


def topk_gating_backward(h: Hostile) -> Arguments:
    E, T, k, dtype = max(1, _experts(h)) % 300, h.size(20, 300), h.number(1, 6), h.pick(*FLOATS)
    grad_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    grads = [h.floats(shape, grad_dtype) if h.number(0, 2) else None for shape in ([T, k], [E], [E], [], [])]
    return {
        "logits": h.floats([T, E], dtype),
        "experts": h.ints([T, k], -1, E, dtype=torch.int32),
        "score": h.pick("softmax", "softmax_topk", "sigmoid", "sqrtsoftplus"),
        "renormalize": h.pick(False, True),
        "scale": h.pick(1.0, -2.0),
        "mask": h.of_dtype([T], torch.bool) if h.rarely(3) else None,
        **dict(zip(("grad_w", "grad_scores", "grad_weight_sum", "grad_lse", "grad_entropy"), grads, strict=True)),
    }


def plan_permutation(h: Hostile) -> Arguments:
    T, k, E = h.size(20, 3000), h.number(0, 5), max(1, _experts(h))
    arguments: Arguments = {"experts": h.ints([T, k], -1, E), "num_experts": E}
    if h.rarely(3):
        arguments["capacity"] = h.pick(0, 1, 2, 5, 100, 2**62)
        arguments["drop"] = h.pick("position", "weight")
    if (arguments.get("drop") == "weight") != h.rarely(20):
        arguments["weights"] = h.floats([T, k], h.pick(*FLOATS))
    if h.rarely(3):
        arguments["align"] = h.pick(1, 2, 3, 8, 16, 128)
    return arguments


def _plan(h: Hostile) -> moeyard.PermutationPlan:
    T, k, E = h.size(12, 300), h.number(0, 4), h.pick(1, 2, 5, 16, 64)
    experts = torch.randint(-1 if h.rarely(3) else 0, E, (T, k), generator=torch.Generator().manual_seed(T))
    plan = moeyard.plan_permutation(experts, E, capacity=h.pick(None, None, 1, 3), align=h.pick(1, 1, 8))
    maps = {name: h.laid_out(getattr(plan, name)) for name in ("row_of_slot", "slot_of_row")}
    if h.rarely(4):
        name = h.pick(*maps)
        x = maps[name].clone(memory_format=torch.contiguous_format)
        if x.numel():
            x.view(-1)[h.number(0, x.numel() - 1)] = h.pick(-1, -2, 0, 1, x.numel(), 2**31 - 1, -(2**31))
        maps[name] = h.laid_out(x)
    return plan._replace(**maps)


def permute_tokens(h: Hostile) -> Arguments:
    plan = _plan(h)
    T, k = plan.row_of_slot.shape
    weighted = h.rarely(3)
    dtype = h.pick(*FLOATS) if weighted else h.pick(*COPIED)
    return {
        "x": h.of_dtype([T, h.pick(8, 0, 1, 2, 3, 7, 16, 17, 33, 64, 100, 257)], dtype),
        "plan": plan,
        "slot_weights": h.floats([T, k], h.pick(*FLOATS)) if weighted else None,
    }


def unpermute_tokens(h: Hostile) -> Arguments:
    plan = _plan(h)
    weighted = h.rarely(2)
    dtype = h.pick(*FLOATS) if weighted else h.pick(*FLOATS, *INTS)
    return {
        "y": h.of_dtype([plan.slot_of_row.shape[0], h.pick(8, 0, 1, 2, 3, 7, 16, 17, 33, 64, 100, 257)], dtype),
        "plan": plan,
        "weights": h.floats(list(plan.row_of_slot.shape), h.pick(*FLOATS)) if weighted else None,
    }


def _ffn(h: Hostile) -> Arguments:
    """In float32: other dtypes are torch's products."""
    dim, hidden, experts = h.pick(8, 0, 1, 3, 16, 33, 64), h.pick(8, 0, 1, 7, 32, 40), h.pick(3, 1, 2, 8)
    activation = h.pick("swiglu", "relu")
    rows = h.size(20, 300)
    return {
        "x": h.floats([rows, dim], torch.float32),
        "up": h.floats([experts, dim, (2 if activation == "swiglu" else 1) * hidden], torch.float32),
        "down": h.floats([experts, hidden, dim], torch.float32),
        "offsets": h.sorted_cuts(max(rows - h.pick(0, 0, 1, 5), 0), experts)[1:],
        "activation": activation,
    }


def expert_ffn(h: Hostile) -> Arguments:
    return _ffn(h) | {"recompute": h.pick(False, True)}


def expert_ffn_backward(h: Hostile) -> Arguments:
    arguments = _ffn(h)
    x, up = arguments["x"], arguments["up"]
    kept = h.floats([x.shape[0], up.shape[2]], torch.float32) if h.number(0, 1) else x.new_empty(0)
    named = {"grad": h.floats(list(x.shape), torch.float32), **arguments, "hidden": kept}
    order = ("grad", "x", "up", "down", "hidden", "offsets", "activation")
    return {name: named[name] for name in order} | {"for_x": h.pick(True, False), "for_weights": h.pick(True, False)}


def _moved_backward(h: Hostile, permuting: bool) -> Arguments:
    plan, H, dtype = _plan(h), h.pick(8, 0, 1, 3, 16, 33), h.pick(*FLOATS)
    rows, tokens = [plan.slot_of_row.shape[0], H], [plan.row_of_slot.shape[0], H]
    need_weights = h.rarely(2)
    weighted = need_weights != h.rarely(4)
    return {
        "grad": h.floats(rows if permuting else tokens, dtype),
        "source": h.floats(tokens if permuting else rows, dtype) if need_weights != h.rarely(20) else None,
        "row_of_slot": plan.row_of_slot,
        "slot_of_row": plan.slot_of_row,
        "weights": h.floats(list(plan.row_of_slot.shape), h.pick(*FLOATS)) if weighted else None,
        "need_source": h.pick(True, False),
        "need_weights": need_weights,
    }


# ---- edges ----------------------------------------------------------------------------------------------------------


def _coordinates(h: Hostile, n: int, dtype: torch.dtype) -> Tensor:
    if h.rarely(6):
        return h.floats([n, 3], dtype)
    kind = h.pick("cloud", "lattice", "line", "far away", "clusters")
    x = h.uniform(n, 3) * 6
    if kind == "lattice":
        x = x.round()
    elif kind == "line":
        x[:, 1:] = 0.25
    elif kind == "far away":
        x = x + h.pick(1e3, 1e6, 1e15)
    elif kind == "clusters" and n:
        x[: n // 2] += h.pick(1e2, 1e8, 1e18)
    return h.laid_out(x.to(dtype))


def _graphs(h: Hostile, n: int, suffix: str = "") -> Arguments:
    kind = h.pick("none", "batch", "ptr")
    if kind == "batch":
        ids = torch.randint(0, h.pick(1, 3, 9), (n,), generator=torch.Generator().manual_seed(n)).sort().values
        if h.rarely(8):
            ids = ids * h.pick(7, 2**40, 2**58)
        if h.rarely(10) and n:
            ids[h.number(0, n - 1)] = h.pick(-1, 10**6, 2**62, 0)
        narrow = ids.numel() == 0 or int(ids.abs().max()) < 2**31
        return {f"batch{suffix}": h.laid_out(ids.to(h.pick(*INTS) if narrow else torch.int64))}
    return {f"ptr{suffix}": h.sorted_cuts(n, h.number(0 if n == 0 else 1, 6))} if kind == "ptr" else {}


def _box(h: Hostile, dtype: torch.dtype) -> Arguments:
    """Cells a third of a cutoff long and longer; singular, skewed and huge ones too. Too small ones are refused."""
    if not h.rarely(3):
        return {}
    lengths = torch.tensor([h.pick(4.0, 1.1, 9.0) for _ in range(3)], dtype=torch.float64)
    cell = torch.diag(lengths) + (h.uniform(3, 3) if h.rarely(3) else 0)
    if h.rarely(8):
        cell[h.number(0, 2)] = h.pick(cell[0], cell[0] * 1e-9, cell[0] * 1e30, cell[0] * 0)
    if h.rarely(20):
        cell[0, 0] = h.pick(float("nan"), float("inf"), 1e-30, -1.0)
    cell = cell.to(dtype) if not h.rarely(3) else cell.to(dtype).expand(h.number(0, 9), 3, 3)
    box: Arguments = {"cell": h.laid_out(cell)}
    if h.rarely(2):
        box["pbc"] = h.of_dtype([3] if h.rarely(2) else [h.number(0, 9), 3], torch.bool)
    return box


def _cutoff(h: Hostile) -> Any:
    return h.pick(1.5, 3.0, 0.7) if not h.rarely(8) else h.pick(0.0, -1.0, 1e-20, 1e9, 1e19, 3, _NAN, _INF)


def radius_graph(h: Hostile) -> Arguments:
    dtype, box_dtype = h.pick(torch.float32, torch.float64), h.pick(torch.float32, torch.float64)
    box = _box(h, dtype if not h.rarely(20) else box_dtype)
    n = h.size(12, 24) if box else h.size(30, 500)
    arguments = {"pos": _coordinates(h, n, dtype), "r": _cutoff(h), **_graphs(h, n), **box}
    if h.rarely(3):
        arguments["max_num_neighbors"] = h.pick(4, 1, 64, 2**62)
        arguments["symmetric"] = h.pick(False, True)
    return arguments | _options(h) | ({"half": True} if h.rarely(5) else {})


def _options(h: Hostile) -> Arguments:
    options: Arguments = {"loop": h.pick(False, True), "flow": h.pick("source_to_target", "target_to_source")}
    return options | _outputs(h)


def _outputs(h: Hostile) -> Arguments:
    capacity = {"max_edges": h.pick(0, 1, 50, 3000)} if h.rarely(4) else {}
    return {"geometry": h.pick(True, False), **capacity}


def radius(h: Hostile) -> Arguments:
    dtype = h.pick(torch.float32, torch.float64)
    box = _box(h, dtype)
    n, m = (h.size(12, 20), h.size(12, 20)) if box else (h.size(30, 300), h.size(30, 300))
    sets = {
        "x": _coordinates(h, n, dtype),
        "y": _coordinates(h, m, dtype),
        "r": _cutoff(h),
    }
    limit = {"max_num_neighbors": h.pick(4, 1, 64, 2**62)} if h.rarely(3) else {}
    return sets | _graphs(h, n, "_x") | _graphs(h, m, "_y") | box | limit | _outputs(h)


def knn_graph(h: Hostile) -> Arguments:
    dtype = h.pick(torch.float32, torch.float64)
    box = _box(h, dtype)
    n = h.size(10, 16) if box else h.size(30, 400)
    arguments = {
        "pos": _coordinates(h, n, dtype),
        "k": h.number(1, 20) if box else h.pick(3, 1, 2, 8, 20, 1000),
    }
    return arguments | _graphs(h, n) | box | _options(h)


def radius_graph_backward(h: Hostile) -> Arguments:
    n, m, dtype, source = h.number(0, 20), h.size(40, 2000), h.pick(torch.float32, torch.float64), h.pick(False, True)
    two_sets, cell = h.rarely(3), h.pick(None, None, [3, 3], [2, 3, 3])
    k = h.number(0, 20) if two_sets else n
    # Sorted by centre, as the forward gives them, unless h.ints puts something else among them.
    centre = h.ints([m], 0, k, dtype=torch.int64).sort().values
    neighbour = h.ints([m], 0, n, dtype=torch.int64)
    rows = [centre, neighbour] if source else [neighbour, centre]
    graphs = {"batch_centres": None, "ptr_centres": None} | {f"{n}_centres": v for n, v in _graphs(h, k).items()}
    return {
        "grad_distance": h.floats([m], dtype) if h.number(0, 2) else None,
        "grad_vector": h.floats([m, 3], dtype) if h.number(0, 2) else None,
        "edge_index": h.laid_out(torch.stack(rows)),
        "distance": h.floats([m], dtype),
        "vector": h.floats([m, 3], dtype),
        "cell_shift": h.ints([m if cell else 0, 3], -2, 3, dtype=torch.int32),
        "num_edges": torch.tensor(h.pick(m, m // 2, m + 5) if not h.rarely(20) else h.pick(-1, 2**62)),
        **graphs,
        "num_points": n,
        "num_centres": k if two_sets else None,
        "cell_shape": cell,
        "centre_is_source": source,
    }


def radius_graph_double_backward(h: Hostile) -> Arguments:
    first = radius_graph_backward(h)
    dtype, centres, cell = first["distance"].dtype, first["num_centres"], first["cell_shape"]
    second = {
        "gg_points": h.floats([first["num_points"], 3], dtype),
        "gg_centres": h.floats([centres or 0, 3], dtype),
        "gg_cell": h.floats(cell or [0, 3, 3], dtype),
    }
    return second | first


# ---- batches --------------------------------------------------------------------------------------------------------


def pack_batches(h: Hostile) -> Arguments:
    n, budget = h.size(40, 3000), h.pick(20, 1, 1000, 2**31, 2**62, 2**63 - 1)
    large = h.pick(min(budget, 2**40), min(budget, 2**40) // 4 + 1, budget // 2)
    dtype = h.pick(torch.int64, torch.int32) if large < 2**31 - 1 else torch.int64
    arguments: Arguments = {"sizes": h.ints([n], 0, large + 1, dtype=dtype), "budget": budget}
    if h.rarely(2):
        order = h.order(n)[: h.pick(n, n, n // 2)]
        if h.rarely(6) and order.numel():
            order[h.number(0, order.numel() - 1)] = h.pick(0, -1, n, 2**62)
        arguments["order"] = h.laid_out(order)
    if h.rarely(3):
        arguments["segments"] = h.ints([n], 0, h.pick(3, 1, 50))
    if h.rarely(3):
        arguments |= {"sizes2": h.ints([n], 0, 10), "budget2": h.pick(30, 9, 2**63 - 1)}
    if h.rarely(3):
        arguments["max_samples"] = h.pick(4, 1, 2**63 - 1)
    return arguments | {"lookahead": h.pick(0, 1, 3, 64, 2**40), "oversize": h.pick("error", "own_batch", "skip")}


def gather_segments(h: Hostile) -> Arguments:
    n, S = h.size(30, 1000), h.number(0, 8)
    dtype, tail = h.pick(*COPIED), h.pick([], [3], [0], [2, 2], [33])
    M = h.size(12, 300) if S else 0
    arguments: Arguments = {
        "values": h.of_dtype([n, *tail], dtype),
        "ptr": h.sorted_cuts(n, S),
        "index": h.laid_out(h.order(S).to(h.pick(*INTS))) if h.rarely(3) else h.ints([M], 0, S),
    }
    if (dtype in (*INTS, torch.int8, torch.uint8, torch.int16) and h.rarely(2)) or h.rarely(30):
        arguments["add"] = h.ints([arguments["index"].shape[0]], -50, h.pick(50, 2**31 - 1))
    if h.rarely(3):
        arguments["total"] = h.pick(5000, 0, 30, 2**62)
    return arguments


def gather_segments_backward(h: Hostile) -> Arguments:
    n, S, tail = h.size(30, 500), h.number(0, 8), h.pick([], [3], [0], [33])
    index = h.laid_out(h.order(S)) if not h.rarely(4) else h.ints([h.number(0, 5)], 0, S)
    rows = n if not h.rarely(4) else h.number(0, 40)
    return {
        "grad": h.floats([rows, *tail], h.pick(*FLOATS)),
        "ptr": h.sorted_cuts(n, S),
        "index": index,
        "num_values": n if not h.rarely(10) else h.pick(0, n // 2, n + 3),
    }


# ---- all of them ----------------------------------------------------------------------------------------------------


def _native(name: str) -> Callable[..., Any]:
    def call(**arguments: Any) -> Any:
        return getattr(torch.ops.moeyard, name).default(*arguments.values())

    return call


_BACKWARD = {
    "topk_gating_backward": topk_gating_backward,
    "permute_tokens_backward": lambda h: _moved_backward(h, True),
    "unpermute_tokens_backward": lambda h: _moved_backward(h, False),
    "gather_segments_backward": gather_segments_backward,
    "radius_graph_backward": radius_graph_backward,
    "radius_graph_double_backward": radius_graph_double_backward,
}
CASES = {
    "identity": Case(moeyard.identity, identity, invariants.identity, ("x",)),
    "topk_gating": Case(moeyard.topk_gating, topk_gating, invariants.topk_gating, ("logits",)),
    "plan_permutation": Case(moeyard.plan_permutation, plan_permutation, invariants.plan_permutation),
    "permute_tokens": Case(moeyard.permute_tokens, permute_tokens, invariants.permute_tokens, ("x", "slot_weights")),
    "unpermute_tokens": Case(moeyard.unpermute_tokens, unpermute_tokens, invariants.unpermute_tokens, ("y", "weights")),
    "radius_graph": Case(moeyard.radius_graph, radius_graph, invariants.radius_graph, ("pos", "cell")),
    "radius": Case(moeyard.radius, radius, invariants.radius, ("x", "y", "cell")),
    "knn_graph": Case(moeyard.knn_graph, knn_graph, invariants.knn_graph, ("pos", "cell")),
    "pack_batches": Case(moeyard.pack_batches, pack_batches, invariants.pack_batches),
    "gather_segments": Case(moeyard.gather_segments, gather_segments, invariants.gather_segments, ("values",)),
    **{name: Case(_native(name), arguments, public=False) for name, arguments in _BACKWARD.items()},
}
if cpu.expert_ffn_preferred():  # elsewhere these are torch's products
    CASES["expert_ffn"] = Case(ops_expert_ffn, expert_ffn, invariants.expert_ffn, ("x", "up", "down"))
    CASES["expert_ffn_backward"] = Case(_native("expert_ffn_backward"), expert_ffn_backward, public=False)
