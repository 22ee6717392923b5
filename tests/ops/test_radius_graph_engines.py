"""radius_graph, radius and knn_graph on CUDA against the CPU: equal edges in equal order, and equal bits."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moeyard
from engines import engine, examples, large, place
from ops.compare import assert_equal
from ops.test_radius_graph import points, skew_cell
from ops.test_radius_graph_exact import RADII, SELECTIONS, boxes, clouds

NAMES = pytest.mark.parametrize("name", ["emulated", "cuda"])
NAN, INF = float("nan"), float("inf")


def outcome(function: Any, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """The graph, and the gradients of its lengths and vectors."""
    arguments = dict(arguments)
    leaves = []
    for key in ("pos", "x", "y", "cell"):
        if key in arguments:
            arguments[key] = arguments[key].detach().requires_grad_()
            leaves.append(arguments[key])
    graph = function(**arguments)
    found = tuple(t.detach().cpu() for t in graph)
    if graph.distance.requires_grad and graph.distance.numel():
        weights = torch.linspace(0.5, 1.5, graph.distance.numel(), dtype=graph.distance.dtype).to(graph.distance.device)
        total = (graph.distance * weights).sum() + (graph.vector * weights[:, None]).sum()
        found += tuple(g.cpu() for g in torch.autograd.grad(total, leaves))
    return found


def assert_agree(name: str, seed: int, function: Any, arguments: dict[str, Any]) -> None:
    want = outcome(function, arguments)
    with engine.run(name, seed):
        got = outcome(function, place(arguments))
        moeyard.check_device_errors()
    exact = len(want) - ("cell" in arguments and len(want) > len(moeyard.RadiusGraph._fields))
    assert_equal(got[:exact], want[:exact])
    # A cell's gradient is a sum over all edges, in another order.
    for g, w in zip(got[exact:], want[exact:], strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5 if w.dtype == torch.float32 else 1e-12, atol=1e-4 * w.abs().max())


CAPACITIES = st.sampled_from([None, None, 0, 7, 2000])


@NAMES
@settings(max_examples=examples(60))
@given(clouds(most=180), RADII, SELECTIONS, st.booleans(), CAPACITIES, st.integers(0, 21))
def test_radius_graph_agrees(
    name: str, cloud: Any, r: float, selection: dict[str, Any], loop: bool, max_edges: int | None, seed: int
) -> None:
    pos, graphs, _ = cloud
    arguments = {"pos": pos, "r": r, **graphs, **selection, "loop": loop, "max_edges": max_edges}
    assert_agree(name, seed, moeyard.radius_graph, arguments)


@NAMES
@settings(max_examples=examples(40))
@given(clouds(most=30), RADII, SELECTIONS, st.booleans(), st.sampled_from([1.0, 1.5, 4.0]), st.integers(0, 21))
def test_periodic_agrees(
    name: str, cloud: Any, r: float, selection: dict[str, Any], loop: bool, side: float, seed: int
) -> None:
    pos, graphs, box_seed = cloud
    pos = pos.clamp(-3 * side, 3 * side)
    arguments = {"pos": pos, "r": min(r, 2 * side), **graphs, **selection, **boxes(pos, box_seed, side), "loop": loop}
    assert_agree(name, seed, moeyard.radius_graph, arguments)


@NAMES
@settings(max_examples=examples(40))
@given(clouds(most=120), clouds(most=150), RADII, st.sampled_from([None, 1, 4]), st.booleans(), st.integers(0, 21))
def test_radius_agrees(name: str, one: Any, other: Any, r: float, cap: int | None, periodic: bool, seed: int) -> None:
    x, y = one[0], other[0].to(one[0].dtype)
    arguments: dict[str, Any] = {"max_num_neighbors": cap}
    for suffix, (_, graphs, _) in (("_x", one), ("_y", other)):
        arguments.update({key + suffix: value for key, value in graphs.items() if key == "batch"})
    if periodic:
        x, y, arguments = x[:12].clamp(-5, 5), y[:12].clamp(-5, 5), {"max_num_neighbors": cap}
        arguments.update(boxes(x, one[2], 2.0))
    assert_agree(name, seed, moeyard.radius, {"x": x, "y": y, "r": min(r, 3.0) if periodic else r, **arguments})


@NAMES
@settings(max_examples=examples(40))
@given(clouds(most=150), st.integers(1, 40), st.booleans(), st.booleans(), st.integers(0, 21))
def test_knn_graph_agrees(name: str, cloud: Any, k: int, loop: bool, periodic: bool, seed: int) -> None:
    pos, graphs, box_seed = cloud
    arguments = {**graphs, "loop": loop}
    if periodic:
        pos, arguments, k = pos[:10].clamp(-4, 4), {"loop": loop, **boxes(pos, box_seed, 2.0)}, min(k, 9)
    assert_agree(name, seed, moeyard.knn_graph, {"pos": pos, "k": k, **arguments})


@NAMES
@pytest.mark.parametrize("dtype", [torch.float32, *large(torch.float64)])
@pytest.mark.parametrize("options", [{}, {"max_num_neighbors": 9}, {"max_num_neighbors": 9, "symmetric": True}])
def test_several_levels_of_boxes_agree(name: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Two levels of boxes above the points, in graphs that meet inside of boxes."""
    pos = points(1500, 11.0, dtype, 3)
    arguments = {"pos": pos, "r": 1.3, "ptr": torch.tensor([0, 40, 41, 41, 1400, 1500]), **options}
    assert_agree(name, 2, moeyard.radius_graph, arguments)
    cell = skew_cell(11.0, dtype)
    assert_agree(name, 4, moeyard.radius_graph, {"pos": pos[:300] * 1.5, "r": 2.0, "cell": cell, **options})


