"""What must hold for any files that stand where a bundle should."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from guard.bundle import ARRAY_FILE, CARD_FILE, Bundle, BundleError
from guard.scorer import Scorer
from guard.sealed import KeyFileError, Keyring
from tests.engine.cards import card

_FOLDER = Path(tempfile.mkdtemp(prefix="neuronguard-fuzz-"))
BUNDLE = Bundle(card(), Scorer.linear(np.array([1.0, -2.0], dtype=np.float32), 0.5))
FILES = {name: (BUNDLE.save(_FOLDER / "good") / name).read_bytes() for name in (CARD_FILE, ARRAY_FILE)}


def _load(**changed: bytes) -> None:
    folder = _FOLDER / "bundle"
    folder.mkdir(exist_ok=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(changed.get(name.removeprefix("guard."), content))
    with suppress(BundleError):
        found = Bundle.load(folder)
        logits = found.logits(np.ones((3, found.card.features), dtype=np.float32))
        assert logits.shape == (3,)
        same = (folder / CARD_FILE).read_bytes() == FILES[CARD_FILE]
        same = same and np.array_equal(found.scorer.weight, BUNDLE.scorer.weight)
        same = same and np.array_equal(found.scorer.bias, BUNDLE.scorer.bias)
        assert (found.digest == BUNDLE.digest) == same


def bundle_card(data: bytes) -> None:
    """A card makes a bundle with a digest of its own, or is refused."""
    _load(json=data)


def bundle_arrays(data: bytes) -> None:
    """Arrays make a bundle with a digest of its own, or are refused."""
    _load(safetensors=data)


def key_file(data: bytes) -> None:
    """A key file holds one or two sound keys, or is refused."""
    path = _FOLDER / "keys"
    path.touch(mode=0o600)
    path.write_bytes(data)
    with suppress(KeyFileError):
        ring = Keyring.load(path)
        assert ring.open("verdict", ring.seal("verdict", b"x")) == b"x"


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (bundle_card, bundle_arrays, key_file)
}
