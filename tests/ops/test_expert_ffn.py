"""expert_ffn against the plain formula: values, gradients of both orders, blocks, idle experts, dtypes, compilation."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from moeyard import _native
from moeyard.ops.expert_ffn import PARTS, expert_ffn, expert_ffn_reference

ACTIVATIONS = sorted(PARTS)


def problem(activation: str, counts: list[int], *, tail: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(len(counts))
    rows, experts, dim, hidden = sum(counts) + tail, len(counts), 6, 5
    x = torch.randn(rows, dim, generator=g, dtype=torch.float64)
    up = torch.randn(experts, dim, PARTS[activation] * hidden, generator=g, dtype=torch.float64)
    down = torch.randn(experts, hidden, dim, generator=g, dtype=torch.float64)
    return [*(t.to(dtype).requires_grad_() for t in (x, up, down)), torch.tensor(counts).cumsum(0).int()]


def by_hand(x: Tensor, up: Tensor, down: Tensor, offsets: Tensor, activation: str) -> Tensor:
    """Row by row, with the activations written out."""
    y = torch.zeros(x.shape[0], down.shape[2], dtype=x.dtype)
    for r in range(int(offsets[-1])):
        e = int((offsets <= r).sum())
        h = x[r] @ up[e]
        if activation == "swiglu":
            gate, value = h[: len(h) // 2], h[len(h) // 2 :]
            h = gate / (1 + torch.exp(-gate)) * value
        elif activation == "gelu":
            h = h * 0.5 * (1 + torch.erf(h / 2**0.5))
        else:
            h = torch.where(h > 0, h, 0)
        y[r] = h @ down[e]
    return y


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("counts", "tail"), [([3, 4, 2], 0), ([0, 5, 0, 0, 1], 2), ([0, 0], 3), ([7], 0), ([0], 0)])
@pytest.mark.parametrize("recompute", [False, True])
def test_equals_the_formula(activation: str, counts: list[int], tail: int, recompute: bool) -> None:
    *leaves, offsets = problem(activation, counts, tail=tail)
    y = expert_ffn(*leaves, offsets, activation, recompute=recompute)
    want = by_hand(*leaves, offsets, activation)
    torch.testing.assert_close(y, want, rtol=0, atol=1e-11)
    seed = torch.randn(y.shape, dtype=y.dtype)
    got = torch.autograd.grad(y, leaves, seed)
    # A formula without a single row has no graph at all; its gradients are zero.
    expected = torch.autograd.grad(want, leaves, seed) if sum(counts) else [torch.zeros_like(t) for t in leaves]
    for g, w in zip(got, expected, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=1e-11)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("recompute", [False, True])
def test_experts_larger_than_a_block(activation: str, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["moeyard.ops.expert_ffn"], "_BLOCK", 4)
    test_equals_the_formula(activation, [9, 0, 4, 1], 3, recompute)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_gradients_of_both_orders(activation: str) -> None:
    *leaves, offsets = problem(activation, [2, 0, 3], tail=1)
    assert torch.autograd.gradcheck(lambda *t: expert_ffn(*t, offsets, activation), leaves)
    assert torch.autograd.gradgradcheck(lambda *t: expert_ffn(*t, offsets, activation), leaves)


@pytest.mark.parametrize("ffn", [expert_ffn, expert_ffn_reference])
def test_second_order_where_one_argument_depends_on_another(ffn: Any) -> None:
    """The experts applied twice, and tied weights: what the engine adds is not added here."""
    x, up, down, offsets = problem("relu", [2, 3])

    def gradients(create_graph: bool) -> list[Tensor]:
        middle = ffn(x, up, down, offsets, "relu")
        y = ffn(middle, up, up.transpose(1, 2), offsets, "relu").square().sum()
        return list(torch.autograd.grad(y, [middle, up, down, x], create_graph=create_graph))

    want = gradients(False)
    got = gradients(True)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)
    assert all(g.requires_grad for g in got)


def test_strided_input_compiles() -> None:
    x, up, down, offsets = problem("swiglu", [2, 3], dtype=torch.float32)
    strided = x.detach().t().contiguous().t().requires_grad_()
    compiled = torch.compile(lambda x: expert_ffn(x, up, down, offsets).square().sum(), fullgraph=True)
    (got,) = torch.autograd.grad(compiled(strided), [strided])
    (want,) = torch.autograd.grad(expert_ffn(x, up, down, offsets).square().sum(), [x])
    torch.testing.assert_close(got, want)


def test_meta_tensors() -> None:
    x, up, down, offsets = (t.detach().to("meta") for t in problem("swiglu", [2, 3]))
    assert expert_ffn(x, up, down, offsets).shape == (5, 6)


def test_only_what_is_asked_for_is_differentiated() -> None:
    x, up, down, offsets = problem("swiglu", [2, 3])
    want = torch.autograd.grad(expert_ffn(x, up, down, offsets).sum(), [x, up, down])
    for wanted in ([x], [up], [down], [x, down]):
        mine = [t.detach().requires_grad_(any(t is w for w in wanted)) for t in (x, up, down)]
        expert_ffn(*mine, offsets).sum().backward()
        for t, g in zip(mine, want, strict=True):
            assert (t.grad is None) == (not t.requires_grad)
            assert t.grad is None or torch.equal(t.grad, g)


def test_a_gradient_of_stride_zero() -> None:
    *leaves, offsets = problem("swiglu", [2, 3])
    expanded = torch.autograd.grad(expert_ffn(*leaves, offsets).sum(), leaves)
    dense = torch.autograd.grad(expert_ffn(*leaves, offsets), leaves, torch.ones(5, 6, dtype=torch.float64))
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


def test_transposed_weights() -> None:
    """Weights stored [E,out,in], as other libraries do, passed as views."""
    x, up, down, offsets = problem("swiglu", [2, 0, 3])
    stored = [w.detach().transpose(1, 2).contiguous().requires_grad_() for w in (up, down)]
    y = expert_ffn(x, stored[0].transpose(1, 2), stored[1].transpose(1, 2), offsets)
    torch.testing.assert_close(y, expert_ffn(x, up, down, offsets))
    got = torch.autograd.grad(y.square().sum(), stored)
    want = torch.autograd.grad(expert_ffn(x, up, down, offsets).square().sum(), [up, down])
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.transpose(1, 2), w)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precisions_stay_near(dtype: torch.dtype) -> None:
    exact = problem("swiglu", [5, 3, 8])
    rounded = problem("swiglu", [5, 3, 8], dtype=dtype)
    y = expert_ffn(*rounded)
    assert y.dtype == dtype
    want = expert_ffn(*(t.detach().to(dtype).double() if t.is_floating_point() else t for t in exact))
    scale = float(want.detach().abs().max())
    assert float((y.double() - want).detach().abs().max()) <= 8 * torch.finfo(dtype).eps * scale


def test_autocast_runs_in_its_dtype() -> None:
    *leaves, offsets = problem("swiglu", [4, 4], dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = expert_ffn(*leaves, offsets)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in leaves)


def test_autocast_leaves_float64_alone() -> None:
    *leaves, offsets = problem("swiglu", [4, 4])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert expert_ffn(*leaves, offsets).dtype == torch.float64


def test_recompute_keeps_no_hidden_features() -> None:
    *leaves, offsets = problem("swiglu", [4, 4])

    def kept(recompute: bool) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            expert_ffn(*leaves, offsets, recompute=recompute)
        return sum(sizes)

    assert kept(False) - kept(True) == 8 * 2 * 5


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compiles_in_one_graph(activation: str) -> None:
    *leaves, offsets = problem(activation, [2, 0, 3], tail=1, dtype=torch.float32)
    compiled = torch.compile(lambda *t: expert_ffn(*t, activation).square().sum(), fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*leaves, offsets), leaves)
    want = torch.autograd.grad(expert_ffn(*leaves, offsets, activation).square().sum(), leaves)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_opcheck() -> None:
    # Without a tail: its rows of the hidden features, which nobody reads, are not initialised.
    *leaves, offsets = problem("gelu", [2, 0, 3])
    torch.library.opcheck(torch.ops.moeyard.expert_ffn.default, (*leaves, offsets, "gelu", True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"offsets": [3, 2]}, ValueError, r"offsets: expected values that rise within \[0, 5\], got 3 before 2"),
        ({"offsets": [2, 6]}, ValueError, r"offsets: .*got 6 before 5"),
        ({"offsets": [-1, 5]}, ValueError, r"offsets: .*got 0 before -1"),
        ({"offsets": [1, 2, 5]}, ValueError, r"offsets: expected shape \[2\], got \[3\]"),
        (
            {"x": torch.zeros(5, 7, dtype=torch.float64)},
            ValueError,
            r"up: expected shape \[2, 7, 10\], got \[2, 6, 10\]",
        ),
        ({"down": torch.zeros(2, 5, 6)}, TypeError, "down: expected dtype float64, got float32"),
        ({"down": torch.zeros(2, 5, 7).double()}, ValueError, r"down: expected shape \[2, 5, 6\], got \[2, 5, 7\]"),
        ({"up": torch.zeros(6, 10, dtype=torch.float64)}, ValueError, r"up: expected shape \[E, H, P\*I\]"),
        ({"activation": "tanh"}, ValueError, "activation: expected one of 'swiglu', 'gelu', 'relu', got 'tanh'"),
        ({"x": None}, TypeError, "x: expected a torch.Tensor, got NoneType"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    x, up, down, offsets = problem("swiglu", [2, 3])
    arguments: dict[str, Any] = {"x": x, "up": up, "down": down, "offsets": offsets, "activation": "swiglu", **change}
    if isinstance(arguments["offsets"], list):
        arguments["offsets"] = torch.tensor(arguments["offsets"])
    with pytest.raises(error, match=message):
        expert_ffn(**arguments)


native = pytest.mark.skipif(not _native.cpu.expert_ffn_runs(), reason="no AVX-512")
SIZES = [(5, 3), (8, 32), (33, 17), (64, 40), (257, 31), (31, 257), (520, 530)]


@pytest.fixture
def on_native(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Our kernels, also where the BLAS behind torch would be preferred; notes their calls."""
    calls: list[str] = []
    module = sys.modules["moeyard.ops.expert_ffn"]
    taken = module._problem
    monkeypatch.setattr(
        module, "_takes_native", lambda x, u, d, a: x.dtype == torch.float32 and a in ("swiglu", "relu")
    )
    monkeypatch.setattr(module, "_problem", lambda *a: calls.append("native") or taken(*a))
    return calls


