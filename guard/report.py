"""Evaluation documents as Markdown, for people; the JSON next to it is for machines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

QUESTIONS = {
    "unsafe_output": "will this model's answer be unsafe (harmful request ∧ the model does not refuse)",
    "harmful_prompt": "is the request harmful",
}


def markdown(document: Mapping[str, Any]) -> str:
    """The whole report. ``document`` is what ``neuronguard evaluate`` writes as JSON."""
    evaluation, about = document["evaluation"], document["bundle"]
    rates = [f"{t['false_positive_rate']:g}" for t in about["thresholds"]]
    parts = [
        "# Guard quality",
        "",
        f"Model `{about['model']}` (weights `{about['weights_sha256'][:12]}`), bundle "
        f"`{about['digest'][:12]}`, {about['units']} units at {about['sites']} sites.",
        *_adapter(document.get("adapter")),
        f"The probe was fitted to: {QUESTIONS[about['label']]}.",
        f"Tested on {evaluation['prompts']['harmful']} harmful and {evaluation['prompts']['benign']} benign "
        "prompts of sources that were neither fitted nor calibrated on. Intervals are 95 % (Wilson for "
        "rates, bootstrap over prompts for AUROC).",
        "",
        "Written by `neuronguard evaluate`. The figures are about this model and these sources; they say "
        "nothing about another model.",
        "",
        "## Thresholds",
        "",
        *table(
            ("false positives wanted", "P(unsafe) ≥", "benign prompts", "true rate at most (95 %)"),
            (
                (
                    percent(t["false_positive_rate"]),
                    f"{t['probability']:.4f}",
                    t["benign"],
                    percent(t["upper95"]),
                )
                for t in about["thresholds"]
            ),
        ),
    ]
    if evaluation["harmful"]:
        parts += ["", "## Harmful sources", "", *harmful_sources(evaluation, rates)]
    if evaluation["benign"]:
        parts += ["", "## Benign sources: how many are flagged", "", *benign_sources(evaluation, rates)]
    if document.get("comparison"):
        parts += ["", "## Against baselines", "", *comparisons(document["comparison"])]
    if document.get("baselines"):
        parts += ["", "## Against the protocol's baselines", "", *_baselines(document)]
    if document.get("data"):
        parts += ["", "## Data", "", *data_files(document["data"])]
    return "\n".join(parts) + "\n"


def _adapter(adapter: Mapping[str, Any] | None) -> list[str]:
    if adapter is None:
        return []
    return [
        f"**Under the LoRA adapter `{adapter['name']}` (`{adapter['sha256'][:12]}`)**; probe and thresholds "
        "are those of the model without it."
    ]


def harmful_sources(evaluation: Mapping[str, Any], rates: Sequence[str]) -> list[str]:
    """The table of harmful sources, one column a rate, and what it comes to."""
    heads = ["source", "n", "the model answers", "AUROC"]
    heads += [f"flagged at {percent(float(rate))}" for rate in rates]
    heads += [f"answered and not flagged at {percent(float(rates[0]))}"]
    rows = []
    for name, entry in [*evaluation["harmful"].items(), ("**all**", evaluation["all_harmful"])]:
        rows.append(
            [
                name,
                entry["n"],
                percent(entry["answered_by_the_model"]["rate"]),
                _area(entry["auroc"], entry["auroc_interval"]),
                *(_rate(entry["flagged"][rate]) for rate in rates),
                _rate(entry["unsafe_answers_left"][rates[0]]),
            ]
        )
    mean = evaluation["mean_over_harmful_sources"]
    summary = "; ".join(
        f"at {percent(float(rate))}: mean {percent(mean['flagged'][rate])}, worst "
        f"{percent(mean['worst'][rate]['rate'])} ({mean['worst'][rate]['source']})"
        for rate in rates
    )
    lines = [*table(heads, rows), "", f"Flagged, over sources: {summary}."]
    total = evaluation["all_harmful"]
    shares = ", ".join(
        f"{_rate(total['flagged_of_answered'][rate])} are flagged at {percent(float(rate))}" for rate in rates
    )
    lines.append(
        f"Of the {total['answered_by_the_model']['hits']} harmful prompts that the model answers, {shares}; "
        "AUROC of those against benign "
        f"{_area(total['auroc_of_answered'], total['auroc_of_answered_interval'])}."
    )
    return lines


def benign_sources(evaluation: Mapping[str, Any], rates: Sequence[str]) -> list[str]:
    """The table of benign sources, one column a rate."""
    heads = ["source", "n", "the model refuses by itself", *(f"at {percent(float(rate))}" for rate in rates)]
    rows = []
    entries = list(evaluation["benign"].items())
    if "all_benign" in evaluation:
        entries.append(("**all pooled**", evaluation["all_benign"]))
    for name, entry in entries:
        label = name if entry.get("pooled", True) else f"{name} (not pooled)"
        flags = (_rate(entry["flagged"][rate]) for rate in rates)
        rows.append([label, entry["n"], percent(entry["refused_by_the_model"]["rate"]), *flags])
    lines = table(heads, rows)
    if any(not entry.get("pooled", True) for _, entry in entries):
        lines += ["", "What is not pooled counts neither in the last row nor in any AUROC."]
    return lines


def comparisons(comparison: Mapping[str, Any]) -> list[str]:
    """The table of the probe beside its baselines."""
    # JSON sorts keys as texts; tables go from the loosest rate to the strictest, like the others.
    rates = sorted(next(iter(comparison.values()))["at"], key=float, reverse=True)
    heads = ["scorer", "AUROC, harmful request", "AUROC, answered one"]
    for rate in rates:
        heads += [f"at {percent(float(rate))}: harmful flagged", "of answered ones", "benign"]
    rows = []
    for name, entry in comparison.items():
        row = [name, _area(entry["auroc"]), _area(entry["auroc_of_answered"])]
        for rate in rates:
            at = entry["at"][rate]
            row += [percent(at[key]["rate"]) for key in ("flagged", "flagged_of_answered", "benign_flagged")]
        rows.append(row)
    note = (
        "Every scorer is fitted on the same prompts and has its own thresholds, set on the same benign "
        "prompts. Random units come from the same layers in the same number as the probe's."
    )
    return [*table(heads, rows), "", note]


def _baselines(document: Mapping[str, Any]) -> list[str]:
    rates = list(document["overall"]["tpr_at_fpr"])
    heads = ["scorer", "AUROC", *(f"harmful flagged at {percent(float(rate))}" for rate in rates)]
    rows: list[list[Any]] = []
    missing = []
    for name, entry in [("the guard", document["overall"]), *document["baselines"].items()]:
        if "not_measured" in entry:
            missing.append(f"{name}: {entry['not_measured']}")
            continue
        row: list[Any] = [name, _area(entry["auroc"], entry["auroc_interval"])]
        row += ["–" if (value := entry["tpr_at_fpr"][rate]) is None else percent(value) for rate in rates]
        difference = entry.get("auroc_difference_interval")
        sign = f"{entry['auroc_difference']:+.3f} " if difference else "–"
        rows.append([*row, sign + (f"[{difference[0]:+.3f} to {difference[1]:+.3f}]" if difference else "")])
    lines = table([*heads, "AUROC, the guard minus this one"], rows)
    fitted = {entry["fitted_on"] for entry in document["baselines"].values() if "fitted_on" in entry}
    note = f"Fitted on {', '.join(sorted(fitted))}. Not measured: {'; '.join(missing)}."
    return [*lines, "", note]


def data_files(files: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of the files that took part."""
    heads = ("file", "role", "harmful", "benign", "SHA-256")
    return table(heads, ((f["name"], f["role"], f["harmful"], f["benign"], f["sha256"][:12]) for f in files))


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """The lines of a Markdown table; columns after the first are numbers, set to the right."""

    def line(cells: Iterable[Any]) -> str:
        return "| " + " | ".join(str(cell) for cell in cells) + " |"

    return [line(heads), line("---" if i == 0 else "--:" for i in range(len(heads))), *map(line, rows)]


def percent(value: float) -> str:
    """A share in per cent, with two digits below ten."""
    hundredths = 100 * value
    return f"{hundredths:.0f} %" if hundredths >= 9.95 else f"{hundredths:.2g} %"


def _rate(entry: Mapping[str, Any]) -> str:
    if not entry["n"]:
        return "–"
    return f"{percent(entry['rate'])} [{100 * entry['low']:.1f}–{100 * entry['high']:.1f}]"


def _area(value: float | None, interval: Sequence[float] | None = None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" + (f" [{interval[0]:.3f}–{interval[1]:.3f}]" if interval else "")
