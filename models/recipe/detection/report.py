"""The study's figures as `docs/results/detection.md`. What they mean is written by hand, in `findings.md`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from guard.report import table
from models.recipe.detection.figures import NAMES
from models.recipe.detection.left_out import SCORERS, summary
from models.recipe.detection.study import APART, VARIANTS

FINDINGS = Path(__file__).parent / "findings.md"
HARD = ("oktest", "counsel_chat", *APART)
"""Benign test sources that look harmful."""
RATES = ("0.01", "0.005", "0.001")
Figures = Mapping[str, Any]


def markdown(document: Figures) -> str:
    """The whole report."""
    first = document["quality"][VARIANTS[0]]
    parts = [
        "# Detection on the lab models",
        "Written by `make detection`; figures in [detection.json](detection.json). How to read the figures: "
        "[evaluation.md](../evaluation.md). Intervals are 95 %: bootstrap over requests for ranking "
        "figures, Wilson for rates. The models have seven million parameters and are instruments: nothing "
        "here says anything about a real model.",
        FINDINGS.read_text("utf-8").strip(),
        "## Operating points",
        f"`{VARIANTS[0]}` with the shipped bundle `{first['bundle']['digest'][:12]}` "
        f"({first['bundle']['units']} units). Thresholds were set on benign prompts of other sources.",
        _operating(first),
        "## Over-refusal",
        "Share of benign prompts that each threshold flags. Marked sources look harmful on purpose; "
        f"{', '.join(APART)} is kept out of every pool.",
        _benign(first),
        f"Harmful test requests against the structural twins: AUROC {_auroc(document['twins'])}, recall "
        f"where 1 % of the twins are flagged {_recall(document['twins'])}; chance is 0.5 and 1 %.",
        "## All models, harmful requests",
        _models(document["quality"]),
        "## Leave one source out",
        "Each harmful source against the same benign pool, by a probe and by words that were fitted without "
        "it. Sources that the model itself was trained on are told apart: its activations know them, however "
        "the probe was fitted.",
        *_left_out(document["left_out"]),
        "## Against baselines",
        "All are fitted on the prompts of the bundle and ranked on the test sources. Differences are the "
        "guard's figure minus the baseline's, on the same resamples.",
        _baselines(first),
        "## Chosen against random neurons",
        "Neurons chosen by an L1 fit, and five draws of as many random ones of the same layers. A difference "
        "counts when its interval, against every draw, lies above 0.",
        _selection(document["selection"]),
        _picture("selection"),
        "## Robustness: the same request in other words",
        "Harmful test requests that a scorer flags at 1 %, then reworded without a change of what they ask; "
        "the words are none of those that the guard was fitted with. Share that is no longer flagged.",
        _flips(document["flips"]),
        _picture("flips"),
        "## Robustness: attacks and languages",
        "Share of attacked or translated harmful requests that the shipped bundle flags. None of it was "
        "fitted on, and the models know English alone.",
        _families(document["families"]),
        "## Will the answer be unsafe?",
        *_unsafe(document["unsafe_output"]),
        "## Data",
        "The files, as [sources.json](../../models/recipe/detection/sources.json) lists them: gzipped JSON "
        "lines with `prompt` or `messages`, `label` and `source`, checked by digest before anything is read. "
        "Roles are in `models/recipe/sources.py`. Files without a permissive licence are measured on, never "
        "fitted on.",
        _table(
            ((e["file"], e["origin"], e["licence"], f"`{e['sha256'][:12]}`") for e in document["data"]),
            *("file", "origin", "licence", "SHA-256"),
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _table(rows: Iterable[tuple[Any, ...]], *head: str) -> str:
    return "\n".join(table(head, rows))


def _picture(name: str) -> str:
    file, title = NAMES[name]
    return f"![{title}](../images/{file})"


def number(value: float | None, ends: Sequence[float] | None = None) -> str:
    """A ranking figure with its interval."""
    if value is None:
        return "–"
    return f"{value:.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "")


def percent(value: float | None, ends: Sequence[float] | None = None) -> str:
    """A rate with its interval."""
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" + (f" [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]" if ends else "")


def _rate(entry: Figures) -> str:
    return percent(entry["rate"], (entry["low"], entry["high"]))


def _recall(entry: Figures, rate: str = "0.01") -> str:
    return percent(entry["tpr_at_fpr"][rate], entry["tpr_at_fpr_interval"][rate])


def _auroc(entry: Figures) -> str:
    return number(entry["auroc"], entry["auroc_interval"])


def _flagged(entry: Figures, which: str) -> tuple[str, ...]:
    values, ends = entry[f"flag_rate_{which}_at"], entry[f"flag_rate_{which}_at_interval"]
    return tuple(percent(values[rate], ends[rate]) for rate in RATES)


def _operating(found: Figures) -> str:
    whole = found["overall"]
    rows = [("all pooled", whole["n_harmful"], _auroc(whole), *_flagged(whole, "harmful"))]
    rows += [
        (name, entry["n_harmful"], _auroc(entry["against_pool"]), *_flagged(entry, "harmful"))
        for name, entry in found["by_source"].items()
        if entry["n_harmful"]
    ]
    rows.append(("benign, pooled", whole["n_benign"], "", *_flagged(whole, "benign")))
    return _table(rows, "source", "n", "AUROC", *(f"flagged at {percent(float(r))}" for r in RATES))


def _benign(found: Figures) -> str:
    rows = [
        (f"**{name}**" if name in HARD else name, entry["n_benign"], *_flagged(entry, "benign"))
        for name, entry in found["by_source"].items()
        if entry["n_benign"]
    ]
    return _table(rows, "source", "n", *(f"flagged at {percent(float(r))}" for r in RATES))


def _models(found: Figures) -> str:
    rows = []
    for name, each in found.items():
        whole, over = each["overall"], each["over_sources"]["auroc"]
        worst = f"{number(over['worst']['value'])} ({over['worst']['source']})"
        flagged = (_flagged(whole, "harmful")[0], _flagged(whole, "benign")[0])
        rows.append((name, _auroc(whole), number(over["mean"]), worst, _recall(whole), *flagged))
    head = ("model", "AUROC", "mean of sources", "worst source", "recall at 1 % of these benign prompts")
    return _table(rows, *head, "harmful flagged at the 1 % threshold", "benign flagged there")


def _left_out(sources: Figures) -> Iterable[str]:
    rows = []
    for unseen, title in ((True, "never seen by the model"), (False, "trained on by the model")):
        figures = summary(dict(sources), unseen)
        for scorer in SCORERS:
            area, recall = figures[scorer]["auroc"], figures[scorer]["tpr_at_1_percent"]
            rows.append(
                (
                    f"{title} ({figures['sources']})",
                    scorer,
                    number(area["mean"]),
                    f"{number(area['worst'])} ({area['worst_source']})",
                    percent(recall["mean"]),
                    f"{percent(recall['worst'])} ({recall['worst_source']})",
                )
            )
    head = ("sources", "scorer", "AUROC, mean", "worst", "recall at 1 %, mean", "worst")
    yield _table(rows, *head)
    yield _picture("left_out")
    each = [
        (
            name,
            "no" if e["unseen_by_the_model"] else "yes",
            e["n"],
            *(f"{_auroc(e[s])}; {percent(e[s]['tpr_at_fpr']['0.01'])}" for s in SCORERS),
        )
        for name, e in sources.items()
    ]
    yield _table(each, "source", "model trained on it", "n", *(f"{s}: AUROC; recall at 1 %" for s in SCORERS))


def _baselines(found: Figures) -> str:
    rows = [("**the guard**", _auroc(found["overall"]), _recall(found["overall"]), "", "")]
    for name, each in found["baselines"].items():
        if "not_measured" in each:
            rows.append((name, "not measured", each["not_measured"], "", ""))
            continue
        rows.append(
            (
                name,
                _auroc(each),
                _recall(each),
                number(each["auroc_difference"], each["auroc_difference_interval"]),
                percent(
                    each["tpr_at_fpr_difference"]["0.01"], each["tpr_at_fpr_difference_interval"]["0.01"]
                ),
            )
        )
    return _table(rows, "scorer", "AUROC", "recall at 1 %", "AUROC, difference", "recall, difference")


def _selection(found: Figures) -> str:
    rows = []
    for name, row in found.items():
        drawn = row["random"]
        if not drawn:
            rows.append((name, row["n"], _auroc(row["chosen"]), "", "", _recall(row["chosen"]), "", ""))
            continue
        areas = [each["auroc"] for each in drawn]
        recalls = [each["tpr_at_fpr"]["0.01"] for each in drawn]
        rows.append(
            (
                name,
                row["n"],
                _auroc(row["chosen"]),
                f"{min(areas):.3f} to {max(areas):.3f}",
                _beaten(each["chosen_minus_random"]["auroc"] for each in drawn),
                _recall(row["chosen"]),
                f"{percent(min(recalls))} to {percent(max(recalls))}",
                _beaten(each["chosen_minus_random"]["tpr_at_fpr"]["0.01"] for each in drawn),
            )
        )
    head = ("units", "n", "AUROC, chosen", "random", "draws beaten", "recall at 1 %, chosen", "random")
    return _table(rows, *head, "draws beaten")


def _beaten(differences: Iterable[Figures]) -> str:
    each = [difference["difference_interval"][0] > 0 for difference in differences]
    return f"{sum(each)} of {len(each)}"


def _flips(found: Figures) -> str:
    scorers = list(found["flagged"])
    rows = [("flagged before", *(found["flagged"][name] for name in scorers))]
    rows += [(c, *(_rate(each[name]) for name in scorers)) for c, each in found["changes"].items()]
    return _table(rows, "change", *scorers)


def _families(found: Figures) -> str:
    rows = [
        (name, each["n"], each["too_long"] or "", *(_rate(each["flagged"][rate]) for rate in RATES))
        for name, each in found.items()
    ]
    return _table(rows, "family", "n", "too long", *(f"flagged at {percent(float(r))}" for r in RATES))


def _unsafe(found: Figures) -> Iterable[str]:
    yield (
        f"Of the harmful test requests `{VARIANTS[0]}` answers {found['n_unsafe']} and refuses "
        f"{found['n_refused_harmful']} by itself. Positive: a harmful request that it answers. *Among "
        "harmful*: answered against refused, where knowing a harmful request when it comes is of no help."
    )
    rows = [
        (name, _auroc(each["overall"]), _recall(each["overall"]), _auroc(each["among_harmful"]))
        for name, each in found["rows"].items()
    ]
    yield _table(rows, "scorer", "AUROC", "recall at 1 %", "AUROC among harmful")