def compare_with_float64(
    x: Tensor, up: Tensor, down: Tensor, offsets: Tensor, activation: str, recompute: bool
) -> None:
    leaves = [t.requires_grad_() for t in (x, up, down)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    y = expert_ffn(*leaves, offsets, activation, recompute=recompute)
    want = expert_ffn_reference(*exact, offsets, activation)
    if not want.requires_grad:  # not one expert
        assert not y.any()
        return
    seed = torch.randn(y.shape)
    got = [y, *torch.autograd.grad(y, leaves, seed)]
    expected = [want, *torch.autograd.grad(want, exact, seed.double())]
    for g, w in zip(got, expected, strict=True):
        scale = max(1.0, float(w.detach().abs().max())) if w.numel() else 1.0
        torch.testing.assert_close(g.double(), w, rtol=0, atol=3e-6 * scale)


@native
@pytest.mark.parametrize("activation", ["swiglu", "relu"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("dim", "hidden"), SIZES)
def test_native_products(dim: int, hidden: int, activation: str, recompute: bool, on_native: list[str]) -> None:
    torch.manual_seed(dim)
    counts = [9, 0, 1, 140, 7, 0]
    x = torch.randn(sum(counts) + 3, dim)
    up = torch.randn(len(counts), dim, PARTS[activation] * hidden) * dim**-0.5
    down = torch.randn(len(counts), hidden, dim) * hidden**-0.5
    compare_with_float64(x, up, down, torch.tensor(counts).cumsum(0), activation, recompute)
    assert on_native


@native
@pytest.mark.parametrize("counts", [[9000, 3], [0, 2500, 2600], [700] * 13])
def test_threads_and_many_rows(counts: list[int], on_native: list[str]) -> None:
    """Several segments and sums of gradients for one expert; the same bits for any number of threads."""
    torch.manual_seed(0)
    x, seed = torch.randn(sum(counts) + 5, 24), torch.randn(sum(counts) + 5, 24)
    up, down = torch.randn(len(counts), 24, 40) * 0.2, torch.randn(len(counts), 20, 24) * 0.2
    offsets = torch.tensor(counts).cumsum(0).int()
    compare_with_float64(x, up, down, offsets, "swiglu", False)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        y = expert_ffn(x, up, down, offsets)
        results.append([y.detach(), *torch.autograd.grad(y, [x, up, down], seed)])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@native
@pytest.mark.parametrize(("rows", "experts", "dim", "hidden"), [(0, 2, 4, 3), (3, 2, 4, 0), (3, 2, 0, 3), (3, 0, 4, 3)])
def test_native_products_of_nothing(rows: int, experts: int, dim: int, hidden: int, on_native: list[str]) -> None:
    offsets = torch.full((experts,), rows)
    for activation in ("swiglu", "relu"):
        shapes = (rows, dim), (experts, dim, PARTS[activation] * hidden), (experts, hidden, dim)
        compare_with_float64(*(torch.randn(s) for s in shapes), offsets, activation, False)


@native
def test_native_backward_checks_what_it_reads(on_native: list[str]) -> None:
    x, up, down, offsets = torch.ones(5, 4), torch.ones(2, 4, 6), torch.ones(2, 3, 4), torch.tensor([2, 5])
    backward = torch.ops.moeyard.expert_ffn_backward
    for grad, hidden, message in (
        (torch.ones(4, 4), torch.ones(5, 6), r"grad: expected shape \[5, 4\], got \[4, 4\]"),
        (torch.ones(5, 4), torch.ones(5, 5), r"hidden: expected shape \[5, 6\], got \[5, 5\]"),
        (torch.ones(5, 4), torch.ones(1), r"hidden: expected shape \[5, 6\], got \[1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            backward(grad, x, up, down, hidden, offsets, "swiglu", True, True)


@native
def test_native_products_take_any_strides(on_native: list[str]) -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 40).t().contiguous().t()
    up, down = torch.randn(2, 60, 40).transpose(1, 2), torch.randn(2, 40, 30).transpose(1, 2)
    compare_with_float64(x, up * 0.1, down * 0.1, torch.tensor([21, 50]), "swiglu", False)
    compare_with_float64(x, up[:, :, ::2] * 0.1, down[:, ::2] * 0.1, torch.tensor([21, 50]), "swiglu", False)
    assert len(on_native) == 4


@native
def test_native_products_keep_nan(on_native: list[str]) -> None:
    for activation in ("swiglu", "relu"):
        x, up, down = torch.ones(9, 4), torch.ones(1, 4, PARTS[activation] * 3), torch.ones(1, 3, 4)
        x[5, 1] = torch.nan
        y = expert_ffn(x, up, down, torch.tensor([9]), activation)
        assert y.isnan().any(1).tolist() == [i == 5 for i in range(9)]


@native
def test_native_offsets_are_checked(on_native: list[str]) -> None:
    x, up, down = torch.ones(5, 4), torch.ones(2, 4, 6), torch.ones(2, 3, 4)
    for offsets, message in (([3, 2], "got 3 before 2"), ([2, 6], "got 6 before 5"), ([-1, 5], "got 0 before -1")):
        with pytest.raises(ValueError, match=rf"offsets: expected values that rise within \[0, 5\], {message}"):
            expert_ffn(x, up, down, torch.tensor(offsets))


def test_the_reference_is_the_formula() -> None:
    for activation in ACTIVATIONS:
        *leaves, offsets = problem(activation, [2, 0, 3], tail=2)
        torch.testing.assert_close(
            expert_ffn_reference(*leaves, offsets, activation), by_hand(*leaves, offsets, activation)
        )
