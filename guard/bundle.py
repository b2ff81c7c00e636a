"""The Bundle: a directory with ``guard.json`` and ``guard.safetensors``, all that fitting hands to serving.

``guard.json`` is readable by people and holds everything but arrays; ``guard.safetensors`` holds the probe.
There is no pickle. ``CARD.md``, made of ``guard.json``, says the same for people who read no JSON. A bundle
is bound to one model by two digests, one of the weights and one of tokenizer and chat template; loading it
for another model is refused with a sentence that says what differs.

The classes of the card are in ``guard.card`` and may be imported from here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError
from safetensors.numpy import load, save_file

from guard.bundle_card import TEXT_FILE, bundle_card
from guard.bundle_schema import CURRENT, SchemaError, migrated, version_of
from guard.card import (
    AdapterCard,
    Calibration,
    DataFile,
    GuardCard,
    ModelCard,
    SelfTest,
    Site,
    card_bytes,
)
from guard.patch import Patch, PatchError, patch_arrays, take_patches
from guard.replace import replace_directory
from guard.scorer import Float32Array, Scorer, ScorerError
from guard.sequence import SequenceScorer
from guard.sites import ModelShape

__all__ = [
    "ARRAY_FILE",
    "CARD_FILE",
    "SIGNATURE_FILE",
    "TEXT_FILE",
    "AdapterCard",
    "Bundle",
    "BundleError",
    "Calibration",
    "DataFile",
    "GuardCard",
    "ModelCard",
    "SelfTest",
    "Site",
]

CARD_FILE = "guard.json"
ARRAY_FILE = "guard.safetensors"
SIGNATURE_FILE = "signature.json"
"""There if the bundle is signed (``guard.signature``)."""


class BundleError(ValueError):
    """A bundle cannot be read, is inconsistent, or does not belong to the model it is to guard."""


class Bundle:
    """A loaded bundle: ``card``, the ``probe`` that reads raw activations in feature order, and patches."""

    def __init__(
        self,
        card: GuardCard,
        probe: Scorer | SequenceScorer,
        patches: Iterable[Patch] = (),
        *,
        stored: bytes | None = None,
        stored_version: int = CURRENT,
    ) -> None:
        """``stored`` is the card as it was read, of schema version ``stored_version``; None: newly made."""
        if probe.kind != card.probe:
            raise BundleError(f"the card says {card.probe!r}, but the probe is {probe.kind!r}")
        if isinstance(probe, SequenceScorer) and probe.pooling != card.pooling:
            raise BundleError(f"the card pools by {card.pooling}, but the probe by {probe.pooling}")
        if probe.features != card.features:
            raise BundleError(
                f"the probe weight is float32[{probe.features}] a row, expected float32[{card.features}]"
            )
        self.patches = {patch.card.name: patch for patch in patches}
        if [patch.card for patch in self.patches.values()] != list(card.patches):
            raise BundleError("the patches are not those that the card lists")
        try:
            for patch in self.patches.values():
                patch.check(card.model.shape)
        except PatchError as error:
            raise BundleError(str(error)) from error
        self.card = card
        self.probe = probe
        self.stored_version = stored_version
        """Schema version of ``guard.json`` as it was read."""
        self._card_bytes = card_bytes(card) if stored is None else stored

    @property
    def digest(self) -> str:
        """SHA-256 over card and arrays: the bundle's name in verdicts, metrics and status.

        Of a bundle that was read it is over the card's bytes as they were stored, whatever their schema
        version, so that reading it with a newer release does not change its name.
        """
        digest = hashlib.sha256(self._card_bytes)
        for array in self._arrays().values():
            digest.update(array.tobytes())
        return digest.hexdigest()

    def _arrays(self) -> dict[str, Float32Array]:
        """Everything in ``guard.safetensors``; the digest is taken in this order."""
        return {**self.probe.arrays(), **patch_arrays(self.patches.values())}

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write the bundle; the directory appears whole or not at all. Replaces an existing bundle."""
        target = Path(directory)
        if target.exists() and not (target / CARD_FILE).exists():
            raise BundleError(f"{target} exists and is not a bundle; choose another directory")
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            (staging / CARD_FILE).write_bytes(self._card_bytes)
            (staging / TEXT_FILE).write_text(bundle_card(self.card, self.digest), "utf-8")
            save_file(self._arrays(), staging / ARRAY_FILE)
            # Private by default, both of them: a bundle is as readable as any file, whoever serves it.
            (staging / ARRAY_FILE).chmod(0o644)
            staging.chmod(0o755)
            replace_directory(staging, target)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        return target

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Bundle:
        """Read and validate a bundle. Raises BundleError with what was wrong and where."""
        root = Path(directory)
        try:
            stored = (root / CARD_FILE).read_bytes()
            document = json.loads(stored)
            arrays = load((root / ARRAY_FILE).read_bytes())
        except Exception as error:
            raise BundleError(
                f"{root} is not a readable bundle (expected {CARD_FILE} and {ARRAY_FILE}): {error}"
            ) from error
        try:
            version, card = version_of(document), GuardCard.model_validate(migrated(document))
        except (SchemaError, ValidationError) as error:
            raise BundleError(f"{root / CARD_FILE} is not a valid card: {error}") from error
        try:
            patches = take_patches(card.patches, arrays)
            probe = _probe(card, arrays)
            return cls(card, probe, patches, stored=stored, stored_version=version)
        except (ScorerError, PatchError) as error:
            raise BundleError(f"{root / ARRAY_FILE}: {error}") from error

    def migrated(self) -> Bundle:
        """The same bundle in the current schema: other bytes, and therefore another digest.

        ``created.migrated_from`` names the bundle that it was. Raises BundleError when it is current already.
        """
        if self.stored_version == CURRENT:
            raise BundleError(
                f"the bundle is of schema version {CURRENT} already; there is nothing to migrate"
            )
        created = {**self.card.created, "migrated_from": self.digest}
        return Bundle(self.card.model_copy(update={"created": created}), self.probe, self.patches.values())

    def with_adapter(self, adapter: AdapterCard) -> Bundle:
        """The same bundle that lists ``adapter`` as well. Raises BundleError when its name is taken."""
        if any(adapter.name == listed.name for listed in self.card.adapters):
            raise BundleError(f"the bundle lists an adapter {adapter.name!r} already; choose another name")
        document = self.card.model_dump() | {"adapters": (*self.card.adapters, adapter)}
        return Bundle(GuardCard.model_validate(document), self.probe, self.patches.values())

    def with_patch(self, patch: Patch) -> Bundle:
        """The same bundle with ``patch`` as well. Raises BundleError when it cannot have it."""
        if patch.card.name in self.patches:
            raise BundleError(f"the bundle has a patch {patch.card.name!r} already; choose another name")
        document = self.card.model_dump() | {"patches": (*self.card.patches, patch.card)}
        try:
            card = GuardCard.model_validate(document)
        except ValidationError as error:
            raise BundleError(f"the patch does not fit the bundle: {error}") from error
        return Bundle(card, self.probe, (*self.patches.values(), patch))

    def verify_model(self, *, shape: ModelShape, weights_sha256: str, tokenizer_sha256: str) -> None:
        """Refuse any model but the one the bundle was fitted on. Raises BundleError."""
        model = self.card.model
        for what, expected, found in (
            ("shape", model.shape, shape),
            ("weights digest", model.weights_sha256, weights_sha256),
            ("tokenizer and chat template digest", model.tokenizer_sha256, tokenizer_sha256),
        ):
            if expected != found:
                raise BundleError(
                    f"this bundle was fitted on {model.name!r} and does not belong to the served model: "
                    f"{what} is {found}, expected {expected}. Fit a bundle for this model (neuronguard fit)."
                )

    @property
    def scorer(self) -> Scorer:
        """The probe of the last token. Raises BundleError when the bundle has a sequence probe."""
        if isinstance(self.probe, SequenceScorer):
            raise BundleError("the bundle's probe reads every token of a prompt, not its last one only")
        return self.probe

    @property
    def sequence(self) -> SequenceScorer | None:
        """The probe of every token; None when the bundle reads the last one only."""
        return self.probe if isinstance(self.probe, SequenceScorer) else None

    def logits(self, features: Float32Array) -> Float32Array:
        """Raw logits ``[n]`` of features ``[n, features]``: the reference the engine must agree with.

        Of the last token only. Raises BundleError when the bundle has a sequence probe.
        """
        return self.scorer.logits(features)


def _probe(card: GuardCard, arrays: dict[str, Float32Array]) -> Scorer | SequenceScorer:
    """What of ``arrays`` is left when the patches are taken out."""
    if card.probe != "sequence":
        return Scorer.of_arrays(card.probe, arrays)
    if card.pooling is None:  # the card's own check refuses it
        raise ScorerError("a sequence probe has a pooling")
    return SequenceScorer.of_arrays(card.pooling, arrays)
