"""Attack the lab guard, refit it, attack it again, and write `docs/results/redteam.md`.

    python -m loadtests.redteam --data DIR
    python -m loadtests.redteam timing --data DIR

What is done is kept in the user's cache, and an interrupted run goes on. It takes no model: it attacks
the repository's lab model and its shipped bundle (`loadtests.redteam.target`).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from guard.cache import cache_root, write_whole
from loadtests.redteam import figures, report, timing
from loadtests.redteam.measure import Measurement
from loadtests.redteam.world import Sizes, World
from models.recipe.detection import manifest
from models.recipe.detection.study import Study
from models.recipe.options import add_data

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Measure what is not measured yet, and write everything anew."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.redteam", description=__doc__)
    parser.add_argument("what", nargs="?", choices=("attacks", "timing"), default="attacks")
    add_data(parser)
    parser.add_argument("--seed", type=int, default=0, help="of every draw (default: 0)")
    parser.add_argument("--store", type=Path, default=cache_root() / "redteam", help="folder of the parts")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of results/ and images/")
    options = parser.parse_args()
    try:
        manifest.check(manifest.read(), options.data)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    torch.set_num_threads(1)
    study = Study(options.data, ROOT / "models" / "lab", cache_root() / "detection")
    if options.what == "timing":
        found = timing.measure(study, range(options.seed, options.seed + 3))
        _write(options.docs / "results" / "refusal-timing.json", found)
        _write_text(options.docs / "results" / "refusal-timing.md", timing.report(found))
        return
    measurement = Measurement(World.of(study), Sizes(seed=options.seed), options.store, progress=True)
    document = measurement.document()
    results = options.docs / "results"
    _write(results / "redteam.json", document)
    _write_text(results / "redteam.md", report.markdown(document))
    figures.draw(document, options.docs / "images")


def _write(path: Path, document: object) -> None:
    _write_text(path, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    write_whole(path, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main()
