"""moeyard: native ops and complete pipelines for mixture-of-experts training on scientific data.

Importing it loads torch and the native modules, nothing else; it never touches a GPU.
"""

from moeyard.ops import Gating, identity, topk_gating

__version__ = "0.1.0"

__all__ = [
    "Gating",
    "identity",
    "topk_gating",
]
