"""CPU kernels on raw addresses. Sizes are elements unless said; `threads` bounds the pool."""

def simd_level() -> str: ...
def simd_best() -> str: ...
def identity(input: int, out: int, bytes: int, threads: int) -> None: ...

class PointSet:
    def __init__(self, xyz: int, count: int, batch: int, ptr: int, num_graphs: int) -> None: ...

class Periodicity:
    def __init__(self, cell: int, num_cells: int, pbc: int, num_pbc: int) -> None: ...

class RadiusHits:
    num_edges: int
    truncated: int

class RadiusEdges:
    def __init__(
        self,
        capacity: int,
        num_edges: int,
        centre: int,
        neighbour: int,
        distance: int,
        vector: int,
        cell_shift: int,
        grad_distance: int,
        grad_vector: int,
    ) -> None: ...

def radius_graph_search(
    dtype: int,
    points: PointSet,
    centres: PointSet,
    periodic: Periodicity,
    r: float,
    k: int,
    max_neighbors: int,
    symmetric: bool,
    loop: bool,
    half: bool,
    threads: int,
) -> RadiusHits: ...
def radius_graph_fill(
    hits: RadiusHits,
    dtype: int,
    points: PointSet,
    centres: PointSet,
    periodic: Periodicity,
    capacity: int,
    centre: int,
    neighbour: int,
    distance: int,
    vector: int,
    cell_shift: int,
    num_neighbors: int,
    padding: float,
    threads: int,
) -> None: ...
def radius_graph_backward(
    dtype: int,
    edges: RadiusEdges,
    num_points: int,
    centres: PointSet,
    num_cells: int,
    grad_points: int,
    grad_centres: int,
    grad_cell: int,
    threads: int,
) -> None: ...
def radius_graph_double_backward(
    dtype: int,
    edges: RadiusEdges,
    num_points: int,
    centres: PointSet,
    num_cells: int,
    gg_points: int,
    gg_centres: int,
    gg_cell: int,
    to_grad_distance: int,
    to_grad_vector: int,
    to_distance: int,
    to_vector: int,
    threads: int,
) -> None: ...
