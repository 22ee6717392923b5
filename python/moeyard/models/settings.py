"""What every settings class has in common. Needs pydantic, so nothing that the base install imports may import it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A frozen table of settings: unknown keys, wrong types ("3" for 3, true for 1), NaN and infinity are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())
