"""Do safety and helpfulness share neurons? Patch both ways between two aligned twins.

The alignment tax of Chen et al. (arXiv 2406.14144, section 5): the units that rank high for both a safety and
a helpfulness data set are patched from one aligned model into the other, and back, and every cost is taken
before and after. Select the units on data sets that neither model was aligned on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from guard.locate.causal import Array, Cost
from guard.locate.decoding import greedy
from guard.locate.errors import LocateError
from guard.locate.patching import dap_generate, units_of
from guard.locate.twins import Twin, swapped
from guard.locate.unit_set import UnitSet
from guard.prompts import Tokens
from guard.sites import ModelShape
from guard.stats import CONFIDENCE
from guard.units import Units


class Change(NamedTuple):
    """What a patch did to one cost of the recipient's answers."""

    before: float
    after: float
    donor: float
    """Mean costs of recipient, patched recipient and donor."""
    low: float
    high: float
    """95 % interval of ``after − before``, by a paired bootstrap over prompts."""


class Crossed(NamedTuple):
    """Both directions, each by the name of the cost."""

    into_first: dict[str, Change]
    """The first model is the recipient."""
    into_second: dict[str, Change]


def shared_units(first: UnitSet, second: UnitSet, shape: ModelShape) -> Units:
    """The units that both sets select. Raises LocateError when there is none, or a component is missing."""
    if first.selected.keys() != second.selected.keys():
        raise LocateError(
            f"one set selects among {sorted(first.selected)}, the other among {sorted(second.selected)}"
        )
    both = {name: chosen & second.selected[name] for name, chosen in first.selected.items()}
    if not any(chosen.any() for chosen in both.values()):
        raise LocateError("the two sets share no unit, so there is nothing to patch")
    return units_of(UnitSet(first.provenance, first.scores, both), shape)


def cross_patch(
    first: Twin,
    second: Twin,
    units: Units,
    prompts: Sequence[Tokens],
    costs: Mapping[str, Cost],
    *,
    new_tokens: int = 128,
    batch_tokens: int = 8192,
    resamples: int = 2000,
    seed: int = 0,
    progress: bool = False,
) -> Crossed:
    """Patch ``units`` from each model into the other and score all answers. Raises LocateError.

    ``second`` is given as a donor of ``first``: its folded factors, if any, are relative to ``first``.
    """
    settings: dict[str, Any] = {
        "new_tokens": new_tokens,
        "batch_tokens": batch_tokens,
        "progress": progress,
    }
    patched = dap_generate(first, second, units, prompts, **settings)
    back = dap_generate(*swapped(first, second), units, prompts, **settings)
    own = [greedy(twin, prompts, **settings) for twin in (first, second)]
    directions: list[dict[str, Change]] = []
    for before, after, donor in ((own[0], patched, own[1]), (own[1], back, own[0])):
        directions.append(
            {
                name: _change(
                    *(
                        np.array(cost(prompts, answers), dtype=np.float64)
                        for answers in (before, after, donor)
                    ),
                    resamples=resamples,
                    seed=seed,
                )
                for name, cost in costs.items()
            }
        )
    return Crossed(*directions)


def _change(before: Array, after: Array, donor: Array, *, resamples: int, seed: int) -> Change:
    chosen = np.random.default_rng(seed).integers(len(before), size=(resamples, len(before)))
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile((after - before)[chosen].mean(1), [tail, 100 - tail])
    return Change(float(before.mean()), float(after.mean()), float(donor.mean()), float(low), float(high))
