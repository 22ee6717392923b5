"""The torch_cluster drop-ins against the definition of its functions, loop by loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moeyard.integrations.torch_cluster import radius, radius_graph


def points(n: int, dims: int, seed: int) -> Tensor:
    return torch.rand(n, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def definition(
    x: Tensor, y: Tensor, r: float, batch_x: Tensor, batch_y: Tensor, limit: int, ignore_same: bool
) -> list[tuple[int, int]]:
    """For each row of y the first `limit` rows of x, by index, of the same graph and closer than r."""
    edges = []
    for i in range(y.shape[0]):
        found = 0
        for j in range(x.shape[0]):
            near = float(((x[j] - y[i]) ** 2).sum()) < r * r
            if near and batch_x[j] == batch_y[i] and found < limit and not (ignore_same and i == j):
                edges.append((i, j))
                found += 1
    return edges


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("limit", [0, 3, 32])
@pytest.mark.parametrize("ignore_same", [False, True])
def test_radius(dims: int, limit: int, ignore_same: bool) -> None:
    x, y = points(60, dims, 0), points(40, dims, 1)
    batch_x, batch_y = torch.arange(60) // 25, torch.arange(40) // 15
    got = radius(x, y, 0.4, batch_x, batch_y, limit, ignore_same_index=ignore_same)
    assert got.t().tolist() == [list(e) for e in definition(x, y, 0.4, batch_x, batch_y, limit, ignore_same)]


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("flow", ["source_to_target", "target_to_source"])
@pytest.mark.parametrize("limit", [4, 32])
def test_radius_graph(loop: bool, flow: str, limit: int) -> None:
    x, batch = points(70, 3, 2), torch.arange(70) // 30
    got = radius_graph(x, 0.35, batch, loop, limit, flow)
    centre, neighbour = (got[1], got[0]) if flow == "source_to_target" else (got[0], got[1])
    want = definition(x, x, 0.35, batch, batch, limit, not loop)
    assert list(zip(centre.tolist(), neighbour.tolist(), strict=True)) == want


def test_defaults_and_one_dimension() -> None:
    x = torch.arange(100.0)
    edges = radius_graph(x, 50.5)
    assert torch.equal(edges, radius_graph(x[:, None], 50.5, None, False, 32, "source_to_target", 1, None))
    assert edges.dtype == torch.int64
    assert int(torch.bincount(edges[1]).max()) == 32
    assert edges[0, edges[1] == 99].tolist() == list(range(49, 81))


def test_nothing() -> None:
    assert radius_graph(torch.empty(0, 3), 1.0).shape == (2, 0)
    assert radius(torch.rand(3, 2), torch.empty(0, 2), 1.0).shape == (2, 0)


def test_too_many_dimensions() -> None:
    with pytest.raises(ValueError, match=r"x: expected shape \[N, D\] with D from 1 to 3, got \[5, 4\]"):
        radius_graph(torch.rand(5, 4), 1.0)


def test_different_dimensions() -> None:
    with pytest.raises(ValueError, match="y: expected 2 dimensions like x, got 3"):
        radius(torch.rand(5, 2), torch.rand(5, 3), 1.0)
    with pytest.raises(ValueError, match="y: expected 1 dimensions like x, got 3"):
        radius(torch.rand(5), torch.rand(5, 3), 1.0)
