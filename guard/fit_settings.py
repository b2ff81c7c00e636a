"""What to fit and how: the choices of ``neuronguard fit``, checked when they are made."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from guard.mlp_probe import HiddenLayer
from guard.observe import Judged
from guard.probe import LINEAR, Family
from guard.scorer import MOST_HIDDEN, ProbeKind
from guard.sites import SiteKind

Target = Literal["unsafe_output", "harmful_prompt"]
UnitChoice = Literal["all", "l1", "stability", "random", "file"]


class FitError(ValueError):
    """A bundle cannot be made from these inputs."""


@dataclass(frozen=True)
class FitSettings:
    """What to fit and how."""

    label: Target = "unsafe_output"
    """What counts as positive: an unsafe answer of this model, or a harmful request."""
    units: UnitChoice = "l1"
    """Every unit, those that an L1 fit keeps, those that it keeps on most halves of the prompts, as many
    random ones, or those of ``units_file``."""
    units_file: Path | None = None
    max_units: int = 1000
    """Most units that ``l1``, ``stability`` and ``random`` take."""
    sites: tuple[SiteKind, ...] = ("mlp",)
    """Where units are chosen from when no file names them."""
    layers: Literal["all", "choose"] | tuple[int, ...] = "all"
    """All layers stacked, those named, or whatever ranks left-out sources best: one layer, or all stacked."""
    calibration: Literal["platt", "isotonic"] = "platt"
    rates: tuple[float, ...] = (0.01, 0.005, 0.001)
    """False-positive rates that thresholds are set for."""
    default_rate: float = 0.01
    """The rate an engine enforces when nobody tells it otherwise."""
    probe: ProbeKind = "linear"
    """A logistic regression, a network with one hidden layer, or a product of two logistic regressions: the
    prompt is harmful, and the model complies."""
    hidden: int = 16
    """Size of the hidden layer, if there is one."""
    apart: tuple[str, ...] = ()
    """Benign evaluation sources that are reported but not pooled."""
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.units == "file") != (self.units_file is not None):
            raise FitError("units 'file' and a units file belong together; give both or neither")
        if not self.sites or self.layers == ():
            raise FitError("name at least one kind of site and one layer")
        if self.probe == "product" and self.label != "unsafe_output":
            raise FitError(
                "a product of 'harmful prompt' and 'the model complies' predicts an unsafe output; "
                "fit it with the label unsafe_output"
            )
        if self.max_units < 1:
            raise FitError(f"max_units must be at least 1, got {self.max_units}")
        if not 1 <= self.hidden <= MOST_HIDDEN:
            raise FitError(f"hidden must be from 1 to {MOST_HIDDEN}, got {self.hidden}")
        if any(not 0 < rate < 1 for rate in self.rates) or self.default_rate not in self.rates:
            raise FitError(
                f"the default rate {self.default_rate:g} must be one of the rates, each between 0 and 1: "
                f"{', '.join(f'{rate:g}' for rate in self.rates)}"
            )

    @property
    def judged(self) -> Judged:
        """Which prompts to fit on have to be answered."""
        return "harmful" if self.label == "unsafe_output" else "none"

    @property
    def family(self) -> Family:
        """How a probe of this kind is fitted."""
        return HiddenLayer(self.hidden, self.seed) if self.probe == "mlp" else LINEAR

    def recorded(self) -> dict[str, str]:
        """The settings as the card keeps them, without paths of this machine."""
        document = {key: str(value) for key, value in asdict(self).items()}
        document["units_file"] = self.units_file.name if self.units_file else ""
        if self.probe != "mlp":
            del document["hidden"]
        for field in fields(self):
            # Says nothing new: a plain fit repeats the bundles that were made before there was a choice.
            if field.name in _LATER and getattr(self, field.name) == field.default:
                del document[field.name]
        return document


_LATER = frozenset({"probe", "sites", "layers", "calibration"})
"""Settings that are recorded only where they are not the default."""
