"""PyG's radius functions and batches, with ours in their place."""

from __future__ import annotations

import sys
import types
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

pyg = pytest.importorskip("torch_geometric")

import torch_geometric.nn as gnn  # noqa: E402
from torch_geometric.data import Batch, Data, InMemoryDataset  # noqa: E402
from torch_geometric.loader import DataLoader  # noqa: E402
from torch_geometric.transforms import RadiusGraph  # noqa: E402

from moeyard.integrations import torch_cluster  # noqa: E402
from moeyard.integrations.pyg import SegmentDataset, SegmentLoader, patch  # noqa: E402

# ---- radius and radius_graph -----------------------------------------------------------------------------------------


def cloud(n: int = 40) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 3, generator=torch.Generator().manual_seed(0)), torch.arange(n) // 15


def definition(pos: Tensor, r: float, batch: Tensor) -> set[tuple[int, int]]:
    near = ((pos[:, None] - pos[None]).square().sum(2) < r * r) & (batch[:, None] == batch[None])
    return {(j, i) for i, j in near.fill_diagonal_(False).nonzero().tolist()}


def test_radius_graph_of_torch_geometric_works() -> None:
    pos, batch = cloud()
    with patch():
        edges = gnn.radius_graph(pos, r=0.4, batch=batch, loop=False, max_num_neighbors=40)
        pairs = gnn.radius(pos, pos[:5], 0.4, batch, batch[:5], max_num_neighbors=None)
        data = RadiusGraph(0.4)(Data(pos=pos[:15]))
    assert set(map(tuple, edges.t().tolist())) == definition(pos, 0.4, batch)
    assert torch.equal(edges, torch_cluster.radius_graph(pos, 0.4, batch, max_num_neighbors=40))
    assert torch.equal(pairs, torch_cluster.radius(pos, pos[:5], 0.4, batch, batch[:5], 40))
    assert torch.equal(data.edge_index, torch_cluster.radius_graph(pos[:15], 0.4))


def test_no_limit_on_neighbours() -> None:
    pos = torch.zeros(50, 3)
    with patch():
        assert gnn.radius_graph(pos, 1.0).shape[1] == 50 * 32
        assert gnn.radius_graph(pos, 1.0, None, False, None).shape[1] == 50 * 49


def test_models_that_hold_the_name_and_the_way_back() -> None:
    """SchNet imported radius_graph by name, long before the patch; so did this module."""
    user = types.ModuleType("somebodys_module")
    user.neighbours, user.ours = gnn.radius_graph, torch_cluster.radius_graph
    sys.modules["somebodys_module"] = user
    theirs = gnn.radius_graph
    pos, batch = cloud()
    model = gnn.SchNet(hidden_channels=8, num_filters=8, num_interactions=1, cutoff=0.5)
    numbers = torch.ones(40, dtype=torch.int64)
    try:
        undo = patch()
        energy = model(numbers, pos, batch)
        assert user.neighbours is gnn.radius_graph is not theirs
        undo.close()
        assert user.neighbours is gnn.radius_graph is gnn.models.schnet.radius_graph is theirs
        assert user.ours is torch_cluster.radius_graph
    finally:
        del sys.modules["somebodys_module"]
    edges = torch.tensor(sorted(definition(pos, 0.5, batch))).t()

    class Given(torch.nn.Module):
        def forward(self, pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
            return edges, (pos[edges[0]] - pos[edges[1]]).norm(dim=-1)

    model.interaction_graph = Given()
    torch.testing.assert_close(energy, model(numbers, pos, batch))


# ---- batches ---------------------------------------------------------------------------------------------------------


def graphs(count: int = 9, **more: Any) -> list[Data]:
    rng = torch.Generator().manual_seed(1)
    found = []
    for i in range(count):
        # Graph 3 has no edges, graph 5 no nodes.
        n, m = (0, 0) if i == 5 else (i + 2, 0 if i == 3 else 3 * i + 1)
        data = Data(
            x=torch.rand(n, 4, generator=rng),
            pos=torch.rand(n, 3, generator=rng, dtype=torch.float64),
            edge_index=torch.randint(max(n, 1), (2, m), generator=rng),
            edge_attr=torch.rand(m, 2, generator=rng),
            y=torch.tensor([float(i)]),
            node_index=torch.arange(n),
            scalar=torch.tensor(i),
            number=0.5 * i,
            name=f"graph {i}",
            mask=torch.rand(n, generator=rng) < 0.5,
        )
        for key, value in more.items():
            data[key] = value
        found.append(data)
    return found


class Stored(InMemoryDataset):
    def __init__(self, data_list: list[Data], transform: Any = None) -> None:
        super().__init__(None, transform)
        self.data, self.slices = self.collate(data_list)


def assert_same(got: Any, want: Any) -> None:
    assert type(got) is type(want)
    assert set(got.keys()) == set(want.keys())
    for key in want.keys():  # noqa: SIM118
        if isinstance(want[key], Tensor):
            assert got[key].dtype == want[key].dtype, key
            assert torch.equal(got[key], want[key]), key
        else:
            assert got[key] == want[key], key
    if isinstance(want, Batch):
        assert got.num_graphs == want.num_graphs
        for ours, theirs in zip(got.to_data_list(), want.to_data_list(), strict=True):
            assert_same(ours, theirs)


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4, 5, 6, 7, 8], [8, 2, 2, 5], [3], [5]], ids=str)
@pytest.mark.parametrize("stored", [False, True])
def test_batch_is_that_of_from_data_list(ids: list[int], stored: bool) -> None:
    data_list = graphs()
    dataset = SegmentDataset(Stored(data_list) if stored else data_list)
    assert_same(dataset[ids], Batch.from_data_list([data_list[i] for i in ids]))


