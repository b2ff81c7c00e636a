"""Make one of a lab directory's models: base weights, an (IA)³ vector and its strength become a checkpoint.

A lab directory holds one set of weights, small vector files, and ``lab.json`` that names the variants. The
checkpoint of a variant is folded on first use into the user's cache, under a name that contains a digest of
all that went into it.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from guard.cache import cache_root, digest_of
from guard.digest import file_digest, tokenizer_digest

LAB_FILE = "lab.json"


class LabError(ValueError):
    """A lab directory is malformed or does not have the variant that was asked for."""


class Variant(BaseModel):
    """One model of a lab directory."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    vector: str | None = None
    """File of the (IA)³ vector, relative to the directory; None is the base."""
    alpha: float = 1.0
    """Strength of the vector: 0 is the base, 1 the aligned model."""


def variants(lab_dir: str | os.PathLike[str]) -> dict[str, Variant]:
    """The models of a lab directory by name. Raises LabError."""
    file = Path(lab_dir) / LAB_FILE
    try:
        entries = json.loads(file.read_text("utf-8"))["variants"]
        return {name: Variant.model_validate(entry) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise LabError(
            f"{file} is not a readable lab file (expected an object 'variants'): {error}"
        ) from error


def materialise(
    lab_dir: str | os.PathLike[str], variant: str, *, cache: str | os.PathLike[str] | None = None
) -> Path:
    """The checkpoint directory of a variant, folded now if it is not there yet.

    Two processes may ask at once: one folds, the other waits. Raises LabError.
    """
    root = Path(lab_dir)
    known = variants(root)
    if variant not in known:
        raise LabError(f"{root} has no variant {variant!r}; there are: {', '.join(sorted(known))}")
    chosen = known[variant]
    vector = root / chosen.vector if chosen.vector else None
    try:
        identity = [
            # The file, not the tensors of the directory: the vectors lie next to it.
            file_digest(root / "model.safetensors"),
            tokenizer_digest(root),
            file_digest(root / "config.json"),
            file_digest(vector) if vector else None,
            chosen.alpha,
        ]
    except OSError as error:
        raise LabError(f"{root} is incomplete: {error}") from error
    store = Path(cache) if cache else cache_root() / "checkpoints"
    target = store / f"{variant}-{digest_of(identity)[:16]}"
    store.mkdir(parents=True, exist_ok=True)
    with (store / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / "model.safetensors").is_file():
            from guard.ia3 import fold_checkpoint  # here, since it needs torch and a second call does not

            try:
                fold_checkpoint(root, target, vector=vector, alpha=chosen.alpha)
            except ValueError as error:
                raise LabError(str(error)) from error
    return target


def resolve(text: str) -> tuple[Path, str]:
    """Path and name of ``CHECKPOINT`` or ``LAB_DIR:VARIANT``. Raises LabError."""
    path = Path(text)
    if path.is_dir() and not (path / LAB_FILE).is_file():
        return path, path.resolve().name
    directory, colon, variant = text.rpartition(":")
    if colon and Path(directory).is_dir():
        return materialise(directory, variant), variant
    if path.is_dir():
        names = ", ".join(f"{text}:{name}" for name in sorted(variants(path)))
        raise LabError(f"{text} holds several models; name one: {names}")
    raise LabError(f"there is no model directory {text}")
