"""Losses that sequence probes are trained by: the differentiable twins of ``guard.pooling``.

- ``ema`` and ``rolling``: Constitutional Classifiers++ (arXiv 2601.04603). The outputs are smoothed, and each
  position counts, the most alarming ones most: Σ_t w_t · BCE(y, z̄_t), w_t = softmax_t(z̄_t / τ). With τ → ∞
  it is the mean over positions, with τ → 0 the loss at the highest. Both classes are weighted so: one
  alarming place in a benign text is expensive. Positions before a whole window do not count, as in ``pool``.
- ``softmax`` and ``attention``: BCE of the pooled logit.

Many probes are trained side by side, whence the dimension ``probes``. Shapes: ``outputs``
``[prompts, tokens, probes, channels]``, padded at the end; ``lengths`` int64 ``[prompts]``; ``positive``
float ``[prompts]``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, conv1d

from guard.pooling import Pooling

TEMPERATURE = 1.0
"""τ of the loss over smoothed positions, in logits."""


def losses(
    pooling: Pooling,
    outputs: Tensor,
    lengths: Tensor,
    positive: Tensor,
    *,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """The loss of each prompt by each probe, ``[prompts, probes]``."""
    if pooling.kind in ("ema", "rolling"):
        smooth = smoothed(pooling, outputs[..., 0])
        first = (lengths.clamp(max=pooling.full) - 1)[:, None]
        return position_losses(smooth, _between(first, lengths, smooth), positive, temperature)
    logits = pooled(pooling, outputs, lengths)
    return binary_cross_entropy_with_logits(logits, _like(positive, logits), reduction="none")


def position_losses(smooth: Tensor, counts: Tensor, positive: Tensor, temperature: float) -> Tensor:
    """Σ_t w_t · BCE(y, z̄_t) ``[prompts, probes]`` of ``smooth`` ``[prompts, tokens, probes]``.

    ``counts`` ``[prompts, tokens]`` says which positions do.
    """
    scores = (smooth / temperature).masked_fill(~counts[..., None], -torch.inf)
    each = binary_cross_entropy_with_logits(smooth, _like(positive, smooth), reduction="none")
    return (scores.softmax(dim=1) * each).sum(dim=1)


def smoothed(pooling: Pooling, z: Tensor) -> Tensor:
    """The moving average at each token, ``[prompts, tokens, probes]`` of the same."""
    prompts, tokens, probes = z.shape
    newest_first = torch.from_numpy(pooling.weights)[:tokens].to(z)
    flat = z.permute(0, 2, 1).reshape(prompts * probes, 1, tokens)
    window = len(newest_first)
    sums = conv1d(flat, newest_first.flip(0)[None, None], padding=window - 1)[..., :tokens]
    total = newest_first.cumsum(0)[torch.arange(tokens).clamp(max=window - 1)]
    return (sums / total).reshape(prompts, probes, tokens).permute(0, 2, 1)


def pooled(pooling: Pooling, outputs: Tensor, lengths: Tensor) -> Tensor:
    """The logit ``[prompts, probes]`` by ``softmax`` or ``attention``."""
    there = _between(torch.zeros_like(lengths)[:, None], lengths, outputs)
    if pooling.temperature is not None:
        scores, values = outputs / pooling.temperature, outputs
    else:
        scores, values = outputs[..., : pooling.heads], outputs[..., pooling.heads :]
    weights = scores.masked_fill(~there[..., None, None], -torch.inf).softmax(dim=1)
    return (weights * values).sum(dim=(1, 3))


def _between(first: Tensor, lengths: Tensor, like: Tensor) -> Tensor:
    """bool ``[prompts, tokens]``: from ``first`` ``[prompts, 1]`` to the end of each prompt."""
    at = torch.arange(like.shape[1])
    return (at >= first) & (at < lengths[:, None])


def _like(positive: Tensor, other: Tensor) -> Tensor:
    return positive.reshape(-1, *[1] * (other.ndim - 1)).expand_as(other)
