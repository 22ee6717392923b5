"""moeyard: native ops and complete pipelines for mixture-of-experts training on scientific data.

Importing it loads torch and the native modules, nothing else; it never touches a GPU.
"""

from moeyard.ops import (
    Gating,
    Packing,
    PermutationPlan,
    RadiusGraph,
    Segments,
    gather_segments,
    identity,
    knn_graph,
    pack_batches,
    permute_tokens,
    plan_permutation,
    radius,
    radius_graph,
    topk_gating,
    unpermute_tokens,
)
from moeyard.ops._device_errors import check_device_errors

__version__ = "0.1.0"

__all__ = [
    "Gating",
    "Packing",
    "PermutationPlan",
    "RadiusGraph",
    "Segments",
    "check_device_errors",
    "gather_segments",
    "identity",
    "knn_graph",
    "pack_batches",
    "permute_tokens",
    "plan_permutation",
    "radius",
    "radius_graph",
    "topk_gating",
    "unpermute_tokens",
]
