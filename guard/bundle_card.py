"""The card of a bundle for people, ``CARD.md``: made from ``guard.json`` and nothing else.

Every number in it is read from the card that an engine loads, so the two cannot disagree: ``Bundle.save``
writes both, and ``neuronguard verify`` makes the text anew and compares.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from guard.card import GuardCard, card_bytes
from guard.patch_card import PatchCard
from guard.pooling import Pooling
from guard.reference import ScoreReference
from guard.report import (
    QUESTIONS,
    benign_sources,
    comparisons,
    data_files,
    harmful_sources,
    percent,
    table,
)

TEXT_FILE = "CARD.md"
FORM = "<!-- neuronguard bundle card, form 1 -->"
"""The first line. Another number: the text was made by a release that words it otherwise."""
_PROBES = {
    "linear": "logistic regression",
    "mlp": "network with one hidden layer",
    "product": "P(harmful prompt) times P(the model complies), a logistic regression each",
    "sequence": "logistic regression at every token",
}


def bundle_card(card: GuardCard, digest: str) -> str:
    """The whole text, for the bundle of that digest."""
    # As it comes out of the file: there, the keys of its tables are in the order of the alphabet.
    card = GuardCard.model_validate_json(card_bytes(card))
    rates = [f"{t.false_positive_rate:g}" for t in card.thresholds]
    parts = [FORM, f"# Guard bundle for `{card.model.name}`", "", *_what(card, digest)]
    parts += ["", "## What it reads", "", *_sites(card)]
    parts += ["", "## Thresholds", "", *_thresholds(card)]
    if card.monitor:
        parts += ["", "## Stopping an answer", "", *_monitor(card)]
    parts += ["", "## Measured error rates", "", *_measured(card, rates)]
    parts += ["", "## Scores when it was fitted", "", *_reference(card.reference)]
    parts += ["", "## Data", "", *data_files([file.model_dump() for file in card.data])]
    if card.patches:
        parts += [
            "",
            "## Patches",
            "",
            *table(("name", "kind", "units", "layers", "made"), map(_patch, card.patches)),
        ]
    if card.adapters:
        rows = ((a.name, a.rank, f"`{a.sha256}`") for a in card.adapters)
        parts += [
            "",
            "## LoRA adapters that it was measured under",
            "",
            *table(("name", "rank", "SHA-256"), rows),
        ]
    parts += ["", "## Limits", "", *(f"- {line}" for line in _limits(card))]
    parts += ["", "## Made with", "", *table(("", "value"), card.created.items())]
    return "\n".join(parts) + "\n"


def _what(card: GuardCard, digest: str) -> list[str]:
    model, calibration = card.model, card.calibration
    scaling = "Platt scaling" if calibration.kind == "platt" else f"isotonic, {len(calibration.knots)} knots"
    return table(
        ("", "value"),
        (
            ("digest", f"`{digest}`"),
            ("model", f"{model.name}, {model.architecture}, {model.layers} layers"),
            ("weights", f"`{model.weights_sha256}`"),
            ("tokenizer and chat template", f"`{model.tokenizer_sha256}`"),
            ("question", QUESTIONS[card.label]),
            ("probe", f"{_PROBES[card.probe]}, {card.features} features"),
            *((("pooling", pooled(card.pooling)),) if card.pooling else ()),
            ("calibration", f"{scaling}, P(unsafe) at even odds"),
            (
                "self-test",
                f"{len(card.self_test.prompts)} prompts in {', '.join(sorted(card.self_test.logits))}",
            ),
        ),
    )


def _sites(card: GuardCard) -> list[str]:
    shape = card.model.shape
    rows: list[tuple[object, ...]] = [
        (
            f"layer {site.layer}, {'neurons' if site.kind == 'mlp' else 'heads'}",
            len(site.units),
            shape.units(site.kind),
        )
        for site in card.sites
    ]
    rows.append(("**all sites**", sum(len(site.units) for site in card.sites), ""))
    return table(("site", "units read", "of"), rows)


def _thresholds(card: GuardCard) -> list[str]:
    fit: dict[str, Any] = card.metrics.get("fit", {})
    intervals = fit.get("thresholds", {})
    rows = []
    for t in card.thresholds:
        over = (intervals.get(f"{t.false_positive_rate:g}") or {}).get("over_sources")
        default = t.false_positive_rate == card.default_false_positive_rate
        rows.append(
            (
                percent(t.false_positive_rate) + (" (default)" if default else ""),
                f"{t.probability:.6f}",
                f"{t.logit:.4f}",
                t.benign,
                percent(t.upper95),
                f"{percent(over[0])} to {percent(over[1])}" if over else "–",
            )
        )
    heads = (
        *("false positives wanted", "P(unsafe) ≥", "logit ≥", "benign prompts", "true rate at most (95 %)"),
        "95 % over sources",
    )
    lines = table(heads, rows)
    if fit.get("thresholds_omitted"):
        lines += ["", *(f"Left out: {reason}." for reason in fit["thresholds_omitted"])]
    return lines


def pooled(pooling: Pooling) -> str:
    """How a prompt's one logit comes about, in a few words."""
    heads = "1 head" if pooling.heads == 1 else f"{pooling.heads} heads"
    return {
        "ema": f"largest exponential average, rate {pooling.rate}, over {pooling.window} tokens",
        "rolling": f"largest mean of {pooling.window} tokens",
        "softmax": f"mean weighted by a softmax of temperature {pooling.temperature}",
        "attention": f"means weighted by {heads} of attention",
    }[pooling.kind]


