"""The native ops. Each file reads from top to bottom: maths, schema, public function, reference, devices, gradient."""

from moeyard.ops.identity import identity

__all__ = [
    "identity",
]
