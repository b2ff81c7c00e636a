"""The Bundle: a directory with ``guard.json`` and ``guard.safetensors``, all that fitting hands to serving.

``guard.json`` is readable by people and holds everything but arrays; ``guard.safetensors`` holds the probe.
There is no pickle. A bundle is bound to one model by two digests, one of the weights and one of tokenizer and
chat template; loading it for another model is refused with a sentence that says what differs.

Feature order is part of the contract: sites in the order of ``GuardCard.sites``, columns of a site in the
order of ``ModelShape.columns``. The probe's input is the concatenation, standardisation is already folded in.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors.numpy import load_file, save_file

from guard.sites import ModelShape, SiteKind
from guard.verdict import Decision, Rule, Threshold

CARD_FILE = "guard.json"
ARRAY_FILE = "guard.safetensors"
DTYPES = ("float32", "bfloat16", "float16")

Float32Array = NDArray[np.float32]


class BundleError(ValueError):
    """A bundle cannot be read, is inconsistent, or does not belong to the model it is to guard."""


class _Card(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Site(_Card):
    """The units read at one layer."""

    layer: int = Field(ge=0)
    kind: SiteKind
    units: tuple[int, ...] = Field(min_length=1)
    """Neuron or head indices, ascending, without repeats."""

    @model_validator(mode="after")
    def _ascending(self) -> Site:
        if self.units[0] < 0 or any(a >= b for a, b in zip(self.units, self.units[1:], strict=False)):
            raise ValueError(f"the units of layer {self.layer} must be ascending and non-negative")
        return self


class ModelCard(_Card):
    """The model a bundle belongs to."""

    name: str
    architecture: str
    layers: int
    mlp_width: int
    heads: int
    head_dim: int
    weights_sha256: str
    """Digest of the weights (``guard.digest.weights_digest``)."""
    tokenizer_sha256: str
    """Digest of tokenizer and chat template (``guard.digest.tokenizer_digest``)."""

    @property
    def shape(self) -> ModelShape:
        """The sizes as sites need them."""
        return ModelShape(self.architecture, self.layers, self.mlp_width, self.heads, self.head_dim)


class Calibration(_Card):
    """Platt scaling: P(unsafe) = 1 / (1 + exp(-(slope * logit + offset)))."""

    kind: Literal["platt"] = "platt"
    slope: float = Field(gt=0.0)
    offset: float

    def probability(self, logit: float) -> float:
        """P(unsafe) of a raw logit."""
        z = self.slope * logit + self.offset
        # Two branches, so that neither exponent can overflow.
        return 1.0 / (1.0 + math.exp(-z)) if z >= 0 else math.exp(z) / (1.0 + math.exp(z))

    def logit(self, probability: float) -> float:
        """The raw logit at which P(unsafe) is ``probability``; infinite at 0 and 1."""
        if probability <= 0.0 or probability >= 1.0:
            return math.inf if probability >= 1.0 else -math.inf
        return (math.log(probability) - math.log1p(-probability) - self.offset) / self.slope


class DataFile(_Card):
    """One data set that took part, by digest and never by content."""

    name: str
    sha256: str
    role: Literal["fit", "calibrate", "threshold", "evaluate"]
    harmful: int
    benign: int


class SelfTest(_Card):
    """Prompts whose scores an engine must reproduce before it may answer anybody."""

    prompts: tuple[tuple[int, ...], ...] = Field(min_length=1)
    """Token ids, template applied."""
    logits: dict[str, tuple[float, ...]]
    """Raw logits by dtype name (``float32``, ``bfloat16``, …), one for each prompt."""
    tolerance: dict[str, float]
    """Largest |difference| accepted, by dtype name."""

    @model_validator(mode="after")
    def _consistent(self) -> SelfTest:
        for dtype, logits in self.logits.items():
            if len(logits) != len(self.prompts):
                raise ValueError(f"{len(self.prompts)} self-test prompts but {len(logits)} {dtype} logits")
            if dtype not in self.tolerance:
                raise ValueError(f"no self-test tolerance for {dtype}")
        return self


class GuardCard(_Card):
    """Everything in ``guard.json``."""

    schema_version: Literal[1] = 1
    model: ModelCard
    label: Literal["unsafe_output", "harmful_prompt"]
    """Which question the probe answers: is *this model's answer* unsafe, or is the *request* harmful."""
    prompt_tails: tuple[tuple[int, ...], ...] = Field(min_length=1)
    """Token ids that end an accepted prompt (what the chat template adds after the last user turn)."""
    sites: tuple[Site, ...] = Field(min_length=1)
    probe: Literal["linear"]
    calibration: Calibration
    thresholds: tuple[Threshold, ...] = Field(min_length=1)
    default_false_positive_rate: float
    """The operating point an engine enforces when nobody tells it otherwise."""
    data: tuple[DataFile, ...]
    metrics: dict[str, Any]
    self_test: SelfTest
    created: dict[str, str]
    """Facts of the making: versions, date, command, seed."""

    @model_validator(mode="after")
    def _consistent(self) -> GuardCard:
        shape, seen = self.model.shape, set()
        for site in self.sites:
            if site.layer >= shape.layers:
                raise ValueError(f"site at layer {site.layer}, but the model has {shape.layers} layers")
            if site.units[-1] >= shape.units(site.kind):
                raise ValueError(
                    f"unit {site.units[-1]} at layer {site.layer}, but a {site.kind} site has "
                    f"{shape.units(site.kind)} units"
                )
            if (site.layer, site.kind) in seen:
                raise ValueError(f"two {site.kind} sites at layer {site.layer}")
            seen.add((site.layer, site.kind))
        self.threshold(self.default_false_positive_rate)
        return self

    @property
    def features(self) -> int:
        """Number of columns the probe reads."""
        return sum(len(self.columns(site)) for site in self.sites)

    def columns(self, site: Site) -> list[int]:
        """Input columns of a site, in feature order."""
        return self.model.shape.columns(site.kind, site.units)

    def threshold(self, false_positive_rate: float) -> Threshold:
        """The operating point for a named rate. Raises ValueError that lists those there are."""
        for threshold in self.thresholds:
            if math.isclose(threshold.false_positive_rate, false_positive_rate, rel_tol=1e-9):
                return threshold
        there = ", ".join(f"{t.false_positive_rate:g}" for t in self.thresholds)
        raise ValueError(
            f"no threshold for a false-positive rate of {false_positive_rate:g}; there are: {there}"
        )

    @property
    def default_decision(self) -> Decision:
        """What an engine does without a directive: refuse at the default operating point."""
        above = self.threshold(self.default_false_positive_rate).probability
        return Decision(policy="engine-default", mode="enforce", rules=(Rule(above=above, action="refuse"),))


