"""What can go wrong while a model is tuned."""

from __future__ import annotations


class TuneError(ValueError):
    """Model, units, data or options do not allow the tuning. The message says what was expected."""


class DivergedError(TuneError):
    """The loss, or a gradient, is no longer a finite number."""
