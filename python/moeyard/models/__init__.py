"""Models: one file per model, its config on top. Sees `nn`, `data` and `ops`."""

from moeyard.models.structure_encoder import StructureEncoder, StructureEncoderConfig, StructureEncoding

#: What `moeyard train` can train, and where it lies: "module:attribute", imported when asked for.
SYSTEMS = {
    "structures-demo": "moeyard.models.structures_demo:system",
    "tokens-demo": "moeyard.models.tokens_demo:system",
}

__all__ = [
    "SYSTEMS",
    "StructureEncoder",
    "StructureEncoderConfig",
    "StructureEncoding",
]
