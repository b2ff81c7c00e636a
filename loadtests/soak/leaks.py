"""Whether something has leaked: by what is left at rest, and by what grew under way.

*At rest*: nothing is being asked, before the soak (but after a first round of traffic) and after it. State of
requests has to be gone; pooled connections may stay. *Growth*: the Theil–Sen slope of a series over the soak
(``scipy.stats.theilslopes``), times its length; a leak is a growth whose lower 95 % bound is above what is
allowed, so that a single step or the fluctuation of what is in flight is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import theilslopes

WARM_UP = 0.25
"""Share of the soak that is left out: caches and arenas fill."""


class Allowance(NamedTuple):
    """How much more a series may be at rest after the soak, and how much it may grow during it."""

    left: float
    growth: float


class Finding(NamedTuple):
    """One series."""

    name: str
    before: float
    after: float
    growth: float
    low: float
    high: float
    leak: str
    """Why it counts as a leak; empty if it does not."""


def allowance(name: str, megabytes: float, connections: int) -> Allowance:
    """What a series is allowed, by its unit. ``connections``: those that may stay open in pools."""
    unit = name.rpartition(": ")[2]
    return {
        "MB": Allowance(np.inf, megabytes),
        "files": Allowance(connections + 4, connections + 4),
        "threads": Allowance(connections + 4, connections + 4),
        "tasks": Allowance(3, 2 * connections + 4),
        "share of KV blocks": Allowance(0.0, 0.5),
    }.get(unit, Allowance(0.0, 2 * connections + 4))


def growth(times: Sequence[float], values: Sequence[float]) -> tuple[float, float, float]:
    """Growth over the time after warming up, with its 95 % bounds."""
    begin = times[0] + WARM_UP * (times[-1] - times[0])
    kept = [(at, value) for at, value in zip(times, values, strict=True) if at >= begin]
    at, value = np.array(kept).T
    found = theilslopes(value, at, alpha=0.95)
    span = at[-1] - at[0]
    return float(found.slope * span), float(found.low_slope * span), float(found.high_slope * span)


def findings(
    times: Sequence[float],
    samples: Sequence[dict[str, float]],
    before: dict[str, float],
    after: dict[str, float],
    megabytes: float,
    connections: int,
) -> list[Finding]:
    """One for each series that was there all the time."""
    names = [name for name in before if name in after and all(name in sample for sample in samples)]
    found = []
    for name in names:
        middle, low, high = growth(times, [sample[name] for sample in samples])
        allowed = allowance(name, megabytes, connections)
        leak = ""
        if after[name] - before[name] > allowed.left:
            leak = f"{after[name] - before[name]:g} more are left at rest, {allowed.left:g} allowed"
        elif low > allowed.growth:
            leak = f"grew by at least {low:.1f}, {allowed.growth:g} allowed"
        found.append(Finding(name, before[name], after[name], middle, low, high, leak))
    return found


def table(found: Sequence[Finding]) -> str:
    """Markdown."""
    lines = [
        "| | at rest before | after | growth [95 % interval] | leak |",
        "|---|--:|--:|--:|---|",
    ]
    for one in found:
        spread = f"{one.growth:.2f} [{one.low:.2f}, {one.high:.2f}]"
        lines.append(f"| {one.name} | {one.before:g} | {one.after:g} | {spread} | {one.leak or 'no'} |")
    return "\n".join(lines) + "\n"
