"""PyG: `torch_geometric.nn.radius_graph` and `radius` without pyg-lib, and batches gathered instead of concatenated.

    with patch():                                  # or patch() alone, for good
        edge_index = torch_geometric.nn.radius_graph(pos, r=5.0, batch=batch)

    for batch in SegmentLoader(dataset, batch_size=64, shuffle=True): ...

`SegmentLoader` yields what `torch_geometric.loader.DataLoader` yields, but makes no `Data` per graph: the tensors of an
InMemoryDataset are concatenated already, and each attribute of a batch is one `gather_segments`.

Shape letters: S graphs of the dataset, G of the batch.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
import torch_geometric.nn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch_geometric.data import Batch, Data, InMemoryDataset
from torch_geometric.data.collate import collate as concatenate
from torch_geometric.data.separate import separate
from torch_geometric.data.storage import N_KEYS

from moeyard.integrations import torch_cluster
from moeyard.ops import gather_segments

__all__ = ["SegmentDataset", "SegmentLoader", "patch"]

# ---- radius and radius_graph -----------------------------------------------------------------------------------------


def patch() -> ExitStack:
    """Puts moeyard's `radius` and `radius_graph` in the place of torch_geometric's, in every module that holds them.

    Models that imported them by name (SchNet, DimeNet, ViSNet ...) and your own modules are covered, if they are loaded
    by now. Arguments and defaults are the same; for edges, their order and errors see
    `moeyard.integrations.torch_cluster`.

    Returns:
        A context manager; leaving it, or calling its `close()`, brings torch_geometric's functions back. Dropping it
        keeps the patch in place.
    """
    undo = ExitStack()
    for name in ("radius", "radius_graph"):
        # partial: an object of its own, so that undoing finds it and nobody's direct import of ours.
        theirs, ours = getattr(torch_geometric.nn, name), partial(getattr(torch_cluster, name))
        _rebind(theirs, ours)
        undo.callback(_rebind, ours, theirs)
    return undo


def _rebind(old: Any, new: Any) -> None:
    """Binds each name of a loaded module that is bound to `old` to `new`."""
    for module in list(sys.modules.values()):
        # __dict__, not getattr(): modules that load lazily would load everything.
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is old:
                setattr(module, name, new)


# ---- batches ---------------------------------------------------------------------------------------------------------


class SegmentDataset(Dataset[Batch]):
    """The graphs of an InMemoryDataset (or a list of Data), gathered batch by batch.

    A list of ids gives one `Batch`, equal to `Batch.from_data_list` of those graphs: attributes with their offsets,
    `batch`, `ptr`, and what `to_data_list` needs. A single id gives a batch of one graph.

    Args:
        dataset: an InMemoryDataset, also an indexed or shuffled view of one, whose tensors are used in place; or a list
            of Data with the same attributes, which are concatenated here.

    Raises:
        TypeError: neither of the two, or an attribute that is no plain tensor, number or object (sparse or nested
            tensors, EdgeIndex, tensors inside lists or dicts).
        ValueError: no graphs; a `transform`, which would have to run graph by graph; an attribute that is concatenated
            along a dimension in the middle; nothing that tells the number of nodes (x, pos, num_nodes ...).

    Determinism: a copy, bit-identical for any number of threads and workers.
    """

    def __init__(self, dataset: InMemoryDataset | Sequence[Data]) -> None:
        data, slices, self._ids = _store_of(dataset)
        self._empty = type(data)()
        self._nodes = _nodes_per_graph(data, slices)
        self._counted = "num_nodes" in data
        self._attributes = {key: _attribute(data, key, slices, self._nodes) for key in slices if key != "num_nodes"}

    def __len__(self) -> int:
        return self._ids.shape[0]

    def __getitem__(self, index: int | Sequence[int]) -> Batch:
        return self.__getitems__(index)

    def __getitems__(self, indices: int | Sequence[int]) -> Batch:
        """The graphs `indices` (ids from 0 to S - 1, repeats allowed) as one batch, in that order."""
        ids = self._ids[torch.as_tensor(indices, dtype=torch.int64).reshape(-1)]
        out = Batch(_base_cls=type(self._empty)).stores_as(self._empty)
        out._slice_dict, out._inc_dict = {}, {}
        for key, attribute in self._attributes.items():
            out[key], out._slice_dict[key], out._inc_dict[key] = _gather(attribute, ids)
        nodes = self._nodes[ids]
        if self._counted:
            out._store._num_nodes, out.num_nodes = nodes.tolist(), int(nodes.sum())
        out.batch, out.ptr = torch.repeat_interleave(nodes), _ends(nodes)
        out._num_graphs = ids.shape[0]
        return out


class SegmentLoader(DataLoader[Batch]):
    """torch_geometric's DataLoader over a `SegmentDataset`.

    Args:
        dataset: a `SegmentDataset`, or what it takes.
        batch_size, shuffle: as for any DataLoader.
        options: its further arguments: `batch_sampler` (an AtomBudgetBatchSampler, say), `num_workers`, `generator` ...
    """

    def __init__(
        self,
        dataset: SegmentDataset | InMemoryDataset | Sequence[Data],
        batch_size: int = 1,
        shuffle: bool | None = None,
        **options: Any,
    ) -> None:
        graphs = dataset if isinstance(dataset, SegmentDataset) else SegmentDataset(dataset)
        super().__init__(graphs, batch_size, shuffle, collate_fn=_keep, **options)


def _keep(batch: Batch) -> Batch:
    """The collate_fn: `__getitems__` gave a complete batch."""
    return batch


# ---- from PyG's store to segments, and back --------------------------------------------------------------------------


class _Attribute(NamedTuple):
    """One attribute of all graphs: S objects in a list, or `parts` segments per graph, in the order [parts, S]."""

    values: Any
    ptr: Tensor | None  # [parts * S + 1]; None: a list
    lead: list[int]  # the dimensions before the concatenated one, which make the parts
    shift: Tensor | None  # [S] what each graph adds to the values of those after it


def _store_of(dataset: Any) -> tuple[Data, dict[str, Any], Tensor]:
    """The concatenated Data, its slices, and the ids of the graphs that the dataset shows."""
    if isinstance(dataset, InMemoryDataset):
        if dataset.transform is not None:
            raise ValueError("dataset: expected no transform, which runs graph by graph (use pre_transform), got one")
        graphs, ids = [dataset._data], torch.as_tensor(list(dataset.indices()), dtype=torch.int64)
        if dataset.slices is not None:
            return dataset._data, dataset.slices, ids
    elif isinstance(dataset, (list, tuple)) and all(isinstance(data, Data) for data in dataset):
        if not dataset:
            raise ValueError("dataset: expected at least one graph, got none")
        graphs, ids = list(dataset), torch.arange(len(dataset))
    else:
        raise TypeError(f"dataset: expected an InMemoryDataset or a list of Data, got {type(dataset).__name__}")
    data, slices, _ = concatenate(type(graphs[0]), graphs, increment=False, add_batch=False)
    return data, slices, ids


def _nodes_per_graph(data: Data, slices: dict[str, Any]) -> Tensor:
    """[S], found as `Data.num_nodes` finds it."""
    counts = data._store.__dict__.get("_num_nodes")
    if counts is not None:
        return torch.as_tensor(counts, dtype=torch.int64)
    named = [key for key in slices if key in N_KEYS] + [key for key in slices if "node" in key]
    for key in named:
        if isinstance(data[key], Tensor):
            return torch.as_tensor(slices[key]).diff()
    raise ValueError(f"dataset: expected x, pos or num_nodes, which tell the number of nodes, got {list(slices)}")


def _attribute(data: Data, key: str, slices: dict[str, Any], nodes: Tensor) -> _Attribute:
    values = data[key]
    if isinstance(values, list) and not any(isinstance(v, (Tensor, list, tuple, dict)) for v in values):
        return _Attribute(values, None, [], None)
    if type(values) is not Tensor or values.layout != torch.strided or values.is_nested:
        raise TypeError(f"{key}: expected a plain tensor, a number or an object per graph, got {type(values).__name__}")
    ptr, shift = torch.as_tensor(slices[key]), _shift(data, key, slices, nodes)
    dim = (data.__cat_dim__(key, values, data._store) or 0) % values.dim()
    if dim == 0:
        return _Attribute(values, ptr, [], shift)
    if dim != values.dim() - 1:
        raise ValueError(f"{key}: expected concatenation along the first or the last dimension, got dimension {dim}")
    # Row after row: for edge_index the sources of all graphs, then their targets.
    *lead, columns = values.shape
    starts = ptr[:-1] + columns * torch.arange(math.prod(lead))[:, None]
    return _Attribute(values.reshape(-1), torch.cat([starts.flatten(), torch.tensor([values.numel()])]), lead, shift)


def _shift(data: Data, key: str, slices: dict[str, Any], nodes: Tensor) -> Tensor | None:
    """[S] PyG's `__inc__` of each graph; None for zeros."""
    if type(data).__inc__ is Data.__inc__ and "batch" not in key:
        return nodes if "index" in key or key == "face" else None
    graphs = (separate(type(data), data, i, slices, decrement=False) for i in range(nodes.shape[0]))
    steps = [graph.__inc__(key, graph[key], graph._store) for graph in graphs]
    if any(isinstance(step, Tensor) and step.numel() != 1 for step in steps):
        raise TypeError(f"{key}: expected one number from {type(data).__name__}.__inc__, got a tensor of several")
    shift = torch.tensor([int(step) for step in steps])
    return shift if shift.any() else None


def _gather(attribute: _Attribute, ids: Tensor) -> tuple[Any, Tensor, Tensor | None]:
    """The attribute of the graphs `ids`; its slices and increments, as `Batch` keeps them."""
    values, ptr, lead, shift = attribute
    graphs, parts = ids.shape[0], math.prod(lead)
    if ptr is None:
        return [values[i] for i in ids.tolist()], torch.arange(graphs + 1), None
    increments = ids.new_zeros(graphs) if shift is None else _ends(shift[ids])[:-1]
    segments = (ptr.shape[0] - 1) // max(parts, 1)
    index = (ids + segments * torch.arange(parts)[:, None]).flatten()
    found = gather_segments(values, ptr, index, add=None if shift is None else increments.repeat(parts))
    slices = found.ptr[: graphs + 1]
    return found.values.reshape(*lead, int(slices[-1]), *values.shape[1:]), slices, increments


def _ends(sizes: Tensor) -> Tensor:
    """[G] sizes -> [G + 1] offsets."""
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
