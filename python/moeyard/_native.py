"""Loads the native modules: `_cpu` is always there, `_cuda` only in a build with CUDA.

This is the one place that says "built without CUDA". Importing it touches no GPU.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType

import torch

from moeyard import _cpu as cpu

__all__ = ["cpu", "cuda", "cuda_built"]

#: True when this installation holds compiled CUDA kernels, whether or not a GPU is present.
cuda_built: bool = importlib.util.find_spec("moeyard._cuda") is not None


def cuda() -> ModuleType:
    """The CUDA module; RuntimeError with the way to mend it when this build has none."""
    if torch.version.hip is not None:
        raise RuntimeError("moeyard has no kernels for ROCm, which this torch is built for; pass CPU tensors")
    if not cuda_built:
        raise RuntimeError(
            "moeyard was built without CUDA: no CUDA compiler was found at build time. Install a CUDA toolkit (nvcc on "
            "PATH) and reinstall from source (`pip install --force-reinstall --no-deps .`), or pass CPU tensors."
        )
    from moeyard import _cuda

    return _cuda
