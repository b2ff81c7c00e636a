"""Change scores out of streaming sums: two twins read one batch of texts, and some positions are compared.

The score of a neuron is the root mean square of a − b over all compared tokens pooled (Chen et al., arXiv
2406.14144, section 2.2); a and b are its activations in recipient and donor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from guard.capture import pad
from guard.locate.hooks import Place, at_inputs
from guard.locate.twins import Twin
from guard.locate.unit_set import Float64Array
from guard.prompts import Tokens

Positions = Literal["predicting", "completion", "prompt_last", "prompt"]
Text = tuple[Tokens, Tokens]
"""Token ids of a prompt and of the answer to it."""
STATISTICS = 5
"""Σ(a−b)², Σa, Σa², Σb, Σb²."""


class Sums:
    """Streaming sums over tokens. Memory is five float64 arrays ``[layers, width]``, however many tokens."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}

    def add(self, layer: int, recipient: Tensor, donor: Tensor) -> None:
        """Add activations ``[tokens, width]`` of the same tokens in both models."""
        a, b = recipient.double(), donor.to(recipient.device).double()
        found = torch.stack(
            [(a - b).square().sum(0), a.sum(0), a.square().sum(0), b.sum(0), b.square().sum(0)]
        )
        if layer in self._sums:
            self._sums[layer] += found
        else:
            self._sums[layer] = found

    def array(self, layers: int) -> Float64Array:
        """float64 ``[STATISTICS, layers, width]``; NaN in layers to which nothing was added."""
        width = next(iter(self._sums.values())).shape[1]
        array = np.full((STATISTICS, layers, width), np.nan)
        for layer, found in self._sums.items():
            array[:, layer] = found.cpu().numpy()
        return array


def compared(prompt: int, answer: int, positions: Positions) -> range:
    """Positions that are compared in a text of ``prompt`` and ``answer`` tokens."""
    if positions == "predicting":
        return range(prompt - 1, prompt + answer - 1)
    if positions == "completion":
        return range(prompt, prompt + answer)
    return range(prompt - 1, prompt) if positions == "prompt_last" else range(prompt)


@torch.inference_mode()
def add_texts(
    sums: Sums,
    recipient: Twin,
    donor: Twin,
    places: Sequence[Place],
    texts: Sequence[Text],
    positions: Positions,
) -> None:
    """Run both twins over one batch of (prompt, answer) and add the positions that are compared."""
    ids, mask, _ = pad([prompt + answer for prompt, answer in texts])
    picked = torch.zeros_like(mask, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(texts):
        span = compared(len(prompt), len(answer), positions)
        picked[row, span.start : span.stop] = True
    flat = picked.flatten().nonzero()[:, 0]
    held: dict[int, Tensor] = {}

    def rows(twin: Twin, number: int, seen: Tensor) -> Tensor:
        # Picked before anything is computed: what stands in the padding never enters a statistic.
        chosen = seen.reshape(-1, seen.shape[-1])[flat.to(seen.device)]
        return twin.common(places[number], chosen)

    def hold(number: int, seen: Tensor) -> None:
        held[number] = rows(recipient, number, seen)

    def add(number: int, seen: Tensor) -> None:
        sums.add(places[number][0], held.pop(number), rows(donor, number, seen))

    for twin, read in ((recipient, hold), (donor, add)):
        with twin.scaled(), at_inputs(twin.model, places, read):
            _forward(twin.model, ids, mask)


def _forward(model: Any, ids: Tensor, mask: Tensor) -> None:
    """The decoder alone: logits over the vocabulary are not needed."""
    device = model.device
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model.base_model(
        input_ids=ids.to(device),
        attention_mask=None if bool(mask.all()) else mask.to(device),
        position_ids=positions.to(device),
        use_cache=False,
    )


def finish(sums: Float64Array, tokens: int) -> tuple[Float64Array, dict[str, Float64Array]]:
    """Change scores ``[layers, width]``, means and standard deviations out of sums over ``tokens``."""
    mean = sums / tokens
    extra = {}
    for name, first in (("recipient", 1), ("donor", 3)):
        extra[f"mean.{name}"] = mean[first]
        # Rounding may leave a variance of zero just below it.
        extra[f"std.{name}"] = np.sqrt(np.maximum(mean[first + 1] - mean[first] ** 2, 0.0))
    return np.sqrt(mean[0]), extra
