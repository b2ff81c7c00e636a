"""What methods that read one model share: usable prompts, padded forward passes, partial results on disk.

A run is cut into the chunks of ``guard.observe.chunks``. What a chunk adds to a statistic is kept in a
``guard.cache.Cache`` as soon as it is complete, so that an interrupted run goes on at the chunk it was in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import Tensor

from guard.cache import Cache
from guard.capture import pad
from guard.checkpoint import Checkpoint
from guard.locate.errors import LocateError
from guard.locate.unit_set import Float64Array
from guard.prompts import Tokens


@dataclass
class Cost:
    """Counts what a run costs, as ``Scores.cost`` has it."""

    forward_passes: int = 0
    tokens: int = 0
    begun: float = field(default_factory=time.monotonic)

    def add(self, texts: Sequence[Tokens]) -> None:
        """Count texts that went through the whole model."""
        self.forward_passes += len(texts)
        self.tokens += sum(map(len, texts))

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
    cost.add(prompts)


def wide(tensor: Tensor) -> Tensor:
    """At least float32: what statistics are computed in, whatever the weights' dtype."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
