"""How a model is tuned, checked when it is made: one class a method, for the methods' own defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from guard.tune.errors import TuneError

Schedule = Literal["constant", "linear", "cosine", "plateau"]
Objective = Literal["sft", "dpo"]
Precision = Literal["float32", "bfloat16"]
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class TuneOptions:
    """What all methods share. Raises TuneError when a value makes no sense."""

    steps: int | None = None
    """Optimiser steps; by default as many as 'epochs' takes."""
    epochs: float = 1.0
    """How often the data are gone through, unless 'steps' says how far."""
    batch: int = 16
    """Rows of a step."""
    at_once: int | None = None
    """Rows that go through the model at a time, by default all of a step; gradients are summed up."""
    rate: float = 2e-5
    """Learning rate of AdamW."""
    schedule: Schedule = "cosine"
    """What becomes of the rate behind the warm-up; 'plateau' falls over the second half alone, linearly."""
    warmup: float = 0.05
    """Share of the steps over which the rate rises."""
    weight_decay: float = 0.0
    """Weight decay. It reaches what is trained and nothing else."""
    beta2: float = 0.999
    """Decay of AdamW's second moment."""
    clip: float = 1.0
    """Longest gradient; the norm is over what is trained."""
    objective: Objective = "sft"
    """Likelihood of the responses, or preference over 'rejected' ones against the model as it was (DPO)."""
    beta: float = 0.1
    """DPO: how strongly the model is held to what it was."""
    first_token: float = 1.0
    """SFT: weight of an answer's first token, where many models decide whether to refuse."""
    refusal: str | None = None
    """Answer of harmful prompts that have none of their own."""
    own_answers: int | None = None
    """Let the model itself give what benign prompts lack, and DPO's rejected responses: so many tokens."""
    longest: int = 512
    """Tokens of the longest text; longer answers are cut, longer prompts left out."""
    save_every: int = 20
    """Steps from one checkpoint to the next. An interrupted run goes on at its last one."""
    seed: int = 0
    """Of the order of the rows, and of what is drawn at the start."""
    dtype: Precision = "float32"
    """What the model computes in. The numbers that train are float32 in both."""
    weights: Literal["same", "float32"] = "same"
    """Number format of a checkpoint that is written: the model's own, or float32."""
    device: Device = "cpu"
    """Where the model is trained."""

    def __post_init__(self) -> None:
        for name, known in (
            ("schedule", Schedule),
            ("objective", Objective),
            ("dtype", Precision),
            ("device", Device),
            ("weights", Literal["same", "float32"]),
        ):
            if getattr(self, name) not in get_args(known):
                raise TuneError(
                    f"{name} must be one of {', '.join(get_args(known))}; got {getattr(self, name)!r}"
                )
        for name in ("steps", "at_once", "own_answers", "batch", "longest", "save_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TuneError(f"{name} must be at least 1, got {value}")
        for name in ("epochs", "rate", "clip", "beta", "first_token"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise TuneError(f"{name} must be a number above 0, got {getattr(self, name)!r}")
        for name in ("warmup", "weight_decay", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise TuneError(f"{name} must be from 0 to below 1, got {getattr(self, name)!r}")
        if self.at_once is not None and self.batch % self.at_once:
            raise TuneError(f"at_once must divide the batch of {self.batch} rows, got {self.at_once}")
        if self.refusal is not None and not self.refusal.strip():
            raise TuneError("refusal must be a sentence, or be left out")


@dataclass(frozen=True)
class SnOptions(TuneOptions):
    """SN-Tune (Zhao et al., ICLR 2025): the rate and one epoch are those of replications of the paper."""

    rate: float = 1e-6
    gate: bool = False
    """Train the gate row of a neuron as well; the paper has its up row and its down column."""


@dataclass(frozen=True)
class RsnOptions(TuneOptions):
    """Downstream tuning while the safety units that are no foundation units stay."""

    gate: bool = True
    """Keep the gate row of a neuron as well as its up row and down column."""


@dataclass(frozen=True)
class FreezeOptions(RsnOptions):
    """Downstream tuning while safety-critical units stay (Li & Kim, arXiv 2410.10862)."""


@dataclass(frozen=True)
class BudgetOptions(TuneOptions):
    """Alignment budget (Li & Kim): train redundant units alone."""

    gate: bool = True
    """Train the gate row of a neuron as well as its up row and down column."""


@dataclass(frozen=True)
class Ia3Options(TuneOptions):
    """An (IA)³ vector by the recipe of the lab twins; Chen et al. (arXiv 2406.14144) use a rate of 1e-3."""

    rate: float = 0.03
    schedule: Schedule = "plateau"
    beta2: float = 0.98
    first_token: float = 4.0
    last_layers: int = 1
    """Layers at the end that keep the vector 1: rankings of units leave the last one out."""
    whole: bool = False
    """Write the whole checkpoint, with the vector folded in, in place of the vector."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.last_layers < 0:
            raise TuneError(f"last_layers must be 0 or more, got {self.last_layers}")


@dataclass(frozen=True)
class LoraOptions(TuneOptions):
    """A LoRA adapter on the linear layers of the decoder blocks."""

    rate: float = 2e-4
    rank: int = 8
    """Rank of the adapter."""
    alpha: float = 16.0
    """The adapter's product is scaled by alpha / rank."""
    target: tuple[str, ...] = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    """Linear layers that get an adapter."""
    whole: bool = False
    """Write the whole checkpoint, with the adapter merged in, which a patch's donor must be."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1 or not self.alpha > 0 or not self.target:
            raise TuneError(
                f"expected a rank of at least 1, an alpha above 0 and a target; got {self.rank}, "
                f"{self.alpha}, {self.target}"
            )


@dataclass(frozen=True)
class FullOptions(TuneOptions):
    """Every weight: what the other methods are held against."""