@NAMES
@pytest.mark.parametrize("dtype", [torch.float32, *large(torch.float64)])
def test_nearest_across_several_levels_of_boxes_agree(name: str, dtype: torch.dtype) -> None:
    assert_agree(name, 3, moeyard.knn_graph, {"pos": points(1500, 11.0, dtype, 3), "k": 12})


@NAMES
def test_ties_between_boxes_agree(name: str) -> None:
    """Of points that are equally far the first are taken, in whichever box they are."""
    order = torch.randperm(343, generator=torch.Generator().manual_seed(3))
    pos = torch.cartesian_prod(*[torch.arange(7.0)] * 3)[order]
    assert_agree(name, 4, moeyard.knn_graph, {"pos": pos, "k": 3})
    assert_agree(name, 4, moeyard.radius_graph, {"pos": pos, "r": 1.5, "max_num_neighbors": 3, "symmetric": True})


@NAMES
@pytest.mark.parametrize("k", [300, *large(700)])
def test_lists_in_shared_and_in_global_memory_agree(name: str, k: int) -> None:
    pos = points(k + 30, 4.0, torch.float32, 1)
    graphs = {"ptr": torch.tensor([0, k + 20, k + 30])}
    assert_agree(name, k, moeyard.knn_graph, {"pos": pos, "k": k, **graphs})
    if k > 600:
        for symmetric in (False, True):
            options = {"max_num_neighbors": k, "symmetric": symmetric}
            assert_agree(name, k, moeyard.radius_graph, {"pos": pos, "r": 3.9, **graphs, **options})


@NAMES
@pytest.mark.parametrize("cap", [39, 40, 41, 10**9, 2**63 - 1])
@pytest.mark.parametrize("symmetric", [False, True])
def test_caps_that_nothing_exceeds_agree(name: str, cap: int, symmetric: bool) -> None:
    options = {"r": 3.0, "max_num_neighbors": cap, "symmetric": symmetric}
    assert_agree(name, 1, moeyard.radius_graph, {"pos": points(40, 1.0, torch.float32, 2), "loop": True, **options})
    if cap > 2**27:
        pos, cell = points(6, 2.0, torch.float32, 2), 2 * torch.eye(3)
        assert_agree(name, 1, moeyard.radius_graph, {"pos": pos, "cell": cell, **options})


