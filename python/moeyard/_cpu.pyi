"""CPU kernels on raw addresses. Sizes are elements unless said; `threads` bounds the pool."""

from collections.abc import Callable, Sequence
from typing import Any

Ints = tuple[int, bool]  # address, int64 (else int32)
Plan = tuple[int, int, int, int, int]  # row_of_slot, slot_of_row, tokens, k, rows
Strided = tuple[int, int, int, int]  # address; strides of expert, row and column

def simd_level() -> str: ...
def simd_best() -> str: ...

class PlainCalls:
    def __init__(
        self,
        allowed: Sequence[Sequence[type]],
        tensors: Sequence[type],
        keys_of: Callable[..., Any],
        plain: Sequence[int],
        keys_added: Callable[[], Any],
        no_mode: Sequence[int],
    ) -> None: ...
    def __call__(self, args: tuple[Any, ...]) -> bool | None: ...

def identity(input: int, out: int, bytes: int, threads: int) -> None: ...

class ExpertFfn:
    def __init__(
        self,
        x: int,
        up: Strided,
        down: Strided,
        offsets: Ints,
        rows: int,
        experts: int,
        dim: int,
        hidden: int,
        swiglu: bool,
    ) -> None: ...

def expert_ffn_runs() -> bool: ...
def expert_ffn_preferred() -> bool: ...
def expert_ffn(problem: ExpertFfn, y: int, hidden: int, threads: int) -> None: ...
def expert_ffn_backward(
    problem: ExpertFfn, grad: int, hidden: int, grad_x: int, grad_up: int, grad_down: int, threads: int
) -> None: ...
def plan_permutation(
    experts: Ints,
    tokens: int,
    k: int,
    num_experts: int,
    capacity: int,
    align: int,
    rows: int,
    weights: int,
    wide_weights: bool,
    out: list[int],
    threads: int,
) -> None: ...
def permute_rows(x: int, plan: Plan, row_bytes: int, out: int, threads: int) -> None: ...
def permute_weighted(
    x: int, weights: int, y: int, plan: Plan, features: int, dtype: int, out: int, dots: int, threads: int
) -> None: ...
def unpermute_rows(
    y: int, weights: int, x: int, plan: Plan, features: int, dtype: int, out: int, dots: int, threads: int
) -> None: ...

class PackRequest:
    def __init__(
        self,
        sizes: Ints,
        samples: int,
        order: Ints,
        length: int,
        segments: Ints,
        sizes2: Ints,
        budget: int,
        budget2: int,
        max_samples: int,
        lookahead: int,
        oversize: int,
    ) -> None: ...

class PackPlan:
    @property
    def batches(self) -> int: ...

def count_skipped(request: PackRequest) -> int: ...
def pack_batches(request: PackRequest, seen: int, batch_of_position: int, index: int, skipped: int) -> PackPlan: ...
def pack_batches_fill(
    request: PackRequest, plan: PackPlan, batch_of_position: int, index: int, ptr: int, fill: int, skipped: int
) -> None: ...

class SegmentsRequest:
    def __init__(self, ptr: Ints, num_segments: int, num_values: int, index: Ints, count: int) -> None: ...

def segments_ptr(request: SegmentsRequest, out: int) -> int: ...
def gather_segments(
    request: SegmentsRequest,
    out_ptr: int,
    values: int,
    row_items: int,
    item_bytes: int,
    add: Ints,
    total: int,
    out: int,
    batch: int,
    threads: int,
) -> None: ...
def gather_segments_backward(
    request: SegmentsRequest,
    out_ptr: int,
    grad: int,
    row_items: int,
    dtype: int,
    workspace: int,
    grad_values: int,
    threads: int,
) -> None: ...

class GatingProblem:
    def __init__(
        self,
        dtype: int,
        rows: int,
        experts: int,
        k: int,
        score: int,
        renormalize: bool,
        scale: float,
        num_groups: int = 0,
        topk_groups: int = 0,
        group_score_experts: int = 0,
        forced_slots: int = 0,
        unit_weights: bool = False,
    ) -> None: ...

def topk_gating(
    problem: GatingProblem,
    logits: int,
    bias: int,
    mask: int,
    forced: int,
    weights: int,
    experts: int,
    counts: int,
    score_sum: int,
    weight_sum: int,
    logsumexp_sq: int,
    entropy_sum: int,
    threads: int,
) -> None: ...
def topk_gating_backward(
    problem: GatingProblem,
    logits: int,
    experts: int,
    mask: int,
    grad_weights: int,
    grad_score_sum: int,
    grad_weight_sum: int,
    grad_logsumexp_sq: int,
    grad_entropy_sum: int,
    grad_logits: int,
    threads: int,
) -> None: ...

class PointSet:
    def __init__(self, xyz: int, count: int, batch: int, ptr: int, num_graphs: int) -> None: ...

class Periodicity:
    def __init__(self, cell: int, num_cells: int, pbc: int, num_pbc: int) -> None: ...

class RadiusHits:
    num_edges: int
    truncated: int

class RadiusEdges:
    def __init__(
        self,
        capacity: int,
        num_edges: int,
        centre: int,
        neighbour: int,
        distance: int,
        vector: int,
        cell_shift: int,
        grad_distance: int,
        grad_vector: int,
    ) -> None: ...

def radius_graph_search(
    dtype: int,
    points: PointSet,
    centres: PointSet,
    periodic: Periodicity,
    r: float,
    k: int,
    max_neighbors: int,
    symmetric: bool,
    loop: bool,
    half: bool,
    threads: int,
) -> RadiusHits: ...
def radius_graph_fill(
    hits: RadiusHits,
    dtype: int,
    points: PointSet,
    centres: PointSet,
    periodic: Periodicity,
    capacity: int,
    centre: int,
    neighbour: int,
    distance: int,
    vector: int,
    cell_shift: int,
    num_neighbors: int,
    truncated: int,
    num_edges: int,
    overflow: int,
    padding: float,
    threads: int,
) -> None: ...
def radius_graph_backward(
    dtype: int,
    edges: RadiusEdges,
    num_points: int,
    centres: PointSet,
    num_cells: int,
    grad_points: int,
    grad_centres: int,
    grad_cell: int,
    threads: int,
) -> None: ...
def radius_graph_double_backward(
    dtype: int,
    edges: RadiusEdges,
    num_points: int,
    centres: PointSet,
    num_cells: int,
    gg_points: int,
    gg_centres: int,
    gg_cell: int,
    to_grad_distance: int,
    to_grad_vector: int,
    to_distance: int,
    to_vector: int,
    threads: int,
) -> None: ...
