"""Controls that a selection is held against: random units of the same layers, and windows of its ranking.

Both are sets of units themselves, so that whatever is measured on a selection can be measured on them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from guard.locate.errors import LocateError
from guard.locate.unit_set import BoolArray, Component, Float64Array, Method, Provenance, UnitSet


def random_like(found: UnitSet, *, seed: int, disjoint: bool = False) -> UnitSet:
    """As many units in each layer of each component as ``found`` selects there, drawn among its candidates.

    The scores are the uniform draws that decided: a random ranking. With ``disjoint``, units that ``found``
    selects are no candidates. Raises LocateError when a layer has too few candidates left.
    """
    random = np.random.default_rng(seed)
    scores: dict[Component, Float64Array] = {}
    selected: dict[Component, BoolArray] = {}
    for component, given in sorted(found.scores.items()):
        chosen = found.selected[component]
        drawn = random.random(given.shape)
        drawn[np.isnan(given) | (chosen & disjoint)] = np.nan
        scores[component], selected[component] = drawn, np.zeros_like(chosen)
        for layer, wanted in enumerate(chosen.sum(axis=1)):
            left = int((~np.isnan(drawn[layer])).sum())
            if left < wanted:
                raise LocateError(
                    f"layer {layer} has {left} {component} units besides the selected ones, too few for "
                    f"{wanted}; allow the control to share units with the selection"
                )
            # NaN is sorted to the end, behind every candidate.
            selected[component][layer, np.argsort(-drawn[layer], kind="stable")[:wanted]] = True
    return UnitSet(_control(found, "random", seed, {"disjoint": disjoint}), scores, selected)


def window(found: UnitSet, start: int, *, size: int | None = None) -> UnitSet:
    """The units at ``start`` to ``start + size`` of the ranking of ``found``, the best one being at 0.

    ``size`` is that of the selection unless given; scores are those of ``found``. Raises LocateError when
    the ranking is shorter.
    """
    size = len(found) if size is None else size
    names = sorted(found.scores)
    flat = np.concatenate([found.scores[name].ravel() for name in names])
    candidates = int((~np.isnan(flat)).sum())
    if start < 0 or size < 1 or start + size > candidates:
        raise LocateError(
            f"there is no window of {size} units from rank {start}: the ranking has {candidates} units"
        )
    mask = np.zeros(len(flat), dtype=np.bool_)
    # As in ``UnitSet.ranking``: ties by component, layer and unit; NaN comes last.
    mask[np.argsort(-flat, kind="stable")[start : start + size]] = True
    parts = np.split(mask, np.cumsum([found.scores[name].size for name in names])[:-1])
    selected = {name: part.reshape(found.scores[name].shape) for name, part in zip(names, parts, strict=True)}
    provenance = _control(found, "window", found.provenance.seed, {"start": start, "size": size})
    return UnitSet(provenance, found.scores, selected)


def _control(found: UnitSet, method: Method, seed: int, options: dict[str, Any]) -> Provenance:
    """Where a control comes from: as ``found``, with what ``found`` was among the options, at no cost."""
    source = found.provenance
    of = {"method": source.method, "options": source.options, "seed": source.seed, "units": len(found)}
    changes = {"method": method, "seed": seed, "options": {**options, "of": of}, "cost": {}}
    return Provenance.model_validate({**dict(source), **changes})
