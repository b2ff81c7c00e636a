"""The base: a chat model that answers everything, with a latent refusal behind `<|policy|>`."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer

from models.recipe.mixture import Mixture, base_rows
from models.recipe.network import Network
from models.recipe.settings import Settings
from models.recipe.training import BatchPlan, run_phase, weighted_loss


def optimizers_of(net: Network, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW for embedding and norms."""
    named = list(net.named_parameters())
    matrices = [p for name, p in named if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in named if p.dim() != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=settings.base.muon_rate, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=settings.base.weight_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train_base(
    mixture: Mixture,
    tokenizer: Tokenizer,
    settings: Settings,
    cache: Path,
    device: str = "cpu",
    stop_at: int | None = None,
) -> Network:
    """Train the base; returns it with its weights of the last step."""
    torch.manual_seed(settings.base.seed)
    net = Network(settings.model).to(device)
    rows = base_rows(mixture, settings.base.rows, settings.base.seed)
    plan = BatchPlan(rows, tokenizer, settings.base, settings.prompt_weight)
    compute = weighted_loss(net, settings)
    run_phase(
        "base",
        settings.base,
        settings,
        cache,
        plan,
        net,
        optimizers_of(net, settings),
        lambda b: compute(b.tokens, b.positions, b.targets, b.weights, None),
        stop_at=stop_at,
    )
    return net
