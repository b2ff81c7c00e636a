"""How alike two sets of units are: shared units, correlation of scores, and in which layers they lie.

Two questions are kept apart. Are the same units *selected*, more than chance would have it? And do the two
methods, seeds or data sets *rank* units alike, selected or not? Both are asked of the units that are
candidates in both sets; what is selected outside of them is counted and left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from guard.locate.errors import LocateError
from guard.locate.unit_set import BoolArray, Component, Float64Array, UnitSet

Support = Literal["union", "all"]


class Overlap(NamedTuple):
    """How many units two selections share, against two kinds of chance."""

    candidates: int
    """Units that are candidates in both sets: what chance draws from."""
    first: int
    """Units of the first selection among them; ``second`` likewise."""
    second: int
    outside: int
    """Selected units of either set that are no candidates in the other; they are left out of all figures."""
    shared: int
    jaccard: float
    """Shared units over units in either selection; NaN when nothing is selected."""
    expected: float
    """Shared units if both selections were drawn at random."""
    p_value: float
    """P(at least that many shared) then, hypergeometric; 0 when it is too small for a float."""
    expected_same_layers: float
    """Shared units if both were drawn at random, each with its number of units in every layer."""
    p_value_same_layers: float
    """P(at least that many shared) then. Two methods that prefer the same layers share units without agreeing
    on units: this is the figure that tells."""


class Correlation(NamedTuple):
    """Rank correlations of two sets' scores; NaN when there are fewer than two units, or all are equal."""

    units: int
    spearman: float
    kendall: float
    """Kendall's tau-b."""


class Comparison(NamedTuple):
    """Two sets of units side by side."""

    differ: tuple[str, ...]
    """What differs in their provenance: method, options, model, donor, data, template, seed."""
    components: tuple[Component, ...]
    """Components that both have; when there are none, only layers can be compared."""
    overlap: Overlap | None
    correlation: dict[Support, Correlation]
    """Over the units selected in either, and over all candidates of both. A unit gets into the former by
    ranking high in one set, so that unrelated rankings have *negative* correlations there, not zero: hold
    them against those with a random control."""
    layers: float | None
    """Pearson correlation of the numbers of selected units by layer, all components of each set together;
    NaN when one of them is the same in every layer; None when the models differ in depth."""


def compare(first: UnitSet, second: UnitSet) -> Comparison:
    """Compare two sets of models of one shape. Raises LocateError when a shared component differs in size."""
    names = tuple(sorted(first.scores.keys() & second.scores.keys()))
    for name in names:
        if first.scores[name].shape != second.scores[name].shape:
            raise LocateError(
                f"sets of models of different size cannot be compared: {name} is "
                f"{first.scores[name].shape} in one and {second.scores[name].shape} in the other"
            )
    profiles = layer_profile(first), layer_profile(second)
    layers = pearson(*profiles) if len(profiles[0]) == len(profiles[1]) else None
    if not names:
        return Comparison(differences(first, second), (), None, {}, layers)
    both = {name: ~np.isnan(first.scores[name] + second.scores[name]) for name in names}
    either = {name: both[name] & (first.selected[name] | second.selected[name]) for name in names}
    correlation: dict[Support, Correlation] = {
        "union": _correlation(first, second, either),
        "all": _correlation(first, second, both),
    }
    return Comparison(differences(first, second), names, _overlap(first, second, both), correlation, layers)


def compare_all(sets: Mapping[str, UnitSet]) -> dict[tuple[str, str], Comparison]:
    """Every pair of several sets, in the order given. Raises LocateError, which names the pair."""
    found = {}
    for (a, first), (b, second) in combinations(sets.items(), 2):
        try:
            found[a, b] = compare(first, second)
        except LocateError as error:
            raise LocateError(f"{a} and {b}: {error}") from error
    return found


def differences(first: UnitSet, second: UnitSet) -> tuple[str, ...]:
    """Fields of the provenance that are not the same; models count by their digests, data by their files."""
    found = []
    for name in ("method", "options", "model", "donor", "data", "template", "seed"):
        values = [_identity(name, getattr(each.provenance, name)) for each in (first, second)]
        if values[0] != values[1]:
            found.append(name)
    return tuple(found)


def _identity(name: str, value: Any) -> Any:
    if name in ("model", "donor"):
        return value and (value.weights_sha256, value.tokenizer_sha256)
    return sorted(file.sha256 for file in value) if name == "data" else value


def layer_profile(found: UnitSet) -> NDArray[np.int64]:
    """Number of selected units in each layer, ``[layers]``, all components together."""
    counts = [chosen.sum(axis=1, dtype=np.int64) for chosen in found.selected.values()]
    profile: NDArray[np.int64] = np.sum(counts, axis=0)
    return profile


def ranked(found: UnitSet) -> Float64Array:
    """The scores of all candidates, highest first."""
    flat = np.concatenate([scores.ravel() for scores in found.scores.values()])
    return np.sort(flat[~np.isnan(flat)])[::-1]


def pearson(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Pearson correlation of two vectors; NaN for fewer than two entries, or if all of one are equal."""
    if len(first) < 2 or _constant(first) or _constant(second):
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])


def _constant(values: NDArray[Any]) -> bool:
    return bool((values == values[0]).all())


def _correlation(first: UnitSet, second: UnitSet, where: Mapping[Component, BoolArray]) -> Correlation:
    a, b = (
        np.concatenate([each.scores[name][mask] for name, mask in where.items()]) for each in (first, second)
    )
    if len(a) < 2 or _constant(a) or _constant(b):
        return Correlation(len(a), float("nan"), float("nan"))
    return Correlation(
        len(a), float(stats.spearmanr(a, b).statistic), float(stats.kendalltau(a, b).statistic)
    )


def _overlap(first: UnitSet, second: UnitSet, both: Mapping[Component, BoolArray]) -> Overlap:
    a = {name: first.selected[name] & mask for name, mask in both.items()}
    b = {name: second.selected[name] & mask for name, mask in both.items()}
    shared = sum(int((a[name] & b[name]).sum()) for name in both)
    # One row a component and layer: candidates there, and how many of them each set selects.
    rows = np.array(
        [
            (mask[layer].sum(), a[name][layer].sum(), b[name][layer].sum())
            for name, mask in both.items()
            for layer in range(len(mask))
        ],
        dtype=np.int64,
    )
    total, of_a, of_b = (int(count) for count in rows.sum(axis=0))
    rows = rows[rows[:, 0] > 0]
    return Overlap(
        candidates=total,
        first=of_a,
        second=of_b,
        outside=len(first) + len(second) - of_a - of_b,
        shared=shared,
        jaccard=shared / (of_a + of_b - shared) if of_a + of_b else float("nan"),
        expected=of_a * of_b / total if total else 0.0,
        p_value=float(stats.hypergeom(total, of_a, of_b).sf(shared - 1)) if shared else 1.0,
        expected_same_layers=float((rows[:, 1] * rows[:, 2] / rows[:, 0]).sum()),
        p_value_same_layers=_at_least_in_layers(shared, rows) if shared else 1.0,
    )


def _at_least_in_layers(shared: int, rows: NDArray[np.int64]) -> float:
    """P(X ≥ shared) of a sum of independent hypergeometric counts, one a row of (candidates, first, second).

    Its distribution is the convolution of theirs; all terms are positive, so nothing cancels in the tail.
    """
    total = np.ones(1)
    for candidates, of_a, of_b in rows:
        support = np.arange(min(of_a, of_b) + 1)
        total = np.convolve(total, stats.hypergeom(candidates, of_a, of_b).pmf(support))
    return min(1.0, float(total[shared:].sum()))
