"""What the time of an answer tells of the score: refused requests beside refused ones, passed beside passed.

A client of the gateway times whole answers of one token. The two of a pair have equally many prompt tokens
and are sent one after the other, in an order that is drawn; every prompt is sent once. If time told the
score, one of the two would be the slower one more often than not.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from scipy.stats import wilcoxon

from guard.calibrate import cut
from guard.sealed import Keyring
from loadtests.first_token import FLAGS, server
from loadtests.pairs import Interval
from loadtests.redteam.target import refuse_others
from models.recipe.corpus import digest
from models.recipe.detection.study import VARIANTS, Study

FEWEST = 200
"""Fewest pairs of a comparison."""
MOST = 300

ABOUT = """\
Written by `python -m loadtests.redteam timing`; figures in [refusal-timing.json](refusal-timing.json). A
client of the gateway times whole answers of one token on the lab guard. Two prompts of equally many tokens
are sent one after the other: both refused, one for a high score and one for a low one; or both passed, one
close to the threshold and one far below it. Every order of requests is drawn anew and has an engine of its
own. Medians with 95 % bootstrap intervals; p by Wilcoxon's signed-rank test, one of as many tests as there
are lines."""


class Row(NamedTuple):
    """A test prompt, its length and its score."""

    text: str
    tokens: int
    logit: float


class Comparison(NamedTuple):
    """Two groups of prompts whose times are compared, pair by pair."""

    first: str
    second: str
    pairs: list[tuple[Row, Row]]


def pairs(first: Sequence[Row], second: Sequence[Row], most: int = MOST) -> list[tuple[Row, Row]]:
    """Rows of equal length, each used once, in the order of a hash."""
    waiting: dict[int, list[Row]] = {}
    for row in sorted(second, key=lambda r: digest(f"timing:{r.text}")):
        waiting.setdefault(row.tokens, []).append(row)
    found = []
    for row in sorted(first, key=lambda r: digest(f"timing:{r.text}")):
        if others := waiting.get(row.tokens):
            found.append((row, others.pop()))
    return found[:most]


def comparisons(rows: Sequence[Row], at: float) -> list[Comparison]:
    """Refused: the upper third of the scores and the lower one. Passed: the highest scores and the lowest."""
    refused = sorted((r for r in rows if r.logit >= at), key=lambda r: -r.logit)
    passed = sorted((r for r in rows if r.logit < at), key=lambda r: -r.logit)
    third = len(refused) // 3
    some = min(len(refused), len(passed) // 2)
    near, far = passed[:some], passed[-some:]
    return [
        Comparison("refused, high score", "refused, low score", pairs(refused[:third], refused[-third:])),
        Comparison("passed, close to the threshold", "passed, far below it", pairs(near, far)),
    ]


def difference(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """Of paired times in seconds: median difference, who is slower how often, Wilcoxon's signed-rank p."""
    a, b = np.asarray(first), np.asarray(second)
    return {
        "pairs": len(a),
        "first_ms": Interval.of((1e3 * a).tolist())._asdict(),
        "second_ms": Interval.of((1e3 * b).tolist())._asdict(),
        "difference_ms": Interval.of((1e3 * (a - b)).tolist())._asdict(),
        "first_slower": float(np.mean(a > b)),
        "p": float(wilcoxon(a, b).pvalue),
    }


def measure(study: Study, seeds: Sequence[int]) -> dict[str, Any]:
    """Times against a guarded engine and a gateway that are started for it, once for each order."""
    variant = VARIANTS[0]
    subject, bundle = study.subject(variant), study.bundle(variant)
    refuse_others(subject.checkpoint)
    test = study.role(variant, study.evaluate, bundle.card.sites)
    calm = study.role(variant, study.threshold, bundle.card.sites)
    logits = bundle.logits(test.features)
    rows = [
        Row(prompt.text, len(tokens), float(logit))
        for prompt, tokens, logit in zip(test.seen.prompts, test.seen.tokens, logits, strict=True)
    ]
    compared = comparisons(rows, cut(bundle.logits(calm.features), 0.01)[0])
    for each in compared:
        if len(each.pairs) < FEWEST:
            raise SystemExit(f"only {len(each.pairs)} pairs of '{each.first}', expected {FEWEST} at least")
    return {
        str(seed): _measure(subject.checkpoint.path, study.lab / "bundle", compared, seed) for seed in seeds
    }


def _measure(model: Path, bundle: Path, compared: Sequence[Comparison], seed: int) -> dict[str, Any]:
    with _stack(model, bundle) as client:
        return {
            each.first + " / " + each.second: difference(*times)
            for each, times in zip(compared, _send(client, compared, seed), strict=True)
        }


def _send(
    client: httpx.Client, compared: Sequence[Comparison], seed: int
) -> Iterator[tuple[list[float], list[float]]]:
    draw = random.Random(seed)
    order = [(c, p) for c, each in enumerate(compared) for p in range(len(each.pairs))]
    draw.shuffle(order)
    for text in ("What is a lamp?", "Name a river.", "How do birds sing?") * 10:
        _time(client, text)
    times = {}
    for c, p in order:
        halves = [0, 1]
        draw.shuffle(halves)
        for half in halves:
            times[c, p, half], action = _time(client, compared[c].pairs[p][half].text)
            # Close to the threshold, rounding in the engine may decide the other way.
            if (action == "refuse") != (c == 0):
                times[c, p, half] = float("nan")
    for c, each in enumerate(compared):
        both = np.array([[times[c, p, 0], times[c, p, 1]] for p in range(len(each.pairs))])
        both = both[~np.isnan(both).any(axis=1)]
        yield both[:, 0].tolist(), both[:, 1].tolist()


def _time(client: httpx.Client, text: str) -> tuple[float, str | None]:
    body = {
        "model": "model",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 1,
        "temperature": 0,
    }
    began = time.perf_counter()
    answer = client.post("/v1/chat/completions", json=body)
    elapsed = time.perf_counter() - began
    answer.raise_for_status()
    return elapsed, answer.headers.get("x-guard-action")


@contextmanager
def _stack(model: Path, bundle: Path) -> Iterator[httpx.Client]:
    """A client of a gateway before a guarded engine."""
    python = sys.executable
    with ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory()))
        keys = folder / "keys"
        Keyring.generate().save(keys)
        command = [python, "-m", "guard.engine", "--bundle", str(bundle), "--key-file", str(keys)]
        engine = running.enter_context(
            server([*command, "--model", str(model), *FLAGS], "/guard/status", folder / "engine.log")
        )
        settings = {"NEURONGUARD_ENGINE_URL": engine, "NEURONGUARD_KEY_FILE": str(keys)}
        gateway = running.enter_context(
            server([python, "-m", "service"], "/readyz", folder / "gateway.log", settings)
        )
        yield running.enter_context(httpx.Client(base_url=gateway, timeout=60.0))


def report(found: dict[str, Any]) -> str:
    """What ``measure`` found, as a page."""
    lines = [
        "# What the time of an answer tells of the score",
        "",
        ABOUT,
        "",
        "| prompts of a pair | order | pairs | median, ms | difference, ms | the first is slower | p |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for seed, comparisons in found.items():
        for name, each in comparisons.items():
            lines.append(
                f"| {name} | {seed} | {each['pairs']} "
                f"| {each['first_ms']['median']:.1f} / {each['second_ms']['median']:.1f} "
                f"| {Interval(**each['difference_ms'])} | {100 * each['first_slower']:.0f} % "
                f"| {each['p']:.2g} |"
            )
    return "\n".join(lines) + "\n"