@NAMES
def test_the_centre_on_which_the_capacity_ends(name: str) -> None:
    """Many more hits than room: what is kept are its first edges."""
    pos = points(400, 1.0, torch.float32, 5)
    for max_edges in (1, 31, 32, 33, 150, 399, 400, 5000):
        assert_agree(name, max_edges, moeyard.radius_graph, {"pos": pos, "r": 9.0, "max_edges": max_edges})
    for max_edges, cap in itertools.product((1, 19, 20, 21, 39, 40, 777), (None, 20)):
        arguments = {"pos": pos[:40], "r": 9.0, "max_num_neighbors": cap, "max_edges": max_edges}
        assert_agree(name, max_edges, moeyard.radius_graph, arguments)


@NAMES
@pytest.mark.parametrize("options", [{}, {"half": True}, {"loop": True}, {"loop": True, "max_edges": 3000}])
def test_rows_of_every_length_agree(name: str, options: dict[str, Any]) -> None:
    """Neighbours of a centre are sorted 32 or 64 at a time, and from 49 on otherwise."""
    sizes = [1, 2, 3, 31, 32, 33, 34, 47, 48, 49, 50, 51, 64, 65, 66, 97]
    ptr = torch.tensor([0, *sizes]).cumsum(0)
    shuffled = points(sum(sizes), 0.5, torch.float32, 7)
    assert_agree(name, 6, moeyard.radius_graph, {"pos": shuffled, "r": 1.0, "ptr": ptr, **options})


@NAMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cells_anywhere_agree(name: str, dtype: torch.dtype) -> None:
    """Graphs in one place, points far out, radii from tiny to huge: what shares a bucket is told apart."""
    graphs = {"batch": torch.arange(300) // 2}
    assert_agree(name, 2, moeyard.radius_graph, {"pos": points(2, 1.0, dtype, 1).repeat(150, 1), "r": 2.0, **graphs})
    line = torch.arange(-150, 150, dtype=dtype)[:, None] * torch.tensor([1.0, 0.5, -2.0], dtype=dtype)
    for scale, seed in ((1.0, 3), (1e-20, 4), (1e-22, 5), (2.0**30, 6), (1e17, 7)):
        assert_agree(name, seed, moeyard.radius_graph, {"pos": line * scale, "r": 5.0 * scale})
        assert_agree(name, seed, moeyard.radius, {"x": line * scale, "y": line[::7] * scale, "r": 5.0 * scale})
    # Neighbours that are a whole radius away, but for a millionth: cells must not be narrower.
    chain = torch.arange(300, dtype=dtype)[:, None] * (0.7 * (1 - 1e-6))
    for axis in torch.eye(3, dtype=dtype):
        assert_agree(name, 9, moeyard.radius_graph, {"pos": chain * axis, "r": 0.7})
    # As near as double numbers tell apart, among points that are far from each other in such cells.
    pairs = points(150, 1.0, dtype, 10).repeat(2, 1)
    pairs[150:] += torch.finfo(dtype).eps * points(150, 4.0, dtype, 11)
    for r in (2.0**-30, 2.0**-40, 2.0**-51, 2.0**-60):
        assert_agree(name, 12, moeyard.radius_graph, {"pos": pairs, "r": r})
    far = torch.cat([line * 1e-3, line * 1e-3 + 1e4, line * 1e15])
    assert_agree(name, 8, moeyard.radius_graph, {"pos": far, "r": 0.005})


# ---- bad values -----------------------------------------------------------------------------------------------------

POS = points(8, 1.0, torch.float32, 0)


def spoiled(row: int, value: float) -> Tensor:
    pos = POS.clone()
    pos[row, 1] = value
    return pos


CUBES = torch.eye(3).expand(2, 3, 3).contiguous()
HALVES = torch.arange(8) // 4


@pytest.mark.usefixtures("engine")
@pytest.mark.engines("emulated", "cuda")
@pytest.mark.parametrize(
    ("arguments", "lost", "message"),
    [
        ({"pos": spoiled(3, NAN)}, [3], "pos: expected finite"),
        ({"pos": spoiled(0, INF)}, [0], "pos: expected finite"),
        ({"pos": spoiled(7, -INF), "max_num_neighbors": 7}, [7], "pos: expected finite"),
        ({"cell": torch.full((3, 3), NAN)}, range(8), "cell: expected finite"),
        ({"cell": torch.zeros(3, 3)}, range(8), "cell: expected finite, linearly independent"),
        ({"cell": CUBES[:1], "batch": HALVES}, range(4, 8), "cell: .* for every graph"),
        ({"cell": CUBES * torch.tensor([1.0, 0.0])[:, None, None], "batch": HALVES}, range(4, 8), "cell: expected"),
        ({"pos": spoiled(2, 1e12), "cell": CUBES[0]}, [2], "pos: expected coordinates within"),
        ({"cell": CUBES[0] * 1e-4}, range(8), r"cell: expected at most 2\^27"),
    ],
)
def test_bad_points_have_no_edges(arguments: dict[str, Any], lost: Any, message: str) -> None:
    arguments = place(arguments)
    pos = arguments.pop("pos", place(POS))
    graph = moeyard.radius_graph(pos, 2.0, **arguments)
    with pytest.raises(ValueError, match=message):
        moeyard.check_device_errors()
    involved = set(graph.edge_index.flatten().tolist())
    assert involved == set(range(8)) - set(lost)


@pytest.mark.usefixtures("engine")
@pytest.mark.engines("emulated", "cuda")
@pytest.mark.parametrize(
    ("graphs", "message"),
    [
        ({"batch": torch.tensor([0, 0, 1, 0, 2, 2, 2, 2])}, "batch: expected sorted"),
        ({"batch": torch.tensor([-1, 0, 0, 0, 0, 0, 0, 0])}, "batch: expected sorted"),
        ({"ptr": torch.tensor([0, 7])}, "ptr: expected values"),
        ({"ptr": torch.tensor([1, 8])}, "ptr: expected values"),
        ({"ptr": torch.tensor([0, 2**62, -5, 8])}, "ptr: expected values"),
        ({"ptr": torch.tensor([0])}, "ptr: expected values"),
    ],
)
def test_bad_graphs_stay_in_bounds(graphs: dict[str, Tensor], message: str) -> None:
    for function, much in ((moeyard.radius_graph, 5.0), (moeyard.knn_graph, 3)):
        graph = function(place(POS), much, **place(graphs))
        assert ((graph.edge_index >= 0) & (graph.edge_index < 8)).all()
        with pytest.raises(ValueError, match=message):
            moeyard.check_device_errors()


@pytest.mark.usefixtures("engine")
@pytest.mark.engines("emulated", "cuda")
def test_distances_that_overflow() -> None:
    graph = moeyard.knn_graph(torch.tensor([[0.0, 0, 0], [3e38, 0, 0], [-3e38, 0, 0], [1, 0, 0]]), 2)
    assert graph.num_neighbors.tolist() == [2, 2, 2, 2]
    with pytest.raises(ValueError, match="pos: expected points whose squared distances are finite"):
        moeyard.check_device_errors()


@pytest.mark.usefixtures("engine")
@pytest.mark.engines("emulated", "cuda")
def test_gradients_of_edges_that_are_no_graph() -> None:
    backward = torch.ops.moeyard.radius_graph_backward
    ones, vectors, none = torch.ones(3), torch.ones(3, 3), torch.empty(0, 3, dtype=torch.int32)
    for index in ([[0, 1, 5], [0, 0, 1]], [[0, 1, 1], [1, 0, 1]], [[-1, 1, 1], [0, 0, 1]]):
        edge_index, count = torch.tensor(index), torch.tensor(3)
        backward(ones, vectors, edge_index, ones, vectors, none, count, None, None, 2, None, None, False)
        with pytest.raises(ValueError, match="edge_index: expected edges sorted by centre"):
            moeyard.check_device_errors()
