"""Inputs worth keeping: ``corpus/TARGET/NAME``, one a file, found by hand or by the fuzzer."""

from __future__ import annotations

from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
LONGEST = 4096
"""Bytes of one input."""


def inputs(target: str) -> list[Path]:
    """The inputs of one target."""
    return sorted((CORPUS / target).iterdir())
