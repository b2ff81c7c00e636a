"""What the study is about, and the prompts and activations that all its parts share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from guard.bundle import Bundle
from guard.cache import Cache, cache_root, digest_of
from guard.checkpoint import Checkpoint
from guard.data import Dataset, Prompt, load
from guard.fit import fit_bundle
from guard.fit_plan import prepare
from guard.fit_settings import FitSettings
from guard.fitting import Role
from guard.lab import materialise
from guard.locate.results import versions
from guard.observe import Subject
from guard.prompts import encode
from guard.resample import Bootstrap
from guard.units import Units, every_unit
from models.recipe import bundle_data
from models.recipe.parts import part

VARIANTS = ("lab-partial", "lab-sft", "lab-aligned", "lab-aligned-dense")
"""The first one is what the shipped bundle is for."""
APART = ("structural_twins",)
"""Benign sources that are reported, but not pooled: see `models/recipe/sources.py`."""
SETTINGS = FitSettings(label="harmful_prompt", units="all", sites=("attention",), apart=APART)
"""How the shipped bundle is fitted (`models/recipe/bundle.py`)."""
JUDGED_TOKENS = 12


@dataclass
class Study:
    """Folders, and what has been read so far."""

    data: Path
    lab: Path
    store: Path
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    _subjects: dict[str, Subject] = field(default_factory=dict)

    @cached_property
    def folder(self) -> Path:
        """The prompts of each role, written anew."""
        out = self.store / "prompts"
        bundle_data.write_all(self.data, out)
        return out

    @cached_property
    def evaluate(self) -> Dataset:
        """Prompts of the test sources."""
        return load("evaluate", [self.folder / "evaluate"])

    @cached_property
    def threshold(self) -> Dataset:
        """Benign prompts that set thresholds."""
        return load("threshold", [self.folder / "threshold"], barred=[self.evaluate])

    @cached_property
    def fit(self) -> Dataset:
        """Prompts to fit on, those in other words among them."""
        return load("fit", [self.folder / "fit"], barred=[self.evaluate, self.threshold])

    @cached_property
    def plain(self) -> Dataset:
        """Prompts to fit on as their sources have them: of a pair, the row whose text is the pair's name."""
        kept = tuple(p for p in self.fit.prompts if p.pair is None or p.pair == p.text)
        return replace(self.fit, prompts=kept)

    def subject(self, variant: str) -> Subject:
        """A lab model."""
        if variant not in self._subjects:
            checkpoint = Checkpoint.open(materialise(self.lab, variant), variant)
            self._subjects[variant] = Subject(
                checkpoint, Cache(cache_root()), new_tokens=JUDGED_TOKENS, progress=True
            )
        return self._subjects[variant]

    def units(self, variant: str) -> Units:
        """Every unit of a model, attention heads and neurons."""
        return every_unit(self.subject(variant).checkpoint.shape, ("mlp", "attention"))

    def role(self, variant: str, dataset: Dataset, units: Units) -> Role:
        """What a model made of the prompts of one role; harmful ones are answered, but for thresholds."""
        subject = self.subject(variant)
        seen = subject.observe(dataset, judge="none" if dataset.role == "threshold" else "harmful")
        return Role(seen, subject.features(seen.tokens, units, dataset.role))

    def bundle(self, variant: str) -> Bundle:
        """The shipped bundle; for the other models one that is fitted just like it, and kept nowhere."""
        if variant == VARIANTS[0]:
            return Bundle.load(self.lab / "bundle")
        return fit_bundle(self.subject(variant), SETTINGS, self.fit, self.threshold)

    def fitted_on(self, variant: str, dataset: Dataset) -> Dataset:
        """What a fit keeps of its prompts: without those nearly equal to one of another role."""
        plan = prepare(self.subject(variant), SETTINGS, dataset, self.threshold, self.evaluate)
        return plan.fit

    def scores(self, variant: str, bundle: Bundle, prompts: Sequence[Prompt]) -> NDArray[np.float64]:
        """Logits ``[n]`` of conversations, NaN for those that the model's context cannot hold."""
        subject = self.subject(variant)
        limit = subject.checkpoint.context - subject.new_tokens
        tokens = [encode(subject.tokenizer, prompt.chat()) for prompt in prompts]
        fits = np.array([len(each) <= limit for each in tokens])
        found = np.full(len(prompts), np.nan)
        if fits.any():
            kept = [each for each, fit in zip(tokens, fits, strict=True) if fit]
            found[fits] = bundle.logits(subject.features(kept, bundle.card.sites, "reworded"))
        return found

    def part(self, key: Any, compute: Callable[[], Any]) -> Any:
        """A part of the study: read back, or computed and kept."""
        weights = [self.subject(variant).checkpoint.weights_sha256 for variant in VARIANTS]
        bundle = Bundle.load(self.lab / "bundle")
        probe = digest_of([row.tolist() for row in (bundle.scorer.weight, bundle.scorer.bias)])
        limits = [round(threshold.logit, 3) for threshold in bundle.card.thresholds]
        about = [key, weights, probe, limits, self.bootstrap.draws, self.bootstrap.seed, versions()]
        return part(self.store, about, compute)
