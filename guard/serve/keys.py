"""The key that gateway and engine share: fresh for every start, private to this user, gone afterwards."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from guard.sealed import Keyring


@contextmanager
def fresh_key_file() -> Iterator[Path]:
    """A key file of mode 0600 in a directory of mode 0700; both are removed on leaving."""
    # mkdtemp makes the directory private to its owner.
    folder = Path(tempfile.mkdtemp(prefix="neuronguard-"))
    try:
        file = folder / "keys"
        Keyring.generate().save(file)
        yield file
    finally:
        shutil.rmtree(folder, ignore_errors=True)
