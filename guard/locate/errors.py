"""What can go wrong while units are located."""

from __future__ import annotations


class LocateError(ValueError):
    """Models, data or options do not allow a method to run. The message says what was expected."""
