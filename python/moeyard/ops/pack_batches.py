"""pack_batches: cuts a shuffled epoch into batches that fit a budget of atoms (and of edges), from sizes alone.

Batch b holds the samples index[ptr[b]:ptr[b + 1]]:

    sum of sizes <= budget,   sum of sizes2 <= budget2,   ptr[b + 1] - ptr[b] <= max_samples

Shape letters: N samples, L length of the order, B batches, P packed and Q skipped samples (P + Q = L).
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeyard import _native
from moeyard.ops import _check
from moeyard.ops._register import address, contiguous, device_and_stream, int_view, register

_SCHEMA = (
    "pack_batches(Tensor sizes, SymInt budget, Tensor? order, Tensor? segments, SymInt? max_samples, Tensor? sizes2,"
    " SymInt? budget2, SymInt lookahead, str oversize) -> (Tensor, Tensor, Tensor, Tensor)"
)
_INTS = (torch.int32, torch.int64)
_OVERSIZE = ("error", "own_batch", "skip")
_NO_LIMIT = 2**63 - 1
_MOST_ON_CUDA = 2**31 - 2


class Packing(NamedTuple):
    """All int64. `index[P]`: sample ids, batch after batch. `ptr[B+1]`: where each batch starts in it. `fill[B]`: each
    batch's total size. `skipped[Q]`: ids left out by oversize="skip", in the order of `order`.
    """

    index: Tensor  # type: ignore[assignment]  # the contract's name, over tuple.index
    ptr: Tensor
    fill: Tensor
    skipped: Tensor


def pack_batches(
    sizes: Tensor,
    budget: int,
    *,
    order: Tensor | None = None,
    segments: Tensor | None = None,
    max_samples: int | None = None,
    sizes2: Tensor | None = None,
    budget2: int | None = None,
    lookahead: int = 0,
    oversize: str = "error",
) -> Packing:
    """Packs samples into batches within a budget, in the order in which they come.

    Args:
        sizes: [N] int64 or int32, every sample's size (atoms), at least 0. A size of 0 counts to `max_samples` only.
        budget: largest total size of a batch, positive.
        order: [L] distinct sample ids, L <= N: the shuffled order, or one rank's share of it; None is 0 ... N - 1.
        segments: [N] integer, the chunk of every sample, by id. Chunks are ranked by their first appearance in `order`;
            a batch opened by a sample of rank s takes samples of ranks s and s + 1 only.
        max_samples: most samples per batch; None is no limit.
        sizes2, budget2: a second size per sample (edges) and its budget; both or neither.
        lookahead: 0 is next-fit: a sample that does not fit closes the batch, and `index` keeps the order (on a GPU
            nothing else is supported). L > 0 is bounded best fit: with at most L open batches a sample goes to the one
            that it leaves the least room in (ties: the earliest opened); when it fits in none and L are open, the
            fullest is closed. A batch that can take no more closes at once: one without room, with `max_samples`, or
            when `order` holds no more samples of its two segments. Best means by `sizes`; the rest only says what fits.
        oversize: a sample larger than the budget is an "error", gets its "own_batch" at its place, or is left out
            ("skip") and listed in `skipped`.

    Returns:
        Packing; batches in the order in which they were opened, samples of a batch in the order of arrival.

    Raises:
        TypeError, ValueError: a wrong type, shape, device or option; a negative size, an id out of range or repeated,
            an oversize sample (naming id, size and budget).

    Determinism: integers, equal on every call and device. Autocast and gradients do not apply. A GPU is waited for, to
    learn how many batches there are. Time: O(L) for next-fit and for best fit with lookahead <= 64 and budget < 2^25;
    O(L log lookahead) beyond, unless many open batches have room but fail in sizes2 or segments. Memory beside the
    outputs: a bit per sample with `order`, 12 bytes per batch (best fit: 8, and 4 per sample), and a few words per
    segment and open batch; on a GPU, 20 to 80 bytes per sample.
    Source: Csirik & Johnson, "Bounded space on-line bin packing: best is better than first", Algorithmica 31 (2001).
    """
    return Packing(*_op(sizes, budget, order, segments, max_samples, sizes2, budget2, lookahead, oversize))


def pack_batches_reference(
    sizes: Tensor,
    budget: int,
    *,
    order: Tensor | None = None,
    segments: Tensor | None = None,
    max_samples: int | None = None,
    sizes2: Tensor | None = None,
    budget2: int | None = None,
    lookahead: int = 0,
    oversize: str = "error",
) -> Packing:
    """The same in plain Python."""
    size = sizes.tolist()
    size2 = [0] * len(size) if sizes2 is None else sizes2.tolist()
    segment = [0] * len(size) if segments is None else segments.tolist()
    ids = list(range(len(size))) if order is None else order.tolist()
    batches: list[list[int]] = []
    opened: list[int] = []  # open batches, by number
    skipped: list[int] = []
    ranks: dict[int, int] = {}
    for i in ids:
        ranks.setdefault(segment[i], len(ranks))
    left = Counter(ranks[segment[i]] for i in ids)

    def rank(b: int) -> int:
        return ranks[segment[batches[b][0]]]

    def room(b: int) -> int:
        return budget - int(sum(size[i] for i in batches[b]))

    def takes(b: int, i: int) -> bool:
        within = size[i] <= room(b) and sum(size2[j] for j in (*batches[b], i)) <= (budget2 or 0)
        return within and len(batches[b]) < (max_samples or _NO_LIMIT) and ranks[segment[i]] - rank(b) in (0, 1)

    for i in ids:
        opened = [b for b in opened if left[rank(b)] + left[rank(b) + 1] > 0]
        left[ranks[segment[i]]] -= 1
        if size[i] > budget or size2[i] > (budget2 or 0):
            if oversize == "error":
                raise ValueError(f"sample {i} is too large")
            if oversize == "skip":
                skipped.append(i)
            else:
                batches.append([i])
                opened = opened if lookahead else []
            continue
        fits = [b for b in opened if takes(b, i)]
        if fits:
            best = min(fits, key=lambda b: (room(b), b))
        else:
            if len(opened) == max(lookahead, 1):
                opened.remove(min(opened, key=lambda b: (room(b), b)))
            best = len(batches)
            batches.append([])
            opened.append(best)
        batches[best].append(i)
        if lookahead and (room(best) == 0 or len(batches[best]) == max_samples):
            opened.remove(best)

    def ints(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64)

    ptr = [0]
    for batch in batches:
        ptr.append(ptr[-1] + len(batch))
    fill = [sum(size[i] for i in batch) for batch in batches]
    return Packing(ints([i for batch in batches for i in batch]), ints(ptr), ints(fill), ints(skipped))


# ---- below the dispatcher ---------------------------------------------------------------------------------------


def _validate(
    sizes: Tensor,
    budget: Any,
    order: Tensor | None,
    segments: Tensor | None,
    max_samples: Any,
    sizes2: Tensor | None,
    budget2: Any,
    lookahead: Any,
    oversize: str,
) -> None:
    _check.integer("budget", budget, minimum=1)
    _check.integer("max_samples", max_samples, minimum=1, optional=True)
    _check.integer("budget2", budget2, minimum=1, optional=True)
    _check.integer("lookahead", lookahead, minimum=0)
    _check.option("oversize", oversize, _OVERSIZE)
    _check.rank("sizes", sizes, ("N",))
    _check.dtype("sizes", sizes, _INTS)
    if (sizes2 is None) != (budget2 is None):
        given, missing = ("budget2", "sizes2") if sizes2 is None else ("sizes2", "budget2")
        raise ValueError(f"{missing}: expected a value together with {given}, got None")
    for name, value in (("order", order), ("segments", segments), ("sizes2", sizes2)):
        if value is not None:
            _check.shape(name, value, ("L",) if name == "order" else sizes.shape)
            _check.dtype(name, value, _INTS)


def _request(
    sizes: Tensor,
    budget: int,
    order: Tensor | None,
    segments: Tensor | None,
    max_samples: int | None,
    sizes2: Tensor | None,
    budget2: int | None,
    lookahead: int,
    oversize: str,
) -> tuple[Any, int, tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]]:
    """The native request, the length of the order, and the tensors that the request points to."""
    _validate(sizes, budget, order, segments, max_samples, sizes2, budget2, lookahead, oversize)
    samples = sizes.shape[0]
    length = samples if order is None else order.shape[0]
    if length > samples:
        raise ValueError(f"order: expected at most {samples} ids (one per sample), got {length}")
    if length > 2**32 - 2:
        raise ValueError(f"order: expected at most 2^32 - 2 samples, got {length}")
    sizes, order, segments, sizes2 = sizes.contiguous(), contiguous(order), contiguous(segments), contiguous(sizes2)
    request = _native.cpu.PackRequest(
        int_view(sizes),
        samples,
        int_view(order),
        length,
        int_view(segments),
        int_view(sizes2),
        budget,
        budget2 or 0,
        max_samples or _NO_LIMIT,
        lookahead,
        _OVERSIZE.index(oversize),
    )
    return request, length, (sizes, order, segments, sizes2)


def _cpu(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    request, length, held = _request(*args)
    (sizes, order, _, _), lookahead = held, args[7]
    skips = _native.cpu.count_skipped(request)
    index, skipped = torch.empty(length - skips, dtype=torch.int64), torch.empty(skips, dtype=torch.int64)
    seen = None if order is None else torch.zeros((sizes.shape[0] + 7) // 8, dtype=torch.uint8)
    batch_of_position = torch.empty(length, dtype=torch.int32) if lookahead else None
    notes, lists, left = address(batch_of_position), index.data_ptr(), skipped.data_ptr()
    plan = _native.cpu.pack_batches(request, address(seen), notes, lists, left)
    batches = plan.batches
    ptr, fill = index.new_empty(batches + 1), index.new_empty(batches)
    _native.cpu.pack_batches_fill(request, plan, notes, lists, ptr.data_ptr(), fill.data_ptr(), left)
    return index, ptr, fill, skipped


def _cuda(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    request, length, held = _request(*args)
    sizes, order, _, sizes2 = held
    budget, budget2, lookahead = args[1], args[6], args[7]
    if lookahead:
        raise ValueError(f"lookahead: expected 0 on a GPU, where there is next-fit only, got {lookahead}")
    if length > _MOST_ON_CUDA:
        raise ValueError(f"order: expected at most 2^31 - 2 samples on a GPU, got {length}")
    native, where = _native.cuda(), device_and_stream(sizes)
    index, summary = sizes.new_empty(length, dtype=torch.int64), sizes.new_empty(7, dtype=torch.int64)
    workspace = sizes.new_empty(native.pack_batches_workspace(request), dtype=torch.uint8)
    at = index.data_ptr(), summary.data_ptr()
    native.pack_batches(request, *at, workspace.data_ptr(), *where)
    batches, packed, *wrong = summary.tolist()  # waits for the device
    _raise_first(wrong, sizes, budget, order, sizes2, budget2)
    ptr, fill = index.new_empty(batches + 1), index.new_empty(batches)
    native.pack_batches_fill(request, *at, batches, workspace.data_ptr(), ptr.data_ptr(), fill.data_ptr(), *where)
    # A copy, where something is skipped: else `index` would keep the memory of both.
    return (index if packed == length else index[:packed].clone()), ptr, fill, index[packed:].flip(0)


def _raise_first(
    wrong: list[int], sizes: Tensor, budget: int, order: Tensor | None, sizes2: Tensor | None, budget2: int | None
) -> None:
    """What the CPU raises: of the sizes first, then of the first position at which something is wrong; -1 for none."""
    negative, negative2, *positions = wrong
    for name, values, sample in (("sizes", sizes, negative), ("sizes2", sizes2, negative2)):
        if values is not None and sample >= 0:
            raise ValueError(f"{name}: expected sizes of at least 0, got {int(values[sample])} for sample {sample}")
    position = min((p for p in positions if p >= 0), default=-1)
    if position < 0:
        return
    bad_id, repeated, _too_large = positions
    sample = position if order is None else int(order[position])
    if position == bad_id:
        raise ValueError(f"order: expected sample ids in [0, {len(sizes)}), got {sample} at position {position}")
    if position == repeated:
        raise ValueError(f"order: expected distinct sample ids, got {sample} again at position {position}")
    name, size, limit = "", int(sizes[sample]), budget
    if size <= budget and sizes2 is not None and budget2 is not None:
        name, size, limit = "2", int(sizes2[sample]), budget2
    raise ValueError(
        f"sizes{name}: expected every sample within budget{name} = {limit}, got sample {sample} of size {size} "
        '(oversize="own_batch" and "skip" accept it)'
    )


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _validate(*args)
    sizes = args[0]
    new_size = torch.library.get_ctx().new_dynamic_size
    packed, batches, skipped = new_size(), new_size(), new_size()
    index, ptr, fill, left = (
        torch.empty(n, dtype=torch.int64, device=sizes.device) for n in (packed, batches + 1, batches, skipped)
    )
    return index, ptr, fill, left


_op = register(_SCHEMA, cpu=_cpu, cuda=_cuda, fake=_fake, options={"oversize": _OVERSIZE})
