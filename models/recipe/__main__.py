"""`python -m models.recipe --data DIR [STEP …]`: make the lab models, or only the named steps."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from models.recipe.settings import Settings
from models.recipe.steps import STEPS, Workshop, default_cache


def main() -> None:
    """Parse arguments and run the steps in order."""
    parser = argparse.ArgumentParser(prog="python -m models.recipe", description=__doc__)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"any of: {', '.join(STEPS)} (default: all)")
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("NEURONGUARD_DATA"),
        help="folder of *.jsonl.gz files (default: $NEURONGUARD_DATA)",
    )
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of checkpoints")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parents[1] / "lab", help="folder of the artifacts"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; part of what makes a run repeatable"
    )
    options = parser.parse_args()
    if options.data is None:
        parser.error("no data folder: give --data DIR or set NEURONGUARD_DATA")
    unknown = set(options.steps) - set(STEPS)
    if unknown:
        parser.error(f"no such step: {', '.join(sorted(unknown))}; the steps are {', '.join(STEPS)}")
    torch.set_num_threads(options.threads)
    workshop = Workshop(options.data, options.cache, options.out, Settings(), options.device)
    for step in options.steps or STEPS:
        print(f"step {step}", flush=True)
        workshop.run(step)


if __name__ == "__main__":
    main()
