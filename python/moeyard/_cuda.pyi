"""CUDA kernels on raw addresses; `stream` is a cudaStream_t as an integer."""

from moeyard._cpu import GatingProblem, PackRequest, Periodicity, PointSet, RadiusEdges, SegmentsRequest

runtime_version: int
architectures: str  # as CMake has them: "80-real,90" is code for both and PTX of the last

def device_errors(device: int) -> int: ...
def take_device_errors(device: int) -> int: ...
def identity(input: int, out: int, bytes: int, device: int, stream: int) -> None: ...

Plan = tuple[int, int, int, int, int]  # row_of_slot, slot_of_row, tokens, k, rows

class PlanRequest:
    def __init__(
        self,
        experts: tuple[int, bool],
        tokens: int,
        k: int,
        num_experts: int,
        capacity: int,
        align: int,
        rows: int,
        weights: int,
        wide_weights: bool,
    ) -> None: ...

def plan_permutation_workspace(request: PlanRequest) -> int: ...
def plan_permutation(
    request: PlanRequest, out: list[int], workspace: int, errors: int, device: int, stream: int
) -> None: ...
def permute_rows(x: int, plan: Plan, row_bytes: int, out: int, errors: int, device: int, stream: int) -> None: ...
def permute_weighted(
    x: int,
    weights: int,
    y: int,
    plan: Plan,
    features: int,
    dtype: int,
    out: int,
    dots: int,
    errors: int,
    device: int,
    stream: int,
) -> None: ...
def unpermute_rows(
    y: int,
    weights: int,
    x: int,
    plan: Plan,
    features: int,
    dtype: int,
    out: int,
    dots: int,
    errors: int,
    device: int,
    stream: int,
) -> None: ...
def topk_gating_workspace(problem: GatingProblem) -> int: ...
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
    workspace: int,
    errors: int,
    device: int,
    stream: int,
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
    errors: int,
    device: int,
    stream: int,
) -> None: ...
def pack_batches_workspace(request: PackRequest) -> int: ...
def pack_batches(request: PackRequest, index: int, summary: int, workspace: int, device: int, stream: int) -> None: ...
def pack_batches_fill(
    request: PackRequest,
    index: int,
    summary: int,
    batches: int,
    workspace: int,
    ptr: int,
    fill: int,
    device: int,
    stream: int,
) -> None: ...

too_many_rows: int

def segments_workspace(count: int) -> int: ...
def segments_ptr(
    request: SegmentsRequest, limit: int, out: int, workspace: int, errors: int, device: int, stream: int
) -> None: ...
def gather_segments(
    request: SegmentsRequest,
    out_ptr: int,
    workspace: int,
    values: int,
    row_items: int,
    item_bytes: int,
    add: tuple[int, bool],
    total: int,
    out: int,
    batch: int,
    device: int,
    stream: int,
) -> None: ...
def gather_segments_backward_workspace(request: SegmentsRequest) -> int: ...
def gather_segments_backward(
    request: SegmentsRequest,
    out_ptr: int,
    grad: int,
    row_items: int,
    dtype: int,
    workspace: int,
    grad_values: int,
    errors: int,
    device: int,
    stream: int,
) -> None: ...

class RadiusOptions:
    def __init__(self, r: float, k: int, max_neighbors: int, symmetric: bool, loop: bool, half: bool) -> None: ...

def radius_graph_workspace(
    dtype: int, points: PointSet, centres: PointSet, periodic: Periodicity, options: RadiusOptions
) -> int: ...
def radius_graph_search(
    dtype: int,
    points: PointSet,
    centres: PointSet,
    periodic: Periodicity,
    options: RadiusOptions,
    out: tuple[int, ...],
    workspace: int,
    errors: int,
    device: int,
    stream: int,
) -> None: ...
def radius_graph_wants_keys(options: RadiusOptions) -> bool: ...
def radius_graph_fill(
    dtype: int,
    points: PointSet,
    centres: PointSet,
    periodic: Periodicity,
    options: RadiusOptions,
    capacity: int,
    out: tuple[int, ...],
    padding: float,
    workspace: int,
    keys: int,
    errors: int,
    device: int,
    stream: int,
) -> None: ...
def radius_graph_backward_workspace(
    edges: int, num_points: int, num_centres: int, has_cell: bool, num_cells: int
) -> int: ...
def radius_graph_backward(
    dtype: int,
    edges: RadiusEdges,
    num_points: int,
    centres: PointSet,
    num_cells: int,
    grad_points: int,
    grad_centres: int,
    grad_cell: int,
    workspace: int,
    errors: int,
    device: int,
    stream: int,
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
    errors: int,
    device: int,
    stream: int,
) -> None: ...
