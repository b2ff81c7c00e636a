"""Choices of ``guard.locate.importance``, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from guard.locate.errors import LocateError
from guard.locate.templates import Template

Matrix = Literal["mlp", "query", "key", "value"]
MATRICES: tuple[Matrix, ...] = get_args(Matrix)


@dataclass(frozen=True)
class ImportanceOptions:
    """What counts as active, and how consistently. Raises LocateError when choices do not fit together."""

    matrices: tuple[Matrix, ...] = MATRICES
    """Which weights are searched. ``mlp``: row k of up_proj and column k of down_proj, which are one unit."""
    variant: Literal["exact", "released"] = "exact"
    """``released`` repeats the authors' code, which leaves out the gate, the output weights and a scale."""
    scope: Literal["model", "layer"] = "model"
    """Whether the most important units of a prompt are taken from all layers together or from each layer."""
    mlp_active: float = 0.05
    """Share of the MLP neurons that is active for a prompt (the released code: 12 000 of each layer)."""
    attention_active: float = 0.05
    """Share of the query, key and value rows that is, each for itself (the released code: 2 000)."""
    consistency: float = 1.0
    """A unit is selected when it is active for at least this share of the prompts; 1 is the paper."""
    foundation: bool = True
    """Leave out units that are as consistently active for the benign prompts."""
    effect: Literal["map", "output"] = "map"
    """Query and key: change of the attention map, as in the paper, or of the layer's output (slower)."""
    query_rows: Literal["all", "last"] = "all"
    """Query and key: measure at every token, or at the last one only (faster)."""
    template: Template = "chat"
    """``chat``: the model's own; ``query`` and ``tulu``: those of other papers; ``none``: the bare text."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.matrices if name not in MATRICES]
        if unknown or not self.matrices or len(set(self.matrices)) != len(self.matrices):
            raise LocateError(
                f"matrices must name some of {', '.join(MATRICES)}, each once; got {self.matrices!r}"
            )
        for name in ("variant", "scope", "effect", "query_rows", "template"):
            allowed = {
                "variant": ("exact", "released"),
                "scope": ("model", "layer"),
                "effect": ("map", "output"),
                "query_rows": ("all", "last"),
                "template": get_args(Template),
            }[name]
            if getattr(self, name) not in allowed:
                raise LocateError(f"{name} must be {' or '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("mlp_active", "attention_active", "consistency"):
            if not 0 < getattr(self, name) <= 1:
                raise LocateError(f"{name} must be above 0 and at most 1, got {getattr(self, name)!r}")
        if self.variant == "released" and (self.effect, self.query_rows) != ("map", "all"):
            raise LocateError(
                "the released variant measures the map at all tokens; leave effect and query_rows"
            )

    def active_share(self, matrix: Matrix) -> float:
        """Share of the units of a matrix that count as active for a prompt."""
        return self.mlp_active if matrix == "mlp" else self.attention_active
