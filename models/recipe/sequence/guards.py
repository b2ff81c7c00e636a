"""The guards that are compared: the shipped one, which reads the last token, and four that read every token.

All read the same heads and are fitted on the same prompts. Their scores come out of one pass over the
prompts: each is some rows of weights, and the rest is pooling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from guard.bundle import Bundle
from guard.cache import digest_of
from guard.data import Dataset
from guard.fit import fit_bundle
from guard.pooling import Pooling, pool, running
from guard.prompts import Tokens
from guard.scorer import Float32Array
from guard.sequence_scores import outputs, token_activations
from models.recipe.detection.study import SETTINGS, VARIANTS, Study

LAST = "last token"
POOLINGS: Mapping[str, Pooling] = {
    "ema": Pooling(kind="ema", window=64, rate=0.125),
    "rolling": Pooling(kind="rolling", window=16),
    "softmax": Pooling(kind="softmax", temperature=1.0),
    "attention": Pooling(kind="attention", heads=2),
}
"""As `neuronguard fit --pooling` has them by default."""
VARIANT = VARIANTS[0]


@dataclass(frozen=True)
class Guards:
    """Bundles by name, the shipped one first, and what they make of prompts."""

    study: Study

    @cached_property
    def fit(self) -> Dataset:
        """What the shipped bundle is fitted on: without what nearly equals a test prompt."""
        return self.study.fitted_on(VARIANT, self.study.fit)

    @cached_property
    def bundles(self) -> dict[str, Bundle]:
        """Each is fitted as `neuronguard fit` does it, and kept."""
        found, subject = {LAST: self.study.bundle(VARIANT)}, self.study.subject(VARIANT)
        for name, pooling in POOLINGS.items():
            settings = replace(SETTINGS, pooling=pooling)
            files = [file.sha256 for data in (self.study.fit, self.study.threshold) for file in data.files]
            key = digest_of([settings.recorded(), pooling.model_dump(), files, found[LAST].digest])
            folder = self.study.store / "bundles" / f"{name}-{key[:16]}"
            if not folder.exists():
                print(f"fit: {name}", flush=True)
                # One reading of the threshold prompts for all four.
                calm = subject.observe(self.study.threshold, judge="none")
                token_activations(subject, calm.tokens, found[LAST].card.sites, "threshold")
                fit_bundle(subject, settings, self.fit, self.study.threshold).save(folder)
            found[name] = Bundle.load(folder)
        return found

    def thresholds(self, rate: float = 0.01) -> dict[str, float]:
        """The logit of each bundle's operating point."""
        return {name: bundle.card.threshold(rate).logit for name, bundle in self.bundles.items()}

    def outputs(self, prompts: Sequence[Tokens], name: str) -> list[dict[str, Float32Array]]:
        """For each prompt the outputs ``[tokens, channels]`` of each guard; the shipped one has one."""
        probes = {n: b.sequence or b.scorer for n, b in self.bundles.items()}
        weight = np.concatenate([probe.weight for probe in probes.values()])
        bias = np.concatenate([probe.bias for probe in probes.values()])
        ends = np.cumsum([len(probe.weight) for probe in probes.values()])[:-1]
        units = self.bundles[LAST].card.sites
        every = outputs(self.study.subject(VARIANT), weight, bias, units, prompts, name)
        return [dict(zip(probes, np.split(part, ends, axis=1), strict=True)) for part in every]

    def logits(self, prompts: Sequence[Tokens], name: str) -> dict[str, NDArray[np.float64]]:
        """The logit of each prompt by each guard, ``[n]``."""
        every = self.outputs(prompts, name)
        found = {LAST: np.array([part[LAST][-1, 0] for part in every], dtype=np.float64)}
        for kind, pooling in POOLINGS.items():
            found[kind] = np.array([pool(pooling, part[kind]) for part in every], dtype=np.float64)
        return found

    def watched(self, prompts: Sequence[Tokens], answers: Sequence[Tokens]) -> list[dict[str, Float32Array]]:
        """What the monitor of each sequence probe sees at each token of each answer."""
        whole = [(*prompt, *answer) for prompt, answer in zip(prompts, answers, strict=True)]
        every = self.outputs(whole, "answers")
        return [
            {kind: _last(running(pooling, part[kind]), len(answer)) for kind, pooling in POOLINGS.items()}
            for part, answer in zip(every, answers, strict=True)
        ]


def _last(scores: Float32Array, number: int) -> Float32Array:
    return scores[len(scores) - number :]
