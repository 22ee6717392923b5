"""radius_graph, radius, knn_graph: the op contract and hand-computed tables."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import moeyard
from engines import engine, place
from moeyard.ops._radius_graph_reference import knn_graph_reference, radius_graph_reference, radius_reference
from ops.contract import Inputs, OpContract

pytestmark = pytest.mark.usefixtures("engine")

F64 = torch.float64


def points(n: int, side: float, dtype: torch.dtype, seed: int) -> Tensor:
    return (torch.rand(n, 3, generator=torch.Generator().manual_seed(seed), dtype=F64) * side).to(dtype)


def large(n: int) -> int:
    """Points of a large case; a thread of the emulation is slower than one of a GPU."""
    return n // 12 if engine.is_emulated else n


def skew_cell(side: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.9, 0.0], [-0.1, 0.3, 1.1]], dtype=dtype) * side


class RadiusContract(OpContract):
    dtypes = (torch.float32, torch.float64)
    double_backward = True
    tolerance: ClassVar = {torch.float32: (1e-6, 1e-6), torch.float64: (1e-14, 1e-14)}


class TestRadiusGraph(RadiusContract):
    function = staticmethod(moeyard.radius_graph)
    reference = staticmethod(radius_graph_reference)
    differentiable = ("pos",)

    def inputs(self, dtype: torch.dtype, size: str = "small", seed: int = 0) -> Inputs:
        n = large(20_000) if size == "large" else 9
        pos = points(n, (n / 0.3) ** (1 / 3), dtype, seed)
        return {"pos": pos, "r": 2.1, "batch": torch.arange(n) // (n * 3 // 4 if size == "large" else 6)}

    def empty_inputs(self) -> list[Inputs]:
        none = torch.empty(0, 3)
        return [
            {"pos": none, "r": 1.0},
            {"pos": none, "r": 1.0, "batch": torch.empty(0, dtype=torch.int64)},
            {"pos": none, "r": 1.0, "ptr": torch.zeros(4, dtype=torch.int64)},
            {"pos": none, "r": 1.0, "cell": torch.eye(3)},
            {"pos": torch.rand(4, 3), "r": 1e-3},
        ]


class TestRadiusGraphPeriodic(TestRadiusGraph):
    differentiable = ("pos", "cell")

    def inputs(self, dtype: torch.dtype, size: str = "small", seed: int = 0) -> Inputs:
        n = large(6_000) if size == "large" else 5
        side = (n / 0.3) ** (1 / 3) if size == "large" else 2.0
        cells = torch.stack([skew_cell(side, dtype), skew_cell(side, dtype) * 1.1])
        pbc = torch.tensor([[True, True, True], [True, False, True]])
        pos = points(n, side, dtype, seed) - 0.4 * side
        return {"pos": pos, "r": 1.7, "ptr": torch.tensor([0, n // 2, n]), "cell": cells, "pbc": pbc}

    def empty_inputs(self) -> list[Inputs]:
        return [
            {"pos": torch.empty(0, 3), "r": 1.0, "cell": torch.eye(3)},
            {"pos": torch.zeros(1, 3), "r": 0.5, "cell": torch.eye(3)},
        ]


class TestRadiusGraphFixed(TestRadiusGraph):
    """A capped, symmetric graph in a fixed number of edges, of which some are unused."""

    def inputs(self, dtype: torch.dtype, size: str = "small", seed: int = 0) -> Inputs:
        more = {"max_num_neighbors": 2, "symmetric": True, "max_edges": 100_000 if size == "large" else 40}
        return {**super().inputs(dtype, size, seed), **more}

    def empty_inputs(self) -> list[Inputs]:
        return [{**case, "max_edges": 3} for case in super().empty_inputs()]


class TestRadius(RadiusContract):
    function = staticmethod(moeyard.radius)
    reference = staticmethod(radius_reference)
    differentiable = ("x", "y", "cell")

    def inputs(self, dtype: torch.dtype, size: str = "small", seed: int = 0) -> Inputs:
        n = large(8_000) if size == "large" else 6
        side = (n / 0.4) ** (1 / 3) if size == "large" else 2.0
        x, y = points(n, side, dtype, seed), points(n // 2, side, dtype, seed + 100)
        batches = {"batch_x": torch.arange(n) // (n // 2), "batch_y": torch.arange(n // 2) // (n // 4)}
        return {"x": x, "y": y, "r": 1.5, "cell": skew_cell(side, dtype), **batches}

    def empty_inputs(self) -> list[Inputs]:
        none, some, cell = torch.empty(0, 3), torch.rand(3, 3), torch.eye(3)
        pairs = [(none, some), (some, none), (none, none)]
        return [{"x": x, "y": y, "r": 0.4, "cell": cell} for x, y in pairs]


class TestKnnGraph(RadiusContract):
    function = staticmethod(moeyard.knn_graph)
    reference = staticmethod(knn_graph_reference)
    differentiable = ("pos",)

    def inputs(self, dtype: torch.dtype, size: str = "small", seed: int = 0) -> Inputs:
        n = large(20_000) if size == "large" else 9
        return {"pos": points(n, 5.0, dtype, seed), "k": 3, "ptr": torch.tensor([0, n // 2, n // 2, n])}

    def empty_inputs(self) -> list[Inputs]:
        return [{"pos": torch.empty(0, 3), "k": 2}, {"pos": torch.rand(1, 3), "k": 2}]


class TestKnnGraphPeriodic(TestKnnGraph):
    differentiable = ("pos", "cell")

    def inputs(self, dtype: torch.dtype, size: str = "small", seed: int = 0) -> Inputs:
        n, side = (large(5_000), 30.0) if size == "large" else (4, 2.0)
        return {"pos": points(n, side * 1.3, dtype, seed), "k": 5, "cell": skew_cell(side, dtype)}

    def empty_inputs(self) -> list[Inputs]:
        return [{"pos": torch.empty(0, 3), "k": 2, "cell": torch.eye(3)}]


# ---- tables ---------------------------------------------------------------------------------------------------------

LINE = [[0.0, 0, 0], [1, 0, 0], [3, 0, 0], [3, 0, 0]]


def edges(graph: moeyard.RadiusGraph) -> list[tuple[int, ...]]:
    """(centre, neighbour, *shift) in order; the centre is the target."""
    rows = (
        torch.cat([graph.edge_index.flip(0).t(), graph.cell_shift], 1)
        if len(graph.cell_shift)
        else graph.edge_index.flip(0).t()
    )
    return [tuple(row) for row in rows.tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"r": 1.0}, [(2, 3), (3, 2)]),
        ({"r": 1.001}, [(0, 1), (1, 0), (2, 3), (3, 2)]),
        ({"r": 2.5}, [(0, 1), (1, 0), (1, 2), (1, 3), (2, 1), (2, 3), (3, 1), (3, 2)]),
        ({"r": 0.5, "loop": True}, [(0, 0), (1, 1), (2, 2), (2, 3), (3, 2), (3, 3)]),
        ({"r": 2.5, "half": True}, [(0, 1), (1, 2), (1, 3), (2, 3)]),
        ({"r": 0.5, "half": True, "loop": True}, [(0, 0), (1, 1), (2, 2), (2, 3), (3, 3)]),
        ({"r": 9.0, "max_num_neighbors": 1}, [(0, 1), (1, 0), (2, 3), (3, 2)]),
        ({"r": 9.0, "max_num_neighbors": 2}, [(0, 1), (0, 2), (1, 0), (1, 2), (2, 1), (2, 3), (3, 1), (3, 2)]),
        ({"r": 9.0, "max_num_neighbors": 1, "loop": True}, [(0, 0), (1, 1), (2, 2), (3, 2)]),
        (
            {"r": 9.0, "max_num_neighbors": 2, "symmetric": True},
            [(0, 1), (0, 2), (1, 0), (1, 2), (1, 3), (2, 0), (2, 1), (2, 3), (3, 1), (3, 2)],
        ),
        ({"r": 9.0, "batch": torch.tensor([0, 0, 7, 9])}, [(0, 1), (1, 0)]),
        ({"r": 9.0, "batch": torch.tensor([0, 0, 7, 9], dtype=torch.int32)}, [(0, 1), (1, 0)]),
        ({"r": 9.0, "ptr": torch.tensor([0, 1, 1, 3, 4, 4])}, [(1, 2), (2, 1)]),
    ],
)
def test_radius_graph_table(dtype: torch.dtype, options: dict[str, Any], expected: list[tuple[int, int]]) -> None:
    graph = moeyard.radius_graph(torch.tensor(LINE, dtype=dtype), **place(options))
    assert edges(graph) == expected
    assert graph.num_neighbors.tolist() == [sum(e[0] == i for e in expected) for i in range(4)]
    assert (graph.num_edges.item(), graph.overflow.item()) == (len(expected), False)


def test_truncated_counts_cut_centres() -> None:
    pos = torch.tensor(LINE)
    assert [moeyard.radius_graph(pos, 2.5, max_num_neighbors=c).truncated.item() for c in (1, 2, 3)] == [3, 1, 0]


def test_geometry_of_an_edge() -> None:
    pos = torch.tensor([[0.0, 0, 0], [1, 2, 2]])
    graph = moeyard.radius_graph(pos, 4.0)
    assert graph.distance.tolist() == [3.0, 3.0]
    assert graph.vector.tolist() == [[1.0, 2, 2], [-1, -2, -2]]
    assert graph.cell_shift.shape == (0, 3)
    bare = moeyard.radius_graph(pos, 4.0, geometry=False)
    assert (bare.distance.shape, bare.vector.shape) == ((0,), (0, 3))
    assert torch.equal(bare.edge_index, graph.edge_index)


def test_flow_swaps_the_rows() -> None:
    pos = torch.tensor([[0.0, 0, 0], [1, 0, 0], [2, 0, 0]])
    to = moeyard.radius_graph(pos, 9.0, max_num_neighbors=1)
    back = moeyard.radius_graph(pos, 9.0, max_num_neighbors=1, flow="target_to_source")
    assert to.edge_index.tolist() == [[1, 0, 1], [0, 1, 2]]
    assert back.edge_index.tolist() == [[0, 1, 2], [1, 0, 1]]
    assert torch.equal(to.vector, back.vector)


def test_max_edges() -> None:
    pos = torch.tensor(LINE, requires_grad=True)
    graph = moeyard.radius_graph(pos, 1.5, max_edges=6)
    assert edges(graph) == [(0, 1), (1, 0), (2, 3), (3, 2), (0, 0), (0, 0)]
    assert graph.distance.tolist() == [1, 1, 0, 0, 1.5, 1.5]
    assert (graph.num_edges.item(), graph.overflow.item()) == (4, False)
    (grad,) = torch.autograd.grad(
        (graph.distance * torch.tensor([1.0, 0, 0, 0, 50, 50])).sum() + graph.vector[4:].sum(), pos
    )
    assert grad.tolist() == [[-1.0, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]]
    short = moeyard.radius_graph(pos, 1.5, max_edges=3)
    assert edges(short) == [(0, 1), (1, 0), (2, 3)]
    assert (short.num_edges.item(), short.overflow.item(), short.num_neighbors.tolist()) == (4, True, [1, 1, 1, 1])
    assert moeyard.radius_graph(pos, 1.5, max_edges=0).edge_index.shape == (2, 0)


def test_radius_table() -> None:
    x = torch.tensor([[0.0, 0, 0], [1, 0, 0], [5, 0, 0], [0, 0, 0]])
    y = torch.tensor([[0.5, 0, 0], [5, 0, 0], [0, 0, 0]])
    graph = moeyard.radius(x, y, 0.75)
    assert graph.edge_index.tolist() == [[0, 0, 0, 1, 2, 2], [0, 1, 3, 2, 0, 3]]
    assert graph.vector[:, 0].tolist() == [-0.5, 0.5, -0.5, 0, 0, 0]
    assert graph.num_neighbors.tolist() == [3, 1, 2]
    ids = torch.tensor([0, 0, 0, 10**18]), torch.tensor([0, 5, 10**18])
    assert moeyard.radius(x, y, 0.75, *ids).edge_index.tolist() == [[0, 0, 2], [0, 1, 3]]
    assert moeyard.radius(x, y, 9.0, max_num_neighbors=1).edge_index.tolist() == [[0, 1, 2], [0, 2, 0]]
    mixed = moeyard.radius(x, y, 0.75, ptr_x=torch.tensor([0, 3, 4]), batch_y=torch.tensor([0, 0, 1]))
    assert mixed.edge_index.tolist() == [[0, 0, 1, 2], [0, 1, 2, 3]]


def test_knn_table() -> None:
    pos = torch.tensor([[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [10, 0, 0], [10, 0, 0]])
    assert edges(moeyard.knn_graph(pos, 1)) == [(0, 1), (1, 0), (2, 1), (3, 4), (4, 3)]
    assert edges(moeyard.knn_graph(pos, 1, loop=True)) == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 3)]
    few = moeyard.knn_graph(pos, 3, torch.tensor([0, 0, 0, 1, 1]))
    assert few.num_neighbors.tolist() == [2, 2, 2, 1, 1]
    assert moeyard.knn_graph(pos, 10**9).num_edges.item() == 20


def test_periodic_table() -> None:
    """One atom in a unit cube: 6 faces at 1, 12 edges at sqrt 2."""
    atom, cube = torch.tensor([[0.25, 7.5, -3.0]]), torch.eye(3)
    faces = [(0, 0, -1, 0, 0), (0, 0, 0, -1, 0), (0, 0, 0, 0, -1), (0, 0, 0, 0, 1), (0, 0, 0, 1, 0), (0, 0, 1, 0, 0)]
    assert edges(moeyard.radius_graph(atom, 1.1, cell=cube)) == faces
    assert edges(moeyard.radius_graph(atom, 1.1, cell=cube, half=True)) == faces[3:]
    assert edges(moeyard.radius_graph(atom, 1.1, cell=cube, max_num_neighbors=2)) == faces[:2]
    assert edges(moeyard.radius_graph(atom, 1.1, cell=cube, max_num_neighbors=2, symmetric=True)) == [
        *faces[:2], *faces[4:],
    ]  # fmt: skip
    assert edges(moeyard.knn_graph(atom, 6, cell=cube)) == faces
    assert moeyard.radius_graph(atom, 1.0, cell=cube).num_edges.item() == 0
    assert moeyard.radius_graph(atom, 1.5, cell=cube).num_edges.item() == 18
    flat = moeyard.radius_graph(atom, 1.5, cell=cube, pbc=torch.tensor([True, False, True]))
    assert flat.num_edges.item() == 8
    assert flat.cell_shift[:, 1].abs().sum().item() == 0
    lone = moeyard.radius_graph(atom, 1.5, cell=torch.zeros(3, 3), pbc=torch.zeros(3, dtype=torch.bool), loop=True)
    assert edges(lone) == [(0, 0, 0, 0, 0)]


def test_shifts_belong_to_the_coordinates_given() -> None:
    """An atom moved by whole cells keeps its neighbours; only the shifts change."""
    pos, cell = torch.tensor([[0.5, 0, 0], [3.75, 0, 0]]), torch.eye(3) * 4
    near = moeyard.radius_graph(pos, 1.0, cell=cell)
    moved = moeyard.radius_graph(pos + torch.tensor([[0.0, 0, 0], [-8, 12, 0]]), 1.0, cell=cell)
    assert edges(near) == [(0, 1, -1, 0, 0), (1, 0, 1, 0, 0)]
    assert edges(moved) == [(0, 1, 1, -3, 0), (1, 0, -1, 3, 0)]
    assert torch.equal(near.vector, moved.vector)


def test_compiles_with_sizes_from_data() -> None:
    """Points and graph ids picked by two masks: their sizes are equal only at run time, and are checked there."""

    @torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
    def compiled(mask: Tensor) -> Tensor:
        def function(pos: Tensor, batch: Tensor, some: Tensor, others: Tensor) -> Tensor:
            return moeyard.radius_graph(pos[some.nonzero()[:, 0]], 1.0, batch[others.nonzero()[:, 0]]).edge_index

        run = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
        return run(points(20, 2.0, F64, 0), torch.arange(20) // 10, torch.arange(20) % 3 > 0, mask)

    mask = torch.arange(20) % 3 > 0
    want = moeyard.radius_graph(points(20, 2.0, F64, 0)[mask], 1.0, (torch.arange(20) // 10)[mask])
    assert torch.equal(compiled(mask), want.edge_index)
    with pytest.raises(ValueError, match="batch: expected shape"):
        compiled(torch.ones(20, dtype=torch.bool))
