"""The native ops. Each file reads from top to bottom: maths, schema, public function, reference, devices, gradient."""

from moeyard.ops.identity import identity
from moeyard.ops.radius_graph import RadiusGraph, knn_graph, radius, radius_graph

__all__ = [
    "RadiusGraph",
    "identity",
    "knn_graph",
    "radius",
    "radius_graph",
]
