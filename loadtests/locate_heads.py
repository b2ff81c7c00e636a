"""Score all heads of a model: what sharing layers and batching heads saves against a loop over them.

``python -m loadtests.locate_heads``: the sweep of ``guard.locate.head_sweep`` beside two loops that give the
same states: one forward pass for each head and prompt, and one for each head and batch of equally long
prompts. Timings are process CPU time of one thread; runs alternate, ratios are taken in pairs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

import click
import numpy as np
import torch

from guard.checkpoint import Checkpoint
from guard.lab import resolve
from guard.locate.ablation import Head, ablated
from guard.locate.head_sweep import HeadSweep
from guard.prompts import Tokens
from loadtests.pairs import Interval

# Small enough to be the limit, large enough for float32.
EPSILON = 1e-6


class Comparison(NamedTuple):
    """Ratios of times, and how far apart the results are."""

    speedup_over_single: Interval
    """A loop with one prompt a pass, over the sweep."""
    speedup_over_batched: Interval
    """A loop with all prompts of a length in a pass, over the sweep."""
    seconds: Interval
    """The sweep."""
    difference: float
    """Largest |difference| of a final state between sweep and loops, relative to the largest state."""


@torch.inference_mode()
def loop(model: Any, prompts: Sequence[Tokens], layers: int, heads: int, *, batched: bool) -> torch.Tensor:
    """Final states ``[layers * heads, prompts, width]``, a pass of the whole model for each head."""
    groups: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        groups.setdefault(len(prompt) if batched else place, []).append(place)
    found = []
    for head in product(range(layers), range(heads)):
        states = torch.empty(len(prompts), model.config.hidden_size)
        with ablated(model, [Head(*head)], epsilon=EPSILON):
            for group in groups.values():
                ids = torch.tensor([prompts[place] for place in group], device=model.device)
                out = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
                states[group] = out[:, -1].float().cpu()
        found.append(states)
    return torch.stack(found)


def sweep(model: Any, prompts: Sequence[Tokens], batch_tokens: int) -> torch.Tensor:
    """The same states, by the sweep; what it needs to begin with is part of it."""
    made = HeadSweep(model, prompts, batch_tokens=batch_tokens)
    return torch.cat([states.float().cpu() for _, states in made.layers("undifferentiated")])


def compare(
    model: Any,
    prompts: Sequence[Tokens],
    *,
    layers: int,
    heads: int,
    pairs: int = 5,
    batch_tokens: int = 2048,
) -> Comparison:
    """Time the three ways ``pairs`` times each, in turning order, after one warm-up of the sweep."""
    ways: list[Callable[[], torch.Tensor]] = [
        lambda: sweep(model, prompts, batch_tokens),
        lambda: loop(model, prompts, layers, heads, batched=False),
        lambda: loop(model, prompts, layers, heads, batched=True),
    ]
    results = [ways[0]()]
    times = np.zeros((pairs, len(ways)))
    clock = time.process_time if model.device.type == "cpu" else time.perf_counter
    for pair in range(pairs):
        for way in np.roll(range(len(ways)), pair):
            began = clock()
            result = ways[way]()
            times[pair, way] = clock() - began
            if pair == 0:
                results.append(result)
    difference = max(float((result - results[0]).abs().max()) for result in results[1:])
    return Comparison(
        Interval.of((times[:, 1] / times[:, 0]).tolist()),
        Interval.of((times[:, 2] / times[:, 0]).tolist()),
        Interval.of(times[:, 0].tolist()),
        difference / float(results[0].abs().max()),
    )


@click.command()
@click.option("--model", default="models/lab:lab-partial", help="A checkpoint, or LAB_DIR:VARIANT.")
@click.option("--prompts", "number", default=40, help="Random prompts of 16 to 31 tokens.")
@click.option("--pairs", default=5)
@click.option("--batch-tokens", default=2048)
@click.option("--device", default="cpu")
@click.option("--dtype", default="float32")
def main(model: str, number: int, pairs: int, batch_tokens: int, device: str, dtype: str) -> None:
    """Print the comparison as JSON."""
    torch.set_num_threads(1)
    checkpoint = Checkpoint.open(*resolve(model))
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(1, 256, int(rng.integers(16, 32))).tolist()) for _ in range(number)]
    shape = checkpoint.shape
    found = compare(
        checkpoint.load_model(dtype, device),
        prompts,
        layers=shape.layers,
        heads=shape.heads,
        pairs=pairs,
        batch_tokens=batch_tokens,
    )
    print(
        json.dumps(
            {name: getattr(value, "_asdict", lambda v=value: v)() for name, value in found._asdict().items()}
        )
    )


if __name__ == "__main__":
    main()
