"""Training sequence probes: Adam on standardised activations of every token, many probes side by side.

What takes time is going over the activations of all tokens, so all probes that leaving sources out and the
choice of regularisation need are trained in one go: they differ in which prompts they see, in their penalty,
and in nothing else. Prompts come in random order from a seed; the same seed gives the same probes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from guard.pooling import Pooling
from guard.probe import BoolArray, ProbeError, Standard
from guard.sequence import SequenceScorer
from guard.sequence_loss import losses
from guard.sequence_scores import TokenActivations

EPOCHS = 6
LEAST_STEPS = 400
"""Few prompts are gone over more often than ``EPOCHS`` times."""
BATCH = 128
"""Prompts in a step."""
RATE = 3e-3
"""Learning rate at the start; it falls to 0 along a cosine. One fits all: activations are standardised."""


class Problem(NamedTuple):
    """One of the probes to train."""

    rows: BoolArray
    """The prompts that it sees, ``[n]``."""
    strength: float
    """Inverse regularisation, as scikit-learn's C: the sum of the losses times it, plus half the squared
    weights."""


def standard_of(activations: TokenActivations) -> Standard:
    """Mean and scale of each activation over all tokens, in one pass over the blocks."""
    count, mean, square = 0, np.zeros(activations.features), np.zeros(activations.features)
    for block in activations.blocks():
        # Each block's own moments, then joined (Chan, Golub and LeVeque 1979): sums of squares cancel.
        here = block.mean(axis=0, dtype=np.float64)
        spread = ((block - here.astype(np.float32)) ** 2).sum(axis=0, dtype=np.float64)
        gap, total = here - mean, count + len(block)
        square += spread + gap**2 * (count * len(block) / total)
        mean += gap * (len(block) / total)
        count = total
    scale = np.sqrt(square / count)
    constant = scale <= 1e-7 * np.maximum(1e-30, np.abs(mean))
    return Standard(mean, np.where(constant, np.inf, scale))


def train(
    activations: TokenActivations,
    positive: BoolArray,
    problems: Sequence[Problem],
    pooling: Pooling,
    *,
    seed: int = 0,
    epochs: int | None = None,
) -> list[SequenceScorer]:
    """One probe for each problem, on raw activations; ``positive`` ``[n]``. Raises ProbeError."""
    standard = standard_of(activations)
    a_round = -(-len(activations) // BATCH)
    epochs = epochs or max(EPOCHS, -(-LEAST_STEPS // a_round))
    weights = np.stack([_weights(problem.rows, positive) for problem in problems], axis=1)
    penalty = torch.tensor(
        [1 / (2 * problem.strength * problem.rows.sum()) for problem in problems], dtype=torch.float32
    )
    draws = np.random.default_rng(seed)
    weight, bias = _start(pooling, len(problems), activations.features, seed)
    mean, scale = (torch.from_numpy(part.astype(np.float32)) for part in standard)
    optimiser = torch.optim.Adam([weight, bias], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * a_round)
    for _ in range(epochs):
        order = draws.permutation(len(activations))
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            optimiser.zero_grad()
            folded = weight / scale
            shift = bias - folded @ mean
            outputs, lengths = _outputs(activations, chosen, folded, shift)
            each = losses(pooling, outputs, lengths, torch.from_numpy(positive[chosen].astype(np.float32)))
            share = torch.from_numpy(weights[chosen]) * (len(order) / len(chosen))
            loss = (share * each).sum() + (penalty * weight.square().sum(dim=(1, 2))).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
    rows, offsets = (part.detach().double().numpy() for part in (weight, bias))
    return [SequenceScorer(pooling, *standard.fold(w, b)) for w, b in zip(rows, offsets, strict=True)]


def _weights(rows: BoolArray, positive: BoolArray) -> NDArray[np.float32]:
    """Weight of each prompt ``[n]``, 0 for those not seen: both classes count alike, and all sum to 1."""
    seen = int((rows & positive).sum()), int((rows & ~positive).sum())
    if not all(seen):
        raise ProbeError(
            f"a probe needs both classes, but {seen[0]} of {sum(seen)} prompts are positive; add sources"
        )
    found = np.where(positive, 0.5 / seen[0], 0.5 / seen[1]) * rows
    return found.astype(np.float32)


def _start(pooling: Pooling, probes: int, features: int, seed: int) -> tuple[Tensor, Tensor]:
    """Weights ``[probes, channels, features]`` and biases ``[probes, channels]`` before the first step.

    All 0, but for the scores of attention: heads that start alike would stay alike.
    """
    weight = torch.zeros(probes, pooling.channels, features)
    if pooling.kind == "attention":
        random = torch.Generator().manual_seed(seed)
        start = torch.randn(pooling.heads, features, generator=random) * (0.3 / features**0.5)
        weight[:, : pooling.heads] = start
    return weight.requires_grad_(), torch.zeros(probes, pooling.channels, requires_grad=True)


def _outputs(
    activations: TokenActivations, chosen: NDArray[np.int64], weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs ``[prompts, tokens, probes, channels]``, padded at the end, and the prompts' lengths."""
    rows = torch.from_numpy(np.concatenate([activations.prompt(index) for index in chosen]))
    flat = rows @ weight.flatten(0, 1).T + bias.flatten()
    lengths = activations.lengths[chosen].tolist()
    padded = torch.nn.utils.rnn.pad_sequence(list(torch.split(flat, lengths)), batch_first=True)
    return padded.reshape(*padded.shape[:2], *bias.shape), torch.tensor(lengths)
