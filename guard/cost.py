"""What a fit will cost, before it is paid: prompts, tokens, seconds and bytes, less what is in the cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from safetensors import safe_open

from guard.checkpoint import DTYPES, Checkpoint
from guard.data import Dataset
from guard.fit_plan import prepare
from guard.fit_settings import FitSettings
from guard.observe import Judged, Subject
from guard.prompts import Tokens
from guard.units import Units

UTILISATION = 0.3
"""Share of the speed of plain matrix products that a forward pass of many tokens reaches; generating one
token at a time for a batch reaches far less."""
GENERATING = 0.05
"""The same for answers."""
_SIDE = 1024


class Cost(NamedTuple):
    """Of one role."""

    role: str
    prompts: int
    tokens: int
    too_long: int
    to_read: list[Tokens]
    """Prompts whose activations are not in the cache."""
    to_answer: list[Tokens]
    """Prompts whose answers are wanted and not in the cache."""
    answered: int
    """Prompts whose answers are wanted."""


def cost(subject: Subject, dataset: Dataset, units: Units, judge: Judged) -> Cost:
    """Count the work of one role. Nothing but the tokenizer is loaded."""
    kept, too_long = subject.encoded(dataset)
    tokens = [tokens for _, tokens in kept]
    asked = [tokens for prompt, tokens in kept if judge == "all" or judge == prompt.label]
    return Cost(
        dataset.role,
        len(tokens),
        sum(map(len, tokens)),
        too_long,
        subject.unread(tokens, units),
        subject.unanswered(asked),
        len(asked),
    )


def planned(
    subject: Subject,
    settings: FitSettings,
    fit: Dataset,
    threshold: Dataset,
    evaluation: Dataset | None = None,
    hard_negatives: Dataset | None = None,
) -> str:
    """What ``fit_bundle`` would do, as lines of text. Raises what it would raise before the model runs."""
    plan = prepare(subject, settings, fit, threshold, evaluation, hard_negatives)
    roles: list[tuple[Dataset, Judged]] = [(plan.fit, settings.judged), (threshold, "none")]
    if evaluation is not None:
        roles.append((evaluation, "all"))
    costs = [cost(subject, dataset, plan.read, judge) for dataset, judge in roles]
    lines = [
        f"{each.role}: {each.prompts} prompts, {each.tokens} tokens, {each.too_long} too long; "
        f"activations of {len(each.to_read)} to read, {each.prompts - len(each.to_read)} cached; "
        f"answers of {len(each.to_answer)} to make, {each.answered - len(each.to_answer)} cached"
        for each in costs
    ]
    width = subject.width(plan.read)
    stored = 4 * width * sum(len(each.to_read) for each in costs)
    memory = 4 * width * sum(each.prompts for each in costs)
    lines.append(
        f"{width} activations a prompt: about {_size(stored)} more in the cache, {_size(memory)} of memory"
    )
    if settings.pooling is not None:
        size = _size(4 * width * costs[0].tokens)
        lines.append(f"every token of the prompts to fit on is kept: about {size} on disk")
    if work := _work(costs, subject.new_tokens):
        flops = 2 * parameters(subject.checkpoint)
        speed = _speed(subject.dtype, subject.device)
        seconds = flops * (work.read / UTILISATION + work.generated / GENERATING) / speed
        lines.append(
            f"the model runs over {work.read} tokens and makes at most {work.generated}: about "
            f"{max(1, round(seconds))} s on this {subject.device}, by the speed of its matrix products"
        )
    else:
        lines.append("everything is cached: the model is not needed for these prompts")
    return "\n".join(lines)


class _Work(NamedTuple):
    read: int
    generated: int


def _work(costs: Sequence[Cost], new_tokens: int) -> _Work | None:
    read = sum(len(prompt) for each in costs for prompts in each[4:6] for prompt in prompts)
    return _Work(read, new_tokens * sum(len(each.to_answer) for each in costs)) if read else None


def parameters(checkpoint: Checkpoint) -> int:
    """Numbers in the checkpoint's weights, counted from the files' headers."""
    total = 0
    for path in sorted(checkpoint.path.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (no mapping, only a method of that name)
                count = 1
                for size in file.get_slice(name).get_shape():
                    count *= size
                total += count
    return total


def _speed(dtype: str, device: str) -> float:
    """Operations a second of a matrix product."""
    a, b = (torch.ones(_SIDE, _SIDE, dtype=DTYPES[dtype], device=device) for _ in range(2))
    (a @ b).sum().item()
    start = time.perf_counter()
    (a @ b).sum().item()
    return float(2 * _SIDE**3 / max(1e-6, time.perf_counter() - start))


def _size(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 2**10:.0f} KiB"
