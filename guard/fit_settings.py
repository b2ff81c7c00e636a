"""What to fit and how: the choices of ``neuronguard fit``, checked when they are made."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from guard.mlp_probe import HiddenLayer
from guard.observe import Judged
from guard.pooling import Pooling
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
    pooling: Pooling | None = None
    """How a linear probe of every token makes one logit; None: a probe of the last token only."""
    monitor_tokens: int = 0
    """Longest answers that the monitor's limits are set on; 0: the bundle watches no answers."""
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
        if self.pooling is not None:
            self._refuse_for_sequence()
        elif self.monitor_tokens:
            raise FitError("only a sequence probe can watch answers; give a pooling (--pooling) as well")
        if self.max_units < 1:
            raise FitError(f"max_units must be at least 1, got {self.max_units}")
        if not 1 <= self.hidden <= MOST_HIDDEN:
            raise FitError(f"hidden must be from 1 to {MOST_HIDDEN}, got {self.hidden}")
        if any(not 0 < rate < 1 for rate in self.rates) or self.default_rate not in self.rates:
            raise FitError(
                f"the default rate {self.default_rate:g} must be one of the rates, each between 0 and 1: "
                f"{', '.join(f'{rate:g}' for rate in self.rates)}"
            )

    def _refuse_for_sequence(self) -> None:
        """Raises FitError that names what does not go with a probe of every token."""
        clashes = {
            f"probe {self.probe!r} (it has one linear probe)": self.probe != "linear",
            f"units {self.units!r} (they are chosen by what the last token says; take 'all', 'random' or a "
            "file)": self.units in ("l1", "stability"),
            "layers 'choose' (name them, or take all)": self.layers == "choose",
        }
        if found := [text for text, clash in clashes.items() if clash]:
            raise FitError(f"a sequence probe does not go with {'; nor with '.join(found)}")
        if self.monitor_tokens < 0:
            raise FitError(f"monitor_tokens must be 0 or more, got {self.monitor_tokens}")

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
        if self.pooling is not None:
            document["pooling"] = self.pooling.kind
        document["units_file"] = self.units_file.name if self.units_file else ""
        if self.probe != "mlp":
            del document["hidden"]
        for field in fields(self):
            # Says nothing new: a plain fit repeats the bundles that were made before there was a choice.
            if field.name in _LATER and getattr(self, field.name) == field.default:
                del document[field.name]
        return document


_LATER = frozenset({"probe", "sites", "layers", "calibration", "pooling", "monitor_tokens"})
"""Settings that are recorded only where they are not the default."""
