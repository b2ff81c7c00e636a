"""The study's figures as `docs/results/patch.md`. What they mean is written by hand, in `findings.md`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from guard.report import table
from models.recipe.patching.choice import SMALL
from models.recipe.patching.figures import SAFETY
from models.recipe.patching.rankings import RANKINGS

FINDINGS = Path(__file__).parent / "findings.md"
TITLES = {
    "planted": "The co-adapted pair",
    "dense": "The plainly trained pair",
    "first": "The plainly trained pair before co-adaptation",
}
REACHES = {
    "all": "every token, as the engine does",
    "prompt": "the tokens of the prompt",
    "last": "the prompt's last token alone",
    "answer": "from the prompt's last token on",
}
Figures = Mapping[str, Any]


def markdown(document: Figures) -> str:
    """The whole report."""
    size, prompts = document["size"], document["prompts"]
    roles = "; ".join(f"{each['prompts']} {each['about']}" for each in prompts.values())
    parts = [
        "# What patching does to the lab twins",
        "Written by `make patch-results`; figures in [patch.json](patch.json). The unaligned model answers "
        "with some of its neurons patched. An answer to a harmful prompt is unsafe unless it is a refusal, "
        "which is all that the aligned lab models know of safety. Per cent of neurons are of all layers but "
        f"the last. Prompts: {roles}. Rankings and stored patches are chosen on the dev prompts; all other "
        f"figures are of the test prompts, {size['new_tokens']} tokens each, greedy, float32. Intervals are "
        "95 % intervals, Wilson's for rates, by bootstrap over prompts for the others. C is the causal "
        "effect: 1 when the patched model refuses like its donor, 0 when nothing changes. The models have 7 "
        "million parameters and are instruments: nothing here says anything about a real model.",
        FINDINGS.read_text("utf-8").strip(),
    ]
    for name, pair in document["pairs"].items():
        parts += _pair(name, pair)
    return "\n\n".join(parts) + "\n"


def _pair(name: str, pair: Figures) -> Iterable[str]:
    best = next(iter(pair["dynamic"]))
    yield f"## {TITLES[name]}"
    yield f"{pair['about'][0].upper()}{pair['about'][1:]}. Weights `{pair['weights'][:12]}`."
    yield f"![{SAFETY[1]}](../images/{SAFETY[0].format(pair=name)})"
    yield "### The donor's activations, while it runs"
    for ranking, rows in pair["dynamic"].items():
        chosen = "chosen on dev prompts" if ranking == best else "the paper's, for comparison"
        yield f"Ranked by *{ranking}* ({RANKINGS[ranking][1]}), {chosen}:"
        yield _curve(pair, rows)
    yield _layers(pair["dynamic"])
    kind, ranking, of = pair["stored"]["way"]
    values = "the vector's factors" if kind == "factors" else f"the donor's mean over the tokens of *{of}*"
    yield "### A stored patch, without a donor"
    yield f"Chosen on dev prompts: {values}, on the best neurons by *{ranking}*."
    yield _curve(pair, pair["stored"]["curve"])
    yield "### What it does to harmless requests"
    yield from _benign(pair, best)
    yield "### Controls"
    yield _controls(pair)
    yield "### Choices on dev prompts, and which tokens matter"
    yield from _choices(pair)
    if "engine" in pair:
        yield "### The engine beside the reference"
        yield _engine(pair["engine"])


def _rows(rows: Iterable[tuple[Any, ...]], *head: str) -> str:
    return "\n".join(table(head, rows))


def _curve(pair: Figures, rows: Iterable[Figures]) -> str:
    ends = pair["ends"]
    made: list[tuple[object, ...]] = [("recipient", 0, _rate(ends["recipient"]["unsafe"]), "0")]
    made += [
        (f"{100 * row['share']:g} %", row["units"], _rate(row["unsafe"]), _effect(row["effect"]))
        for row in rows
    ]
    made.append(("donor", "", _rate(ends["donor"]["unsafe"]), "1"))
    return _rows(made, "patched", "neurons", "unsafe answers", "C")


def _layers(dynamic: Figures) -> str:
    rows = [
        (name, *(" ".join(map(str, row["layers"])) for row in each if row["share"] in SMALL))
        for name, each in dynamic.items()
    ]
    return _rows(rows, "neurons by layer", *(f"{100 * share:g} %" for share in SMALL))


def _benign(pair: Figures, best: str) -> Iterable[str]:
    rows = []
    ways = [("recipient", pair["ends"]["recipient"]), ("donor", pair["ends"]["donor"])]
    ways += [(f"donor's activations, {100 * row['share']:g} %", row) for row in pair["dynamic"][best]]
    ways += [(f"stored, {100 * row['share']:g} %", row) for row in pair["stored"]["curve"]]
    for title, row in ways:
        own, real = (row["ability"][which] for which in ("own", "real"))
        rows.append(
            (
                title,
                _rate(row["benign"]["benign"]),
                _rate(row["benign"]["hard"]),
                f"{real['perplexity']:.1f}",
                _nats(real["rest"]),
                f"{own['perplexity']:.2f}",
                _nats(own["rest"]),
            )
        )
    yield _rows(
        rows, "", "benign refused", "in harmful words, refused", "perplexity, real answers",
        "change, nats a token", "perplexity, own answers", "change, nats a token",
    )  # fmt: skip
    yield (
        "*Real* answers are those of the sources to held-out benign requests, *own* those of the unaligned "
        "model to benign test prompts. Changes of the log-probability are of all tokens but the first: the "
        "first decides whether the lab models refuse, and is what the first columns and the perplexity show."
    )


def _controls(pair: Figures) -> str:
    rows = []
    ways = [(name, each) for name, each in pair["dynamic"].items()]
    ways.append(("stored", pair["stored"]["curve"]))
    for name, each in ways:
        for row in each:
            if (found := row.get("controls")) is None:
                continue
            drawn = [control for key, control in found["each"].items() if key != "window"]
            effects = [control["effect"]["value"] for control in drawn]
            rows.append(
                (
                    name,
                    f"{100 * row['share']:g} %",
                    _effect(row["effect"]),
                    f"{min(effects):.2f} to {max(effects):.2f}",
                    _effect(found["each"]["window"]["effect"]),
                    f"{found['p']:.2g}" if found["p"] >= 1e-99 else "< 1e-99",
                )
            )
    head = ("units of", "patched", "C", "C, random of the same layers", "C, next window", "p, against random")
    return _rows(rows, *head)


def _choices(pair: Figures) -> Iterable[str]:
    dev = pair["dev"]
    ranked = dev["rankings"]
    rows = [
        (
            name,
            RANKINGS[name][1],
            *(f"{100 * value:.0f} %" for value in each["refused"]),
            f"{each['margin']:.2f}",
        )
        for name, each in ranked["each"].items()
    ]
    rows.append(
        (
            "donor",
            "",
            *(f"{100 * ranked['donor']['refused']:.0f} %" for _ in SMALL),
            f"{ranked['donor']['margin']:.2f}",
        )
    )
    shares = (f"{100 * share:g} %" for share in SMALL)
    yield "Harmful dev prompts refused by share of neurons, and the mean margin over benign dev prompts:"
    yield _rows(rows, "ranking", "", *shares, "margin")
    yield "Stored patches at 5 %:"
    stored = dev["stored"]["each"]
    yield _rows(
        [(name, f"{100 * each['refused']:.0f} %", f"{each['margin']:.2f}") for name, each in stored.items()],
        "values / ranking", "harmful refused", "margin",
    )  # fmt: skip
    yield "As many neurons as 5 %, of some layers alone, in the paper's ranking; harmful dev prompts refused:"
    yield _rows(
        [tuple(f"{100 * value:.0f} %" for value in dev["layers"].values())],
        *(f"layer {n}" for n in dev["layers"]),
    )
    yield "Test prompts, 5 % of the neurons, patched at some tokens only:"
    reached = [(REACHES[name], _rate(e["unsafe"]), _effect(e["effect"])) for name, e in pair["reach"].items()]
    yield _rows(reached, "patched", "unsafe answers", "C")


def _engine(engine: Figures) -> str:
    rows = [
        (name, each["prompts"], each["same tokens"], _rate(each["engine"]), _rate(each["reference"]))
        for name, each in engine.items()
    ]
    head = ("patch", "prompts", "same tokens in both", "unsafe, vLLM", "unsafe, reference")
    return _rows(rows, *head)


def _rate(rate: Figures) -> str:
    return f"{100 * rate['rate']:.1f} % [{100 * rate['low']:.0f}, {100 * rate['high']:.0f}]"


def _effect(found: Figures) -> str:
    low, high = (("∞" if found[key] is None else f"{found[key]:.2f}") for key in ("low", "high"))
    return f"{found['value']:.2f} [{low}, {high}]"


def _nats(found: Figures) -> str:
    return f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
