"""Sets of units as Markdown and pictures, for people."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from guard.cache import write_whole
from guard.locate.compare import Comparison, ranked
from guard.locate.unit_set import UnitSet
from guard.report import table

_SHOWN = 20


def describe(found: UnitSet) -> str:
    """One set: where it comes from, what it selects, its layers and its highest scores."""
    source = found.provenance
    models = [f"Model `{source.model.name}` (weights `{source.model.weights_sha256[:12]}`)"]
    if source.donor:
        models.append(f"donor `{source.donor.name}` (weights `{source.donor.weights_sha256[:12]}`)")
    about = [
        *((key, json.dumps(value, ensure_ascii=False)) for key, value in source.options.items()),
        ("template", source.template[:12]),
        ("seed", source.seed),
        *((f"cost, {key}", f"{value:,.10g}") for key, value in source.cost.items()),
        *((f"version of {key}", value) for key, value in source.versions.items()),
    ]
    files = [(f.name, f.harmful, f.benign, f.sha256[:12]) for f in source.data]
    return _joined(
        f"# Units located by `{source.method}`",
        ", ".join(models) + f". {len(found)} units are selected.",
        "## Selection",
        table(("component", "candidates", "selected", "share", "lowest selected score"), _components(found)),
        "## Layers",
        table(("layer", *found.selected), _layers(found)),
        "## Highest scores",
        table(("rank", "score", "component", "layer", "unit", "selected"), _highest(found)),
        "Score at rank " + "; ".join(f"{rank:,}: {score:.4g}" for rank, score in decay(found)) + ".",
        "## Made with",
        table(("", "value"), about),
        table(("data", "harmful", "benign", "SHA-256"), files),
    )


def _components(found: UnitSet) -> list[tuple[Any, ...]]:
    rows = []
    for name, scores in found.scores.items():
        chosen = found.selected[name]
        candidates, selected = int((~np.isnan(scores)).sum()), int(chosen.sum())
        share = f"{100 * selected / candidates:.3g} %" if candidates else "–"
        rows.append((name, candidates, selected, share, f"{scores[chosen].min():.4g}" if selected else "–"))
    return rows


def _layers(found: UnitSet) -> list[tuple[Any, ...]]:
    depth = found.provenance.model.layers
    return [
        (layer, *(int(chosen[layer].sum()) for chosen in found.selected.values())) for layer in range(depth)
    ]


def _highest(found: UnitSet) -> list[tuple[Any, ...]]:
    return [
        (
            rank,
            f"{row.score:.4g}",
            row.component,
            row.layer,
            row.unit,
            "yes" if found.selected[row.component][row.layer, row.unit] else "no",
        )
        for rank, row in zip(range(1, _SHOWN + 1), found.ranking(), strict=False)
    ]


def decay(found: UnitSet) -> list[tuple[int, float]]:
    """Rank and score at 1, 10, 100, … and at the number of selected units."""
    scores = ranked(found)
    ranks = {10**power for power in range(8)} | {len(found)}
    return [(rank, float(scores[rank - 1])) for rank in sorted(ranks) if 1 <= rank <= len(scores)]


def describe_pairs(compared: Mapping[tuple[str, str], Comparison]) -> str:
    """Every pair of sets: what differs between them, shared units, rank correlations, layers."""
    selections = []
    scores = []
    for (first, second), found in compared.items():
        pair = f"{first} / {second}"
        selections.append((pair, ", ".join(found.differ) or "nothing", *_shared(found)))
        correlations = [found.correlation[support] for support in found.correlation]
        figures = [_figure(x) for each in correlations for x in (each.spearman, each.kendall)]
        scores.append((pair, *(figures or ["–"] * 4), _figure(found.layers)))
    return _joined(
        "# Sets of units compared",
        "## Selected units",
        table(
            (
                "sets", "differ in", "selected", "shared", "Jaccard", "by chance", "p",
                "by chance, same layers", "p, same layers", "outside",
            ),
            selections,
        ),
        "Counted among the units that are candidates in both sets; *outside* are selected ones that are not. "
        "By chance, both selections are drawn at random from all of them, or from each layer as many as "
        "were selected there; p is the probability of sharing at least as many.",
        "## Scores and layers",
        table(
            (
                "sets", "Spearman, selected in either", "Kendall, selected in either",
                "Spearman, all", "Kendall, all", "Pearson, units by layer",
            ),
            scores,
        ),
        "A unit is selected in either set when it ranks high in one of them, so unrelated rankings have "
        "negative correlations there, not zero; hold them against those with a random control.",
    )  # fmt: skip


def _shared(found: Comparison) -> tuple[Any, ...]:
    if found.overlap is None:
        return ("no component in common", *["–"] * 7)
    each = found.overlap
    return (
        f"{each.first} / {each.second}",
        each.shared,
        _figure(each.jaccard),
        f"{each.expected:.3g}",
        _probability(each.p_value),
        f"{each.expected_same_layers:.3g}",
        _probability(each.p_value_same_layers),
        each.outside,
    )


def _probability(value: float) -> str:
    return f"{value:.2g}" if value else "< 1e-300"


def _figure(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.3f}"


def document(compared: Mapping[tuple[str, str], Comparison]) -> list[dict[str, Any]]:
    """The same for machines: one object a pair; what is not a number is null."""
    return [
        {
            "sets": list(pair),
            "differ": list(found.differ),
            "components": list(found.components),
            "overlap": found.overlap and _finite(found.overlap._asdict()),
            "correlation": {name: _finite(each._asdict()) for name, each in found.correlation.items()},
            "layers": _finite({"": found.layers})[""],
        }
        for pair, found in compared.items()
    ]


def _finite(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and math.isnan(value) else value
        for key, value in figures.items()
    }


def write_set(found: UnitSet, directory: Path) -> list[Path]:
    """Report of one set: ``report.md`` and three pictures. Raises ModuleNotFoundError without matplotlib."""
    from guard.locate import pictures

    name = found.provenance.method
    drawn = {
        "scores.png": pictures.heat_map(found),
        "layers.png": pictures.layer_histogram({name: found}),
        "decay.png": pictures.score_decay({name: found}),
    }
    return _write(describe(found), drawn, directory)


def write_pairs(
    sets: Mapping[str, UnitSet], compared: Mapping[tuple[str, str], Comparison], directory: Path
) -> list[Path]:
    """Report of a comparison, in the same form. Raises ModuleNotFoundError without matplotlib."""
    from guard.locate import pictures

    drawn = {
        "overlap.png": pictures.overlap_matrix(sets, compared),
        "layers.png": pictures.layer_histogram(sets),
        "decay.png": pictures.score_decay(sets),
    }
    return _write(describe_pairs(compared), drawn, directory)


_TITLES = {
    "scores.png": "Scores by layer and unit",
    "layers.png": "Selected units by layer",
    "decay.png": "Scores by rank",
    "overlap.png": "Jaccard index of the selected units",
}


def _write(text: str, drawn: Mapping[str, Any], directory: Path) -> list[Path]:
    from guard.locate.pictures import save

    files = [save(figure, directory / name) for name, figure in drawn.items()]
    text += "".join(f"\n![{_TITLES[name]}]({name})\n" for name in drawn)
    write_whole(directory / "report.md", lambda file: file.write(text.encode()))
    return [directory / "report.md", *files]


def _joined(*parts: str | list[str]) -> str:
    return "\n\n".join(part if isinstance(part, str) else "\n".join(part) for part in parts) + "\n"
