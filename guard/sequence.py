"""The sequence scorer: a linear probe of every token, and the pooling that makes one logit of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from guard.pooling import Pooling, pool, running
from guard.scorer import Float32Array, ScorerError

_ARRAYS = frozenset({"sequence.weight", "sequence.bias"})


@dataclass(frozen=True, eq=False)
class SequenceScorer:
    """outputs = weight · x + bias at every token of a prompt, then ``guard.pooling.pool``.

    Reads raw activations: standardisation is folded in. Raises ScorerError when the arrays do not fit
    together or hold a value that is not finite.
    """

    pooling: Pooling
    weight: Float32Array
    """float32 ``[channels, features]``."""
    bias: Float32Array
    """float32 ``[channels]``."""

    def __post_init__(self) -> None:
        channels = self.pooling.channels
        if self.weight.dtype != np.float32 or self.weight.ndim != 2 or len(self.weight) != channels:
            found = f"{self.weight.dtype}{list(self.weight.shape)}"
            raise ScorerError(f"sequence.weight is {found}, expected float32[{channels}, features]")
        if self.bias.dtype != np.float32 or self.bias.shape != (channels,):
            found = f"{self.bias.dtype}{list(self.bias.shape)}"
            raise ScorerError(f"sequence.bias is {found}, expected float32[{channels}]")
        if not (np.isfinite(self.weight).all() and np.isfinite(self.bias).all()):
            raise ScorerError("the probe holds a value that is not finite")

    @property
    def kind(self) -> Literal["sequence"]:
        """How a card names this kind of probe."""
        return "sequence"

    @property
    def features(self) -> int:
        """Number of activations that are read at each token."""
        return int(self.weight.shape[1])

    def outputs(self, features: Float32Array) -> Float32Array:
        """The probe's outputs ``[tokens, channels]`` of raw activations ``[tokens, features]``."""
        return np.asarray(np.ascontiguousarray(features) @ self.weight.T + self.bias, dtype=np.float32)

    def logit(self, features: Float32Array) -> float:
        """The raw logit of one prompt, of its activations ``[tokens, features]``."""
        return pool(self.pooling, self.outputs(features))

    def running(self, features: Float32Array) -> Float32Array:
        """What a monitor sees at each token: float32 ``[tokens]``."""
        return running(self.pooling, self.outputs(features))

    def arrays(self) -> dict[str, Float32Array]:
        """The arrays as a bundle keeps them, contiguous; the digest is taken over them in this order."""
        return {
            "sequence.weight": np.ascontiguousarray(self.weight),
            "sequence.bias": np.ascontiguousarray(self.bias),
        }

    @classmethod
    def of_arrays(cls, pooling: Pooling, arrays: Mapping[str, NDArray[Any]]) -> SequenceScorer:
        """The probe that :meth:`arrays` gave. Raises ScorerError, also when they are another kind's."""
        if arrays.keys() != _ARRAYS:
            raise ScorerError(
                f"the card says 'sequence', whose arrays are {', '.join(sorted(_ARRAYS))}; found: "
                f"{', '.join(sorted(arrays)) or 'none'}"
            )
        return cls(pooling, arrays["sequence.weight"], arrays["sequence.bias"])
