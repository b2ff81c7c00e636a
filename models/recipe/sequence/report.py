"""The figures as `docs/results/sequence.md`. What they mean is written by hand, in `findings.md`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from guard.report import table
from models.recipe.detection.report import number, percent
from models.recipe.sequence.figures import NAMES
from models.recipe.sequence.guards import LAST, POOLINGS

FINDINGS = Path(__file__).parent / "findings.md"
Figures = Mapping[str, Any]


def markdown(document: Figures, cost: Figures | None) -> str:
    """The whole report; ``cost`` are the engine's figures, None where they are not measured yet."""
    needle, answers = document["needle"], document["answers"]
    parts = [
        "# Sequence probes on the lab models",
        "Written by `make sequence-results`; figures in [sequence.json](sequence.json). What the probes are: "
        "[sequence.md](../sequence.md). Intervals are 95 %: bootstrap over requests for ranking figures, "
        "Wilson for rates. The model has seven million parameters and is an instrument: nothing here says "
        "anything about a real model.",
        FINDINGS.read_text("utf-8").strip(),
        "## Test sources",
        "Sources that took part in nothing. *Flagged* is at each guard's own threshold for 1 % of benign "
        "prompts. Differences are to the guard of the last token, on the same resamples.",
        _quality(document["quality"]),
        _sources(document["quality"]),
        "## Left-out sources of the fit",
        "Harmful sources, each ranked by probes that did not see it: what the strength of the penalty was "
        "chosen by. The guard of the last token was fitted in more folds, so that its probes see more.",
        _left_out(document["left_out"]),
        "## The same request in other words",
        "Harmful test requests that a guard flags at 1 %, then with harmless words around them, none of "
        "which occurred in the fit. Share that is no longer flagged.",
        _flips(document["flips"]),
        _picture("flips"),
        "## A needle in benign text",
        f"The model's context is {needle['context']} tokens, so that the longest text is {_longest(needle)} "
        f"tokens and not two thousand. {needle['needles']} harmful test requests that some guard flags when "
        "they stand alone are hidden in benign test requests; the same texts without a needle are the benign "
        "rows. In brackets: AUROC against those. An AUROC needs no threshold; a flag rate does, and the "
        "thresholds were set on short prompts.",
        _needle(needle),
        _picture("needle"),
        "## Stopping an answer",
        f"{answers['unsafe']['answers']} answers to harmful test requests that the model does not refuse, "
        f"{answers['benign']['answers']} to benign ones, at most {answers['tokens']} tokens long. Limits "
        f"were set on answers to {answers['set_on']} benign threshold prompts, for 1 % of them. *Let "
        f"through*: the {answers['missed']} of the unsafe answers whose request the guard of the last token "
        "does not flag.",
        _answers(answers),
        "## What it costs in the engine",
        *_cost(cost),
    ]
    return "\n\n".join(parts) + "\n"


def _quality(found: Figures) -> str:
    rows = []
    for name, each in found.items():
        ranked, change = each["ranking"], each.get("minus_last")
        rows.append(
            (
                name,
                number(ranked["auroc"], ranked["auroc_interval"]),
                _difference(change["auroc"], number) if change else "",
                percent(ranked["tpr_at_fpr"]["0.01"], ranked["tpr_at_fpr_interval"]["0.01"]),
                _difference(change["tpr_at_fpr"]["0.01"], percent) if change else "",
                rate(each["harmful_flagged"]),
                rate(each["benign_flagged"]),
                number(each["twins"]),
            )
        )
    heads = (
        "guard",
        "AUROC",
        "difference",
        "recall at 1 %",
        "difference",
        "harmful flagged",
        "benign flagged",
    )
    return _table(rows, *heads, "AUROC against structural twins")


