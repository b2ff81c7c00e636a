"""Pooling: how one number is made of a probe's outputs at many tokens. The offline reference, in numpy.

Four kinds, next to a probe of the last token only:

- ``ema``: the largest exponential moving average, e_t ∝ Σ_k (1 − rate)^k z_{t−k}, which is how Constitutional
  Classifiers++ score a text (arXiv 2601.04603).
- ``rolling``: the largest mean of ``window`` tokens in a row, which is what they are trained on.
- ``softmax``: the mean weighted by softmax(z / temperature), a soft maximum.
- ``attention``: for each head a mean weighted by the softmax of scores of its own, the heads summed.

A moving average is over the tokens that are there: it is divided by the sum of the weights in use, and the
largest one is sought where a whole window is (or at the last token of a text that is shorter). It uses
``window`` tokens and no more, so it can be computed anywhere from the scores that lie before it, and nothing
has to be carried along.

Of the text so far (``running``) all kinds see the last ``window`` tokens: what a monitor watches.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

PoolingKind = Literal["ema", "rolling", "softmax", "attention"]
MOST_WINDOW = 1024
MOST_HEADS = 8
LEFT_OUT = 1e-3
"""Share of the weight of an exponential average that its window may leave out."""


class Pooling(BaseModel):
    """A kind of pooling and its numbers, as a bundle's card holds them."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    kind: PoolingKind
    window: int = Field(default=64, ge=1, le=MOST_WINDOW)
    """Tokens in a moving average, and in what a monitor sees."""
    rate: float | None = Field(default=None, gt=0.0, le=1.0)
    """Weight of the newest token in an exponential average."""
    temperature: float | None = Field(default=None, gt=0.0)
    """Of the softmax over a probe's own outputs."""
    heads: int = Field(default=1, ge=1, le=MOST_HEADS)
    """Heads of attention pooling."""

    @model_validator(mode="after")
    def _consistent(self) -> Pooling:
        for name, kind in (("rate", "ema"), ("temperature", "softmax")):
            if (getattr(self, name) is not None) != (self.kind == kind):
                raise ValueError(
                    f"pooling by {self.kind} {'needs' if self.kind == kind else 'has no'} {name}"
                )
        if self.heads != 1 and self.kind != "attention":
            raise ValueError(f"pooling by {self.kind} has one head")
        if self.rate is not None and (1.0 - self.rate) ** self.window > LEFT_OUT:
            need = math.ceil(math.log(LEFT_OUT) / math.log(1.0 - self.rate))
            raise ValueError(
                f"a window of {self.window} tokens leaves out more than {LEFT_OUT:g} of an exponential "
                f"average of rate {self.rate:g}; it needs {need}"
            )
        return self

    @property
    def channels(self) -> int:
        """Numbers that a probe gives for each token: one, or score and value of each head."""
        return 2 * self.heads if self.kind == "attention" else 1

    @property
    def full(self) -> int:
        """Tokens from which on a moving average counts."""
        return math.ceil(1.0 / self.rate) if self.rate is not None else self.window

    @property
    def weights(self) -> NDArray[np.float32]:
        """Of a moving average, the newest token first: float32 ``[window]``."""
        keep = np.float64(1.0 - (self.rate or 0.0))
        return (keep ** np.arange(self.window)).astype(np.float32)


def pool(pooling: Pooling, outputs: NDArray[np.float32]) -> float:
    """The one number of a text, of the probe's outputs ``[tokens, channels]``; at least one token."""
    if pooling.kind in ("ema", "rolling"):
        averages = moving(pooling, outputs[:, 0])
        return float(averages[min(pooling.full, len(averages)) - 1 :].max())
    return _weighted(pooling, outputs)


def running(pooling: Pooling, outputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """The number of the last ``window`` tokens at each token: float32 ``[tokens]``."""
    if pooling.kind in ("ema", "rolling"):
        return moving(pooling, outputs[:, 0])
    ends = range(1, len(outputs) + 1)
    parts = [outputs[max(0, end - pooling.window) : end] for end in ends]
    return np.array([_weighted(pooling, part) for part in parts], dtype=np.float32)


def moving(pooling: Pooling, z: NDArray[np.float32]) -> NDArray[np.float32]:
    """The moving average at each token: float32 ``[tokens]`` of ``[tokens]``."""
    weights = pooling.weights.astype(np.float64)
    sums = np.convolve(z.astype(np.float64), weights)[: len(z)]
    total = np.cumsum(weights)[np.minimum(np.arange(len(z)), pooling.window - 1)]
    return np.asarray(sums / total, dtype=np.float32)


def _weighted(pooling: Pooling, outputs: NDArray[np.float32]) -> float:
    values = outputs.astype(np.float64)
    if pooling.temperature is not None:
        scores = values / pooling.temperature
    else:
        scores, values = values[:, : pooling.heads], values[:, pooling.heads :]
    weights = np.exp(scores - scores.max(axis=0))
    return float((weights * values).sum(axis=0) @ (1.0 / weights.sum(axis=0)))
