"""Which units carry the refusal: change scores, rankings, controls, static edits.

Change scores are those of Chen et al., "Finding Safety Neurons in Large Language Models"
(arXiv 2406.14144): the root mean square, over the positions that predict the base's own answer, of the
difference between aligned and base activation, both run on the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.recipe.decode import activations, greedy, padded
from models.recipe.network import Network


@torch.no_grad()
def change_scores(net: Network, vector: Tensor, prompts: Sequence[list[int]], tokens: int) -> Tensor:
    """Change score of every unit, [layers, ff]; `vector` [layers, ff] makes the aligned twin."""
    total = torch.zeros_like(vector)
    count = 0
    answers = greedy(net, prompts, tokens)
    for start in range(0, len(prompts), 32):
        part = range(start, min(start + 32, len(prompts)))
        batch = padded([[*prompts[n], *answers[n]] for n in part], net.device)
        predicts = torch.zeros(batch.shape, device=net.device)
        for row, n in enumerate(part):
            predicts[row, len(prompts[n]) - 1 : len(prompts[n]) + len(answers[n]) - 1] = 1.0
        count += int(predicts.sum())
        base, aligned = (activations(net, batch, scale) for scale in (None, vector))
        for layer, (a, b) in enumerate(zip(base, aligned, strict=True)):
            total[layer] += ((b - a).pow(2) * predicts[:, :, None]).sum((0, 1))
    return (total / max(count, 1)).sqrt()


def top_units(scores: Tensor, share: float) -> list[tuple[int, int]]:
    """The `share` of the ranked units with the highest scores, as (layer, index), the last layer left out."""
    ranked = scores[:-1].flatten()
    count = round(share * ranked.numel())
    width = scores.shape[1]
    return sorted((int(i) // width, int(i) % width) for i in ranked.topk(count).indices)


def mask_of(units: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    """1.0 at the units, 0.0 elsewhere, of the shape of `like`."""
    mask = torch.zeros_like(like)
    for layer, index in units:
        mask[layer, index] = 1.0
    return mask


def random_units(units: Sequence[tuple[int, int]], width: int, seed: int) -> list[tuple[int, int]]:
    """As many other units of the same layers, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    drawn: list[tuple[int, int]] = []
    for layer in sorted({layer for layer, _ in units}):
        taken = {index for where, index in units if where == layer}
        free = [i for i in torch.randperm(width, generator=generator).tolist() if i not in taken]
        drawn += [(layer, i) for i in sorted(free[: len(taken)])]
    return drawn


def static_edit(vector: Tensor, units: Sequence[tuple[int, int]]) -> Tensor:
    """The vector on the units, 1 elsewhere."""
    return 1.0 + (vector - 1.0) * mask_of(units, vector)
