"""Ways to run the unaligned twin: as it is, patched from its donor, or under a stored patch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from guard import patch as patches
from guard.locate.controls import random_like, window
from guard.locate.decoding import greedy
from guard.locate.patching import dap_generate, units_of
from guard.locate.sweep import log_probabilities, sweep
from guard.locate.twins import Twin
from guard.locate.unit_set import UnitSet
from guard.patch import Patch
from guard.patch_card import PatchSite
from guard.prompts import Tokens
from guard.units import Units
from models.recipe.patching.positions import Reach, reaching
from models.recipe.patching.rankings import donor_mean, units
from models.recipe.patching.study import BATCH, Lab, judged

Kind = Literal["recipient", "donor", "dynamic", "factors", "mean"]


class Way(NamedTuple):
    """One way to answer. What is not said is as in ``Way("recipient")``."""

    kind: Kind
    ranking: str = ""
    share: float = 0.0
    control: str = ""
    """``random N`` or ``window``: other units in place of the best ones of the ranking."""
    layers: tuple[int, ...] = ()
    """Only these layers; empty: all but the last."""
    reach: Reach = "all"
    """The tokens that are patched."""
    of: str = ""
    """For ``mean``: the ranking over whose tokens the donor's mean was taken."""

    def instead(self, control: str) -> Way:
        """The same with other units."""
        return self._replace(control=control)


def chosen(lab: Lab, way: Way) -> UnitSet:
    """The neurons that are patched."""
    found = units(lab, way.ranking, way.share, way.layers)
    if way.control.startswith("random"):
        return random_like(found, seed=int(way.control.split()[1]))
    return window(found, len(found)) if way.control == "window" else found


def stored(lab: Lab, way: Way) -> Patch:
    """A stored patch as a bundle has it."""
    found = units_of(chosen(lab, way), lab.shape)
    sites = [PatchSite(**site.model_dump()) for site in found]

    def columns(table: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.concatenate([table[site.layer, list(site.units)] for site in sites])

    if way.kind == "factors":
        return patches.stored("factors", sites, lab.shape, scale=columns(lab.vector))
    return patches.stored("mean", sites, lab.shape, scale=0.0, shift=columns(donor_mean(lab, way.of)))


def answers(lab: Lab, way: Way, role: str) -> list[int]:
    """1 for each prompt of a role that was answered, 0 for each that was refused."""

    def run() -> list[int]:
        print("answers:", lab.pair.name, role, *[part for part in way if part], flush=True)
        return judged(lab, role, said(lab, way, lab.prompts(role)))

    found: list[int] = lab.part(["answers", role, *way], run)
    return found


def said(lab: Lab, way: Way, prompts: list[Tokens]) -> list[Tokens]:
    """Greedy answers, as token ids."""
    length = lab.size.new_tokens
    if way.kind == "dynamic":
        found = units_of(chosen(lab, way), lab.shape)
        if way.reach != "all":
            return reaching(lab.recipient, lab.donor, found, prompts, way.reach, length, BATCH)
        return dap_generate(
            lab.recipient, lab.donor, found, prompts, new_tokens=length, batch_tokens=2 * BATCH
        )
    with _alone(lab, way) as twin:
        return greedy(twin, prompts, new_tokens=length, batch_tokens=BATCH)


def likelihoods(lab: Lab, way: Way, which: str) -> list[list[float]]:
    """Log-probabilities, nats, of each answer to a benign request: of its first token, and of the rest."""

    def run() -> list[list[float]]:
        print("likelihood:", lab.pair.name, which, *[part for part in way if part], flush=True)
        whole = lab.texts[which]
        first = _likelihood(lab, way, [(prompt, answer[:1]) for prompt, answer in whole])
        every = _likelihood(lab, way, whole)
        return [[float(a), float(b - a)] for a, b in zip(first, every, strict=True)]

    found: list[list[float]] = lab.part(["likelihood", which, *way], run)
    return found


def _likelihood(lab: Lab, way: Way, texts: list[tuple[Tokens, Tokens]]) -> NDArray[np.float64]:
    if way.kind == "dynamic":
        found: list[Units] = [units_of(chosen(lab, way), lab.shape)]
        return np.asarray(sweep(lab.recipient, lab.donor, found, texts, batch_tokens=BATCH)[0])
    with _alone(lab, way) as twin:
        return log_probabilities(twin, texts, batch_tokens=BATCH)


@contextmanager
def _alone(lab: Lab, way: Way) -> Iterator[Twin]:
    """A model that needs no donor while it answers."""
    if way.kind in ("recipient", "donor"):
        yield lab.recipient if way.kind == "recipient" else lab.donor
        return
    with patches.applied(stored(lab, way), lab.recipient.model):
        yield lab.recipient
