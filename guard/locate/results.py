"""What every method finds, and how that becomes a UnitSet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors.numpy import save

import guard
from guard.cache import Cache, write_whole
from guard.checkpoint import Checkpoint
from guard.data import Dataset
from guard.locate import templates
from guard.locate.passes import Kept
from guard.locate.unit_set import BoolArray, Component, Float64Array, Method, Provenance, UnitSet
from guard.prompts import Tokens


class Scores(NamedTuple):
    """What a method finds in loaded models, before it is given a provenance."""

    scores: dict[Component, Float64Array]
    """float64 ``[layers, units]``; higher is more of what the method looks for; NaN: no candidate."""
    selected: dict[Component, BoolArray]
    """``[layers, units]``."""
    cost: dict[str, float]
    """``forward_passes``: texts that went through a whole model, each token once, whether in batches or while
    an answer grew; a pass of half the blocks counts half. ``tokens``: theirs, counted alike. ``seconds``.
    What was found in a cache costs nothing. Methods may add counts of their own."""
    extra: dict[str, NDArray[Any]]
    """Further arrays of the method, by name."""
    completions: tuple[tuple[Tokens, Tokens], ...] = ()
    """Prompts and answers that were compared, exact token ids; of methods that let a model answer."""


class Running(NamedTuple):
    """How a run is carried out, apart from the method's options."""

    device: str
    dtype: str
    batch_tokens: int
    seed: int
    progress: bool
    cache: Cache | None
    statistics: Path | None


def run_one_model(
    method: Method,
    find: Callable[..., Scores],
    checkpoint: Checkpoint,
    dataset: Dataset,
    options: Any,
    how: Running,
) -> UnitSet:
    """Run a method that reads one model, ``find(model, harmful, benign, …)``, on prompts as token ids.

    ``find`` is given ``batch_tokens``, ``progress`` and ``kept`` by name; prompts are rendered by the
    template of the options. Raises LocateError, CheckpointError.
    """
    tokenizer = checkpoint.load_tokenizer()
    harmful, benign = templates.tokens_of(tokenizer, dataset, options.template)
    found = find(
        checkpoint.load_model(how.dtype, how.device),
        harmful,
        benign,
        batch_tokens=how.batch_tokens,
        progress=how.progress,
        kept=Kept.of_checkpoint(how.cache, checkpoint, dtype=how.dtype, device=how.device),
    )
    return unit_set(
        method, found, options, checkpoint, [dataset], tokenizer, seed=how.seed, statistics=how.statistics
    )


def unit_set(
    method: Method,
    found: Scores,
    options: Any,
    checkpoint: Checkpoint,
    datasets: Sequence[Dataset],
    tokenizer: Any,
    *,
    seed: int = 0,
    donor: Checkpoint | None = None,
    statistics: Path | None = None,
) -> UnitSet:
    """Scores with their provenance; ``statistics`` names a safetensors file for ``Scores.extra``.

    ``options`` is the method's dataclass, with a field ``template``.
    """
    provenance = Provenance(
        method=method,
        options=asdict(options),
        model=checkpoint.card(),
        donor=donor.card() if donor else None,
        data=tuple(file for dataset in datasets for file in dataset.files),
        template=templates.identity(tokenizer, options.template),
        seed=seed,
        versions=versions(),
        cost=found.cost,
    )
    made = UnitSet(provenance, found.scores, found.selected)
    if statistics is not None:
        keep_arrays(statistics, found.extra)
    return made


def versions() -> dict[str, str]:
    """Of everything that scores depend on."""
    return {
        "neuronguard": guard.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def keep_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays as one safetensors file, whole or not at all."""
    content = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    write_whole(path, lambda file: file.write(content))
