"""The native ops. Each file reads from top to bottom: maths, schema, public function, reference, devices, gradient."""

from moeyard.ops.gather_segments import Segments, gather_segments
from moeyard.ops.identity import identity
from moeyard.ops.pack_batches import Packing, pack_batches
from moeyard.ops.permute_tokens import permute_tokens, unpermute_tokens
from moeyard.ops.plan_permutation import PermutationPlan, plan_permutation
from moeyard.ops.radius_graph import RadiusGraph, knn_graph, radius, radius_graph
from moeyard.ops.topk_gating import Gating, topk_gating

__all__ = [
    "Gating",
    "Packing",
    "PermutationPlan",
    "RadiusGraph",
    "Segments",
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
