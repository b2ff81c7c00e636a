"""How much of a model's behaviour goes with a set of units: the causal effect of taking them out.

Methods that read one model have no donor to patch from; their units are switched off instead. What is left
is held against another model that lacks the behaviour (an aligned model's base): 1 when the model without
the units behaves like that one, 0 when nothing changes. A model that is merely broken refuses nothing
either, so its harmless answers are to be looked at as well: see ``likelihood``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from guard.locate.ablation import Ablation, Head, ablated
from guard.locate.causal import SELECTED, Array, Cost, Measured, measured
from guard.locate.change import Text
from guard.locate.deactivate import deactivated
from guard.locate.decoding import greedy
from guard.locate.errors import LocateError
from guard.locate.sweep import log_probabilities
from guard.locate.twins import Twin
from guard.locate.unit_set import UnitSet
from guard.prompts import Tokens


@contextmanager
def without(model: Any, found: UnitSet, *, heads: Ablation | None = None) -> Iterator[None]:
    """Run the block without the selected units of a set. Raises LocateError.

    Their coordinates become zero; whole heads are ablated in the way named instead, if one is named.
    """
    units = found.units()
    if heads is None:
        with deactivated(model, units):
            yield
        return
    if units.keys() != {"attention"}:
        raise LocateError(f"only whole heads can be ablated by {heads}; got units of {sorted(units)}")
    chosen = [Head(layer, head) for layer, those in units["attention"].items() for head in those]
    with ablated(model, chosen, heads):
        yield


def measure_removal(
    twin: Twin,
    other: Twin,
    prompts: Sequence[Tokens],
    selected: UnitSet,
    controls: Mapping[str, UnitSet],
    cost: Cost,
    *,
    heads: Ablation | None = None,
    new_tokens: int = 128,
    batch_tokens: int = 8192,
    resamples: int = 2000,
    seed: int = 0,
    progress: bool = False,
) -> Measured:
    """Let ``twin`` answer whole and without each set, and hold the costs against those of ``other``.

    In the result ``recipient`` is ``twin``, ``donor`` is ``other``. Raises LocateError.
    """
    settings: dict[str, Any] = {
        "new_tokens": new_tokens,
        "batch_tokens": batch_tokens,
        "progress": progress,
    }
    answers = {"recipient": greedy(twin, prompts, **settings), "donor": greedy(other, prompts, **settings)}
    sets = {SELECTED: selected, **controls}
    if len(sets) <= len(controls) or sets.keys() & answers.keys():
        raise LocateError(f"a control may not be called {SELECTED!r}, recipient or donor")
    for name, found in sets.items():
        with without(twin.model, found, heads=heads):
            answers[name] = greedy(twin, prompts, **settings)
    costs = {name: np.array(cost(prompts, found), dtype=np.float64) for name, found in answers.items()}
    counts = {name: len(found) for name, found in sets.items()}
    return measured(costs, counts, controls, resamples=resamples, seed=seed)


def likelihood(twin: Twin, texts: Sequence[Text], *, batch_tokens: int = 4096) -> Array:
    """Mean log-probability of each answer's tokens, in nats, ``[texts]``."""
    total = log_probabilities(twin, texts, batch_tokens=batch_tokens)
    return np.asarray(total / [len(answer) for _, answer in texts], dtype=np.float64)
