"""Switch attention heads off: undifferentiated attention and scaling (Zhou et al., ICLR 2025, section 3).

*Undifferentiated attention* takes a head's choice away: its query times a small ε makes all logits zero, so
that every visible key weighs the same and the head's output is the running mean of its values. *Scaling*
takes its contribution away: its output times ε. Both are per query head, and leave the other heads of a
grouped key and value alone.

``ablated`` scales by ε inside the model's own forward, also while it generates; ``replacements`` gives the
limit ε → 0 of the first in closed form, for passes without a cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from guard.locate.errors import LocateError
from guard.sites import ModelShape, module_name, shape_of

Ablation = Literal["undifferentiated", "scaling"]
HEADS_FIRST = frozenset({"Gemma3ForCausalLM"})
"""Architectures that normalise queries as ``[batch, heads, tokens, head_dim]``; others keep tokens first."""


class Head(NamedTuple):
    """One attention head of a model."""

    layer: int
    head: int


def attention_of(model: Any, shape: ModelShape, layer: int) -> Any:
    """The attention module of a layer: the one that holds ``o_proj``."""
    return model.get_submodule(module_name(shape.architecture, "attention", layer).rpartition(".")[0])


def mixing_weights(mask: Tensor | None, tokens: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Attention without a choice, ``[tokens, tokens]``: each row is spread evenly over its visible keys.

    ``mask`` is what a decoder block got: None for plain causal attention, else ``[1, 1, tokens, tokens]``,
    true (boolean) or 0 (additive) where a key is visible. A sliding window is in there, too.
    """
    if mask is None:
        seen = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    else:
        seen = mask[0, 0].to(device) if mask.dtype == torch.bool else mask[0, 0].to(device) == 0
    weights = seen.to(dtype)
    return weights / weights.sum(-1, keepdim=True)


def replacements(
    kind: Ablation, outputs: Tensor, values: Tensor, mask: Tensor | None, *, epsilon: float = 0.0
) -> Tensor:
    """What each head gives when it is ablated: ``[batch, tokens, heads, head_dim]``, dtype of ``outputs``.

    ``outputs`` are the heads' outputs before ``o_proj``, in that shape; ``values`` are
    ``[batch, tokens, kv_heads, head_dim]``. Rows hold no padding. Means are taken in float32 at least.
    ``epsilon`` is for scaling only: undifferentiated attention is exact, its ε is 0.
    """
    if kind == "scaling":
        return outputs * epsilon
    exact = torch.promote_types(values.dtype, torch.float32)
    weights = mixing_weights(mask, values.shape[1], values.device, exact)
    means = torch.einsum("ts,bsgd->btgd", weights, values.to(exact)).to(outputs.dtype)
    return means.repeat_interleave(outputs.shape[2] // values.shape[2], dim=2)


@contextmanager
def ablated(
    model: Any, heads: Iterable[Head], kind: Ablation = "undifferentiated", *, epsilon: float = 1e-5
) -> Iterator[None]:
    """Every pass of ``model`` inside the block, generation included, runs with ``heads`` ablated by ε.

    Queries are scaled after their normalisation where a model has one: before it, it would undo the scaling.
    The hooks are removed when the block is left; weights are never touched.
    """
    shape = shape_of(model.config)
    factors: dict[int, Tensor] = {}
    for layer, head in heads:
        factors.setdefault(layer, torch.ones(shape.heads, dtype=torch.float64))[head] = epsilon
    handles = []
    try:
        for layer, factor in factors.items():
            attention = attention_of(model, shape, layer)
            if kind == "scaling":
                handles.append(attention.o_proj.register_forward_pre_hook(_scale_input(factor, shape)))
            else:
                handles.append(_queries(attention).register_forward_hook(_scale_output(factor, shape)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _queries(attention: Any) -> Any:
    for name in ("q_norm", "q_proj", "qkv_proj"):
        if hasattr(attention, name):
            return getattr(attention, name)
    raise LocateError(f"{type(attention).__name__} has no projection of queries that is known")


def _columns(factor: Tensor, shape: ModelShape, like: Tensor) -> Tensor:
    """The factor of each column; columns after the heads' (keys and values in one layer) keep theirs."""
    columns = like.new_ones(like.shape[-1])
    columns[: shape.heads * shape.head_dim] = factor.to(like).repeat_interleave(shape.head_dim)
    return columns


def _scale_input(factor: Tensor, shape: ModelShape) -> Any:
    def hook(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0] * _columns(factor, shape, inputs[0]), *inputs[1:])

    return hook


def _scale_output(factor: Tensor, shape: ModelShape) -> Any:
    def hook(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        if output.dim() == 3:
            return output * _columns(factor, shape, output)
        heads = factor.to(output)[:, None]
        return output * (heads[:, None] if shape.architecture in HEADS_FIRST else heads)

    return hook
