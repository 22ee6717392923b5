"""What kernels on a GPU could not raise: bad values are taken as absent, and told here when somebody asks.

An error that names a value would need the value on the host, and every call would wait for the device. So kernels set
bits in one sticky word per device (csrc/common/device_errors.hpp).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import Any

from moeyard import _native

__all__ = ["CHECK_AT_ONCE", "check_device_errors", "checked", "used"]

#: Devices whose kernels may have met bad values.
used: set[int] = set()

#: The debug mode: every op on a GPU waits for its end and raises its own errors.
CHECK_AT_ONCE = os.environ.get("MOEYARD_CHECK_DEVICE", "") not in {"", "0"}

#: By the numbers of moeyard::cuda::DeviceError.
_TEXTS = {
    1: "forced_experts: expected ids in [-1, E), got others, which counted as -1",
    2: "forced_experts: expected distinct ids in each row, got repeated ones, which counted as -1",
    4: "selection_bias: expected no NaN, got NaN",
    8: "experts: expected ids in [-1, num_experts), got others, which counted as -1",
    16: "plan: expected row_of_slot and slot_of_row to be inverses of each other, got rows or slots that are not",
    32: "experts: expected the ids that topk_gating returned, in [-1, E), got others, which counted as -1",
    64: "index: expected segment ids in [0, S), got others, which counted as empty segments",
    128: "ptr: expected 0 <= ptr[i] <= ptr[i + 1] <= n for chosen segments, got others, which counted as empty",
    256: "total: expected at least the rows of the chosen segments (of grad, backward), got fewer; the rest is cut off",
    512: "ptr: expected chosen segments that do not overlap for a gradient, got overlapping ones, of which some get 0",
    1024: "batch: expected sorted graph ids >= 0, got others; some edges may be missing",
    2048: "ptr: expected values from 0 to the number of points that do not fall, got others; some edges may be missing",
    4096: "pos: expected finite coordinates, got others, which have no edges",
    8192: "cell: expected finite, linearly independent periodic vectors for every graph, got others; no edges there",
    16384: "pos: expected coordinates within 2^28 cells of the origin, got others, which have no edges",
    32768: "cell: expected at most 2^27 periodic images within reach, got more for some points, which have no edges",
    65536: "pos: expected points whose squared distances are finite in their dtype, got others among the nearest",
    131072: "edge_index: expected edges sorted by centre, of nodes in range, got others; gradients are wrong",
}


def check_device_errors() -> None:
    """Raises what kernels on GPUs have met since the last check; without CUDA it does nothing.

    On the CPU a bad expert id is a ValueError of its call. On a GPU looking for one would make every call wait, so
    kernels take a bad id as -1 and note the fact. Call this where waiting is cheap, once per epoch say; each call waits
    for all devices that were used and forgets what it has told. It cannot be called while a CUDA graph is captured.

    With MOEYARD_CHECK_DEVICE=1 in the environment every op checks at once, so that the traceback shows which.

    Raises:
        ValueError: names each argument that was wrong, what was expected, and the device.
    """
    found = []
    for index in sorted(used):
        kinds = _native.cuda().take_device_errors(index)
        found += [f"{text}, on cuda:{index}" for bit, text in _TEXTS.items() if kinds & bit]
    if found:
        raise ValueError("; ".join(found))


def checked(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` in the debug mode."""

    @wraps(run)
    def run_and_check(*args: Any) -> Any:
        out = run(*args)
        check_device_errors()
        return out

    return run_and_check
