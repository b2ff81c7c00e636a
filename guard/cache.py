"""Results kept on disk by the digest of everything they depend on, so that a second run takes seconds.

Entries are written to a temporary file and renamed: an interrupted run leaves whole entries or none, and the
next run goes on where it stopped. Nothing is ever read back under another key, so there is no expiry.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

ENVIRONMENT = "NEURONGUARD_CACHE"


def cache_root() -> Path:
    """Where caches live: ``$NEURONGUARD_CACHE``, else ``~/.cache/neuronguard``."""
    configured = os.environ.get(ENVIRONMENT)
    return Path(configured) if configured else Path.home() / ".cache" / "neuronguard"


def digest_of(document: Any) -> str:
    """SHA-256 of a JSON-able document, independent of the order of keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call ``write`` on a temporary file and rename it to ``path``: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
        # mkstemp is private to its owner; results are as readable as any other file.
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


class Cache:
    """Arrays and texts by key. ``root=None`` keeps nothing."""

    def __init__(self, root: Path | None) -> None:
        self.root = root

    def path(self, kind: str, key: Any, suffix: str) -> Path | None:
        """File of an entry, whether it exists or not; None when nothing is kept."""
        if self.root is None:
            return None
        digest = digest_of(key)
        return self.root / kind / digest[:2] / f"{digest}{suffix}"

    def array(self, kind: str, key: Any, *, mapped: bool = False) -> NDArray[np.float32] | None:
        """A stored array, or None. A damaged entry counts as absent.

        With ``mapped`` it stays on disk, and what is looked at is read: for arrays larger than the memory.
        """
        path = self.path(kind, key, ".npy")
        if path is None or not path.is_file():
            return None
        try:
            stored: NDArray[np.float32] = np.load(path, "r" if mapped else None, allow_pickle=False)
        except (ValueError, OSError, EOFError):
            return None
        return stored

    def keep_array(self, kind: str, key: Any, value: NDArray[np.float32]) -> None:
        """Store an array."""
        path = self.path(kind, key, ".npy")
        if path is not None:
            write_whole(path, lambda file: np.save(file, value, allow_pickle=False))

    def texts(self, kind: str, key: Any) -> list[str] | None:
        """A stored list of texts, or None. A damaged entry counts as absent."""
        path = self.path(kind, key, ".json")
        if path is None or not path.is_file():
            return None
        try:
            stored = json.loads(path.read_text("utf-8"))
        except (ValueError, OSError):
            return None
        return stored if isinstance(stored, list) else None

    def keep_texts(self, kind: str, key: Any, value: list[str]) -> None:
        """Store a list of texts."""
        path = self.path(kind, key, ".json")
        if path is not None:
            write_whole(path, lambda file: file.write(json.dumps(value).encode()))
