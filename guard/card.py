"""The card of a bundle: everything in ``guard.json``, validated.

Feature order is part of the contract: sites in the order of ``GuardCard.sites``, columns of a site in the
order of ``ModelShape.columns``. The probe's input is the concatenation, standardisation is already folded in.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from guard.monitor import MonitorThreshold
from guard.patch_card import MOST_PATCHES, PatchCard
from guard.pooling import Pooling
from guard.reference import ScoreReference
from guard.scorer import ProbeKind
from guard.sites import ModelShape, SiteKind
from guard.verdict import Decision, Rule, Threshold


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
    first_mlp_layer: int = 0
    weights_sha256: str
    """Digest of the weights (``guard.digest.weights_digest``)."""
    tokenizer_sha256: str
    """Digest of tokenizer and chat template (``guard.digest.tokenizer_digest``)."""

    @property
    def shape(self) -> ModelShape:
        """The sizes as sites need them."""
        return ModelShape(**self.model_dump(include=set(ModelShape._fields)))


class Calibration(_Card):
    """From a raw logit to P(unsafe) = 1 / (1 + exp(-z)), always rising.

    Platt scaling: z = slope * logit + offset. Isotonic: z is interpolated linearly between ``knots`` and goes
    on with ``slope`` beyond them, so that two logits never share a probability, and a threshold on the one is
    a threshold on the other.
    """

    kind: Literal["platt", "isotonic"] = "platt"
    slope: float = Field(gt=0.0)
    offset: float
    """Of Platt scaling; 0 when there are knots."""
    knots: tuple[tuple[float, float], ...] = ()
    """(logit, z), both ascending; at least two for isotonic, none for Platt scaling."""

    @model_validator(mode="after")
    def _rising(self) -> Calibration:
        if (self.kind == "isotonic") != (len(self.knots) >= 2) or (self.kind == "platt" and self.knots):
            raise ValueError("isotonic calibration has two knots or more, Platt scaling has none")
        if any(a >= c or b >= d for (a, b), (c, d) in zip(self.knots, self.knots[1:], strict=False)):
            raise ValueError("the knots of a calibration must rise in both coordinates")
        return self

    def probability(self, logit: float) -> float:
        """P(unsafe) of a raw logit."""
        z = self._scaled(logit) if self.knots else self.slope * logit + self.offset
        # Two branches, so that neither exponent can overflow.
        return 1.0 / (1.0 + math.exp(-z)) if z >= 0 else math.exp(z) / (1.0 + math.exp(z))

    def logit(self, probability: float) -> float:
        """The raw logit at which P(unsafe) is ``probability``; infinite at 0 and 1."""
        if probability <= 0.0 or probability >= 1.0:
            return math.inf if probability >= 1.0 else -math.inf
        z = math.log(probability) - math.log1p(-probability)
        if self.knots:
            turned = tuple((b, a) for a, b in self.knots)
            return _interpolated(z, turned, 1.0 / self.slope)
        return (z - self.offset) / self.slope

    def _scaled(self, logit: float) -> float:
        return _interpolated(logit, self.knots, self.slope)


def _interpolated(x: float, knots: Sequence[tuple[float, float]], slope: float) -> float:
    """Linear between knots (x, y), both ascending; with ``slope`` beyond them."""
    if x <= knots[0][0]:
        return knots[0][1] + slope * (x - knots[0][0])
    if x >= knots[-1][0]:
        return knots[-1][1] + slope * (x - knots[-1][0])
    above = bisect_right(knots, x, key=lambda knot: knot[0])
    (a, b), (c, d) = knots[above - 1], knots[above]
    return b + (d - b) * ((x - a) / (c - a))


class DataFile(_Card):
    """One data set that took part, by digest and never by content."""

    name: str
    sha256: str
    role: Literal["fit", "hard_negative", "calibrate", "threshold", "evaluate"]
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
        _check_logits(self.prompts, self.logits, self.tolerance)
        return self


class AdapterCard(_Card):
    """A LoRA adapter under which this guard was measured."""

    name: str = Field(min_length=1)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Digest of the adapter's configuration and weights (``guard.adapters.adapter_digest``)."""
    rank: int = Field(ge=1)
    self_test: dict[str, tuple[float, ...]]
    """Raw logits of the bundle's self-test prompts under the adapter, by dtype name."""
    tolerance: dict[str, float]
    """Largest |difference| accepted, by dtype name."""


