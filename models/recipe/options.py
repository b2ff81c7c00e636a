"""Options that the recipe's commands share."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def add_data(parser: argparse.ArgumentParser) -> None:
    """``--data``, the folder of data sets; it must be given unless ``$NEURONGUARD_DATA`` names it."""
    configured = os.environ.get("NEURONGUARD_DATA")
    parser.add_argument(
        "--data",
        type=Path,
        default=configured,
        required=configured is None,
        help="folder of *.jsonl.gz files (default: $NEURONGUARD_DATA)",
    )
