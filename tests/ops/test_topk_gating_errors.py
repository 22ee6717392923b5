"""topk_gating refuses what it cannot do, before anything runs, and names the argument."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import moeyard
from moeyard.ops._topk_gating_reference import topk_gating_reference

# On a GPU only values differ: what a kernel finds there is in test_topk_gating_cuda.py.
pytestmark = [pytest.mark.usefixtures("engine"), pytest.mark.engines("cpu", "emulated")]

X = torch.zeros(3, 6)
BACKWARD = torch.ops.moeyard.topk_gating_backward


def refuse(error: type[Exception], message: str, logits: Any = X, k: Any = 2, **options: Any) -> None:
    with pytest.raises(error, match=message):
        moeyard.topk_gating(logits, k, **options)


@pytest.mark.parametrize("logits", [None, 3, [[1.0]], "x"])
def test_logits_type(logits: Any) -> None:
    refuse(TypeError, r"logits: expected a torch.Tensor", logits)


def test_logits() -> None:
    nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    for other in (torch.eye(3).to_sparse(), nested, torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)):
        refuse(TypeError, "logits: .*dense", other)
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn):
        refuse(TypeError, "logits: expected dtype float32", torch.zeros(2, 3).to(dtype))
    for shape in ((6,), (), (2, 3, 4)):
        refuse(ValueError, r"logits: expected shape \[T, E\]", torch.zeros(shape))
    for E in (0, 8193):
        refuse(ValueError, rf"logits: expected 1 to 8192 experts \(columns\), got {E}", torch.zeros(2, E), 1)
    refuse(ValueError, r"logits: expected at most 2\^31 - 1 rows", torch.empty(2**31, 1, device="meta"), 1)


def test_k() -> None:
    for k in (0, -1, 7, 2**40):
        refuse(ValueError, rf"k: expected 1 to 6 \(the number of experts\), got {k}", X, k)
    for k in (-(2**63) - 1, 2**63):
        refuse(ValueError, r"k: expected at (most|least) -?2", X, k)
        refuse(ValueError, r"group_score_experts: expected at (most|least) -?2", group_score_experts=k)
    for k in (2.0, "2", None, True, torch.tensor(2)):
        refuse(TypeError, "k: expected an int", X, k)


def test_score_and_flags() -> None:
    for score in ("Softmax", "", None, 3, np.zeros(2)):
        refuse(ValueError, "score: expected one of 'softmax'", score=score)
    for flag in (1, None, "yes"):
        refuse(TypeError, "renormalize: expected True or False", renormalize=flag)
    for name in ("One", None, 1):
        refuse(ValueError, "forced_weights: expected one of", forced_weights=name)
    refuse(ValueError, 'forced_weights: "one" needs forced_experts', forced_weights="one")


def test_scale() -> None:
    for scale in (float("nan"), float("inf"), -float("inf"), 1e300):
        refuse(ValueError, "scale: expected a finite number", scale=scale)
    for scale in ("1", None, True, torch.tensor(1.0)):
        refuse(TypeError, "scale: expected a number", scale=scale)
    assert moeyard.topk_gating(X, 1, scale=2).weights[0].item() == pytest.approx(2 / 6)
    assert moeyard.topk_gating(X, 1, scale=-2.0).weights[0].item() == pytest.approx(-2 / 6)
    assert moeyard.topk_gating(X.double(), 1, scale=1e300).weights.isfinite().all()


def test_bias() -> None:
    refuse(TypeError, "selection_bias: expected a torch.Tensor or None", selection_bias=[0.0] * 6)
    refuse(TypeError, "selection_bias: expected dtype", selection_bias=torch.zeros(6, dtype=torch.int64))
    for shape in ((5,), (1, 6), ()):
        refuse(ValueError, r"selection_bias: expected shape \[6\]", selection_bias=torch.zeros(shape))
    refuse(ValueError, "selection_bias: expected device cpu", selection_bias=torch.zeros(6, device="meta"))


@pytest.mark.engines("cpu")
def test_nan_bias() -> None:
    bias = torch.zeros(6)
    bias[4] = float("nan")
    refuse(ValueError, "selection_bias: expected no NaN, got NaN for expert 4", selection_bias=bias)
    refuse(ValueError, "selection_bias: expected no NaN", torch.zeros(0, 6), selection_bias=bias)


def test_groups() -> None:
    refuse(ValueError, "num_groups, topk_groups: expected both or neither", num_groups=2)
    refuse(ValueError, "num_groups, topk_groups: expected both or neither", topk_groups=2)
    for n in (4, 0, -1, 7, 12):
        refuse(ValueError, f"num_groups: expected a divisor of the 6 experts, got {n}", num_groups=n, topk_groups=1)
    for n in (0, 4, -2):
        refuse(ValueError, rf"topk_groups: expected 1 to 3 \(num_groups\), got {n}", num_groups=3, topk_groups=n)
    refuse(ValueError, r"k: expected at most 2 \(1 groups of 2 experts\), got 3", X, 3, num_groups=3, topk_groups=1)
    options = {"num_groups": 3, "topk_groups": 2}
    for n in (0, 3, -1):
        message = rf"group_score_experts: expected 1 to 2 \(experts per group\), got {n}"
        refuse(ValueError, message, **options, group_score_experts=n)
    refuse(ValueError, r"group_score_experts: expected at least 1", group_score_experts=0)
    for name in ("num_groups", "topk_groups", "group_score_experts"):
        refuse(TypeError, f"{name}: expected an int", **{**options, name: 1.0})
    refuse(ValueError, "group_score_experts", num_groups=6, topk_groups=6)


def test_mask() -> None:
    refuse(TypeError, "mask: expected a torch.Tensor or None", mask=[True] * 3)
    refuse(TypeError, "mask: expected dtype bool", mask=torch.ones(3))
    for shape in ((2,), (3, 1), ()):
        refuse(ValueError, r"mask: expected shape \[3\]", mask=torch.ones(shape, dtype=torch.bool))
    refuse(ValueError, "mask: expected device cpu", mask=torch.ones(3, dtype=torch.bool, device="meta"))


def test_forced_experts() -> None:
    refuse(TypeError, "forced_experts: expected a torch.Tensor or None", forced_experts=[0, 1, 2])
    for dtype in (torch.float32, torch.int8, torch.bool):
        refuse(TypeError, "forced_experts: expected dtype int32, int64", forced_experts=torch.zeros(3, dtype=dtype))
    for shape in ((2,), ()):
        refuse(ValueError, r"forced_experts: expected shape", forced_experts=torch.zeros(shape, dtype=torch.int64))
    for shape in ((3, 1), (3, 3), (2, 2), (3, 2, 1)):
        ids = torch.zeros(shape, dtype=torch.int64)
        refuse(ValueError, r"forced_experts: expected shape \[3, 2\]", forced_experts=ids)
    refuse(
        ValueError,
        "forced_experts: expected device cpu",
        forced_experts=torch.zeros(3, dtype=torch.int32, device="meta"),
    )


@pytest.mark.engines("cpu")
@pytest.mark.parametrize("bad", [6, -2, 2**31, 2**32 + 1, 2**63 - 1, -(2**63)])
def test_forced_ids_out_of_range(bad: int) -> None:
    ids = torch.tensor([[0, 1], [-1, -1], [3, bad]])
    message = re.escape(f"forced_experts: expected ids in [-1, 6), got {bad} in row 2")
    refuse(ValueError, message, forced_experts=ids)
    refuse(ValueError, message, forced_experts=ids[:, 1])
    moeyard.topk_gating(X, 2, forced_experts=ids, mask=torch.tensor([True, True, False]))


@pytest.mark.engines("cpu")
def test_forced_duplicates() -> None:
    ids = torch.tensor([[0, 1], [4, 4], [-1, -1]], dtype=torch.int32)
    message = "forced_experts: expected distinct ids in each row, got 4 twice in row 1"
    refuse(ValueError, message, forced_experts=ids)
    moeyard.topk_gating(X, 2, forced_experts=ids, mask=torch.tensor([True, False, True]))


def test_meta_tensors_get_the_same_checks() -> None:
    refuse(ValueError, "k: expected 1 to 6", X.to("meta"), 7)
    out = moeyard.topk_gating(torch.empty(5, 6, device="meta", dtype=torch.bfloat16), 2)
    assert [tuple(o.shape) for o in out] == [(5, 2), (5, 2), (6,), (6,), (6,), (), ()]
    assert [o.dtype for o in out] == [torch.float32, torch.int32, torch.int32, *[torch.float32] * 4]


def backward(logits: Tensor = X, experts: Any = None, grads: dict[int, Tensor] | None = None, **options: Any) -> Tensor:
    experts = torch.tensor([[0, 1]] * 3, dtype=torch.int32) if experts is None else experts
    given = [(grads or {}).get(i) for i in range(5)]
    score, scale, mask = options.get("score", "softmax"), options.get("scale", 1.0), options.get("mask")
    return BACKWARD(logits, experts, score, False, scale, mask, *given)


def test_the_backward_op_checks_too() -> None:
    """It can be called directly, so nothing that it is given may make it read out of bounds."""
    assert backward(grads={0: torch.ones(3, 2)}).shape == X.shape
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (TypeError, "experts: expected dtype int32", {"experts": torch.zeros(3, 2, dtype=torch.int64)}),
        (ValueError, r"experts: expected shape \[3, k\]", {"experts": torch.zeros(2, 2, dtype=torch.int32)}),
        (ValueError, r"k: expected 1 to 6", {"experts": torch.zeros(3, 7, dtype=torch.int32)}),
        (ValueError, "score: expected one of", {"score": "entmax"}),
        (ValueError, "scale: expected a finite", {"scale": float("nan")}),
        (TypeError, "mask: expected dtype bool", {"mask": torch.ones(3)}),
        (ValueError, r"grad_weights: expected shape \[3, 2\]", {"grads": {0: torch.ones(3)}}),
        (ValueError, r"grad_score_sum: expected shape \[6\]", {"grads": {1: torch.ones(5)}}),
        (ValueError, r"grad_weight_sum: expected shape \[6\]", {"grads": {2: torch.ones(2, 3)}}),
        (ValueError, r"grad_logsumexp_sq: expected shape \[\]", {"grads": {3: torch.ones(1)}}),
        (TypeError, "grad_entropy_sum: expected dtype float32", {"grads": {4: torch.ones((), dtype=torch.float64)}}),
    ]
    for error, message, options in cases:
        with pytest.raises(error, match=message):
            backward(**options)
    with pytest.raises(ValueError, match=r"logits: expected shape \[T, E\], got \[\]"):
        BACKWARD(X.sum(), torch.zeros(3, 2, dtype=torch.int32), "softmax", False, 1.0, None, *[None] * 5)


@pytest.mark.engines("cpu")
@pytest.mark.parametrize("bad", [6, -1])
def test_the_backward_op_checks_ids(bad: int) -> None:
    with pytest.raises(ValueError, match=r"experts: expected ids in \[0, 6\)"):
        backward(experts=torch.full((3, 2), bad, dtype=torch.int32))


@pytest.mark.engines("cpu")
def test_the_reference_has_the_same_signature() -> None:
    import inspect

    assert inspect.signature(topk_gating_reference) == inspect.signature(moeyard.topk_gating)
