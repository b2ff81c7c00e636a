"""Adversarial refitting: the fit once more with attacked rows of both labels, and the threshold set anew.

A row keeps its label under attack, and benign rows are attacked just like harmful ones, so that being
attacked says nothing about the label. Only rows to fit on are used, and other words than those of the test.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from guard.capture import Float32Array
from guard.fitting import Role
from guard.probe import fit_probe
from guard.scorer import Scorer
from loadtests.redteam.attacks import FIT
from loadtests.redteam.suffixes import search
from loadtests.redteam.world import Guard, Sizes, World, shuffled
from models.recipe.corpus import digest


class Attacked(NamedTuple):
    """Rows to fit on besides the plain ones."""

    texts: list[str]
    harmful: list[bool]


def suffixes(world: World, guard: Guard, sizes: Sizes, *, progress: bool = False) -> list[str]:
    """Suffixes that bring fit requests past ``guard``, by gradient; where none passed, the best one."""
    rows = np.flatnonzero(_plain(world.fit) & world.fit.seen.harmful & guard.flags(world.fit.features))
    texts = shuffled([world.fit.seen.prompts[row].text for row in rows], sizes.seed)[: sizes.suffixes]
    found: list[str] = []
    for turn, length in enumerate(sizes.lengths):
        part = texts[turn :: len(sizes.lengths)]
        settings = sizes.fit_search._replace(length=length)
        target = world.target.under(guard.probe)
        results = search(target, part, guard.cut, "gradient", settings, seed=sizes.seed, progress=progress)
        found += [each.text[len(text) :] for text, each in zip(part, results, strict=True) if each.queries]
    return found


def rows(world: World, behind: Sequence[str], sizes: Sizes) -> Attacked:
    """Some rows of both labels, each in a few attacks' words, and with a suffix of ``behind``."""
    made = Attacked([], [])
    plain = _plain(world.fit)
    for harmful in (True, False):
        chosen = np.flatnonzero(plain & (world.fit.seen.harmful == harmful))
        texts = shuffled([world.fit.seen.prompts[row].text for row in chosen], sizes.seed)[: sizes.fitted]
        for number, text in enumerate(texts):
            draw = random.Random(digest(f"{sizes.seed}:refit:{text}"))
            for attack in draw.sample(FIT, sizes.ways):
                made.texts.append(draw.choice(attack.candidates(text, sizes.seed)))
                made.harmful.append(harmful)
            if behind:
                made.texts.append(text + behind[number % len(behind)])
                made.harmful.append(harmful)
    return made


def refit(world: World, attacked: Attacked) -> Scorer:
    """The probe of plain and attacked rows together; rows that the context cannot hold are left out."""
    features = world.target.features(attacked.texts)
    held = ~np.isnan(features).any(axis=1)
    together: Float32Array = np.concatenate([world.fit.features, features[held]])
    positive = np.concatenate([world.fit.seen.harmful, np.array(attacked.harmful, dtype=bool)[held]])
    return fit_probe(together, positive, strength=world.strength)


def _plain(role: Role) -> NDArray[np.bool_]:
    """Rows as their sources have them, not in other words."""
    return np.array([p.pair is None or p.pair == p.text for p in role.seen.prompts], dtype=bool)
