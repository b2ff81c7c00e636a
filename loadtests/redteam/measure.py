"""The measurement: every attack on the shipped guard and on the refitted one, and what refitting costs.

Three figures an attack: on the shipped guard; *transferred*, the texts that were found against the shipped
guard, scored by the refitted one; *adaptive*, the attack run again against the refitted one. Only the last
says what is left to an attacker who knows that the probe was refitted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from guard.cache import digest_of
from guard.figures import Scored, ranking
from guard.locate.results import versions
from guard.resample import requests_of
from guard.scorer import Scorer
from guard.stats import wilson
from loadtests.redteam import refit
from loadtests.redteam.attacks import TEST, Attack
from loadtests.redteam.outcomes import Outcome, count, tried
from loadtests.redteam.suffixes import Method, Settings, search
from loadtests.redteam.world import RATE, Guard, Sizes, World, shuffled
from models.recipe.parts import part

METHODS: dict[str, Method] = {"random search": "random", "gradient": "gradient"}


def searches(sizes: Sizes) -> dict[str, tuple[Method, Settings]]:
    """The attacks that search a suffix, by name."""
    return {
        f"{name}, {length} token{'s' * (length > 1)}": (method, sizes.search._replace(length=length))
        for length in sizes.lengths
        for name, method in METHODS.items()
    }


class Measurement:
    """One run; parts that were done before are read back from ``store``.

    The store holds attacked prompts, as the cache of the detection study does; the document does not.
    """

    def __init__(self, world: World, sizes: Sizes, store: Path, *, progress: bool = False) -> None:
        self.world = world
        self.sizes = sizes
        self.store = store
        self.progress = progress
        self.shipped = world.guard(world.target.probe)
        self.about = [
            digest_of([world.target.probe.weight.tolist(), world.target.probe.bias.tolist()]),
            digest_of([p.text for role in (world.fit, world.test) for p in role.seen.prompts]),
            round(self.shipped.cut, 3),
            sizes,
            versions(),
        ]
        self.seconds = 0.0

    def document(self) -> dict[str, Any]:
        """All figures. No prompt and no suffix is in it."""
        behind = self._part("suffixes to fit on", self._suffixes)
        weight, bias = self._part("refitted probe", lambda: self._refit(behind))
        probe = Scorer.linear(np.array(weight, dtype=np.float32), bias)
        refitted = self.world.guard(probe)
        asked = {
            name: self.world.flagged(guard, self.sizes.asked, self.sizes.seed)
            for name, guard in (("shipped", self.shipped), ("refitted", refitted))
        }
        attacks: dict[str, Any] = {}
        attacks["none"] = self._part("none", lambda: self._unattacked(asked))
        for attack in TEST:
            attacks[attack.name] = self._part(attack.name, partial(self._ask, attack, asked, refitted))
        last: list[str] = []
        for name, (method, settings) in searches(self.sizes).items():
            found = self._part(name, partial(self._search, method, settings, asked, refitted))
            attacks[name] = found["counts"]
            last += found["suffixes"]
        return {
            "versions": versions(),
            "sizes": {
                **self.sizes._asdict(),
                "search": self.sizes.search._asdict(),
                "fit_search": self.sizes.fit_search._asdict(),
            },
            "rate": RATE,
            "cut": {"shipped": self.shipped.cut, "refitted": refitted.cut},
            "rows_fitted": {
                "plain": len(self.world.fit.seen.prompts),
                "attacked": 2 * self.sizes.fitted * (self.sizes.ways + bool(behind)),
                "suffixes": len(behind),
            },
            "attacks": attacks,
            "cost": self._part("cost", lambda: self._cost(refitted, last)),
            "cpu_minutes": self.seconds / 60,
        }

    def _part(self, name: str, compute: Callable[[], Any]) -> Any:
        def timed() -> dict[str, Any]:
            if self.progress:
                print(name, flush=True)
            begun = time.process_time()
            value = compute()
            return {"value": value, "cpu_s": time.process_time() - begun}

        done = part(self.store, [name, *self.about], timed)
        self.seconds += done["cpu_s"]
        return done["value"]

    def _suffixes(self) -> list[str]:
        return refit.suffixes(self.world, self.shipped, self.sizes, progress=self.progress)

    def _refit(self, behind: Sequence[str]) -> tuple[list[float], float]:
        probe = refit.refit(self.world, refit.rows(self.world, behind, self.sizes))
        return probe.weight[0].tolist(), float(probe.bias[0])

    def _unattacked(self, asked: dict[str, list[str]]) -> dict[str, Any]:
        """How many of the flagged requests the model answers as they are."""
        return {
            name: count([Outcome(True, 1, text) for text in texts], self.world.answers, family="none")
            for name, texts in asked.items()
        }

    def _ask(self, attack: Attack, asked: dict[str, list[str]], refitted: Guard) -> dict[str, Any]:
        seed, world = self.sizes.seed, self.world
        texts = list(dict.fromkeys(text for each in asked.values() for text in each))
        made = [attack.candidates(text, seed) for text in texts]
        features = world.target.features([text for each in made for text in each])
        ends = np.cumsum([len(each) for each in made])
        spans = {t: (c, slice(e - len(c), e)) for t, c, e in zip(texts, made, ends, strict=True)}

        def outcomes(guard: Guard, requests: Sequence[str]) -> Iterator[Outcome]:
            logits = np.where(np.isnan(features).any(axis=1), np.nan, guard.probe.logits(features))
            for request in requests:
                candidates, span = spans[request]
                yield tried(candidates, logits[span], guard.cut)

        before = list(outcomes(self.shipped, asked["shipped"]))
        after = list(outcomes(refitted, asked["refitted"]))
        return self._three(before, after, asked["shipped"], refitted, attack.family)

    def _search(
        self, method: Method, settings: Settings, asked: dict[str, list[str]], refitted: Guard
    ) -> dict[str, Any]:
        found = {}
        for guard, which in ((self.shipped, "shipped"), (refitted, "refitted")):
            found[which] = search(
                self.world.target.under(guard.probe),
                asked[which][: self.sizes.searched],
                guard.cut,
                method,
                settings,
                seed=self.sizes.seed,
                progress=self.progress,
            )
        requests = asked["shipped"][: self.sizes.searched]
        before, after = (
            [Outcome(each.passed, each.queries, each.text) for each in found[which]] for which in asked
        )
        return {
            "counts": self._three(before, after, requests, refitted, "searched suffix"),
            "suffixes": [
                each.text[len(request) :]
                for request, each in zip(requests, found["shipped"], strict=True)
                if each.passed
            ],
        }

    def _three(
        self,
        before: Sequence[Outcome],
        after: Sequence[Outcome],
        requests: Sequence[str],
        refitted: Guard,
        family: str,
    ) -> dict[str, Any]:
        """On the shipped guard, transferred, adaptive."""
        target = self.world.target
        still = refitted.flags(target.features(requests))
        pairs = [o for o, flagged in zip(before, still, strict=True) if flagged]
        seen = refitted.flags(target.features([o.text for o in pairs])) if pairs else np.empty(0, dtype=bool)
        moved = [o._replace(passed=o.passed and not s) for o, s in zip(pairs, seen.tolist(), strict=True)]
        answers = self.world.answers
        return {
            "shipped": count(before, answers, family=family),
            "transferred": count(moved, None, family=family),
            "refitted": count(after, answers, family=family),
        }

    def _cost(self, refitted: Guard, behind: Sequence[str]) -> dict[str, Any]:
        """What each guard does to test rows as they are, and to benign ones under attack."""
        world, pool = self.world, self.world.pooled
        seen, features = world.test.seen, world.test.features[pool]
        harmful, sources = seen.harmful[pool], seen.sources[pool]
        requests = requests_of(seen.prompts)[pool]
        benign = [
            p.text for p, bad, kept in zip(seen.prompts, seen.harmful, pool, strict=True) if kept and not bad
        ]
        benign = shuffled(benign, self.sizes.seed)[: self.sizes.benign]
        attacked: dict[str, list[str]] = {}
        for attack in TEST:
            attacked.setdefault(attack.family, []).extend(
                attack.candidates(t, self.sizes.seed)[0] for t in benign
            )
        if behind:
            # One out of each part of the list in turn: every length and method is there.
            step = max(1, len(behind) // len(benign))
            attacked["searched suffix"] = [t + behind[i * step % len(behind)] for i, t in enumerate(benign)]
        read = {family: world.target.features(texts) for family, texts in attacked.items()}
        document: dict[str, Any] = {}
        for name, guard in (("shipped", self.shipped), ("refitted", refitted)):
            flagged = guard.flags(features)
            document[name] = {
                "ranking": ranking(
                    Scored(guard.probe.logits(features), harmful, sources, requests), world.bootstrap
                ),
                "harmful_flagged": wilson(int(flagged[harmful].sum()), int(harmful.sum())).document(),
                "benign_flagged": wilson(int(flagged[~harmful].sum()), int((~harmful).sum())).document(),
                "attacked_benign_flagged": {
                    family: _rate(guard, rows[~np.isnan(rows).any(axis=1)]) for family, rows in read.items()
                },
            }
        return document


def _rate(guard: Guard, features: Any) -> dict[str, float]:
    return wilson(int(guard.flags(features).sum()), len(features)).document()
