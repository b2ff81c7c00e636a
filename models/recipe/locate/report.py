"""The study's figures as `docs/results/locate.md`. What they mean is written by hand, in `findings.md`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from guard.report import table
from models.recipe.locate.figures import NAMES

FINDINGS = Path(__file__).parent / "findings.md"
TITLES = {
    "planted": "The co-adapted pair: lab-sft and lab-aligned",
    "dense": "The plainly trained pair: lab-sft and lab-aligned-dense",
}
ORDER = ("contrast", "importance", "heads", "capacity")
Figures = Mapping[str, Any]


def markdown(document: Figures) -> str:
    """The whole report."""
    size = document["size"]
    parts = [
        "# Four methods on the lab twins",
        "Written by `make locate`; figures in [locate.json](locate.json). Every method runs with its default "
        f"options on {size['locate']} harmful prompts (and as many benign ones where it uses them) of "
        f"sources that the models were trained on; causal checks use {size['effect']} harmful and "
        f"{size['benign']} benign prompts of sources that no model was trained on. Intervals are 95 % "
        "bootstrap intervals over prompts, Wilson intervals for rates. The models have 7 million parameters "
        "and are instruments: nothing here says anything about a real model. The two pairs share the "
        "unaligned model and are reported apart.",
        FINDINGS.read_text("utf-8").strip(),
    ]
    for name, pair in document["pairs"].items():
        parts += _pair(name, pair, document)
    parts += ["## Cost", *_cost(document)]
    return "\n\n".join(parts) + "\n"


def _pair(name: str, pair: Figures, document: Figures) -> Iterable[str]:
    digests = ", ".join(f"`{model}` (weights `{sha[:12]}`)" for model, sha in pair["models"].items())
    yield f"## {TITLES[name]}"
    yield f"{pair['about'][0].upper()}{pair['about'][1:]}. {digests}."
    yield "### What each method selects"
    yield _selected(pair["methods"])
    yield from _pictures(name, ("layers",))
    yield "### The same again: other draws of prompts, other sources"
    yield _stability(pair["methods"])
    yield (
        "Jaccard index of the selections, and p: the probability that two random selections with these "
        "numbers in every layer share as many units. Spearman's rank correlation is over all candidates."
    )
    yield "### Methods against each other"
    yield _between(pair["between"])
    yield "### Patched into the unaligned twin"
    yield (
        "The unaligned twin answers with the aligned one's activations in these neurons. C = 1: it refuses "
        "like the aligned one; C = 0: nothing changes."
    )
    yield _effects(pair["causal"]["patched"], last="benign prompts refused: unaligned / patched / aligned")
    yield "### Taken out of the aligned twin"
    yield (
        "The aligned twin answers with these units off: neurons and rows at zero, the heads of the method "
        "`heads` with undifferentiated attention. C = 1: it refuses as little as the unaligned one. A model "
        "that is only broken refuses nothing either, so the last columns say what its own answers to benign "
        "prompts lose, in nats a token."
    )
    yield _effects(pair["causal"]["removed"], last="lost on benign answers: selected / random")
    yield from _pictures(name, ("effects",))
    yield "### Alignment tax"
    yield from _tax(pair["tax"])


def _rows(rows: Iterable[tuple[Any, ...]], *head: str) -> str:
    return "\n".join(table(head, rows))


def _pictures(pair: str, which: Iterable[str]) -> Iterable[str]:
    for name in which:
        file, title = NAMES[name]
        yield f"![{title}](../images/{file.format(pair=pair)})"


def _selected(methods: Figures) -> str:
    rows = []
    for name in ORDER:
        each = methods[name]
        layers = "; ".join(
            f"{c} {' '.join(map(str, counts))}" for c, counts in each["layers"].items() if sum(counts)
        )
        planted = each.get("planted")
        rows.append(
            (
                name,
                each["candidates"],
                each["selected"],
                layers or "–",
                _of(planted["own selection"]) if planted else "–",
                _of(planted["best neurons"]) if planted else "–",
            )
        )
    head = ("method", "candidates", "selected", "by layer, from the first")
    return _rows(rows, *head, "planted among its neurons", "planted among its best neurons")


def _of(planted: Figures) -> str:
    return f"{planted['found']} of {planted['selected']}"


def _stability(methods: Figures) -> str:
    rows = []
    for name in ORDER:
        for title, key in (("own selection", "stability"), ("best neurons", "stability of the best neurons")):
            for sample, found in methods[name].get(key, {}).items():
                other = "another draw" if sample.startswith("first") else "other sources"
                rows.append((name, title, other, *_agreement(found)))
    return _rows(rows, "method", "units", "against", "Jaccard", "p, same layers", "Spearman")


def _agreement(found: Figures) -> tuple[str, str, str]:
    return _number(found["jaccard"]), _p(found["p_same_layers"]), _number(found["spearman"])


def _between(between: Figures) -> str:
    rows = [
        (pair, found["shared"], f"{found['expected']:.3g}", *_agreement(found))
        for pair, found in between.items()
    ]
    return _rows(
        rows, "best neurons of", "shared", "by chance, same layers", "Jaccard", "p, same layers", "Spearman"
    )


def _effects(checks: Figures, *, last: str) -> str:
    rows = []
    for name, found in checks.items():
        effects = found["effects"]
        windows = [f"{effects[key]['value']:.2f}" for key in effects if key.startswith("window")]
        rows.append(
            (
                name,
                effects["selected"]["units"],
                _share(found["refused"]["selected units"]),
                _effect(effects["selected"]),
                _effect(effects["random"]),
                f"{min(found['random, one by one']):.2f} to {max(found['random, one by one']):.2f}",
                ", ".join(windows) or "–",
                _effect(effects["every neuron"]) if "every neuron" in effects else None,
                _p(found["against random"]["p"]),
                _aside(found),
            )
        )
    every = any(row[7] for row in rows)
    kept = [row if every else (*row[:7], *row[8:]) for row in rows]
    head = ["units of", "units", "refused", "C", "C, random units of the same layers", "single draws"]
    head += ["C, next windows", *(["C, every neuron"] if every else []), "p, against random", last]
    return _rows(kept, *head)


def _aside(found: Figures) -> str:
    if "damage" in found:
        return " / ".join(f"{found['damage'][who]['mean']:.2f}" for who in ("selected", "random"))
    rates = found["benign refused"]
    return " / ".join(f"{100 * rates[who]['rate']:.0f} %" for who in ("recipient", "patched", "donor"))


def _tax(tax: Figures) -> Iterable[str]:
    yield (
        "*Safety* units are those of `contrast` between the unaligned twin and this pair's aligned one, on "
        "harmful prompts; *helpfulness* units those between the unaligned twin and a helpful one, on benign "
        "prompts. The helpful twin is an (IA)³ vector that the study trains on real answers to harmless "
        "requests."
    )
    rows = [(pair, found["shared"], *_agreement(found)) for pair, found in tax["overlap"].items()]
    yield _rows(rows, "sets", "shared", "Jaccard", "p, same layers", "Spearman")
    crossed = tax["crossed"]
    if not crossed["units"]:
        yield "The sets of the second pool share no unit, so nothing is patched."
        return
    yield (
        f"The {crossed['units']} units that safety and helpfulness share on the second pool, patched both "
        "ways between the aligned and the helpful twin, beside as many random units of the same layers:"
    )
    yield _rows(
        _crossed_rows(crossed), "units", "into", "harmful answered", "benign answered", "real answers"
    )
    yield (
        "Shares of prompts that are answered rather than refused, before → after, and the donor's; the "
        f"log-probability of the sources' own answers to {crossed['texts']} held-out requests, nats a token, "
        "before and its change with its interval."
    )


def _crossed_rows(crossed: Figures) -> Iterable[tuple[str, ...]]:
    for name, found in crossed["sets"].items():
        for way, title in (("into safety", "the aligned twin"), ("into helpful", "the helpful twin")):
            harmful, benign = found["harmful"][way], found["benign"][way]
            told = crossed["reference answers"][way]
            change = told["change"][name]
            yield (
                name,
                title,
                _change(harmful),
                _change(benign),
                f"{told['before']:.3f}, {change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]",
            )


def _change(found: Figures) -> str:
    before, after, donor = (100 * found[key] for key in ("before", "after", "donor"))
    low, high = (100 * found[key] for key in ("low", "high"))
    return f"{before:.0f} → {after:.0f} % ({low:+.0f} to {high:+.0f}); donor {donor:.0f} %"


def _cost(document: Figures) -> Iterable[str]:
    rows = [
        (method, f"{cost['forward_passes']:,.0f}", f"{cost['tokens']:,.0f}", f"{cost['cpu_seconds']:.0f}")
        for method, cost in document["costs"].items()
    ]
    yield _rows(rows, "method", "forward passes", "tokens", "CPU seconds")
    yield (
        "One run of each method on the co-adapted pair, one after the other in one process, nothing taken "
        "from a cache; float32, CPU time of one thread, loading the models included. A forward pass is one "
        "text through one whole model, each token once (half the blocks count half). `heads` searches a "
        "group of three greedily: three sweeps over all heads."
    )


def _effect(found: Figures) -> str:
    low, high = (("∞" if found[key] is None else f"{found[key]:.2f}") for key in ("low", "high"))
    return f"{found['value']:.2f} [{low}, {high}]"


def _share(rate: Figures) -> str:
    return f"{100 * rate['rate']:.0f} % [{100 * rate['low']:.0f}, {100 * rate['high']:.0f}]"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2g}" if value >= 1e-99 else "< 1e-99"