def _check_logits(
    prompts: Sequence[object], logits: Mapping[str, Sequence[float]], tolerance: Mapping[str, float]
) -> None:
    for dtype, values in logits.items():
        if len(values) != len(prompts):
            raise ValueError(f"{len(prompts)} self-test prompts but {len(values)} {dtype} logits")
        if dtype not in tolerance:
            raise ValueError(f"no self-test tolerance for {dtype}")


class GuardCard(_Card):
    """Everything in ``guard.json``."""

    schema_version: Literal[2] = 2
    """Older ones are read by way of ``guard.bundle_schema``."""
    model: ModelCard
    label: Literal["unsafe_output", "harmful_prompt"]
    """Which question the probe answers: is *this model's answer* unsafe, or is the *request* harmful."""
    prompt_tails: tuple[Annotated[tuple[int, ...], Field(min_length=1)], ...]
    """Token ids that end an accepted prompt (what the chat template adds after the last user turn).

    None at all: the probe takes prompts of any shape, and engines do not check how they end."""
    sites: tuple[Site, ...] = Field(min_length=1)
    probe: ProbeKind | Literal["sequence"]
    """``sequence``: a linear probe of every token, and ``pooling``; the others read the last token only."""
    calibration: Calibration
    thresholds: tuple[Threshold, ...] = Field(min_length=1)
    default_false_positive_rate: float
    """The operating point an engine enforces when nobody tells it otherwise."""
    data: tuple[DataFile, ...]
    metrics: dict[str, Any]
    self_test: SelfTest
    reference: ScoreReference | None = None
    """The scores at the time of the fit, to tell drift by; None in bundles that were made without."""
    created: dict[str, str]
    """Facts of the making: versions, date, command, seed."""
    pooling: Pooling | None = None
    """How a sequence probe's outputs at a prompt's tokens become one logit."""
    monitor: tuple[MonitorThreshold, ...] = ()
    """Where a sequence probe stops an answer as it grows; none: it watches no answers."""
    adapters: tuple[AdapterCard, ...] = ()
    """The LoRA adapters that may be served under this guard."""
    patches: tuple[PatchCard, ...] = Field(default=(), max_length=MOST_PATCHES)
    """What a policy may have done to a flagged request instead of refusing it, by name."""

    @model_validator(mode="after")
    def _consistent(self) -> GuardCard:
        shape, seen = self.model.shape, set()
        for site in self.sites:
            if site.layer >= shape.layers:
                raise ValueError(f"site at layer {site.layer}, but the model has {shape.layers} layers")
            shape.check(site.kind, site.layer)
            if site.units[-1] >= shape.units(site.kind):
                raise ValueError(
                    f"unit {site.units[-1]} at layer {site.layer}, but a {site.kind} site has "
                    f"{shape.units(site.kind)} units"
                )
            if (site.layer, site.kind) in seen:
                raise ValueError(f"two {site.kind} sites at layer {site.layer}")
            seen.add((site.layer, site.kind))
        self.threshold(self.default_false_positive_rate)
        if (self.probe == "sequence") != (self.pooling is not None):
            raise ValueError("a sequence probe has a pooling, and no other probe has one")
        if self.monitor and self.pooling is None:
            raise ValueError("only a sequence probe can watch answers")
        if len({adapter.name for adapter in self.adapters}) < len(self.adapters):
            raise ValueError("two adapters have one name")
        if len({patch.name for patch in self.patches}) < len(self.patches):
            raise ValueError("two patches have one name")
        for patch in self.patches:
            patch.check(shape)
        for adapter in self.adapters:
            _check_logits(self.self_test.prompts, adapter.self_test, adapter.tolerance)
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


def card_bytes(card: GuardCard) -> bytes:
    """The card as it is written and hashed."""
    document = card.model_dump(mode="json")
    if not card.adapters:
        # Left out, not empty: bundles made before adapters were known keep their bytes and their digest.
        del document["adapters"]
    if not card.patches:
        del document["patches"]
    if card.pooling is None:
        del document["pooling"]
    if not card.monitor:
        del document["monitor"]
    if not card.calibration.knots:
        del document["calibration"]["knots"]
    if not card.model.first_mlp_layer:
        del document["model"]["first_mlp_layer"]
    return (json.dumps(document, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()
