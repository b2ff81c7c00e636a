"""What a fit will read, of which prompts: everything that can be settled before the model runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from guard.baselines import RANDOM_DRAWS
from guard.bundle import DataFile
from guard.data import Dataset, Prompt
from guard.engine.errors import GuardStartupError
from guard.engine.support import refuse_unservable
from guard.fit_settings import FitError, FitSettings
from guard.groups import requests
from guard.observe import Subject
from guard.sites import ModelShape
from guard.units import (
    Units,
    every_unit,
    located_with,
    random_like,
    random_units,
    read_units,
    union,
    within_layers,
)

MEMORY_LIMIT = 12 * 2**30
"""Most bytes of activations that one role may take; beyond it units have to be named."""


class Plan(NamedTuple):
    """What a fit will read, of which prompts."""

    fit: Dataset
    """With hard negatives in it, and without what nearly equals a prompt of another role."""
    hard: frozenset[Prompt]
    units: Units
    """What the probe is chosen from."""
    draws: list[Units]
    """Random controls that are read in the same pass, if units are named."""
    read: Units
    """All of them together."""
    located: tuple[DataFile, ...]
    """The data that chose the units."""

    def controls(self, units: Units, shape: ModelShape, seed: int) -> list[Units]:
        """Random units of the same layers, as many as ``units``; none if whole layers were taken."""
        layers = {site.layer for site in units}
        if self.draws:
            return [within_layers(draw, layers) for draw in self.draws]
        return [] if units == within_layers(self.units, layers) else _draws(units, shape, seed)


def prepare(
    subject: Subject,
    settings: FitSettings,
    fit: Dataset,
    threshold: Dataset,
    evaluation: Dataset | None = None,
    hard_negatives: Dataset | None = None,
) -> Plan:
    """Check everything that can be checked before the model runs. Raises FitError or UnitsError."""
    shape = subject.checkpoint.shape
    try:
        refuse_unservable(subject.checkpoint.path)
    except GuardStartupError as error:
        raise FitError(f"a probe could be fitted, but the engine would not serve it: {error}") from error
    units = every_unit(shape, settings.sites) if settings.units != "file" else ()
    located: tuple[DataFile, ...] = ()
    if settings.units_file:
        weights = subject.checkpoint.weights_sha256
        units = read_units(settings.units_file, shape, weights_sha256=weights)
        located = _located_with(settings.units_file, threshold, evaluation)
    elif settings.units == "random":
        units = random_units(units, settings.max_units, seed=settings.seed)
    draws = _draws(units, shape, settings.seed) if settings.units in ("file", "random") else []
    fit, hard = _merged(fit, hard_negatives)
    fit, hard = _apart(fit, hard, [threshold, *([evaluation] if evaluation else [])])
    read = union([units, *draws]) if draws else units
    _check_memory(read, subject, max(len(d.prompts) for d in (fit, threshold, evaluation) if d))
    return Plan(fit, hard, units, draws, read, located)


def _merged(fit: Dataset, hard: Dataset | None) -> tuple[Dataset, frozenset[Prompt]]:
    """One data set to fit on, and which of it are hard negatives. Raises FitError when one is not benign."""
    if hard is None:
        return fit, frozenset()
    if harmful := hard.sources("harmful"):
        raise FitError(
            f"hard negatives are benign prompts, but those of {', '.join(harmful)} are labelled harmful; "
            "give them with --data"
        )
    dropped = Counter(fit.dropped) + Counter(hard.dropped)
    files = fit.files + tuple(file.model_copy(update={"role": "hard_negative"}) for file in hard.files)
    merged = replace(fit, prompts=fit.prompts + hard.prompts, files=files, dropped=dict(dropped))
    return merged, frozenset(hard.prompts)


def _apart(
    fit: Dataset, hard: frozenset[Prompt], others: Sequence[Dataset]
) -> tuple[Dataset, frozenset[Prompt]]:
    """Without what is nearly equal to a prompt of another role, which exact comparison has let through."""
    prompts = [*fit.prompts, *(prompt for dataset in others for prompt in dataset.prompts)]
    groups = requests(prompts)
    clash = np.isin(groups[: len(fit.prompts)], groups[len(fit.prompts) :])
    if not clash.any():
        return fit, hard
    kept = tuple(prompt for prompt, out in zip(fit.prompts, clash, strict=True) if not out)
    dropped = {**fit.dropped, "nearly equal to one in another role": int(clash.sum())}
    return replace(fit, prompts=kept, dropped=dropped), hard & frozenset(kept)


def _located_with(units_file: Path, *datasets: Dataset | None) -> tuple[DataFile, ...]:
    """The files that chose the units. Raises FitError when one is to set thresholds or to evaluate."""
    files = located_with(units_file)
    digests = {file.sha256 for file in files}
    for dataset in filter(None, datasets):
        for file in dataset.files:
            if file.sha256 in digests:
                raise FitError(
                    f"{file.name} was used to locate the units of {units_file.name} and cannot be "
                    f"{dataset.role} data; use other prompts"
                )
    return files


def _draws(units: Units, shape: ModelShape, seed: int) -> list[Units]:
    return [random_like(units, shape, seed=1000 * seed + i) for i in range(RANDOM_DRAWS)]


def _check_memory(units: Units, subject: Subject, prompts: int) -> None:
    width = subject.width(units)
    if width * prompts * 4 > MEMORY_LIMIT:
        raise FitError(
            f"{prompts} prompts × {width} activations take {width * prompts * 4 / 2**30:.0f} GiB, the "
            f"limit is {MEMORY_LIMIT / 2**30:.0f}; name the units to read (--units FILE) or fewer prompts"
        )
