"""Peers that may or may not be installed, and how each is asked for what we return. Their code is never ours.

`make bench` installs those that pip has (the `bench` extra and peers.sh). Others exist as source only: tonari and
pyg-lib are used where they can be imported; multipack_sampler's single file in build/peers/multipack_sampler.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from _data import CUTOFF, Points

SOURCES = Path(__file__).resolve().parents[1] / "build" / "peers"


def optional(name: str) -> Any:
    """The module, or None where it cannot be imported: also a peer that breaks on import is a peer we do not have."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except Exception:
        return None


def single_file(distribution: str, path: str, stubs: dict[str, dict[str, Any]]) -> Any:
    """One file of an installed package or of build/peers, without its package.

    The samplers of fairchem and axolotl need numba alone, their packages a whole training stack. `stubs` stand in for
    what the file imports from there and never calls here.
    """
    roots = [SOURCES / distribution, *map(Path, sys.path)]
    file = next((root / path for root in roots if (root / path).is_file()), None)
    if file is None or optional("numba") is None:
        return None
    names = [".".join(name.split(".")[:i]) for name in stubs for i in range(1, name.count(".") + 2)]
    kept = {name: sys.modules.get(name) for name in names}
    try:
        for name in names:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__dict__.update(stubs.get(name, {}), __path__=[])
        spec = importlib.util.spec_from_file_location(f"_peer_{distribution.replace('-', '_')}", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # A new name in sys.modules: numba looks its functions' module up there.
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    except Exception:
        return None
    finally:
        for name, module_ in kept.items():
            if module_ is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module_


def fairchem_sampler() -> Any:
    path = "fairchem/core/datasets/samplers/max_atom_distributed_sampler.py"
    stubs = {"fairchem.core.common": {"gp_utils": None, "distutils": None}}
    return single_file("fairchem-core", path, stubs)


def axolotl_sampler() -> Any:
    import logging

    stubs = {
        "axolotl.utils.distributed": {"reduce_and_broadcast": None},
        "axolotl.utils.logging": {"get_logger": logging.getLogger},
    }
    return single_file("axolotl", "axolotl/utils/samplers/multipack.py", stubs)


def multipack_sampler() -> Any:
    return single_file("multipack_sampler", "multipack_sampler.py", {})


# ---- radius graphs: [2, M] int64 edge_index, in any order, and with geometry also distances and vectors --------------

Search = Callable[[Points], tuple[Any, ...]]


def _joined(points: Points, one: Callable[[int, int], tuple[Any, ...]]) -> tuple[Any, ...]:
    """Peers that know single systems: one call per graph, edges first, offset and concatenated."""
    if len(points.ptr) == 2:
        return one(0, len(points.pos))
    found = []
    for begin, end in points.graphs:
        edges, *rest = one(begin, end)
        found.append((edges + begin, *rest))
    return tuple(torch.cat(parts, 1 if i == 0 else 0) for i, parts in enumerate(zip(*found, strict=True)))


def _torch_cluster(geometry: bool, threads: int) -> Search | None:
    module = optional("torch_cluster")
    if module is None or geometry:
        return None
    return lambda p: (module.radius_graph(p.pos, CUTOFF, p.batch, max_num_neighbors=100_000, num_workers=threads),)


def _pyg(geometry: bool, threads: int) -> Search | None:
    if geometry or optional("pyg_lib") is None or optional("torch_geometric") is None:
        return None
    import torch_geometric.nn

    return lambda p: (torch_geometric.nn.radius_graph(p.pos, CUTOFF, p.batch, max_num_neighbors=100_000),)


def _vesin(geometry: bool, threads: int) -> Search | None:
    module = optional("vesin")
    if module is None:
        return None
    search = module.NeighborList(cutoff=CUTOFF, full_list=True, n_threads=threads)
    box, quantities = np.zeros((3, 3), np.float32), "PdD" if geometry else "P"

    def call(points: Points) -> tuple[Any, ...]:
        pos = points.pos.numpy()

        def one(begin: int, end: int) -> tuple[Any, ...]:
            pairs, *rest = search.compute(pos[begin:end], box, False, quantities)
            return torch.from_numpy(pairs.view(np.int64)).t(), *map(torch.from_numpy, rest)

        return _joined(points, one)

    return call


def _vesin_torch(geometry: bool, threads: int) -> Search | None:
    module = optional("vesin_torch")
    if module is None:
        return None
    search = module.NeighborList(cutoff=CUTOFF, full_list=True, n_threads=threads)
    box, quantities = torch.zeros(3, 3), "PdD" if geometry else "P"

    def call(points: Points) -> tuple[Any, ...]:
        def one(begin: int, end: int) -> tuple[Any, ...]:
            pairs, *rest = search.compute(points.pos[begin:end], box, False, quantities)
            return pairs.t(), *rest

        return _joined(points, one)

    return call


def _nvalchemi(method: str) -> Callable[[bool, int], Search | None]:
    def build(geometry: bool, threads: int) -> Search | None:
        module = optional("nvalchemiops.torch.neighbors")
        if module is None:
            return None

        def call(points: Points) -> tuple[Any, ...]:
            graphs = len(points.ptr) - 1
            size = points.pos.max().item() + 1  # non-periodic, so any box that holds all will do
            out = module.neighbor_list(
                points.pos,
                CUTOFF,
                cell=(torch.eye(3) * size).expand(graphs, 3, 3).contiguous() if method == "cell_list" else None,
                pbc=torch.zeros(graphs, 3, dtype=torch.bool) if method == "cell_list" else None,
                batch_idx=points.batch.int(),
                batch_ptr=points.ptr.int(),
                method=f"batch_{method}",
                max_neighbors=points.most,
                return_neighbor_list=True,
                return_distances=geometry,
                return_vectors=geometry,
            )
            return out[0].long(), *(out[-2:] if geometry else ())

        return call

    return build


def _tonari(geometry: bool, threads: int) -> Search | None:
    module = optional("tonari")
    if module is None:
        return None

    def call(points: Points) -> tuple[Any, ...]:
        graphs = len(points.ptr) - 1
        first, second, *rest = module.neighbor_list(
            "ijdD" if geometry else "ij",
            points.pos,
            torch.zeros(graphs, 3, 3),
            torch.zeros(graphs, 3, dtype=torch.bool),
            CUTOFF,
            points.ptr,
            cpu_threads=threads,
        )
        return torch.stack([first, second]), *rest

    return call


def _matscipy(geometry: bool, threads: int) -> Search | None:
    module = optional("matscipy.neighbours")
    if module is None:
        return None

    def call(points: Points) -> tuple[Any, ...]:
        pos = points.pos.numpy().astype(np.float64)

        def one(begin: int, end: int) -> tuple[Any, ...]:
            part = pos[begin:end]
            found = module.neighbour_list(
                "ijdD" if geometry else "ij",
                positions=part,
                cell=np.diag(part.max(0) + 1),
                pbc=np.zeros(3, bool),
                cutoff=CUTOFF,
            )
            edges = torch.from_numpy(np.stack(found[:2]).astype(np.int64))
            return edges, *(torch.from_numpy(x.astype(np.float32)) for x in found[2:])

        return _joined(points, one)

    return call


def _scipy(**options: Any) -> Callable[[bool, int], Search | None]:
    def build(geometry: bool, threads: int) -> Search | None:
        module = optional("scipy.spatial")
        if module is None or geometry:
            return None

        def call(points: Points) -> tuple[Any, ...]:
            pos = points.pos.numpy()

            def one(begin: int, end: int) -> tuple[Any, ...]:
                tree = module.cKDTree(pos[begin:end], **options)
                half = tree.query_pairs(CUTOFF, output_type="ndarray").T
                return (torch.from_numpy(np.concatenate([half, half[::-1]], 1)),)

            return _joined(points, one)

        return call

    return build


def _freud(geometry: bool, threads: int) -> Search | None:
    module = optional("freud")
    if module is None:
        return None

    def call(points: Points) -> tuple[Any, ...]:
        module.parallel.set_num_threads(threads)
        pos = points.pos.numpy()

        def one(begin: int, end: int) -> tuple[Any, ...]:
            part = pos[begin:end]
            middle = part.max(0) / 2
            box = module.box.Box.cube(2 * float(middle.max()) + 4 * CUTOFF)
            query = module.locality.AABBQuery(box, part - middle)
            pairs = query.query(part - middle, {"r_max": CUTOFF, "exclude_ii": True}).toNeighborList()
            edges = torch.from_numpy(np.asarray(pairs[:]).astype(np.int64)).t()
            rest = (pairs.distances, pairs.vectors) if geometry else ()
            return edges, *(torch.from_numpy(np.array(x)) for x in rest)

        return _joined(points, one)

    return call


_SEARCHES: dict[str, Callable[[bool, int], Search | None]] = {
    "scipy cKDTree, mirrored": _scipy(),
    "scipy cKDTree unbalanced, mirrored": _scipy(balanced_tree=False, compact_nodes=False),
    "torch_cluster": _torch_cluster,
    "PyG with pyg-lib": _pyg,
    "vesin": _vesin,
    "vesin-torch": _vesin_torch,
    "nvalchemiops naive": _nvalchemi("naive"),
    "nvalchemiops cell list": _nvalchemi("cell_list"),
    "tonari": _tonari,
    "matscipy": _matscipy,
    "freud": _freud,
}
#: Peers that return distances and vectors too.
WITH_GEOMETRY = ("vesin", "vesin-torch", "nvalchemiops naive", "nvalchemiops cell list", "tonari", "matscipy", "freud")
#: Peers that can use several threads; freud can too, but is left out of graphs of that size.
WITH_THREADS = ("vesin", "vesin-torch", "tonari")


def radius_peers(geometry: bool, threads: int = 1) -> dict[str, Search | None]:
    names = WITH_GEOMETRY if geometry else tuple(_SEARCHES)
    if threads > 1:
        names = tuple(name for name in names if name in WITH_THREADS)
    return {name: _SEARCHES[name](geometry, threads) for name in names}


def edge_keys(edge_index: Tensor, points: int) -> Tensor:
    """Sorted numbers of the (source, target) pairs."""
    return (edge_index[0] * points + edge_index[1]).sort().values
