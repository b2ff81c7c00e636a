"""Figures from the rows of the rounds, with intervals that resample whole rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from scipy.stats import bootstrap

Row = dict[str, Any]
Statistic = Callable[[Sequence[Row]], float]


def quantile(part: str, q: float) -> Statistic:
    """A quantile of the time to the first text, or to the refusal, in milliseconds."""
    return lambda rows: float(1e3 * np.quantile([x for row in rows for x in row[part]["first"]], q))


def tokens_per_second(rows: Sequence[Row]) -> float:
    """Tokens of the answers in the busy part, over its wall-clock time."""
    return float(sum(row["busy"]["tokens"] for row in rows) / sum(row["busy"]["wall"] for row in rows))


def cpu_per_request(part: str, group: str | None = None) -> Statistic:
    """CPU milliseconds a request of one part, of all processes or of one group."""

    def statistic(rows: Sequence[Row]) -> float:
        spent = sum(
            seconds for row in rows for name, seconds in row["cpu"][part].items() if group in (None, name)
        )
        return float(1e3 * spent / sum(len(row[part]["first"]) for row in rows))

    return statistic


def peak_megabytes(rows: Sequence[Row]) -> float:
    """The largest sum over the processes of an alternative, at the end of any round."""
    return float(max(sum(row["megabytes"].values()) for row in rows))


FIGURES: dict[str, Statistic] = {
    "first_p50_ms": quantile("benign", 0.5),
    "first_p99_ms": quantile("benign", 0.99),
    "refusal_p50_ms": quantile("harmful", 0.5),
    "refusal_p99_ms": quantile("harmful", 0.99),
    "busy_first_p50_ms": quantile("busy", 0.5),
    "tokens_per_second": tokens_per_second,
    "cpu_ms_per_answer": cpu_per_request("busy"),
    "cpu_ms_per_refusal": cpu_per_request("harmful"),
}


def interval(statistic: Callable[[Any], float], rounds: int, resamples: int = 1000) -> dict[str, float]:
    """``statistic`` of a list of round numbers, with its 95 % percentile bootstrap interval, seeded."""
    numbers = np.arange(rounds)
    value = statistic(numbers)
    if rounds < 2:
        return {"value": value, "low": value, "high": value}
    found = bootstrap(
        (numbers,), statistic, vectorized=False, n_resamples=resamples, method="percentile", random_state=0
    ).confidence_interval
    return {"value": value, "low": float(found.low), "high": float(found.high)}


def _of_rounds(statistic: Statistic, rows: Sequence[Row], rounds: Sequence[int]) -> float:
    return statistic([rows[number] for number in rounds])


def _ratio_of_rounds(
    statistic: Statistic, rows: Sequence[Row], against: Statistic, base: Sequence[Row], rounds: Sequence[int]
) -> float:
    return _of_rounds(statistic, rows, rounds) / _of_rounds(against, base, rounds)


def figures(rows: list[Row], base: str) -> dict[str, dict[str, Any]]:
    """All figures of each alternative, and each over that of ``base`` in the same rounds."""
    by_name: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["round"]):
        by_name.setdefault(row["name"], []).append(row)
    rounds = min(map(len, by_name.values()))
    found: dict[str, dict[str, Any]] = {}
    for name, own in by_name.items():
        found[name] = {
            "rounds": rounds,
            "answers": sum(len(row[part]["first"]) for row in own for part in ("benign", "busy")),
            "refusals": sum(len(row["harmful"]["first"]) for row in own),
            "wrong": sum(row["wrong"] for row in own),
            "megabytes": peak_megabytes(own),
            "stages_ms": {part: stages(own, part) for part in ("benign", "harmful")},
            "cpu_ms": {
                part: {group: cpu_per_request(part, group)(own) for group in own[0]["cpu"][part]}
                for part in ("busy", "harmful")
            },
            "ratio": {},
        }
        for figure, statistic in FIGURES.items():
            found[name][figure] = interval(partial(_of_rounds, statistic, own), rounds)
            # A refusal is set against the time in which stock vLLM would have begun to answer.
            against = FIGURES[figure.replace("refusal", "first") if "refusal_p" in figure else figure]
            part = by_name[base]
            if figure == "cpu_ms_per_refusal":
                against = FIGURES["cpu_ms_per_answer"]
            found[name]["ratio"][figure] = interval(
                partial(_ratio_of_rounds, statistic, own, against, part), rounds
            )
    return found


def stages(rows: list[Row], part: str) -> dict[str, float]:
    """Median milliseconds of each stage that the answers name."""
    seen: dict[str, list[float]] = {}
    for row in rows:
        for answer in row[part]["stages"]:
            for stage, ms in answer.items():
                seen.setdefault(stage, []).append(ms)
    return {stage: float(np.median(values)) for stage, values in seen.items()}
