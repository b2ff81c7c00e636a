"""The pair before co-adaptation: the recipe's first base and the plain vector on it, which are not shipped.

The recipe keeps both as intermediate steps. Here they become a folder like the shipped one.
"""

from __future__ import annotations

from pathlib import Path

import torch

from guard.cache import digest_of
from guard.digest import file_digest
from models.recipe.export import save_model, save_vector
from models.recipe.network import Network
from models.recipe.settings import Settings
from models.recipe.tokenizer import load_tokenizer

BASE, VECTOR, TOKENIZER = "base.pt", "dense.pt", "tokenizer.json"


def folder(steps: Path, store: Path) -> Path | None:
    """Weights and vector as a checkpoint below ``store``; None when the recipe has not been run here."""
    files = [steps / name for name in (BASE, VECTOR, TOKENIZER)]
    if not all(file.is_file() for file in files):
        return None
    out = store / "first" / digest_of([file_digest(file) for file in files])[:16]
    if not (out / "ia3-dense.safetensors").is_file():
        net = Network(Settings().model)
        net.load_state_dict(torch.load(steps / BASE, weights_only=True))
        save_model(out, net, load_tokenizer(steps / TOKENIZER))
        save_vector(out / "ia3-dense.safetensors", torch.load(steps / VECTOR, weights_only=True))
    return out
