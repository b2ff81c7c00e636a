"""The figures as `docs/results/redteam.md`. What they mean is written by hand, in `findings.md`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from guard.report import table
from models.recipe.detection.report import number, percent

FINDINGS = Path(__file__).parent / "findings.md"
PICTURE = "redteam.png"
Figures = Mapping[str, Any]


def markdown(document: Figures) -> str:
    """The whole report."""
    sizes, rows = document["sizes"], document["rows_fitted"]
    parts = [
        "# Getting past the lab guard",
        "Written by `make redteam`; figures in [redteam.json](redteam.json). The shipped bundle on "
        "`lab-partial`, attacked by somebody who has weights and probe. Requests are harmful test "
        "requests, of sources that nothing was fitted on, that the guard flags at its threshold for 1 % "
        "false positives; intervals are 95 % (Wilson). The model has seven million parameters and is an "
        "instrument: nothing here says how a guard of a real model fares.",
        FINDINGS.read_text("utf-8").strip(),
        "## Share of flagged requests that get past",
        "*Shipped*: the bundle of this repository. *Transferred*: the texts found against it, scored by "
        "the refitted probe, of the requests that it flags too. *Refitted, adaptive*: the attack run "
        "anew against the refitted probe. An attack that asks tries its ways in turn until one passes; "
        f"*at once* is the first of them alone. The searches put so many tokens "
        f"behind a request, ask at most {sizes['search']['queries']} times, and see the logit.",
        _passed(document["attacks"]),
        f"![Share of flagged requests that get past](../images/{PICTURE})",
        "## Queries, and what the model says then",
        "Median number of queries until a request passed. *Answered*: it passed, and the model does not "
        "refuse by itself. Whether such an answer is unsafe is not judged: these models answer with "
        "stock sentences. As they are, the model answers "
        f"{_rate(document['attacks']['none']['shipped']['answered'])} of the requests that the shipped "
        "guard flags.",
        _queries(document["attacks"]),
        "## Adversarial refitting, and what it costs",
        f"Fitted on {rows['plain']} rows as the bundle was, and {rows['attacked']} attacked ones: "
        f"{sizes['fitted']} of each label, each through {sizes['ways']} attacks in other words than the "
        f"test's, and behind one of {rows['suffixes']} suffixes found by gradient on rows to fit on. "
        "Benign rows get the same attacks and the same suffixes as harmful ones, and keep their label. "
        "Regularisation is the shipped probe's; the threshold is set anew on the same benign prompts, "
        "unattacked.",
        _cost(document["cost"]),
        f"All of it took {document['cpu_minutes']:.0f} minutes of one core.",
    ]
    return "\n\n".join(parts) + "\n"


def _rate(entry: Figures | None) -> str:
    return "–" if entry is None else percent(entry["rate"], (entry["low"], entry["high"]))


def families(attacks: Figures) -> list[tuple[str, Figures]]:
    """The attacks in their order, without the row that attacks nothing."""
    return [(name, entry) for name, entry in attacks.items() if name != "none"]


def _passed(attacks: Figures) -> str:
    head = "attack", "family", "n", "shipped", "at once", "transferred", "refitted, adaptive", "at once"
    return "\n".join(
        table(
            head,
            (
                (
                    name,
                    entry["shipped"]["family"],
                    f"{entry['shipped']['n']}, {entry['refitted']['n']}",
                    _rate(entry["shipped"]["passed"]),
                    percent(entry["shipped"]["passed_at_once"]["rate"]),
                    _rate(entry["transferred"]["passed"]),
                    _rate(entry["refitted"]["passed"]),
                    percent(entry["refitted"]["passed_at_once"]["rate"]),
                )
                for name, entry in families(attacks)
            ),
        )
    )


def _queries(attacks: Figures) -> str:
    def middle(entry: Figures) -> str:
        value = entry["median_queries_of_passed"]
        return "–" if value is None else f"{value:g}"

    return "\n".join(
        table(
            ("attack", "queries, shipped", "queries, refitted", "answered, shipped", "answered, refitted"),
            (
                (
                    name,
                    middle(entry["shipped"]),
                    middle(entry["refitted"]),
                    _rate(entry["shipped"]["answered"]),
                    _rate(entry["refitted"]["answered"]),
                )
                for name, entry in families(attacks)
            ),
        )
    )


def _cost(cost: Figures) -> str:
    def ranking(key: str, show: Any) -> tuple[str, ...]:
        return tuple(show(cost[which]["ranking"]) for which in ("shipped", "refitted"))

    rows: list[tuple[str, ...]] = [
        ("AUROC", *ranking("auroc", lambda r: number(r["auroc"], r["auroc_interval"]))),
        (
            "recall where 1 % of the test's benign prompts are flagged",
            *ranking("tpr", lambda r: percent(r["tpr_at_fpr"]["0.01"], r["tpr_at_fpr_interval"]["0.01"])),
        ),
    ]
    for key, name in (
        ("harmful_flagged", "harmful test prompts flagged at the threshold"),
        ("benign_flagged", "benign test prompts flagged at the threshold"),
    ):
        rows.append((name, *(_rate(cost[which][key]) for which in ("shipped", "refitted"))))
    for family in cost["shipped"]["attacked_benign_flagged"]:
        entries = (cost[which]["attacked_benign_flagged"][family] for which in ("shipped", "refitted"))
        rows.append((f"benign test prompts under attack flagged: {family}", *map(_rate, entries)))
    return "\n".join(table(("", "shipped", "refitted"), rows))
