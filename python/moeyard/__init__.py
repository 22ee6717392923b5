"""moeyard: native ops and complete pipelines for mixture-of-experts training on scientific data.

Importing it loads torch and the native modules, nothing else; it never touches a GPU.
"""

from moeyard.ops import RadiusGraph, identity, knn_graph, radius, radius_graph

__version__ = "0.1.0"

__all__ = [
    "RadiusGraph",
    "identity",
    "knn_graph",
    "radius",
    "radius_graph",
]
