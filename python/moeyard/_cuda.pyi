"""CUDA kernels on raw addresses; `stream` is a cudaStream_t as an integer."""

from moeyard._cpu import GatingProblem

runtime_version: int

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
