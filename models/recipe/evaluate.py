"""Refusal rates by source, with intervals, and the choice of strengths on dev sources."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from torch import Tensor

from models.recipe.corpus import Prompt, digest, read, reserved, trained
from models.recipe.decode import refuses
from models.recipe.network import Network
from models.recipe.sources import (
    DEV_BENIGN,
    DEV_HARMFUL,
    TEST_BENIGN,
    TEST_HARMFUL,
    TRAIN_BENIGN,
    TRAIN_HARMFUL,
    Label,
)

MOST_PER_SOURCE = 300
"""Prompts measured per source, chosen by a hash of their text."""


@dataclass(frozen=True)
class Group:
    """Prompts that are reported together."""

    name: str
    kind: str
    """`unseen source`, `unseen rows` (of trained sources) or `dev`."""
    label: Label
    gated: bool
    texts: tuple[str, ...]


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion."""
    if n == 0:
        return 0.0, 1.0
    share = hits / n
    middle = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - spread) / (1 + z * z / n)), min(1.0, (middle + spread) / (1 + z * z / n))


def _group(name: str, kind: str, label: Label, gated: bool, prompts: Sequence[Prompt]) -> Group:
    chosen = sorted({p.text for p in prompts}, key=lambda text: digest("measure:" + text))[:MOST_PER_SOURCE]
    return Group(name, kind, label, gated, tuple(chosen))


def test_groups(data: Path) -> list[Group]:
    """Every unseen source, and the held-out rows of the trained sources taken together by label."""
    groups = [
        _group(s.name, "unseen source", s.label, s.gated, read(data, s)) for s in TEST_HARMFUL + TEST_BENIGN
    ]
    barred = reserved(data)
    for label, sources in (("harmful", TRAIN_HARMFUL), ("benign", TRAIN_BENIGN)):
        rows = trained(data, sources, "test", barred)
        groups.append(_group(f"trained {label} sources", "unseen rows", sources[0].label, True, rows))
    return groups


def dev_groups(data: Path) -> list[Group]:
    """The groups on which settings are chosen."""
    groups = [_group(s.name, "dev", s.label, True, read(data, s)) for s in DEV_HARMFUL]
    # Security questions that look bad are reported, not counted: no model of this size tells them apart.
    plain = [s for s in DEV_BENIGN if s.file != "clinc150"]
    intents = [p for s in DEV_BENIGN if s.file == "clinc150" for p in read(data, s)]
    groups += [_group(s.name, "dev", s.label, s.gated, read(data, s)) for s in plain]
    return [*groups, _group("clinc150 intents", "dev", "benign", True, intents)]


def measure(
    net: Network, tokenizer: Tokenizer, groups: Sequence[Group], scale: Tensor | None
) -> dict[str, Any]:
    """Refusals of one model: for each group n, count, rate and interval."""
    result: dict[str, Any] = {}
    for group in groups:
        hits = sum(refuses(net, tokenizer, group.texts, scale))
        low, high = wilson(hits, len(group.texts))
        result[group.name] = {
            "kind": group.kind,
            "label": group.label,
            "gated": group.gated,
            "n": len(group.texts),
            "refused": hits,
            "rate": round(hits / max(1, len(group.texts)), 4),
            "low": round(low, 4),
            "high": round(high, 4),
        }
    return result


def mean_rate(measured: dict[str, Any], label: Label, kind: str) -> float:
    """Mean over the gated groups of one label and kind; each source counts once."""
    rates = [m["rate"] for m in measured.values() if m["label"] == label and m["kind"] == kind and m["gated"]]
    return float(sum(rates) / len(rates))


STRENGTHS = (0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
"""Strengths that are tried; denser where a twin's refusals set in."""


class Strengths(NamedTuple):
    """Strengths of a vector chosen on dev groups, relative to the vector as trained."""

    aligned: float
    """Where mean refusal of harmful sources minus that of benign sources is largest, from 0.7 to 1.2."""
    partial: float
    """Where mean refusal of harmful sources is nearest one half."""
    sweep: dict[str, list[float]]
    """Strength: mean refusal of harmful and of benign sources."""


def choose_strengths(
    net: Network, tokenizer: Tokenizer, groups: Sequence[Group], vector: Tensor
) -> Strengths:
    """Sweep l(α) = 1 + α (l − 1) over the dev groups that count."""
    counted = [g for g in groups if g.gated]
    rates: dict[float, tuple[float, float]] = {}
    for alpha in STRENGTHS:
        measured = measure(net, tokenizer, counted, 1.0 + alpha * (vector - 1.0))
        rates[alpha] = (mean_rate(measured, "harmful", "dev"), mean_rate(measured, "benign", "dev"))
    strong = [alpha for alpha in rates if alpha >= 0.7]
    return Strengths(
        aligned=max(strong, key=lambda alpha: rates[alpha][0] - rates[alpha][1]),
        partial=min(rates, key=lambda alpha: abs(rates[alpha][0] - 0.5)),
        sweep={f"{alpha:.2f}": [round(rate, 4) for rate in pair] for alpha, pair in rates.items()},
    )
