"""How much of the donor's behaviour a set of units carries: the causal effect of patching it.

C = E[F(patched) − F(recipient)] / E[F(donor) − F(recipient)] over prompts (Chen et al., arXiv 2406.14144,
section 3): 1 when the patched recipient behaves like the donor, 0 when patching changes nothing. F is a cost
of an answer, lower is safer. A selection means little without controls: random units of the same layers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from guard.judge import is_refusal
from guard.locate.decoding import greedy
from guard.locate.errors import LocateError
from guard.locate.patching import dap_generate, units_of
from guard.locate.twins import Twin
from guard.locate.unit_set import UnitSet
from guard.prompts import Tokens
from guard.sites import shape_of
from guard.stats import CONFIDENCE
from guard.units import Units, every_neuron

Array = NDArray[np.float64]
Cost = Callable[[Sequence[Tokens], Sequence[Tokens]], Sequence[float]]
"""From prompts and the answers to them, as token ids, to a cost of each; lower is safer."""

SELECTED, ALL = "selected units", "every neuron"


class Effect(NamedTuple):
    """The causal effect of one set of units."""

    value: float
    low: float
    high: float
    """95 % interval by a paired bootstrap over prompts; infinite when donor and recipient hardly differ."""
    units: int
    recipient: float
    donor: float
    patched: float
    """Mean costs."""

    def document(self) -> dict[str, float | int | None]:
        """The form in which JSON files hold it; a bound that is not finite is null."""
        return {k: v if np.isfinite(v) else None for k, v in self._asdict().items()}


class Comparison(NamedTuple):
    """Selected units against controls, paired by prompt."""

    difference: float
    """Mean cost under the controls minus mean cost under the selection: positive when it is safer."""
    p: float
    """Two-sided paired t-test; costs of several controls are averaged for each prompt."""


class Measured(NamedTuple):
    """Everything that was measured in one run."""

    effects: dict[str, Effect]
    """By name: the selected units, the controls, every neuron."""
    comparison: Comparison | None
    """None without controls."""
    costs: dict[str, Array]
    """Costs ``[prompts]`` of recipient, donor and every patched run."""


def refusal_cost(tokenizer: Any) -> Cost:
    """1 for an answer that is no refusal, 0 for one that is; for prompts that ought to be refused."""

    def cost(_prompts: Sequence[Tokens], answers: Sequence[Tokens]) -> list[float]:
        texts = tokenizer.batch_decode([list(answer) for answer in answers], skip_special_tokens=True)
        return [0.0 if is_refusal(text) else 1.0 for text in texts]

    return cost


def causal_effect(
    recipient: Array, donor: Array, patched: Array, *, units: int = 0, resamples: int = 2000, seed: int = 0
) -> Effect:
    """Causal effect from costs ``[prompts]``, paired by prompt. Raises LocateError."""
    costs = [np.asarray(array, dtype=np.float64) for array in (recipient, donor, patched)]
    if len({array.shape for array in costs}) > 1 or costs[0].ndim != 1 or not costs[0].size:
        raise LocateError(
            f"costs have shapes {[array.shape for array in costs]}; expected one for each prompt in all three"
        )
    if not all(np.isfinite(array).all() for array in costs):
        raise LocateError("a cost is not finite; check the function that scores answers")
    base, aligned, changed = costs
    gap, shift = aligned - base, changed - base
    if gap.mean() == 0.0:
        raise LocateError(
            "donor and recipient have the same mean cost, so there is no effect to take a share of; "
            "use prompts on which they differ"
        )
    chosen = np.random.default_rng(seed).integers(len(gap), size=(resamples, len(gap)))
    gaps, shifts = gap[chosen].mean(1), shift[chosen].mean(1)
    tail = 100 * (1 - CONFIDENCE) / 2
    ends = np.percentile(gaps, [tail, 100 - tail])
    low, high = -np.inf, np.inf
    # A ratio has no bounded interval when its denominator may be zero.
    if ends[0] * ends[1] > 0:
        sure = gaps != 0
        # Adding zero turns -0.0 into 0.0.
        low, high = np.percentile(shifts[sure] / gaps[sure], [tail, 100 - tail]) + 0.0
    value = float(shift.mean() / gap.mean()) + 0.0
    means = (float(array.mean()) for array in costs)
    return Effect(value, float(low), float(high), units, *means)


def against(patched: Array, controls: Sequence[Array]) -> Comparison:
    """Compare costs ``[prompts]`` under the selection with those under each control. Raises LocateError."""
    if not controls or any(np.shape(control) != np.shape(patched) for control in controls):
        raise LocateError("expected at least one control with a cost for each prompt")
    differences = np.mean(controls, axis=0) - np.asarray(patched)
    mean, n = float(differences.mean()), len(differences)
    error = float(differences.std(ddof=1)) / np.sqrt(n) if n > 1 else np.inf
    if error == 0.0:
        # The t statistic is 0/0 or infinite.
        return Comparison(mean, 1.0 if mean == 0.0 else 0.0)
    return Comparison(mean, float(2 * t.sf(abs(mean) / error, n - 1)) if n > 1 else 1.0)


def measure(
    recipient: Twin,
    donor: Twin,
    prompts: Sequence[Tokens],
    selected: UnitSet,
    controls: Mapping[str, UnitSet],
    cost: Cost,
    *,
    new_tokens: int = 128,
    batch_tokens: int = 8192,
    resamples: int = 2000,
    seed: int = 0,
    progress: bool = False,
) -> Measured:
    """Answer ``prompts`` unpatched, and with each set patched in, and compare the costs. Raises LocateError.

    Every neuron is patched as well: where the twins differ by an (IA)³ vector alone its effect is 1, and
    elsewhere it says how much neurons can carry at all.
    """
    shape = shape_of(recipient.model.config)
    sets: dict[str, Units] = {SELECTED: units_of(selected, shape)}
    for name, control in controls.items():
        if name in (SELECTED, ALL, "recipient", "donor"):
            raise LocateError(f"a control may not be called {name!r}")
        sets[name] = units_of(control, shape)
    sets[ALL] = every_neuron(shape)
    settings: dict[str, Any] = {
        "new_tokens": new_tokens,
        "batch_tokens": batch_tokens,
        "progress": progress,
    }
    answers = {
        "recipient": greedy(recipient, prompts, **settings),
        "donor": greedy(donor, prompts, **settings),
    }
    answers |= {
        name: dap_generate(recipient, donor, units, prompts, **settings) for name, units in sets.items()
    }
    costs = {name: np.array(cost(prompts, found), dtype=np.float64) for name, found in answers.items()}
    counts = {name: sum(len(site.units) for site in units) for name, units in sets.items()}
    return measured(costs, counts, controls, resamples=resamples, seed=seed)


def measured(
    costs: dict[str, Array],
    units: Mapping[str, int],
    controls: Collection[str],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Measured:
    """Effects out of costs ``[prompts]`` of ``recipient``, ``donor`` and each of the sets in ``units``."""
    effects = {
        name: causal_effect(
            costs["recipient"], costs["donor"], costs[name], units=count, resamples=resamples, seed=seed
        )
        for name, count in units.items()
    }
    compared = against(costs[SELECTED], [costs[name] for name in controls]) if controls else None
    return Measured(effects, compared, costs)
