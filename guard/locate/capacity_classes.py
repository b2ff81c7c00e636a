"""Classes of units by two importances: safety-critical, utility-critical, complex, redundant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from guard.locate.capacity_options import KINDS, CapacityOptions
from guard.locate.errors import LocateError
from guard.locate.unit_set import Component, Float64Array

Importance = Mapping[Component, Float64Array]
"""``[layers, units]`` a component; NaN: there is no such unit."""
Classes = Mapping[Component, NDArray[np.int8]]
"""Index into ``KINDS``, ``[layers, units]``; -1: there is no such unit."""


def normalised(raw: Importance, how: str) -> dict[Component, Float64Array]:
    """Importances made comparable within each layer of each component, see ``CapacityOptions.normalise``.

    ``layer_z``: standardised, zero where all units are alike. ``layer_rank``: rank from 0 to 1, ties share
    their mean.
    """
    if how == "none":
        return {name: values.copy() for name, values in raw.items()}
    return {
        name: np.stack([_z(row) if how == "layer_z" else _rank(row) for row in values])
        for name, values in raw.items()
    }


def _z(row: Float64Array) -> Float64Array:
    spread = row.std()
    centred: Float64Array = row - row.mean()
    return centred / spread if spread > 0 else centred


def _rank(row: Float64Array) -> Float64Array:
    if np.isnan(row).any():
        return row.copy()
    _, place, times = np.unique(row, return_inverse=True, return_counts=True)
    last = np.cumsum(times)
    ranks: Float64Array = (last - (times + 1) / 2)[place] / max(1, len(row) - 1)
    return ranks


class Edges(NamedTuple):
    """Where classes begin, so that another model can be divided by the same rule."""

    scu: float
    """Safety minus utility importance is at least this."""
    ucu: float
    """It is at most this."""
    ru: float
    """The sum of both is at most this."""


def edges(safe: Importance, useful: Importance, options: CapacityOptions) -> Edges:
    """The edges that give each class its share of all units, apart from ties.

    A class that is taken later begins behind the units that an earlier one has taken, see :func:`classify`.
    """
    gap = np.concatenate([(safe[name] - useful[name]).ravel() for name in safe])
    total = np.concatenate([(safe[name] + useful[name]).ravel() for name in safe])
    known = ~np.isnan(gap)
    gap, total = gap[known], total[known]
    sizes = [round(share * len(gap)) for share in (options.scu_share, options.ucu_share, options.ru_share)]
    scu = float(np.sort(gap)[-sizes[0]]) if sizes[0] else np.inf
    left = gap < scu
    ucu = float(np.sort(gap[left])[: sizes[1]][-1]) if sizes[1] and left.any() else -np.inf
    left &= gap > ucu
    ru = float(np.sort(total[left])[: sizes[2]][-1]) if sizes[2] and left.any() else -np.inf
    return Edges(scu, ucu, ru)


def classify(safe: Importance, useful: Importance, at: Edges) -> dict[Component, NDArray[np.int8]]:
    """The class of each unit: safety-critical, else utility-critical, else redundant, else complex.

    The papers do not say which class a unit belongs to that meets two rules; this order is ours.
    """
    result: dict[Component, NDArray[np.int8]] = {}
    for name in safe:
        gap, total = safe[name] - useful[name], safe[name] + useful[name]
        classes = np.select(
            [np.isnan(gap), gap >= at.scu, gap <= at.ucu, total <= at.ru],
            [-1, KINDS.index("scu"), KINDS.index("ucu"), KINDS.index("ru")],
            KINDS.index("cu"),
        )
        result[name] = classes.astype(np.int8)
    return result


def transitions(before: Classes, after: Classes) -> NDArray[np.int64]:
    """How many units went from one class (row) to another (column), in the order of ``KINDS``: ``[4, 4]``.

    Raises LocateError when the two are not of the same units.
    """
    table = np.zeros((len(KINDS), len(KINDS)), dtype=np.int64)
    if {n: c.shape for n, c in before.items()} != {n: c.shape for n, c in after.items()}:
        raise LocateError("the two classifications are of models of different shape")
    for name, old in before.items():
        known = old >= 0
        np.add.at(table, (old[known], after[name][known]), 1)
    return table
