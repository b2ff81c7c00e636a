"""Choices of ``guard.locate.capacity``, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from guard.locate.errors import LocateError
from guard.locate.templates import Template

Kind = Literal["scu", "ucu", "cu", "ru"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class CapacityOptions:
    """How units are scored and divided. Raises LocateError when the choices do not fit together."""

    select: Kind = "scu"
    """The class that is selected: safety-critical, utility-critical, complex or redundant units."""
    scu_share: float = 0.013
    """Share of the units that become safety-critical: the paper's measurement of Llama-2-7B-chat."""
    ucu_share: float = 0.133
    """Share that becomes utility-critical."""
    ru_share: float = 0.149
    """Share that becomes redundant; what is left is complex."""
    normalise: Literal["none", "layer_z", "layer_rank"] = "layer_z"
    """How scores are made comparable over layers and data sets before they are subtracted and added."""
    attention_unit: Literal["head", "channel"] = "head"
    """Heads (mean of their channels), or the input channels of o_proj one by one."""
    positions: Literal["all", "last"] = "all"
    """Tokens whose activations count: all of a prompt, or its last one."""
    bootstrap: bool = False
    """Draw as many prompts with replacement, by the run's seed: sets of several seeds show what is stable."""
    template: Template = "chat"
    """``chat``: the model's own; ``query`` and ``tulu``: those of other papers; ``none``: the bare text."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("select", KINDS),
            ("normalise", ("none", "layer_z", "layer_rank")),
            ("attention_unit", ("head", "channel")),
            ("positions", ("all", "last")),
            ("template", get_args(Template)),
        ):
            if getattr(self, name) not in allowed:
                raise LocateError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        shares = (self.scu_share, self.ucu_share, self.ru_share)
        if any(not 0 <= share <= 1 for share in shares) or sum(shares) > 1 + 1e-9:
            raise LocateError(
                f"the shares of the classes must be from 0 to 1 and at most 1 in sum; got {shares}"
            )
