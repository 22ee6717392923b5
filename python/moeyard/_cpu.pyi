"""CPU kernels on raw addresses. Sizes are elements unless said; `threads` bounds the pool."""

def simd_level() -> str: ...
def simd_best() -> str: ...
def identity(input: int, out: int, bytes: int, threads: int) -> None: ...

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
    workspace: int,
    threads: int,
) -> None: ...
