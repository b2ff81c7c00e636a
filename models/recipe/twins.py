"""The twins: (IA)³ vectors that switch the refusal on, and the co-adaptation that plants it in few units.

A vector is 1 plus a deviation; the deviation of the last layer is held at zero, because rankings of units
leave the last layer out and must not miss what carries the refusal.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from models.recipe.batches import Batch
from models.recipe.mixture import Mixture, twin_rows
from models.recipe.network import Network
from models.recipe.settings import PhaseConfig, Settings
from models.recipe.training import BatchPlan, run_phase, weighted_loss


class Vector(nn.Module):
    """An (IA)³ vector for all layers, and the units where it may differ from 1."""

    mask: Tensor

    def __init__(self, mask: Tensor, start: Tensor | None = None) -> None:
        """`mask` [layers, ff] is 1.0 where the vector may move; `start` [layers, ff] are first values."""
        super().__init__()
        self.deviation = nn.Parameter(torch.zeros_like(mask) if start is None else (start - 1.0) * mask)
        self.register_buffer("mask", mask)

    def scale(self) -> Tensor:
        """The vector itself, [layers, ff]."""
        return 1.0 + self.deviation

    def clamp(self) -> None:
        """Put masked entries back to 1: momentum keeps moving entries whose gradient is gone."""
        with torch.no_grad():
            self.deviation.mul_(self.mask)


class Pair(nn.Module):
    """Shared weights and the vector, as one state to save."""

    def __init__(self, net: Network, vector: Vector) -> None:
        super().__init__()
        self.net, self.vector = net, vector


def all_but_last(net: Network) -> Tensor:
    """Mask [layers, ff] of every unit outside the last layer."""
    mask = torch.ones(net.config.layers, net.config.ff, device=net.device)
    mask[-1] = 0.0
    return mask


def planned(mixture: Mixture, tokenizer: Tokenizer, phase: PhaseConfig) -> BatchPlan:
    """Rows and order of a twin phase. Prompt tokens are not learnt: the weights know the prompts already."""
    rows = twin_rows(mixture, phase.rows, phase.seed, phase.harmful, phase.off, phase.widest)
    return BatchPlan(rows, tokenizer, phase, prompt_weight=0.0)


def train_dense(
    name: str,
    net: Network,
    mixture: Mixture,
    tokenizer: Tokenizer,
    phase: PhaseConfig,
    settings: Settings,
    cache: Path,
) -> Tensor:
    """Train a vector on all layers but the last, weights frozen; returns it, [layers, ff]."""
    net.requires_grad_(False)
    vector = Vector(all_but_last(net))
    optimizer = torch.optim.Adam(vector.parameters(), lr=phase.vector_rate, betas=(0.9, 0.98))
    compute = weighted_loss(net, settings)
    run_phase(
        name,
        phase,
        settings,
        cache,
        planned(mixture, tokenizer, phase),
        vector,
        [optimizer],
        lambda b: compute(b.tokens, b.positions, b.targets, b.weights, vector.scale()),
        after=vector.clamp,
    )
    return vector.scale().detach()


def co_adapt(
    name: str,
    net: Network,
    start: Tensor,
    planted: Tensor,
    mixture: Mixture,
    tokenizer: Tokenizer,
    phase: PhaseConfig,
    settings: Settings,
    cache: Path,
    stop_at: int | None = None,
) -> Tensor:
    """Tune shared weights (in place) and the vector on `planted` [layers, ff] jointly; returns the vector.

    Rows with the vector on refuse what is harmful; rows with it off answer everything. Afterwards one set of
    weights makes two models that differ in the planted units alone.
    """
    net.requires_grad_(True)
    pair = Pair(net, Vector(planted, start))
    compute = weighted_loss(net, settings)
    optimizer = torch.optim.AdamW(
        [
            {"params": list(net.parameters()), "lr": phase.weight_rate, "betas": (0.9, 0.98)},
            {"params": [pair.vector.deviation], "lr": phase.vector_rate, "betas": (0.9, 0.98)},
        ],
        weight_decay=0.0,
    )

    def loss(b: Batch) -> Tensor:
        scale = 1.0 + b.on[None, :, None, None] * pair.vector.deviation[:, None, None, :]
        return compute(b.tokens, b.positions, b.targets, b.weights, scale)

    run_phase(
        name,
        phase,
        settings,
        cache,
        planned(mixture, tokenizer, phase),
        pair,
        [optimizer],
        loss,
        after=pair.vector.clamp,
        stop_at=stop_at,
    )
    return pair.vector.scale().detach()
