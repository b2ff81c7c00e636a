"""What the benchmarks of the engine run: random batches, and bundles that refuse nothing or everything."""

from __future__ import annotations

import random
from pathlib import Path

from guard.bundle import Bundle


def batches(
    count: int, requests: int, length: tuple[int, int], vocabulary: int, seed: int
) -> list[list[list[int]]]:
    """``count`` batches of random prompts, all different, so that no prefix is ever cached."""
    rng = random.Random(seed)
    return [
        [[rng.randrange(vocabulary) for _ in range(rng.randint(*length))] for _ in range(requests)]
        for _ in range(count)
    ]


def with_threshold(bundle: Bundle, directory: Path, probability: float) -> Path:
    """Save the bundle with another threshold, the same for all false-positive rates."""
    thresholds = tuple(t.model_copy(update={"probability": probability}) for t in bundle.card.thresholds)
    card = bundle.card.model_copy(update={"thresholds": thresholds})
    return Bundle(card, bundle.probe, bundle.patches.values()).save(directory)
