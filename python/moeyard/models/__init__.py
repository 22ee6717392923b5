"""Models: one file per model, its config on top. Sees `nn`, `data` and `ops`."""

from moeyard.models.structure_encoder import StructureEncoder, StructureEncoderConfig, StructureEncoding

__all__ = [
    "StructureEncoder",
    "StructureEncoderConfig",
    "StructureEncoding",
]