def _sources(found: Figures) -> str:
    names = list(found)
    rows = []
    for source, first in found[LAST]["by_source"].items():
        cells = [found[name]["by_source"][source] for name in names]
        kind = "harmful" if first["harmful"] else "benign"
        rows.append((source, kind, *(_flagged(each) for each in cells)))
    rows.sort(key=lambda row: (row[1] != "harmful", row[0]))
    return _table(rows, "source", "", *(f"{name}: flagged (AUROC)" for name in names))


def _flagged(each: Figures) -> str:
    area = f" ({number(each['auroc'])})" if each.get("auroc") is not None else ""
    return percent(each["flagged"]["rate"]) + area


def _left_out(found: Figures) -> str:
    rows = [
        (
            name,
            each["folds"],
            f"{each['inverse_regularisation']:g}",
            number(each["mean_auroc"]),
            number(each["mean_partial_auroc"]),
            f"{number(each['worst_partial_auroc'])} ({each['worst_source']})",
        )
        for name, each in found.items()
    ]
    heads = ("guard", "folds", "inverse regularisation", "AUROC, mean", "partial AUROC, mean")
    return _table(rows, *heads, "worst")


def _flips(found: Figures) -> str:
    names = list(found["flagged"])
    rows: list[tuple[object, ...]] = [("flagged before", *(found["flagged"][name] for name in names))]
    rows += [(change, *(rate(each[name]) for name in names)) for change, each in found["changes"].items()]
    return _table(rows, "change", *names)


def _longest(found: Figures) -> int:
    return round(max(float(each["tokens"]) for each in found["texts"].values()))


def _needle(found: Figures) -> str:
    names = list(found["alone"])
    rows: list[tuple[object, ...]] = [("needles alone", "", *(rate(found["alone"][name]) for name in names))]
    for title, each in found["texts"].items():
        cells = []
        for name in names:
            area = each["guards"][name].get("auroc")
            cells.append(rate(each["guards"][name]["flagged"]) + (f" ({number(area)})" if area else ""))
        rows.append((title, f"{each['tokens']:.0f}", *cells))
    return _table(rows, "text", "median tokens", *names)


def _answers(found: Figures) -> str:
    rows = [
        (
            name,
            each["debounce"],
            rate(each["unsafe_stopped"]),
            rate(each["missed_stopped"]),
            "–" if each["median_token"] is None else f"{each['median_token']:.0f}",
            rate(each["benign_stopped"]),
        )
        for name, limits in found["guards"].items()
        for each in limits
    ]
    heads = ("probe", "tokens in a row", "unsafe answers stopped", "of those let through", "median token")
    return _table(rows, *heads, "benign answers stopped")


def _cost(cost: Figures | None) -> Iterable[str]:
    if cost is None:
        yield "Not measured yet."
        return
    yield (
        "Ratios to plain vLLM on a 12 × 768 model: throughput of a batch of sixteen, and time of a decode "
        "step and of prefill, from neighbouring steps of one engine; median and 95 % interval. *Control* is "
        "plain vLLM against itself. More in [sequence-cost.md](sequence-cost.md)."
    )
    rows = [
        (kind, arm, *(_ratio(each[key]) for key in ("throughput", "decode", "prefill")))
        for kind, arms in cost["pooling"].items()
        if kind in POOLINGS
        for arm, each in arms.items()
        if isinstance(each, Mapping) and "throughput" in each
    ]
    yield _table(rows, "probe", "what is on", "throughput", "decode step", "prefill")


def _ratio(each: Figures) -> str:
    return number(each["median"], (each["low"], each["high"]))


def rate(each: Figures) -> str:
    """A share as ``guard.stats.Rate`` documents it."""
    return percent(each["rate"], (each["low"], each["high"])) if each["n"] else "–"


def _difference(each: Figures, form: Any) -> str:
    text: str = form(each["difference"], each["difference_interval"])
    return text


def _picture(name: str) -> str:
    file, title = NAMES[name]
    return f"![{title}](../images/{file})"


def _table(rows: Iterable[Iterable[object]], *heads: str) -> str:
    return "\n".join(table(heads, [tuple(row) for row in rows]))
