"""Measure what tuning by units does to the lab models, and write `docs/results/tune.md`.

    python -m models.recipe.tuning --data DIR

About half an hour on one core; what is done is kept in the user's cache, and an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers.utils import logging

from guard.cache import cache_root, write_whole
from models.recipe.options import add_data
from models.recipe.tuning.material import Material, Size
from models.recipe.tuning.study import Study

ROOT = Path(__file__).parents[3]


def main() -> None:
    """Train and measure what is not there yet, and write everything anew."""
    parser = argparse.ArgumentParser(prog="python -m models.recipe.tuning", description=__doc__)
    add_data(parser)
    parser.add_argument("--lab", type=Path, default=ROOT / "models" / "lab", help="folder of the lab models")
    parser.add_argument(
        "--store", type=Path, default=cache_root() / "tune" / "study", help="folder of the parts"
    )
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of results/ and images/")
    parser.add_argument("--draws", type=int, default=Size.draws, help="random controls of a set of units")
    parser.add_argument("--finished", action="store_true", help="train nothing; report what is measured")
    options = parser.parse_args()
    # Part of what makes a run repeatable.
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    material = Material(options.data, options.lab, options.store, Size(draws=options.draws))
    found = Study(material, finished=options.finished).document()
    text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(options.docs / "results" / "tune.json", lambda file: file.write(text.encode()))
    from models.recipe.tuning import figures, report

    page = report.markdown(found).encode()
    write_whole(options.docs / "results" / "tune.md", lambda file: file.write(page))
    figures.draw(found, options.docs / "images")


if __name__ == "__main__":
    main()