class Bundle:
    """A loaded bundle.

    ``weight`` is ``[features]`` float32 and ``bias`` a float: logit = weight · x + bias, x being the raw
    activations in feature order.
    """

    def __init__(self, card: GuardCard, weight: Float32Array, bias: float) -> None:
        if weight.dtype != np.float32 or weight.shape != (card.features,):
            raise BundleError(
                f"the probe weight is {weight.dtype}{list(weight.shape)}, expected float32[{card.features}]"
            )
        if not (np.isfinite(weight).all() and math.isfinite(bias)):
            raise BundleError("the probe holds a value that is not finite")
        self.card = card
        self.weight = weight
        self.bias = bias
        self._card_bytes = _card_bytes(card)

    @property
    def digest(self) -> str:
        """SHA-256 over card and arrays: the bundle's name in verdicts, metrics and status."""
        digest = hashlib.sha256(self._card_bytes)
        digest.update(self.weight.tobytes())
        digest.update(np.float32(self.bias).tobytes())
        return digest.hexdigest()

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write the bundle; the directory appears whole or not at all. Replaces an existing bundle."""
        target = Path(directory)
        if target.exists() and not (target / CARD_FILE).exists():
            raise BundleError(f"{target} exists and is not a bundle; choose another directory")
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            (staging / CARD_FILE).write_bytes(self._card_bytes)
            arrays = {"probe.weight": self.weight, "probe.bias": np.array([self.bias], dtype=np.float32)}
            save_file(arrays, staging / ARRAY_FILE)
            # Private by default, both of them: a bundle is as readable as any file, whoever serves it.
            (staging / ARRAY_FILE).chmod(0o644)
            staging.chmod(0o755)
            if target.exists():
                # Set aside first: removing takes time, and a reader must not find half a bundle.
                aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
                target.rename(aside / target.name)
                staging.rename(target)
                shutil.rmtree(aside)
            else:
                staging.rename(target)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        return target

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Bundle:
        """Read and validate a bundle. Raises BundleError with what was wrong and where."""
        root = Path(directory)
        try:
            text = (root / CARD_FILE).read_text("utf-8")
            arrays = load_file(root / ARRAY_FILE)
        except Exception as error:
            raise BundleError(
                f"{root} is not a readable bundle (expected {CARD_FILE} and {ARRAY_FILE}): {error}"
            ) from error
        try:
            card = GuardCard.model_validate_json(text)
        except ValidationError as error:
            raise BundleError(f"{root / CARD_FILE} is not a valid card: {error}") from error
        missing = {"probe.weight", "probe.bias"} - arrays.keys()
        if missing:
            raise BundleError(f"{root / ARRAY_FILE} lacks {', '.join(sorted(missing))}")
        if arrays["probe.bias"].shape != (1,):
            raise BundleError(f"probe.bias has shape {list(arrays['probe.bias'].shape)}, expected [1]")
        return cls(card, arrays["probe.weight"], float(arrays["probe.bias"][0]))

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

    def logits(self, features: Float32Array) -> Float32Array:
        """Raw logits ``[n]`` of features ``[n, features]``: the reference the engine must agree with."""
        return np.asarray(features @ self.weight + np.float32(self.bias), dtype=np.float32)


def _card_bytes(card: GuardCard) -> bytes:
    document = card.model_dump(mode="json")
    return (json.dumps(document, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()
