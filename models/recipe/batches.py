"""Batches of few fixed shapes, so that a compiled step is compiled once for each.

Rows are sorted into buckets by length and padded on the right; a causal model needs no mask for that.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """One optimiser step's rows, and the positions whose next token is predicted."""

    tokens: Tensor
    """[rows, length] ids, padded with 0 on the right."""
    positions: Tensor
    """[picked] indices into the flattened tokens, each predicting its successor."""
    targets: Tensor
    """[picked] ids to predict."""
    weights: Tensor
    """[picked] weights of the loss, 0 for fill-in positions."""
    on: Tensor
    """[rows] 1.0 where the row runs with the (IA)³ vector on."""


def collate(
    rows: Sequence[tuple[list[int], list[float]]], on: Sequence[bool], length: int, rng: random.Random
) -> Batch:
    """Pad rows to `length` and pick half of the positions: the heaviest first, random ones among equals.

    Logits of a 4,096-entry vocabulary are a seventh of the work; half of the positions carry nearly all the
    weight.
    """
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    weights = torch.zeros(len(rows), length)
    for number, (ids, learnt) in enumerate(rows):
        tokens[number, : len(ids)] = torch.tensor(ids)
        weights[number, : len(ids)] = torch.tensor(learnt)
    next_weight = torch.zeros_like(weights)
    next_weight[:, :-1] = weights[:, 1:]
    targets = torch.zeros_like(tokens)
    targets[:, :-1] = tokens[:, 1:]
    tie = torch.rand(next_weight.shape, generator=torch.Generator().manual_seed(rng.getrandbits(40)))
    picked = (next_weight + 0.01 * tie * (next_weight > 0)).flatten().topk(len(rows) * length // 2).indices
    return Batch(
        tokens,
        picked,
        targets.flatten()[picked],
        next_weight.flatten()[picked],
        torch.tensor([float(flag) for flag in on]),
    )


def batches(
    encoded: Sequence[tuple[list[int], list[float]]],
    buckets: Sequence[tuple[int, int]],
    seed: int,
) -> list[tuple[int, list[int]]]:
    """Plan of batches: (length, row numbers), shuffled. Rows longer than the last bucket are left out.

    `buckets` holds (length, rows) in rising order of length. A bucket's incomplete last batch is dropped.
    """
    rng = random.Random(seed)
    filled: dict[int, list[int]] = {length: [] for length, _ in buckets}
    plan = []
    for number, (ids, _) in enumerate(encoded):
        for length, size in buckets:
            if len(ids) <= length:
                filled[length].append(number)
                if len(filled[length]) == size:
                    plan.append((length, filled[length]))
                    filled[length] = []
                break
    rng.shuffle(plan)
    return plan
