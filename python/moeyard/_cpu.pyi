"""CPU kernels on raw addresses. Sizes are elements unless said; `threads` bounds the pool."""

def simd_level() -> str: ...
def simd_best() -> str: ...
def identity(input: int, out: int, bytes: int, threads: int) -> None: ...

Ints = tuple[int, bool]  # address, int64 (else int32)
Plan = tuple[int, int, int, int, int]  # row_of_slot, slot_of_row, tokens, k, rows

def plan_permutation_workspace(slots: int, num_experts: int, by_weight: bool) -> int: ...
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
    workspace: int,
    threads: int,
) -> None: ...
def check_plan(plan: Plan, threads: int) -> None: ...
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

def pack_batches(request: PackRequest, seen: int, batch_of_position: int) -> list[int]: ...
def pack_batches_fill(
    request: PackRequest, batch_of_position: int, batches: int, index: int, ptr: int, fill: int, skipped: int
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
