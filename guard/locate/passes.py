"""What methods that read one model share: usable prompts, padded forward passes, partial results on disk.

A run is cut into the chunks of ``guard.observe.chunks``. What a chunk adds to a statistic is kept in a
``guard.cache.Cache`` as soon as it is complete, so that an interrupted run goes on at the chunk it was in.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors.numpy import save
from torch import Tensor

from guard.cache import Cache, write_whole
from guard.capture import pad
from guard.checkpoint import Checkpoint
from guard.data import Dataset
from guard.locate.errors import LocateError
from guard.locate.unit_set import BoolArray, Component, Float64Array, Method, Provenance, UnitSet
from guard.prompts import Tokens, encode


class Scores(NamedTuple):
    """What a method finds, before it is given a provenance."""

    scores: dict[Component, Float64Array]
    """float64 ``[layers, units]``; higher is more of what the method looks for; NaN: no candidate."""
    selected: dict[Component, BoolArray]
    """``[layers, units]``."""
    cost: dict[str, float]
    """``forward_passes``, ``tokens``, ``seconds``; chunks that were found on disk cost nothing."""
    extra: dict[str, NDArray[Any]]
    """Further arrays of the method, by name."""


@dataclass
class Cost:
    """Counts what a run costs."""

    forward_passes: int = 0
    tokens: int = 0
    begun: float = field(default_factory=time.monotonic)

    def as_dict(self) -> dict[str, float]:
        """The counts so far, in the form of a provenance."""
        return {
            "forward_passes": float(self.forward_passes),
            "tokens": float(self.tokens),
            "seconds": time.monotonic() - self.begun,
        }


class Kept:
    """Partial results by chunk of prompts. ``identity`` is all that they depend on besides the prompts."""

    def __init__(self, cache: Cache | None = None, **identity: Any) -> None:
        self._cache = cache or Cache(None)
        self._identity = identity

    @classmethod
    def of_checkpoint(cls, cache: Cache | None, checkpoint: Checkpoint, **identity: Any) -> Kept:
        """Results that belong to a checkpoint, and to the adapter that is merged into it."""
        adapter = checkpoint.adapter.sha256 if checkpoint.adapter else None
        return cls(cache, weights=checkpoint.weights_sha256, adapter=adapter, **identity)

    def of(
        self, kind: str, chunk: Sequence[Tokens], key: dict[str, Any], compute: Callable[[], Float64Array]
    ) -> Float64Array:
        """The array of a chunk: read back, or computed now and kept."""
        whole = {
            **self._identity,
            **key,
            "versions": [torch.__version__, transformers.__version__],
            "prompts": [list(prompt) for prompt in chunk],
        }
        found = self._cache.array(kind, whole)
        if found is None:
            made = compute()
            # The cache stores any dtype; float32 is only what its first user keeps.
            self._cache.keep_array(kind, whole, cast(Any, made))
            return made
        return found.astype(np.float64, copy=False)


def usable(prompts: Sequence[Tokens], *, context: int, shortest: int, what: str) -> list[Tokens]:
    """The prompts of ``shortest`` to ``context`` tokens, in order. Raises LocateError when there is none."""
    if not prompts:
        raise LocateError(f"no {what} prompts were given; expected at least one")
    fitting = [prompt for prompt in prompts if shortest <= len(prompt) <= context]
    if fitting:
        return fitting
    if all(len(prompt) > context for prompt in prompts):
        raise LocateError(
            f"all {len(prompts)} {what} prompts are longer than the model's context of {context} tokens; "
            "expected shorter prompts"
        )
    raise LocateError(
        f"none of the {len(prompts)} {what} prompts has from {shortest} to {context} tokens; "
        "expected at least one"
    )


@torch.inference_mode()
def forward(model: Any, prompts: Sequence[Tokens], cost: Cost) -> None:
    """One pass through the decoder, padded on the right: a row holds its prompt in its first positions."""
    ids, mask, _ = (tensor.to(model.device) for tensor in pad(prompts))
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    # Rows of one length need no mask; without it attention takes its exact causal path.
    attention_mask = None if bool(mask.all()) else mask
    model.base_model(input_ids=ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
    cost.forward_passes += 1
    cost.tokens += sum(map(len, prompts))


def wide(tensor: Tensor) -> Tensor:
    """At least float32: what statistics are computed in, whatever the weights' dtype."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def tokens_of(tokenizer: Any, dataset: Dataset) -> tuple[list[Tokens], list[Tokens]]:
    """The harmful and the benign prompts of a data set as the model's chat template renders them."""
    found: dict[str, list[Tokens]] = {"harmful": [], "benign": []}
    for prompt in dataset.prompts:
        found[prompt.label].append(encode(tokenizer, prompt.chat()))
    return found["harmful"], found["benign"]


def keep_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write ``Scores.extra`` as one safetensors file, whole or not at all."""
    content = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    write_whole(path, lambda file: file.write(content))


def unit_set(
    method: Method,
    found: Scores,
    options: dict[str, Any],
    checkpoint: Checkpoint,
    dataset: Dataset,
    tokenizer: Any,
    seed: int,
) -> UnitSet:
    """Scores with their provenance."""
    provenance = Provenance(
        method=method,
        options=options,
        model=checkpoint.card(),
        data=dataset.files,
        template=hashlib.sha256(tokenizer.chat_template.encode()).hexdigest(),
        seed=seed,
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        cost=found.cost,
    )
    return UnitSet(provenance, found.scores, found.selected)