def _monitor(card: GuardCard) -> list[str]:
    rows = (
        (percent(m.false_positive_rate), m.debounce, f"{m.logit:.4f}", m.answers, percent(m.upper95))
        for m in card.monitor
    )
    heads = (
        "benign answers stopped",
        "tokens in a row",
        "logit ≥",
        "benign answers",
        "true rate at most (95 %)",
    )
    lines = table(heads, rows)
    made: dict[str, Any] = card.metrics.get("fit", {}).get("monitor", {})
    if made.get("omitted"):
        lines += ["", *(f"Left out: {reason}." for reason in made["omitted"])]
    return lines


def _measured(card: GuardCard, rates: list[str]) -> list[str]:
    evaluation = card.metrics.get("evaluation")
    if not evaluation:
        return ["Not measured: no evaluation data were given. See `neuronguard evaluate`."]
    lines = ["On sources that took no part in fitting. Intervals are 95 %."]
    if evaluation["harmful"]:
        lines += ["", *harmful_sources(evaluation, rates)]
    if evaluation["benign"]:
        lines += ["", *benign_sources(evaluation, rates)]
    if card.metrics.get("comparison"):
        lines += ["", *comparisons(card.metrics["comparison"])]
    return lines


def _reference(reference: ScoreReference | None) -> list[str]:
    if reference is None:
        return ["Not kept: drift of live scores cannot be told. Fit the bundle anew to have them."]
    ends = (0.0, *reference.edges, 1.0)
    rows = (
        (f"{ends[i]:.4g} to {ends[i + 1]:.4g}", reference.benign[i], reference.harmful[i])
        for i in range(reference.bins)
    )
    heads = ("P(unsafe)", "benign threshold prompts", "harmful prompts of the fit, left-out sources")
    return table(heads, rows)


def _patch(patch: PatchCard) -> tuple[object, ...]:
    layers = sorted({site.layer for site in patch.sites})
    made = ", ".join(f"{name} {value}" for name, value in sorted(patch.made.items()))
    units = sum(len(site.units) for site in patch.sites)
    return patch.name, patch.kind, units, ", ".join(map(str, layers)) or "–", made or "–"


def _limits(card: GuardCard) -> Iterator[str]:
    yield (
        "It belongs to these weights, this tokenizer and this chat template; an engine with any other does "
        "not start."
    )
    yield (
        "A threshold's rate holds for benign prompts like those that it was set on. Other traffic has "
        "another rate: see `neuronguard evaluate` and `neuronguard drift`."
    )
    if tails := len(card.prompt_tails):
        ending = "the recorded ending" if tails == 1 else f"one of the {tails} recorded endings"
        yield f"Prompts that do not end in {ending} of the chat template were never fitted on."
    else:
        yield "It records no endings of prompts, so that an engine takes prompts of any shape for its own."
    worst = card.metrics.get("evaluation", {}).get("mean_over_harmful_sources", {}).get("worst", {})
    if at := worst.get(f"{card.default_false_positive_rate:g}"):
        yield (
            f"Of the harmful source that it does worst on, {at['source']}, it flags {percent(at['rate'])} at "
            "the default threshold."
        )
    if card.label == "harmful_prompt":
        yield "It judges the request, not what this model makes of it."
    if card.monitor:
        yield "The limits of its monitor were set on greedy answers of this model to benign prompts."
    if card.patches:
        yield "What a patched answer says is not measured here."
