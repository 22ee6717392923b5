"""Optional packages, imported when they are needed and not before."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, *, extra: str, purpose: str) -> Any:
    """Imports `module`, which the extra `extra` brings.

    Raises:
        ImportError: it is not there; the message says what for, and how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f'{purpose} needs {package}: pip install "moeyard[{extra}]" ({error})') from error
