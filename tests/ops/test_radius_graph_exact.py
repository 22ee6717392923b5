"""radius_graph, radius, knn_graph against oracles: scipy, all pairs in plain torch, invariances, scale, real files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from torch import Tensor

import moeyard
from moeyard.ops._radius_graph_reference import (
    _squared_norm,
    _vectors,
    knn_graph_reference,
    radius_graph_reference,
    radius_reference,
)
from ops.levels import assert_same_on_all_levels
from ops.test_radius_graph import F64, points, skew_cell


def assert_same_graph(got: moeyard.RadiusGraph, want: moeyard.RadiusGraph) -> None:
    """Equal to the last bit, but for torch's vectorized square root, which is not correctly rounded."""
    for name, g, w in zip(got._fields, got, want, strict=True):
        if name == "distance":
            torch.testing.assert_close(g, w, rtol=1e-6 if g.dtype == torch.float32 else 1e-15, atol=0)
        else:
            assert torch.equal(g, w), name


@st.composite
def clouds(draw: st.DrawFn, most: int) -> tuple[Tensor, dict[str, Tensor], int]:
    """Points (smooth, on a lattice with ties and coincidences, or with an outlier), their graphs, a seed."""
    seed, n = draw(st.integers(0, 10**6)), draw(st.integers(0, most))
    generator = torch.Generator().manual_seed(seed)
    side = draw(st.sampled_from([0.5, 3.0, 10.0, 60.0]))
    pos = (torch.rand(n, 3, generator=generator, dtype=F64) - draw(st.sampled_from([0.0, 0.5, 3.0]))) * side
    kind = draw(st.sampled_from(["smooth", "lattice", "outlier"]))
    if kind == "lattice":
        pos = (pos * 2).round() / 2
    if kind == "outlier" and n:
        pos[n // 2] *= 1e9
    pos = pos.to(draw(st.sampled_from([torch.float32, F64])))
    graphs = draw(st.integers(1, 4))
    ids = torch.randint(0, graphs, (n,), generator=generator).sort().values
    how = draw(st.sampled_from(["none", "batch", "ptr"]))
    if how == "batch":
        return pos, {"batch": ids * 10**15}, seed
    ptr = torch.searchsorted(ids, torch.arange(graphs + 1))
    return pos, {"ptr": ptr} if how == "ptr" else {}, seed


def boxes(pos: Tensor, seed: int, side: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cell = torch.eye(3, dtype=F64) + 0.25 * torch.randn(3, 3, generator=generator, dtype=F64).clamp(-1, 1)
    return {"cell": (cell * side).to(pos.dtype), "pbc": torch.rand(3, generator=generator) < 0.7}


RADII = st.sampled_from([0.3, 0.5, 1.0, 1.5, 3.0, 7.5])
SELECTIONS = st.sampled_from(
    [{}, {"half": True}, *({"max_num_neighbors": c, "symmetric": s} for c in (1, 3, 10) for s in (False, True))]
)


@settings(max_examples=120)
@given(clouds(most=180), RADII, SELECTIONS, st.booleans(), st.sampled_from([None, 7, 2000]))
def test_radius_graph_is_all_pairs(
    cloud: Any, r: float, selection: dict[str, Any], loop: bool, max_edges: int | None
) -> None:
    pos, graphs, _ = cloud
    options = {**graphs, **selection, "loop": loop, "max_edges": max_edges}
    assert_same_graph(moeyard.radius_graph(pos, r, **options), radius_graph_reference(pos, r, **options))


@settings(max_examples=80)
@given(clouds(most=14), st.sampled_from([0.5, 1.0, 2.0]), SELECTIONS, st.booleans(), st.sampled_from([1.0, 1.5, 4.0]))
def test_periodic_is_all_images(cloud: Any, r: float, selection: dict[str, Any], loop: bool, side: float) -> None:
    pos, graphs, seed = cloud
    pos = pos.clamp(-3 * side, 3 * side)
    options = {**graphs, **selection, **boxes(pos, seed, side), "loop": loop}
    assert_same_graph(moeyard.radius_graph(pos, r, **options), radius_graph_reference(pos, r, **options))


@settings(max_examples=80)
@given(clouds(most=120), clouds(most=150), RADII, st.sampled_from([None, 1, 4]))
def test_radius_is_all_pairs(one: Any, other: Any, r: float, cap: int | None) -> None:
    x, y = one[0], other[0].to(one[0].dtype)
    options = {"max_num_neighbors": cap}
    for suffix, (_, graphs, _) in (("_x", one), ("_y", other)):
        options.update({key + suffix: value for key, value in graphs.items() if key == "batch"})
    assert_same_graph(moeyard.radius(x, y, r, **options), radius_reference(x, y, r, **options))
    x, y = x[:12].clamp(-5, 5), y[:12].clamp(-5, 5)
    box = boxes(x, one[2], 2.0)
    assert_same_graph(moeyard.radius(x, y, min(r, 3.0), **box), radius_reference(x, y, min(r, 3.0), **box))


@settings(max_examples=80)
@given(clouds(most=120), st.integers(1, 20), st.booleans(), st.booleans())
def test_knn_graph_is_all_pairs(cloud: Any, k: int, loop: bool, periodic: bool) -> None:
    pos, graphs, seed = cloud
    options = {**graphs, "loop": loop}
    if periodic:
        pos, options, k = pos[:10].clamp(-4, 4), {"loop": loop, **boxes(pos, seed, 2.0)}, min(k, 9)
        options["pbc"] = options["pbc"] | torch.tensor([True, False, False])
    assert_same_graph(moeyard.knn_graph(pos, k, **options), knn_graph_reference(pos, k, **options))


# ---- invariances ----------------------------------------------------------------------------------------------------


def integer_points(seed: int, n: int, side: int) -> Tensor:
    """Coordinates whose differences and squares are exact, so that rotations by symmetry axes change nothing."""
    return torch.randint(0, side, (n, 3), generator=torch.Generator().manual_seed(seed)).float()


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 400), st.sampled_from([1.0, 2.0, 2.5, 5.0]))
def test_motions_change_nothing(seed: int, n: int, r: float) -> None:
    pos = integer_points(seed, n, 16)
    want = moeyard.radius_graph(pos, r)
    turned = pos[:, [2, 0, 1]] * torch.tensor([1.0, -1, 1])
    for moved in (turned, pos + torch.tensor([1024.0, -77, 3])):
        got = moeyard.radius_graph(moved, r)
        assert torch.equal(got.edge_index, want.edge_index)
        assert torch.equal(got.distance, want.distance)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 400), st.sampled_from([None, 4]))
