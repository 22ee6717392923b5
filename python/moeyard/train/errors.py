"""The error that is the caller's to mend."""

from __future__ import annotations


class UsageError(ValueError):
    """A mistake of the caller: a wrong path, a wrong number. The message is all that a user needs to see."""
