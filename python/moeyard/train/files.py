"""Files that are whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Writes beside `path` and renames: whoever reads sees the old file or the new one, never half of it."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