def test_permutation_and_batch_split(seed: int, n: int, cap: int | None) -> None:
    pos = points(n, 9.0, torch.float32, seed)
    one = moeyard.radius_graph(pos, 1.8, max_num_neighbors=cap)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    other = moeyard.radius_graph(pos[order], 1.8, max_num_neighbors=cap)
    named = order[other.edge_index]
    assert set(zip(*named.tolist(), strict=True)) == set(zip(*one.edge_index.tolist(), strict=True))
    twice = moeyard.radius_graph(torch.cat([pos, pos]), 1.8, torch.arange(2 * n) // n, max_num_neighbors=cap)
    assert torch.equal(twice.edge_index, torch.cat([one.edge_index, one.edge_index + n], 1))
    assert torch.equal(twice.vector, torch.cat([one.vector, one.vector]))


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([torch.float32, F64]), st.booleans())
def test_every_edge_has_its_reverse(seed: int, dtype: torch.dtype, far: bool) -> None:
    """Also where rounding decides: periodic distances are the same number in both directions."""
    pos = (points(40, 4.0, dtype, seed) * 4).round() / 4 + 0.1 + (1000 if far else 0)
    graph = moeyard.radius_graph(pos, 1.0, cell=skew_cell(4.0, dtype))
    rows = torch.cat([graph.edge_index.t(), graph.cell_shift, graph.vector.double()], 1)
    mirrored = torch.cat([graph.edge_index.flip(0).t(), -graph.cell_shift, -graph.vector.double()], 1)
    assert {tuple(r) for r in (rows + 0.0).tolist()} == {tuple(r) for r in (mirrored + 0.0).tolist()}


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from([torch.float32, F64]))
def test_atoms_thousands_of_cells_apart(seed: int, dtype: torch.dtype) -> None:
    """Shifts in the thousands cost digits; distances that hover around r are still decided by the caller's numbers."""
    generator = torch.Generator().manual_seed(seed)
    cell = torch.diag(torch.tensor([4.1, 3.9, 4.0], dtype=F64))
    fraction = torch.randint(0, 4, (24, 3), generator=generator) / 4 + 0.1
    away = torch.randint(-3000, 3000, (24, 3), generator=generator)
    pos, cell = ((fraction.double() + away) @ cell).to(dtype), cell.to(dtype)
    i, j = torch.cartesian_prod(torch.arange(24), torch.arange(24)).t()
    around = torch.cartesian_prod(*[torch.arange(-1, 2)] * 3)
    s = ((away[i] - away[j])[:, None] + around).reshape(-1, 3)
    i, j = i.repeat_interleave(27), j.repeat_interleave(27)
    vector = _vectors(pos, pos, i, j, s, cell.expand(len(i), 3, 3), True)
    r = torch.tensor(1.025, dtype=dtype)
    keep = (_squared_norm(vector) < r * r) & ((i != j) | (s != 0).any(1))
    graph = moeyard.radius_graph(pos, 1.025, cell=cell)
    assert torch.equal(graph.edge_index.flip(0), torch.stack([i[keep], j[keep]]))
    assert torch.equal(graph.cell_shift, s[keep].int())
    assert torch.equal(graph.vector, vector[keep])


