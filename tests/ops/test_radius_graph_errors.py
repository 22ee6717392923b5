"""radius_graph, radius, knn_graph: hostile input, gradients at the edges of their domain, memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import moeyard
from ops.test_radius_graph import F64, points, skew_cell

P = points(6, 1.0, torch.float32, 0)
NAN = float("nan")
EYE = torch.eye(3)
BIG = 10**400


def ints(*values: int) -> Tensor:
    return torch.tensor(values)


def quantized() -> Tensor:
    return torch.quantize_per_tensor(P, 0.1, 0, torch.qint8)


def with_row(value: float) -> Tensor:
    return torch.tensor([[0.0, 0, 0], [0, value, 0]])


@pytest.mark.filterwarnings("ignore:.*(nested tensors|quantize)")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: moeyard.radius_graph([[0.0, 0, 0]], 1.0), TypeError, "pos: expected a torch.Tensor, got list"),
        (lambda: moeyard.radius_graph(P.half(), 1.0), TypeError, "pos: expected dtype float32, float64, got float16"),
        (lambda: moeyard.radius_graph(P.long(), 1.0), TypeError, "pos: expected dtype"),
        (lambda: moeyard.radius_graph(P[:, :2], 1.0), ValueError, r"pos: expected shape \[N, 3\], got \[6, 2\]"),
        (lambda: moeyard.radius_graph(P[0], 1.0), ValueError, r"pos: expected shape \[N, 3\]"),
        (lambda: moeyard.radius_graph(P.to_sparse(), 1.0), TypeError, "pos: expected a dense"),
        (lambda: moeyard.radius_graph(quantized(), 1.0), TypeError, "pos: .* got a quantized one"),
        (lambda: moeyard.radius_graph(P, 1.0, quantized()), TypeError, "batch: .* quantized"),
        (lambda: moeyard.radius(P, torch.nested.nested_tensor([P]), 1.0), TypeError, "y: expected a dense .* nested"),
        (lambda: moeyard.radius_graph(with_row(NAN), 1.0), ValueError, "pos: expected finite .* got nan in row 1"),
        (lambda: moeyard.knn_graph(with_row(float("inf")), 1), ValueError, "pos: expected finite .* got inf in row 1"),
        (lambda: moeyard.radius(with_row(NAN), P, 1.0), ValueError, "x: expected finite"),
        (lambda: moeyard.radius(P, with_row(-float("inf")), 1.0), ValueError, "y: expected finite .* -inf in row 1"),
        (lambda: moeyard.radius_graph(EYE[:1].expand(2**31, 3), 1.0), ValueError, r"pos: expected at most 2\^31 - 1"),
        (lambda: moeyard.radius(P, EYE[:1].expand(2**31, 3), 1.0), ValueError, r"y: expected at most 2\^31 - 1"),
        (lambda: moeyard.radius(P, P.double(), 1.0), TypeError, "y: expected dtype float32, got float64"),
        (lambda: moeyard.radius(P, P.to("meta"), 1.0), ValueError, "y: expected device cpu"),
        (lambda: moeyard.radius(P, None, 1.0), TypeError, "y: expected a torch.Tensor, got NoneType"),
        (lambda: moeyard.radius(P, "P", 1.0), TypeError, "y: expected a torch.Tensor, got str"),
        # r
        *((lambda r=r: moeyard.radius_graph(P, r), ValueError, "r: expected a finite") for r in (0, -1.0, NAN, 1e30)),
        *((lambda r=r: moeyard.radius(P, P, r), ValueError, "r: expected a finite") for r in (1e-30, BIG)),
        (lambda: moeyard.radius(P, P, float("inf")), ValueError, "r: expected a finite"),
        (lambda: moeyard.radius_graph(P[:0], -1.0), ValueError, "r: expected a finite"),
        (lambda: moeyard.radius_graph(P, torch.tensor(1.0)), TypeError, "r: expected a number, got Tensor"),
        (lambda: moeyard.radius_graph(P, True), TypeError, "r: expected a number, got bool"),
        (lambda: moeyard.radius_graph(P, None), TypeError, "r: expected a number"),
        # graphs
        (lambda: moeyard.radius_graph(P, 1.0, ints(0, 1, 0, 1, 1, 1)), ValueError, "batch: expected sorted .* row 2"),
        (lambda: moeyard.radius_graph(P, 1.0, ints(-1, 0, 0, 0, 0, 0)), ValueError, "batch: expected graph ids >= 0"),
        (lambda: moeyard.radius_graph(P, 1.0, ints(0)), ValueError, r"batch: expected shape \[6\], got \[1\]"),
        (lambda: moeyard.radius_graph(P, 1.0, torch.zeros(6)), TypeError, "batch: expected dtype int64, int32"),
        (lambda: moeyard.radius_graph(P, 1.0, [0] * 6), TypeError, "batch: expected a torch.Tensor or None"),
        (lambda: moeyard.radius_graph(P, 1.0, ints(*[0] * 6).to("meta")), ValueError, "batch: expected device cpu"),
        (lambda: moeyard.radius_graph(P, 1.0, ints(*[0] * 6), ptr=ints(0, 6)), ValueError, "batch, ptr: .* got both"),
        (lambda: moeyard.radius(P, P, 1.0, None, ints(0, 2, 1, 3, 3, 3)), ValueError, "batch_y: expected sorted"),
        (lambda: moeyard.radius_graph(P, 1.0, ptr=ints()), (ValueError, TypeError), "ptr: expected"),
        (lambda: moeyard.radius_graph(P, 1.0, ptr=ints(0)), ValueError, "ptr: expected to end with 6"),
        (lambda: moeyard.radius_graph(P, 1.0, ptr=ints(0, 7)), ValueError, "ptr: expected to end with 6 .* got 7"),
        (lambda: moeyard.radius_graph(P, 1.0, ptr=ints(1, 6)), ValueError, "ptr: expected to start with 0, got 1"),
        (lambda: moeyard.radius_graph(P, 1.0, ptr=ints(0, 2**62, -5, 6)), ValueError, "ptr: expected non-decreasing"),
        (lambda: moeyard.radius_graph(P, 1.0, ptr=ints(0, 6)[None]), ValueError, "ptr: expected shape"),
        (lambda: moeyard.radius(P, P, 1.0, ptr_x=ints(0, 6), ptr_y=ints(0, 3, 6)), ValueError, "ptr_y: expected as"),
        # options
        (lambda: moeyard.radius_graph(P, 1.0, max_num_neighbors=0), ValueError, "max_num_neighbors: .* at least 1"),
        (lambda: moeyard.radius_graph(P, 1.0, max_num_neighbors=1.5), TypeError, "max_num_neighbors: expected an int"),
        (lambda: moeyard.radius_graph(P, 1.0, max_num_neighbors=2**63), ValueError, "max_num_neighbors: .* at most"),
        (lambda: moeyard.radius_graph(P, 1.0, half=True, max_num_neighbors=3), ValueError, "half: expected"),
        (lambda: moeyard.radius_graph(P, 1.0, loop=1), TypeError, "loop: expected True or False, got int"),
        (lambda: moeyard.radius_graph(P, 1.0, symmetric=None), TypeError, "symmetric: expected True or False"),
        (lambda: moeyard.radius_graph(P, 1.0, half="no"), TypeError, "half: expected True or False"),
        (lambda: moeyard.radius_graph(P, 1.0, geometry=0), TypeError, "geometry: expected True or False"),
        (lambda: moeyard.radius_graph(P, 1.0, flow="up"), ValueError, "flow: expected one of"),
        (lambda: moeyard.knn_graph(P, 2, flow=np.zeros(3)), ValueError, "flow: expected one of"),
        (lambda: moeyard.radius_graph(P, 1.0, max_edges=-1), ValueError, "max_edges: expected at least 0"),
        (lambda: moeyard.radius_graph(P, 1.0, max_edges=2**60), ValueError, r"max_edges: expected at most 2\^48"),
        (lambda: moeyard.radius_graph(P, 1.0, max_edges=2.0), TypeError, "max_edges: expected an int"),
        *((lambda k=k: moeyard.knn_graph(P, k), ValueError, "k: expected at") for k in (0, -3, 2**63)),
        *((lambda k=k: moeyard.knn_graph(P, k), TypeError, "k: expected an int") for k in (True, 2.0, None, ints(2))),
        (lambda: moeyard.knn_graph(P * 1e25, 2), ValueError, "squared distances are finite"),
        # cells
        (lambda: moeyard.radius_graph(P, 1.0, pbc=torch.ones(3).bool()), ValueError, "pbc: expected a cell with it"),
        (lambda: moeyard.radius_graph(P, 1.0, cell=EYE, pbc=torch.ones(3)), TypeError, "pbc: expected dtype bool"),
        (lambda: moeyard.radius_graph(P, 1.0, cell=EYE, pbc=(True,) * 3), TypeError, "pbc: expected a torch.Tensor"),
        (lambda: moeyard.radius_graph(P, 1.0, cell=EYE, pbc=torch.ones(2).bool()), ValueError, "pbc: expected shape"),
        (lambda: moeyard.radius_graph(P, 1.0, cell=EYE.double()), TypeError, "cell: expected dtype float32"),
        (lambda: moeyard.radius_graph(P, 1.0, cell=torch.eye(2)), ValueError, r"cell: expected shape \[3, 3\]"),
        (lambda: moeyard.radius_graph(P, 1.0, cell=EYE.expand(1, 1, 3, 3)), ValueError, "cell: expected shape"),
        (lambda: moeyard.radius_graph(P, 1.0, ints(*range(6)), cell=EYE.expand(5, 3, 3)), ValueError, "5 cells for"),
        (lambda: moeyard.radius_graph(P, 1.0, ptr=ints(0, 6), cell=EYE.expand(5, 3, 3)), ValueError, "cell: expected"),
        (
            lambda: moeyard.radius_graph(P, 1.0, ints(*range(6)), cell=EYE, pbc=torch.ones(2, 3).bool()),
            ValueError,
            "2 rows for graph",
        ),
        *(
            (lambda c=c: moeyard.radius_graph(P, 1.0, cell=c), ValueError, "cell: expected linearly independent")
            for c in (torch.ones(3, 3), torch.zeros(3, 3), EYE * torch.tensor([1.0, 1, 0]))
        ),
        (lambda: moeyard.radius_graph(P, 1.0, cell=EYE * NAN), ValueError, "cell: expected finite vectors"),
        (lambda: moeyard.radius_graph(P, 1.0, cell=EYE * 1e-4), ValueError, r"cell: expected at most 2\^27"),
        (lambda: moeyard.radius_graph(P, 1e9, cell=EYE), ValueError, r"cell: expected at most 2\^27"),
        (lambda: moeyard.knn_graph(P, 10**12, cell=EYE), ValueError, r"k: expected at most 2\^27 with a cell"),
        (lambda: moeyard.knn_graph(P, 2**27, cell=EYE), ValueError, r"cell: expected at most 2\^27"),
        (lambda: moeyard.radius_graph(P * 1e30, 1.0, cell=EYE), ValueError, r"pos: .* within 2\^28 cells"),
        (lambda: moeyard.radius_graph(P * 1e7, 1.0, cell=EYE), ValueError, r"pos: expected coordinates near enough"),
    ],
)  # fmt: skip
def test_hostile_input(call: Callable[[], Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_values_that_look_hostile_but_are_not() -> None:
    assert moeyard.radius_graph(P, 3).num_edges.item() == 30
    assert moeyard.radius_graph(P, 1.0, max_num_neighbors=2**63 - 1).num_edges.item() > 0
    assert moeyard.knn_graph(P, 2**63 - 1).num_edges.item() == 30
    assert moeyard.radius_graph(P, 9.0, ints(0, 0, 0, 2**62, 2**62, 2**63 - 1)).num_edges.item() == 8
    wide = torch.ones(3, 3) * NAN
    wide[0] = torch.tensor([4.0, 0, 0])
    with pytest.raises(ValueError, match="finite"):
        moeyard.radius_graph(P, 1.0, cell=wide, pbc=torch.tensor([True, False, False]))
    wide = wide.nan_to_num(0.0)
    assert moeyard.radius_graph(P, 1.0, cell=wide, pbc=torch.tensor([True, False, False])).num_edges.item() > 0
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.vmap(lambda p: moeyard.knn_graph(p, 2)[0])(torch.stack([P, P]))


def test_meta_tensors() -> None:
    out = moeyard.radius_graph(P.to("meta"), 1.0, max_edges=5, cell=EYE.to("meta"))
    assert [tuple(o.shape) for o in out] == [(2, 5), (5,), (5, 3), (5, 3), (6,), (), (), ()]


# ---- gradients ------------------------------------------------------------------------------------------------------


def test_coincident_points_have_gradient_zero() -> None:
    pos = torch.zeros(3, 3, dtype=F64, requires_grad=True)
    graph = moeyard.radius_graph(pos, 1.0)
    (first,) = torch.autograd.grad((graph.distance * 3 + graph.vector[:, 0] ** 2).sum(), pos, create_graph=True)
    assert first.tolist() == [[0.0] * 3] * 3
    (second,) = torch.autograd.grad((first**2).sum(), pos)
    assert second.isfinite().all()


def test_third_derivative_is_refused() -> None:
    pos = points(4, 1.0, F64, 0).requires_grad_()
    energy = (moeyard.radius_graph(pos, 2.0).distance ** 3).sum()
    (force,) = torch.autograd.grad(energy, pos, create_graph=True)
    (second,) = torch.autograd.grad((force**2).sum(), pos, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivatives"):
        torch.autograd.grad((second**2).sum(), pos)


def test_forces_and_stress_match_plain_torch() -> None:
    """A training loss on forces and virial: gradients of gradients, through cell and positions."""

    def losses(native: bool) -> list[Tensor]:
        pos = (points(12, 5.0, F64, 1) - 1).requires_grad_()
        cell = torch.stack([skew_cell(3.0, F64), skew_cell(3.4, F64)]).requires_grad_()
        depth = torch.tensor(0.7, dtype=F64, requires_grad=True)
        ptr = ints(0, 5, 12)
        graph = moeyard.radius_graph(pos.detach(), 2.4, ptr=ptr, cell=cell.detach())
        if native:
            graph = moeyard.radius_graph(pos, 2.4, ptr=ptr, cell=cell)
            distance, vector = graph.distance, graph.vector
        else:
            j, i = graph.edge_index
            shift = graph.cell_shift.to(F64)
            vector = pos[j] + torch.einsum("ek,ekc->ec", shift, cell[(i >= 5).long()]) - pos[i]
            distance = vector.norm(dim=1)
        energy = (depth * torch.exp(-distance) * (1 + vector[:, 2])).sum()
        force, stress = torch.autograd.grad(energy, [pos, cell], create_graph=True)
        return list(torch.autograd.grad((force**2).sum() + (stress**3).sum(), [pos, cell, depth]))

    for got, want in zip(losses(True), losses(False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("which", ["distance", "vector"])
def test_one_output_alone_has_double_backward(which: str) -> None:
    pos, cell = points(5, 2.0, F64, 4).requires_grad_(), skew_cell(2.0, F64).requires_grad_()

    def function(p: Tensor, c: Tensor) -> Tensor:
        return getattr(moeyard.knn_graph(p, 4, cell=c), which)

    assert torch.autograd.gradcheck(function, (pos, cell))
    assert torch.autograd.gradgradcheck(function, (pos, cell))
    assert torch.autograd.gradgradcheck(lambda c: function(pos.detach(), c), (cell,))
    x, y = points(4, 1.0, F64, 5).requires_grad_(), points(3, 1.0, F64, 6).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda a, b: getattr(moeyard.radius(a, b, 0.8, max_edges=15), which), (x, y))


def test_no_geometry_no_gradient() -> None:
    graph = moeyard.radius_graph(P.clone().requires_grad_(), 1.0, geometry=False)
    assert not any(field.requires_grad for field in graph)


def test_double_backward_op_is_checked() -> None:
    """The ops below autograd, called by hand with nonsense, answer with an error."""
    pos = points(4, 1.0, F64, 0)
    graph = moeyard.radius_graph(pos, 2.0)
    m = len(graph.distance)
    good = [graph.distance, None, graph.edge_index, graph.distance, graph.vector, graph.cell_shift, graph.num_edges]
    rest = [None, None, 4, None, None, False]
    backward = torch.ops.moeyard.radius_graph_backward
    assert backward(*good, *rest)[0].shape == (4, 3)
    for slot, bad in ((0, graph.distance.float()), (2, graph.edge_index + 3), (2, -graph.edge_index), (4, pos)):
        with pytest.raises((ValueError, TypeError)):
            backward(*good[:slot], bad, *good[slot + 1 :], *rest)
    double = torch.ops.moeyard.radius_graph_double_backward
    none, args = torch.zeros(0, 3, dtype=F64), [*good, *rest]
    assert double(pos, none, torch.zeros(0, 3, 3, dtype=F64), *args)[0].shape == (m,)
    torch.library.opcheck(double, (pos, none, torch.zeros(0, 3, 3, dtype=F64), *args))
    with pytest.raises(ValueError, match="gg_points"):
        double(pos[:2], none, torch.zeros(0, 3, 3, dtype=F64), *args)


def test_radius_graph_op_is_checked() -> None:
    """The op itself, with what the public functions cannot pass on."""
    good: dict[str, Any] = {"pos": P, "centres": None, "r": 1.0, "k": None}
    good |= dict.fromkeys(("batch", "batch_centres", "ptr", "ptr_centres", "cell", "pbc", "cap"))
    good |= dict.fromkeys(("symmetric", "loop", "half", "backwards"), False) | {"geometry": True, "max_edges": None}
    op = torch.ops.moeyard.radius_graph
    assert len(op(*good.values())) == 8
    bad: dict[str, Any]
    for bad in ({"max_edges": -1}, {"k": 2, "cap": 1}, {"k": 2, "half": True}, {"k": 2, "symmetric": True}):
        with pytest.raises(ValueError, match=r"max_edges: expected|k: expected no"):
            op(*{**good, **bad}.values())


@pytest.mark.parametrize("second", [False, True])
def test_graphs_of_the_backward_are_checked(second: bool) -> None:
    """Graph ids pick rows of the cell's gradient: wrong ones must not reach memory outside it."""
    pos, cells, batch = P.double(), torch.eye(3, dtype=F64).expand(2, 3, 3), ints(0, 0, 0, 1, 1, 1)
    g = moeyard.radius_graph(pos, 1.2, batch, cell=cells)
    good: dict[str, Any] = {"gd": g.distance, "gv": None, "index": g.edge_index, "d": g.distance, "v": g.vector}
    good |= {"shift": g.cell_shift, "num_edges": g.num_edges, "batch": batch, "ptr": None, "num_points": 6}
    good |= {"num_centres": None, "cell_shape": [2, 3, 3], "backwards": False}
    op = torch.ops.moeyard.radius_graph_double_backward if second else torch.ops.moeyard.radius_graph_backward
    gg = (pos, pos[:0], cells) if second else ()
    assert len(op(*gg, *good.values())) == 3 + second
    cases: list[tuple[dict[str, Any], str]] = [
        *(({"batch": b}, "batch_centres: expected") for b in (ints(0), ints(*[-1] * 6), batch.float(), batch[None])),
        *(({"ptr": p, "batch": None}, "ptr_centres: ex") for p in (ints(3, 6), ints(0, 2**40), ints(0, 9, 6))),
        ({"ptr": batch[:0], "batch": None}, "ptr_centres: expected at least one"),
        *(({"cell_shape": s}, "cell_shape: expected") for s in ([], [5], [-1, 3, 3], [1, 2, 3, 3], [2**62, 3, 3])),
        *(({"num_points": n}, "num_points: expected") for n in (-1, 2**62)),
        *(({"num_centres": n}, "num_centres: expected") for n in (-1, 2**62)),
        ({"ptr": ints(0, 6)}, "batch_centres, ptr_centres: .* got both"),
    ]
    for bad, message in cases:
        with pytest.raises((ValueError, TypeError), match=message):
            op(*gg, *{**good, **bad}.values())
    beyond = {**good, "batch": ints(0, 0, 0, *[2**40] * 3)}
    if second:
        with pytest.raises(ValueError, match="cell_shape: expected a cell for every graph"):
            op(*gg, *beyond.values())
    else:
        assert op(*beyond.values())[2][1].abs().sum() == 0
        assert op(*{**good, "cell_shape": [0, 3, 3]}.values())[2].shape == (0, 3, 3)


def test_more_periodic_images_than_memory_holds() -> None:
    """A distance in the wrong unit is an error at once, not a search that ends with the machine's memory."""
    points, cell = torch.rand(5, 3), torch.eye(3) * 5
    for pbc in ([False, True, False], [True, True, True]):
        with pytest.raises(
            ValueError, match=r"cell: expected at most 2\^27 periodic images of its points within reach"
        ):
            moeyard.radius_graph(points, 1e9, cell=cell, pbc=torch.tensor(pbc))


@pytest.mark.parametrize(("x", "y", "named"), [(31, 0, "x"), (0, 31, "y"), (31, 32, "x")])
def test_more_points_than_ids(x: int, y: int, named: str) -> None:
    many, others = (torch.zeros(1, 3).expand(2**power, 3) for power in (x, y))
    with pytest.raises(ValueError, match=rf"^{named}: expected at most 2\^31 - 1 points, got 2147483648$"):
        moeyard.radius(many, others, 1.0)
    if x == 31:
        with pytest.raises(ValueError, match=r"^pos: expected at most 2\^31 - 1 points, got 2147483648$"):
            moeyard.radius_graph(many, 1.0)
