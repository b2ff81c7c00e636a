"""Run every method on both lab pairs, check what it finds, and write `docs/results/locate.md`.

    python -m models.recipe.locate --data DIR

About half an hour on one core; what is done is kept in the user's cache, and an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from guard.cache import cache_root, write_whole
from guard.locate.results import versions
from models.recipe.locate import effects, sets, tax
from models.recipe.locate.study import PAIRS, RECIPIENT, Pair, Size, Study
from models.recipe.options import add_data

ROOT = Path(__file__).parents[3]


def document(study: Study) -> dict[str, Any]:
    """All figures of the study."""
    return {
        "versions": versions(),
        "size": study.size.__dict__,
        "costs": study.part(["costs"], lambda: sets.costs(study)),
        "pairs": {pair.name: _pair(study, pair) for pair in PAIRS},
    }


def _pair(study: Study, pair: Pair) -> dict[str, Any]:
    weights = {name: study.checkpoint(name).weights_sha256 for name in (RECIPIENT, pair.donor)}
    found: dict[str, Any] = {
        "about": pair.about,
        "models": weights,
        "methods": {name: sets.describe(study, pair, name) for name in sets.METHODS},
        "between": sets.between(study, pair),
        "causal": effects.checked(study, pair),
    }
    print(f"alignment tax: {pair.name}", flush=True)
    found["tax"] = {
        "overlap": tax.overlaps(study, pair),
        "crossed": study.part(["tax", pair.name], lambda: tax.crossed(study, pair)),
    }
    return found


def main() -> None:
    """Measure what is not measured yet, and write everything anew."""
    parser = argparse.ArgumentParser(prog="python -m models.recipe.locate", description=__doc__)
    add_data(parser)
    parser.add_argument("--lab", type=Path, default=ROOT / "models" / "lab", help="folder of the lab models")
    parser.add_argument("--store", type=Path, default=cache_root() / "locate", help="folder of the parts")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of results/ and images/")
    options = parser.parse_args()
    # Part of what makes a run repeatable, and of what its seconds mean.
    torch.set_num_threads(1)
    study = Study(options.data, options.lab, options.store, Size())
    found = document(study)
    text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(options.docs / "results" / "locate.json", lambda file: file.write(text.encode()))
    from models.recipe.locate import figures, report

    write_whole(
        options.docs / "results" / "locate.md", lambda file: file.write(report.markdown(found).encode())
    )
    figures.draw(found, options.docs / "images")


if __name__ == "__main__":
    main()
