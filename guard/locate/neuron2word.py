"""What a neuron writes, in words: its value vector read by the model's own head.

logits = lm_head(final_norm(W_down[:, j])) (Chen et al., arXiv 2406.14144, Tables 2 and 9). Activations may be
negative, so both signs are read. Where a norm stands between ``down_proj`` and the residual stream, as in
Gemma 2 and OLMo 2, the vector passes through it first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from guard.locate.errors import LocateError
from guard.sites import module_name, shape_of

_POST_NORM = "model.layers.{layer}.post_feedforward_layernorm"


class Words(NamedTuple):
    """The tokens that a neuron favours most."""

    layer: int
    unit: int
    positive: tuple[int, ...]
    """Token ids when the neuron is active above zero, strongest first."""
    negative: tuple[int, ...]
    """Token ids when its activation is below zero."""

    def decoded(self, tokenizer: Any) -> tuple[list[str], list[str]]:
        """Both lists as text, one entry a token."""
        positive, negative = (
            tokenizer.batch_decode([[token] for token in tokens]) for tokens in (self.positive, self.negative)
        )
        return positive, negative


@torch.inference_mode()
def neuron2word(
    model: Any, units: Sequence[tuple[int, int]], *, top: int = 20, batch: int = 256
) -> list[Words]:
    """The ``top`` tokens of each MLP neuron (layer, unit), in order. Raises LocateError.

    Use the base model's weights: a folded vector changes the length of a column, or its sign.
    """
    shape = shape_of(model.config)
    width = shape.units("mlp")
    for layer, unit in units:
        if not (shape.first_mlp_layer <= layer < shape.layers and 0 <= unit < width):
            raise LocateError(
                f"there is no neuron {unit} in layer {layer}; this {shape.architecture} has {width} in each "
                f"of the layers {shape.first_mlp_layer} to {shape.layers - 1}"
            )
    found = []
    for start in range(0, len(units), batch):
        part = units[start : start + batch]
        columns = torch.stack([_written(model, shape.architecture, layer, unit) for layer, unit in part])
        positive, negative = (_favoured(model, sign * columns, top) for sign in (1, -1))
        found += [
            Words(layer, unit, tuple(above), tuple(below))
            for (layer, unit), above, below in zip(part, positive, negative, strict=True)
        ]
    return found


def _written(model: Any, architecture: str, layer: int, unit: int) -> Tensor:
    """The direction ``[hidden]`` that an active neuron adds to the residual stream, on the head's device."""
    column: Tensor = model.get_submodule(module_name(architecture, "mlp", layer)).weight[:, unit]
    try:
        norm = model.get_submodule(_POST_NORM.format(layer=layer))
    except AttributeError:
        return column.to(model.lm_head.weight.device)
    written: Tensor = norm(column.to(norm.weight.device))
    return written.to(model.lm_head.weight.device)


def _favoured(model: Any, vectors: Tensor, top: int) -> list[list[int]]:
    norm = model.base_model.norm
    logits = model.lm_head(norm(vectors.to(norm.weight.device)).to(model.lm_head.weight.device))
    tokens: list[list[int]] = logits.topk(min(top, logits.shape[-1]), dim=-1).indices.tolist()
    return tokens
