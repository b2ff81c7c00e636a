"""Measure sequence probes beside the shipped guard and write `docs/results/sequence.md`.

    python -m models.recipe.sequence --data DIR

`make bundle` comes first. What is done is kept in the user's cache, and an interrupted run goes on. What the
engine's half costs is measured by `make bench`; its figures are shown if they are there.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from guard.cache import cache_root, write_whole
from guard.locate.results import versions
from models.recipe.detection import manifest
from models.recipe.detection.study import Study
from models.recipe.options import add_data
from models.recipe.sequence import figures, report
from models.recipe.sequence.answers import answers
from models.recipe.sequence.guards import Guards
from models.recipe.sequence.needle import needle
from models.recipe.sequence.protocol import flips, left_out, quality

ROOT = Path(__file__).parents[3]
PARTS = {"quality": quality, "left_out": left_out, "flips": flips, "needle": needle, "answers": answers}


def document(study: Study) -> dict[str, Any]:
    """All figures of the study."""
    guards = Guards(study)
    digests = {name: bundle.digest for name, bundle in guards.bundles.items()}
    found: dict[str, Any] = {"versions": versions(), "bundles": digests}
    for name, measure in PARTS.items():
        print(name, flush=True)
        found[name] = study.part([name, digests], partial(measure, guards))
    return found


def main() -> None:
    """Measure what is not measured yet, and write everything anew."""
    parser = argparse.ArgumentParser(prog="python -m models.recipe.sequence", description=__doc__)
    add_data(parser)
    parser.add_argument("--lab", type=Path, default=ROOT / "models" / "lab", help="folder of the lab models")
    parser.add_argument("--store", type=Path, default=cache_root() / "sequence", help="folder of the parts")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of results/ and images/")
    options = parser.parse_args()
    try:
        listed = manifest.read()
        manifest.check(listed, options.data)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    torch.set_num_threads(1)
    found = document(Study(options.data, options.lab, options.store))
    text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    results = options.docs / "results"
    write_whole(results / "sequence.json", lambda file: file.write(text.encode()))
    figures.draw(found, options.docs / "images")
    cost = results / "sequence-cost.json"
    page = report.markdown(found, json.loads(cost.read_text("utf-8")) if cost.is_file() else None)
    write_whole(results / "sequence.md", lambda file: file.write(page.encode()))


if __name__ == "__main__":
    main()
