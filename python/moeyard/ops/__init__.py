"""The native ops. Each file reads from top to bottom: maths, schema, public function, reference, devices, gradient."""

from moeyard.ops.identity import identity
from moeyard.ops.topk_gating import Gating, topk_gating

__all__ = [
    "Gating",
    "identity",
    "topk_gating",
]