# ---- scale and shape of the data ------------------------------------------------------------------------------------


def scipy_pairs(pos: Tensor, r: float) -> Tensor:
    """Both directions, sorted, of pairs closer than r in float64, and nothing within 1e-4 of the boundary."""
    pairs = torch.from_numpy(cKDTree(pos.double().numpy()).query_pairs(r, output_type="ndarray").astype(np.int64))
    both = torch.cat([pairs, pairs.flip(1)])
    return both[torch.argsort(both[:, 0] * len(pos) + both[:, 1])].t()


@pytest.mark.parametrize("shape", ["uniform", "shuffled clusters", "outliers", "line"])
def test_two_hundred_thousand_points(shape: str) -> None:
    n = 200_000
    pos = points(n, 165.0, F64, 1)
    if shape == "shuffled clusters":
        pos = (pos[:400].repeat_interleave(n // 400, 0) * 50 + points(n, 22.0, F64, 2))[torch.randperm(n)]
    if shape == "outliers":
        pos[::50_000] *= 1e30
    if shape == "line":
        pos[:, 1:] = 0
        pos[:, 0] *= 500
    graph = moeyard.radius_graph(pos, 5.0, geometry=False)
    assert torch.equal(graph.edge_index, scipy_pairs(pos, 5.0).flip(0))
    nearest = moeyard.knn_graph(pos, 8)
    some = torch.arange(0, n, 977)
    distance, _ = cKDTree(pos.numpy()).query(pos[some].numpy(), 9)
    got = nearest.distance.view(n, 8)[some].sort(1).values
    torch.testing.assert_close(got, torch.from_numpy(distance[:, 1:]), rtol=1e-12, atol=1e-12)


def test_outlier_at_1e30() -> None:
    pos = torch.cat([points(5_000, 20.0, torch.float32, 0), torch.tensor([[1e18, 0, 0], [-1e30, 1e30, 3e38]])])
    graph = moeyard.radius_graph(pos, 2.0)
    assert graph.num_neighbors[-2:].tolist() == [0, 0]
    assert torch.equal(graph.edge_index, moeyard.radius_graph(pos[:5_000], 2.0).edge_index)


def test_crowds_under_a_cap() -> None:
    """Neighbourhoods of tens of thousands of points take no quadratic time when few are kept."""
    coincident = moeyard.radius_graph(torch.zeros(100_000, 3), 1.0, max_num_neighbors=2)
    assert coincident.edge_index[0, :6].tolist() == [1, 2, 0, 2, 0, 1]
    assert coincident.truncated.item() == 100_000
    pos = points(3_000, 1.0, torch.float32, 0)
    crowded = moeyard.radius_graph(pos, 0.8, max_num_neighbors=3)
    assert_same_graph(crowded._replace(truncated=torch.tensor(0)), moeyard.knn_graph(pos, 3))
    assert crowded.truncated.item() == 3_000


def test_large_periodic() -> None:
    """Against scipy's periodic tree."""
    n, side = 30_000, 88.0
    pos = points(n, side, F64, 3)
    graph = moeyard.radius_graph(pos, 5.0, cell=torch.eye(3, dtype=F64) * side)
    pairs = cKDTree(pos.numpy(), boxsize=side).query_pairs(5.0, output_type="ndarray")
    assert graph.num_edges.item() == 2 * len(pairs)
    delta = torch.from_numpy(pos.numpy()[pairs[:, 1]] - pos.numpy()[pairs[:, 0]])
    distance = (delta - side * (delta / side).round()).norm(dim=1).sort().values
    torch.testing.assert_close(graph.distance.sort().values[::2], distance, rtol=1e-12, atol=1e-12)
    nearest = moeyard.knn_graph(pos, 6, cell=torch.eye(3, dtype=F64) * side)
    want, _ = cKDTree(pos.numpy(), boxsize=side).query(pos.numpy(), 7)
    got = nearest.distance.view(n, 6).sort(1).values
    torch.testing.assert_close(got, torch.from_numpy(want[:, 1:]), rtol=1e-12, atol=1e-12)


def test_strictness_at_the_boundary() -> None:
    """d == r is no edge in either dtype, whatever structure proposes the pair."""
    for dtype in (torch.float32, F64):
        grid = torch.cartesian_prod(*[torch.arange(0.0, 10.0, dtype=dtype)] * 3)
        assert moeyard.radius_graph(grid, 1.0).num_edges.item() == 0
        assert moeyard.radius_graph(grid, float(np.nextafter(np.float32(1), 2))).num_edges.item() == 5400
        torus = moeyard.radius_graph(grid, 1.0, cell=torch.eye(3, dtype=dtype) * 10)
        assert torus.num_edges.item() == 0
        assert moeyard.radius_graph(grid, 1.0001, cell=torch.eye(3, dtype=dtype) * 10).num_edges.item() == 6000


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_pairs_nearly_as_far_as_the_radius(axis: int) -> None:
    """Every neighbour is about one cell away: a grid with cells below r would lose those that meet a cell's corner."""
    pos = torch.zeros(6_000, 3)
    pos[:, axis] = torch.arange(6_000.0)
    for r in (1.0005, float(np.nextafter(np.float32(1), 2))):
        assert moeyard.radius_graph(pos, r).num_neighbors[1:-1].unique().tolist() == [2]
        cell = torch.eye(3) * 6_000
        assert moeyard.radius_graph(pos, r, cell=cell).num_neighbors.unique().tolist() == [2]


def test_tiny_lengths() -> None:
    """Where squares underflow, the edge test still decides, not the grid."""
    pos = points(300, 1.0, torch.float32, 0) * 3e-22
    graph = moeyard.radius_graph(pos, 2.9e-23)
    assert_same_graph(graph, radius_graph_reference(pos, 2.9e-23))
    assert graph.num_edges.item() > 100


def test_knn_of_a_lone_atom_in_a_large_cell() -> None:
    """Its neighbours are images of a cluster, further away than the mean density suggests."""
    pos = torch.cat([points(60, 0.1, F64, 0), torch.full((1, 3), 6.0, dtype=F64)])
    graph = moeyard.knn_graph(pos, 4, cell=torch.eye(3, dtype=F64) * 10)
    want, _ = cKDTree(pos.numpy(), boxsize=10.0).query(pos.numpy(), 5)
    torch.testing.assert_close(graph.distance.view(61, 4).sort(1).values, torch.from_numpy(want[:, 1:]))


def test_knn_in_a_cell_whose_volume_underflows() -> None:
    graph = moeyard.knn_graph(torch.zeros(1, 3, dtype=F64), 20, cell=torch.eye(3, dtype=F64) * 1e-120)
    assert graph.num_edges.item() == 20
    assert graph.cell_shift.abs().max() == 1


def clusters(dtype: torch.dtype, most: int = 80) -> tuple[Tensor, Tensor]:
    """Shuffled points in far-apart clusters of 1, 2, ..., `most`, and the cluster of each: lists of every length."""
    which = torch.repeat_interleave(torch.arange(most), torch.arange(1, most + 1))
    which = which[torch.randperm(len(which), generator=torch.Generator().manual_seed(7))]
    corners = torch.stack([which % 5, which // 5 % 5, which // 25], 1) * 3.0
    return (corners + points(len(which), 0.5, F64, 8)).to(dtype), which


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("loop", [False, True])
def test_lists_of_every_length_are_in_order(dtype: torch.dtype, loop: bool) -> None:
    pos, which = clusters(dtype)
    together = which[:, None] == which
    if not loop:
        together.fill_diagonal_(False)
    i, j = together.nonzero().t()
    assert torch.equal(moeyard.radius_graph(pos, 1.0, loop=loop).edge_index, torch.stack([j, i]))
    half = moeyard.radius_graph(pos, 1.0, loop=loop, half=True)
    keep = j >= i if loop else j > i
    assert torch.equal(half.edge_index, torch.stack([j, i])[:, keep])
    k, c = together[::7].nonzero().t()
    if loop:
        assert torch.equal(moeyard.radius(pos, pos[::7], 1.0).edge_index, torch.stack([k, c]))


def test_crowded_cell_is_in_order() -> None:
    pos = points(1_200, 0.5, torch.float32, 3)
    graph = moeyard.radius_graph(torch.cat([pos, pos + 9]), 2.0)
    others = torch.ones(1_200, 1_200).fill_diagonal_(0).nonzero().t()
    assert torch.equal(graph.edge_index.flip(0), torch.cat([others, others + 1_200], 1))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("periodic", [False, True])
def test_geometry_and_cuts_at_any_edge(dtype: torch.dtype, periodic: bool) -> None:
    """Vectors are plain differences to the bit, and a capacity may end anywhere in a row or a thread's piece."""
    n, side = 5_000, 48.0
    pos = points(n, side, dtype, 11)
    cell = torch.eye(3, dtype=dtype) * side if periodic else None
    whole = moeyard.radius_graph(pos, 5.0, cell=cell)
    m = whole.edge_index.shape[1]
    if not periodic:
        j, i = whole.edge_index
        assert torch.equal(whole.vector, pos[j] - pos[i])
        assert np.array_equal(whole.distance.numpy(), np.sqrt(_squared_norm(whole.vector).numpy()))
    row_ends = whole.num_neighbors.cumsum(0)
    for capacity in [0, 1, int(row_ends[2047]), int(row_ends[2047]) - 3, *range(m // 2, m // 2 + 9), m - 1, m, m + 13]:
        cut = moeyard.radius_graph(pos, 5.0, cell=cell, max_edges=capacity)
        kept = min(capacity, m)
        assert cut.num_edges.item() == m
        assert torch.equal(cut.edge_index[:, :kept], whole.edge_index[:, :kept])
        assert torch.equal(cut.distance[:kept], whole.distance[:kept])
        assert torch.equal(cut.vector[:kept], whole.vector[:kept])
        assert torch.equal(cut.cell_shift[:kept], whole.cell_shift[:kept])
        assert torch.equal(cut.num_neighbors, whole.num_neighbors)
        assert cut.edge_index[:, kept:].eq(0).all()
        assert cut.distance[kept:].eq(5).all()
        assert cut.vector[kept:].eq(0).all()


PROBE = """
import hashlib, torch, moeyard
digest = hashlib.sha256()
for dtype in (torch.float32, torch.float64):
    pos = torch.rand(4000, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype) * 15
    pos[:2000] = pos[:2000].round()
    cell = torch.eye(3, dtype=dtype) * 15
    for graph in (moeyard.radius_graph(pos, 2.0), moeyard.radius_graph(pos, 1.5, cell=cell, max_num_neighbors=9),
                  moeyard.radius_graph(pos, 1.5, ptr=torch.arange(0, 4001, 20)), moeyard.radius(pos, pos[::7], 2.0),
                  moeyard.radius_graph(pos, 2.9, half=True), moeyard.radius_graph(pos[::9], 6.0),
                  moeyard.radius_graph(pos, 1.0, max_edges=5003), moeyard.radius_graph(pos * 1e3, 300.0)):
        for field in graph:
            digest.update(field.numpy().tobytes())
print(digest.hexdigest())
"""


def test_simd_levels_agree() -> None:
    assert_same_on_all_levels(PROBE)


def pdb_atoms(path: Path) -> Tensor:
    lines = [line for line in path.read_text().splitlines() if line.startswith(("ATOM", "HETATM"))]
    return torch.tensor([[float(line[at : at + 8]) for at in (30, 38, 46)] for line in lines], dtype=F64)


def test_real_structures(data_dir: Path) -> None:
    files = sorted(data_dir.rglob("*.pdb"))[:6]
    if not files:
        pytest.skip("no .pdb files among the real data")
    proteins = [pdb_atoms(path) for path in files]
    ptr = torch.tensor([0, *(len(p) for p in proteins)]).cumsum(0)
    graph = moeyard.radius_graph(torch.cat(proteins), 5.0, ptr=ptr)
    edges = torch.cat([scipy_pairs(p, 5.0 - 1e-9) + start for p, start in zip(proteins, ptr.tolist(), strict=False)], 1)
    assert torch.equal(graph.edge_index, edges.flip(0))
    assert graph.num_edges.item() > 10 * len(ptr)
