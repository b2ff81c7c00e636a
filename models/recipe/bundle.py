"""The lab model's bundle and the figures about it, made by one command: `make bundle`.

    python -m models.recipe.bundle --data DIR

writes the prompts of each role (`models.recipe.bundle_data`), fits `models/lab/bundle` with
`neuronguard fit`, and measures it with `neuronguard evaluate` into `docs/results/`. The other label is
fitted beside it and measured too, so that the choice of the shipped one can be seen; its bundle stays in the
folder for intermediate files.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from models.recipe import bundle_data
from models.recipe.options import add_data

ROOT = Path(__file__).parents[2]
VARIANT = "lab-partial"
SHIPPED, OTHER = "harmful_prompt", "unsafe_output"
UNITS = ("--units", "all", "--sites", "attention")
"""Every attention head: on dev sources they rank better than the neurons, planted, chosen or all
(docs/decisions/shipped-units.md)."""
COMMON = (
    # The lab models refuse with one fixed sentence of eleven tokens, so that twelve settle the matter.
    *("--judged-tokens", "12"),
    # Harmful requests with the harmful words swapped out: no model of this size tells them apart.
    *("--apart", "structural_twins"),
)


def neuronguard(*arguments: str | Path) -> None:
    """Run a sub-command; leave when it fails, it has said why."""
    command = [Path(sys.executable).with_name("neuronguard"), *arguments]
    code = subprocess.run([str(part) for part in command], check=False).returncode
    if code:
        raise SystemExit(code)


def main() -> None:
    """Write the data, fit both labels, evaluate both."""
    parser = argparse.ArgumentParser(prog="python -m models.recipe.bundle", description=__doc__)
    add_data(parser)
    parser.add_argument("--lab", type=Path, default=ROOT / "models" / "lab", help="folder of the lab models")
    parser.add_argument("--work", type=Path, default=ROOT / "results", help="folder for intermediate files")
    parser.add_argument("--reports", type=Path, default=ROOT / "docs" / "results", help="folder of figures")
    options = parser.parse_args()

    prompts = options.work / "bundle-data"
    bundle_data.write_all(options.data, prompts)
    model = ("--model", f"{options.lab}:{VARIANT}", "--eval-data", prompts / "evaluate", *COMMON)
    for label, out, report in (
        (SHIPPED, options.lab / "bundle", "guard-quality"),
        (OTHER, options.work / "bundle-other", f"guard-quality-{OTHER.replace('_', '-')}"),
    ):
        neuronguard(
            *("fit", *model, "--label", label, *UNITS, "--out", out),
            *("--data", prompts / "fit", "--threshold-data", prompts / "threshold"),
        )
        files = ("--json", options.reports / f"{report}.json", "--markdown", options.reports / f"{report}.md")
        neuronguard("evaluate", *model, "--bundle", out, *files)


if __name__ == "__main__":
    main()
