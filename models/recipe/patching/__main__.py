"""Measure what patches do to the lab twins, and write `docs/results/patch.md`.

    python -m models.recipe.patching --data DIR

Half an hour on one core; what is done is kept in the user's cache, and an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from guard.cache import cache_root, write_whole
from guard.locate.results import versions
from models.recipe.options import add_data
from models.recipe.patching import curve, engine, first
from models.recipe.patching.choice import SHARE
from models.recipe.patching.study import PAIRS, Lab, Size, about
from models.recipe.patching.ways import Way
from models.recipe.steps import default_cache

ROOT = Path(__file__).parents[3]


def labs(data: Path, shipped: Path, steps: Path, store: Path) -> list[Lab]:
    """The pairs there are. The one before co-adaptation needs the recipe's steps, which are not shipped."""
    found = []
    for pair in PAIRS:
        weights = shipped if pair.name != "first" else first.folder(steps, store)
        if weights is None:
            print(f"{steps} has no steps of the recipe: the pair {pair.name!r} is left out", flush=True)
            continue
        found.append(Lab(pair, data, weights, store, Size()))
    return found


def document(pairs: list[Lab]) -> dict[str, Any]:
    """All figures."""
    return {
        "versions": versions(),
        "size": pairs[0].size.__dict__,
        "prompts": about(pairs[0]),
        "pairs": {lab.pair.name: _pair(lab) for lab in pairs},
    }


def _pair(lab: Lab) -> dict[str, Any]:
    found = curve.figures(lab)
    kind, ranking, of = found["stored"]["way"]
    ways = {
        "dynamic": Way("dynamic", found["dev"]["rankings"]["best"], SHARE),
        "stored": Way(kind, ranking, SHARE, of=of),
    }
    return {**found, "engine": engine.checked(lab, ways)}


def main() -> None:
    """Measure what is not measured yet, and write everything anew."""
    parser = argparse.ArgumentParser(prog="python -m models.recipe.patching", description=__doc__)
    add_data(parser)
    parser.add_argument("--lab", type=Path, default=ROOT / "models" / "lab", help="folder of the lab models")
    parser.add_argument("--steps", type=Path, default=default_cache(), help="folder of the recipe's steps")
    parser.add_argument("--store", type=Path, default=cache_root() / "patching", help="folder of the parts")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of results/ and images/")
    options = parser.parse_args()
    # Part of what makes a run repeatable.
    torch.set_num_threads(1)
    pairs = labs(options.data, options.lab, options.steps, options.store)
    found = document(pairs)
    text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(options.docs / "results" / "patch.json", lambda file: file.write(text.encode()))
    from models.recipe.patching import figures, report

    page = report.markdown(found).encode()
    write_whole(options.docs / "results" / "patch.md", lambda file: file.write(page))
    figures.draw(found, options.docs / "images")


if __name__ == "__main__":
    main()
