"""Versions of ``guard.json``, and how a card of an older one is read as one of the current.

Each step is a pure function from one version to the next and is never changed once released: a bundle of an
older version is read through all steps from its own. Nothing is written; ``neuronguard bundle migrate``
writes what was read as a bundle of its own.

- 1: the first.
- 2: ``reference``, the distribution of the scores that the guard gave when it was fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

CURRENT = 2
Document = dict[str, Any]


class SchemaError(ValueError):
    """A card has no version that this release can read."""


def _to_2(card: Document) -> Document:
    """Scores were not kept: there is no reference, and drift cannot be told."""
    return {**card, "schema_version": 2, "reference": None}


STEPS: Mapping[int, Callable[[Document], Document]] = {1: _to_2}
"""From a version to the next."""


def version_of(card: Any) -> int:
    """The schema version of a card as it was read. Raises SchemaError."""
    if not isinstance(card, dict):
        raise SchemaError(f"expected an object, found {type(card).__name__}")
    version = card.get("schema_version")
    if type(version) is not int or version < 1:
        raise SchemaError(f"schema_version is {version!r}; expected a number from 1 to {CURRENT}")
    if version > CURRENT:
        raise SchemaError(
            f"schema_version is {version}, and this release reads versions up to {CURRENT}: a newer "
            "neuronguard made the bundle. Upgrade to that release, or fit the bundle with this one"
        )
    return version


def migrated(card: Document) -> Document:
    """The card in the current version; ``card`` itself is not changed. Raises SchemaError."""
    for version in range(version_of(card), CURRENT):
        card = STEPS[version](card)
    return card