def test_by_hand() -> None:
    """Two triangles' worth of offsets: graph 1 comes first and shifts graph 0 by its three nodes."""
    edge = torch.tensor([[0, 1], [1, 0]])
    pair = [Data(x=torch.zeros(2, 1), edge_index=edge), Data(x=torch.ones(3, 1), edge_index=edge[:, :1])]
    batch = SegmentDataset(pair)[[1, 0]]
    assert batch.edge_index.tolist() == [[0, 3, 4], [1, 4, 3]]
    assert batch.batch.tolist() == [0, 0, 0, 1, 1]
    assert batch.ptr.tolist() == [0, 3, 5]
    assert batch.x.flatten().tolist() == [1, 1, 1, 0, 0]


def test_number_of_nodes_given_alone() -> None:
    data_list = [Data(edge_index=torch.tensor([[0], [1]]), num_nodes=n) for n in (2, 5, 3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(SegmentDataset(data_list)[[2, 1]], Batch.from_data_list([data_list[2], data_list[1]]))


def test_a_class_with_increments_of_its_own() -> None:
    class Pair(Data):
        def __inc__(self, key: str, value: Any, *args: Any, **kwargs: Any) -> Any:
            return self.offset.numel() if key == "edge_index" else super().__inc__(key, value, *args, **kwargs)

        def __cat_dim__(self, key: str, value: Any, *args: Any, **kwargs: Any) -> Any:
            return None if key == "whole" else super().__cat_dim__(key, value, *args, **kwargs)

    data_list = [
        Pair(
            x=torch.rand(i + 1, 2),
            offset=torch.zeros(i + 2),
            edge_index=torch.tensor([[0], [i]]),
            whole=torch.rand(2, 2),
            my_batch=torch.arange(i + 1),
        )
        for i in range(4)
    ]
    assert_same(SegmentDataset(data_list)[[3, 0, 1]], Batch.from_data_list([data_list[i] for i in (3, 0, 1)]))


def test_views_and_a_dataset_of_one() -> None:
    data_list = graphs()
    view = Stored(data_list)[[6, 2, 7]]
    assert_same(SegmentDataset(view)[[1, 0]], Batch.from_data_list([data_list[2], data_list[6]]))
    for one in (0, torch.tensor(0), [0]):
        assert_same(SegmentDataset(Stored(data_list[:1]))[one], Batch.from_data_list(data_list[:1]))


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_is_that_of_torch_geometric(workers: int) -> None:
    dataset = Stored(graphs(24))
    ours, theirs = (
        loader(dataset, batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(2), num_workers=workers)
        for loader in (SegmentLoader, DataLoader)
    )
    assert len(ours) == len(theirs) == 5
    for got, want in zip(ours, theirs, strict=True):
        assert_same(got, want)


def test_loader_with_a_batch_sampler() -> None:
    from moeyard.data.batching import AtomBudgetBatchSampler

    data_list = graphs(24)
    sampler = AtomBudgetBatchSampler([d.num_nodes for d in data_list], 40, seed=3)
    batches = list(SegmentLoader(data_list, batch_sampler=sampler))
    assert [b.name for b in batches] == [[f"graph {i}" for i in ids] for ids in sampler]
    assert max(b.num_nodes for b in batches) <= 40


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="dataset: expected an InMemoryDataset or a list of Data, got int"):
        SegmentDataset(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dataset: expected at least one graph, got none"):
        SegmentDataset([])
    with pytest.raises(ValueError, match="dataset: expected no transform"):
        SegmentDataset(Stored(graphs(), transform=lambda data: data))
    with pytest.raises(ValueError, match=r"dataset: expected x, pos or num_nodes.*got \['y'\]"):
        SegmentDataset([Data(y=torch.zeros(1))] * 2)
    with pytest.raises(TypeError, match="tree: expected a plain tensor, a number or an object per graph, got dict"):
        SegmentDataset(graphs(tree={"a": torch.zeros(1)}))
    with pytest.raises(TypeError, match="adj: expected a plain tensor"):
        SegmentDataset(graphs(adj=torch.eye(2).to_sparse()))
    with pytest.raises(IndexError):
        SegmentDataset(graphs())[[9]]


def test_a_middle_dimension_is_refused() -> None:
    class Middle(Data):
        def __cat_dim__(self, key: str, value: Any, *args: Any, **kwargs: Any) -> Any:
            return 1 if key == "cube" else super().__cat_dim__(key, value, *args, **kwargs)

    with pytest.raises(ValueError, match="cube: expected concatenation along the first or the last dimension, got"):
        SegmentDataset([Middle(x=torch.zeros(1, 1), cube=torch.zeros(2, 3, 2))] * 2)
