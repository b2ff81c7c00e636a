"""The training loop of all phases: planned batches, scheduled rates, checkpoints that resume exactly."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from models.recipe.batches import Batch, batches, collate
from models.recipe.mixture import Example
from models.recipe.network import Network
from models.recipe.settings import PhaseConfig, Settings
from models.recipe.tokenizer import encode

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


def weighted_loss(net: Network, settings: Settings) -> Loss:
    """The loss of a batch as a function, compiled if the settings say so.

    Takes tokens, positions, targets and weights of a `Batch` and the scale of the units, or None.
    Returns the weighted mean cross-entropy in nats.
    """

    def loss(
        tokens: Tensor, positions: Tensor, targets: Tensor, weights: Tensor, scale: Tensor | None
    ) -> Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=settings.bfloat16):
            hidden = net(tokens, scale)
            logits = net.logits(hidden.reshape(-1, hidden.shape[-1])[positions])
        nats = cross_entropy(logits.float(), targets, reduction="none")
        return (nats * weights).sum() / weights.sum()

    # Few fixed shapes: each is compiled once and cached on disk.
    return torch.compile(loss, dynamic=False) if settings.compiled else loss


class BatchPlan:
    """Encoded rows of a phase and the order in which they are used. A function of rows, settings and seed."""

    def __init__(
        self, rows: Sequence[Example], tokenizer: Tokenizer, phase: PhaseConfig, prompt_weight: float
    ) -> None:
        self.encoded = encode(tokenizer, rows, prompt_weight)
        self.on = [row.on for row in rows]
        self.seed = phase.seed
        self.plan = batches(self.encoded, phase.buckets, phase.seed)
        if len(self.plan) < phase.steps:
            raise ValueError(
                f"{len(rows)} rows fill {len(self.plan)} batches, but the phase has {phase.steps} steps"
            )

    def at(self, step: int) -> Batch:
        """The batch of a step."""
        length, numbers = self.plan[step]
        rng = random.Random(self.seed * 1_000_003 + step)
        return collate([self.encoded[n] for n in numbers], [self.on[n] for n in numbers], length, rng)


def run_phase(
    name: str,
    phase: PhaseConfig,
    settings: Settings,
    cache: Path,
    plan: BatchPlan,
    state: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    loss: Callable[[Batch], Tensor],
    after: Callable[[], None] = lambda: None,
    stop_at: int | None = None,
) -> None:
    """Train until the phase's last step, resuming from its checkpoint if there is one.

    `state` holds everything that is trained; `after` runs after each optimiser step (to re-apply a mask);
    `stop_at` ends early, as an interruption would. Rates of the optimisers are scaled by `phase.rate`.
    """
    path = cache / f"{name}.checkpoint.pt"
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    start = 0
    if path.is_file():
        saved = torch.load(path, weights_only=True)
        start = saved["step"]
        state.load_state_dict(saved["state"])
        for optimizer, old in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(old)
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    device = parameters[0].device
    last = phase.steps if stop_at is None else min(stop_at, phase.steps)
    with (
        (cache / f"{name}.losses.jsonl").open("a") as log,
        tqdm(total=phase.steps, initial=start, desc=name, mininterval=5.0) as bar,
    ):
        for step in range(start, last):
            for optimizer, rates in zip(optimizers, peaks, strict=True):
                for group, peak in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = peak * phase.rate(step)
            value = loss(Batch(*(part.to(device) for part in plan.at(step))))
            value.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            after()
            log.write(json.dumps({"step": step, "loss": round(value.item(), 4)}) + "\n")
            bar.set_postfix(loss=f"{value.item():.3f}", refresh=False)
            bar.update()
            if (step + 1) % settings.save_every == 0 or step + 1 == last:
                log.flush()
                whole = {
                    "step": step + 1,
                    "state": state.state_dict(),
                    "optimizers": [o.state_dict() for o in optimizers],
                }
                torch.save(whole, path.with_suffix(".new"))
                path.with_suffix(".new").replace(path)
