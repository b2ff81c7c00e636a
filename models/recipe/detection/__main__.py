"""Measure the lab guard by the whole protocol and write `docs/results/detection.md`.

    python -m models.recipe.detection --data DIR

`make bundle` comes first. What is done is kept in the user's cache, and an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from guard.bundle import Bundle
from guard.cache import cache_root, write_whole
from guard.locate.results import versions
from models.recipe.detection import figures, manifest, report
from models.recipe.detection.left_out import left_out
from models.recipe.detection.quality import quality, twins
from models.recipe.detection.robustness import families, flips
from models.recipe.detection.selection import curve
from models.recipe.detection.study import VARIANTS, Study
from models.recipe.detection.unsafe import unsafe
from models.recipe.options import add_data

ROOT = Path(__file__).parents[3]


def document(study: Study) -> dict[str, Any]:
    """All figures of the study."""
    strength = study.bundle(VARIANTS[0]).card.metrics["fit"]["inverse_regularisation"]
    found = {
        "versions": versions(),
        "models": {name: study.subject(name).checkpoint.weights_sha256 for name in VARIANTS},
        "left_out": study.part("left out", lambda: left_out(study, strength)),
        "selection": study.part("selection", lambda: curve(study)),
        "flips": study.part("flips", lambda: flips(study)),
        "families": study.part("families", lambda: families(study)),
        "unsafe_output": study.part("unsafe output", lambda: unsafe(study)),
        "twins": study.part("twins", lambda: twins(study)),
        "quality": {},
    }
    for variant in VARIANTS:
        print(f"quality: {variant}", flush=True)
        digest = Bundle.load(study.lab / "bundle").digest if variant == VARIANTS[0] else None
        found["quality"][variant] = study.part(["quality", variant, digest], partial(quality, study, variant))
    return found


def main() -> None:
    """Measure what is not measured yet, and write everything anew."""
    parser = argparse.ArgumentParser(prog="python -m models.recipe.detection", description=__doc__)
    add_data(parser)
    parser.add_argument("--manifest", type=Path, default=manifest.FILE, help="names and digests of the files")
    parser.add_argument("--lab", type=Path, default=ROOT / "models" / "lab", help="folder of the lab models")
    parser.add_argument("--store", type=Path, default=cache_root() / "detection", help="folder of the parts")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of results/ and images/")
    options = parser.parse_args()
    try:
        listed = manifest.read(options.manifest)
        manifest.check(listed, options.data)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    torch.set_num_threads(1)
    found = document(Study(options.data, options.lab, options.store))
    found["data"] = [each._asdict() for each in listed]
    text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    results = options.docs / "results"
    write_whole(results / "detection.json", lambda file: file.write(text.encode()))
    write_whole(results / "detection.md", lambda file: file.write(report.markdown(found).encode()))
    figures.draw(found, options.docs / "images")


if __name__ == "__main__":
    main()
