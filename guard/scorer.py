"""The Scorer: the function from activations to a logit, as arrays and nothing else.

A linear probe is one row and its bias. A probe with a hidden layer is the textbook two-layer network with
max(0, x) between the layers. A product is two linear probes, for two things that both have to be so: the
probability is that of the one times that of the other (SafeSwitch, arXiv 2502.01042, has two such stages).
All read raw activations: standardisation is folded in when a probe is fitted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]
ProbeKind = Literal["linear", "mlp", "product"]

MOST_HIDDEN = 256
"""Largest hidden layer: a guard's cost must stay far below that of one layer of the model it reads."""
_ARRAYS: dict[ProbeKind, frozenset[str]] = {
    "linear": frozenset({"probe.weight", "probe.bias"}),
    "mlp": frozenset({"probe.hidden.weight", "probe.hidden.bias", "probe.weight", "probe.bias"}),
    "product": frozenset({"probe.weight", "probe.bias"}),
}


class ScorerError(ValueError):
    """Arrays do not make a probe."""


@dataclass(frozen=True, eq=False)
class Scorer:
    """A probe: logit = readout · max(0, weight · x + bias) + readout_bias, or its linear case.

    A ``product`` has two rows, u and v = weight · x + bias, and the logit of σ(u) σ(v), which is
    −log(e⁻ᵘ + e⁻ᵛ + e⁻ᵘ⁻ᵛ).

    Raises ScorerError when the arrays do not fit together or hold a value that is not finite.
    """

    weight: Float32Array
    """float32 ``[hidden, features]``; a linear probe has one row."""
    bias: Float32Array
    """float32 ``[hidden]``."""
    readout: Float32Array | None = None
    """float32 ``[hidden]``; None: linear, the one row is the logit."""
    readout_bias: float = 0.0
    product: bool = False
    """Whether the two rows are two probes whose probabilities are multiplied."""

    def __post_init__(self) -> None:
        if self.weight.dtype != np.float32 or self.weight.ndim != 2:
            raise ScorerError(
                f"the probe weight is {_about(self.weight)}, expected float32[hidden, features]"
            )
        if self.product and self.readout is not None:
            raise ScorerError("a product of two probes has no hidden layer; give a readout or a product")
        least, most = (2, 2) if self.product else (1, 1) if self.readout is None else (1, MOST_HIDDEN)
        if not least <= self.hidden <= most:
            raise ScorerError(
                f"{self.kind} probe with {self.hidden} rows of weights, expected {least}"
                + (f" to {most}" if most > least else "")
            )
        for name, array in (("bias", self.bias), ("readout", self.readout)):
            if array is not None and (array.dtype != np.float32 or array.shape != (self.hidden,)):
                raise ScorerError(f"the probe {name} is {_about(array)}, expected float32[{self.hidden}]")
        arrays = self.weight, self.bias, self.readout
        if not (all(np.isfinite(a).all() for a in arrays if a is not None) and math.isfinite(self.last)):
            raise ScorerError("the probe holds a value that is not finite")

    @classmethod
    def linear(cls, weight: Float32Array, bias: float) -> Scorer:
        """logit = weight · x + bias, ``weight`` float32 ``[features]``."""
        if weight.ndim != 1:
            raise ScorerError(f"the probe weight is {_about(weight)}, expected float32[features]")
        return cls(weight[None], np.array([bias], dtype=np.float32))

    @property
    def kind(self) -> ProbeKind:
        """How a card names this kind of probe."""
        return "product" if self.product else "linear" if self.readout is None else "mlp"

    @property
    def hidden(self) -> int:
        """Rows of ``weight``: the size of the hidden layer, 1 for a linear probe, 2 for a product."""
        return int(self.weight.shape[0])

    @property
    def features(self) -> int:
        """Number of activations that are read."""
        return int(self.weight.shape[1])

    @property
    def last(self) -> np.float32:
        """``readout_bias`` as it is stored and added."""
        with np.errstate(over="ignore"):  # too large becomes infinite, which is refused
            return np.float32(self.readout_bias)

    def logits(self, features: Float32Array) -> Float32Array:
        """Raw logits float32 ``[n]`` of raw activations ``[n, features]``.

        Equal activations give equal logits, however they lie in memory: BLAS adds up another layout in
        another order, and a choice of columns is laid out so.
        """
        features = np.ascontiguousarray(features)
        if self.product:
            return product_logit(*(features @ self.weight.T + self.bias).T)
        if self.readout is None:
            return np.asarray(features @ self.weight[0] + self.bias[0], dtype=np.float32)
        hidden = np.maximum(features @ self.weight.T + self.bias, np.float32(0))
        return np.asarray(hidden @ self.readout + self.last, dtype=np.float32)

    def arrays(self) -> dict[str, Float32Array]:
        """The arrays as a bundle keeps them, contiguous; the digest is taken over them in this order."""
        if self.readout is None:
            return {
                "probe.weight": np.ascontiguousarray(self.weight if self.product else self.weight[0]),
                "probe.bias": np.ascontiguousarray(self.bias),
            }
        return {
            "probe.hidden.weight": np.ascontiguousarray(self.weight),
            "probe.hidden.bias": np.ascontiguousarray(self.bias),
            "probe.weight": np.ascontiguousarray(self.readout),
            "probe.bias": np.array([self.last], dtype=np.float32),
        }

    @classmethod
    def of_arrays(cls, kind: ProbeKind, arrays: Mapping[str, NDArray[Any]]) -> Scorer:
        """The probe that :meth:`arrays` gave. Raises ScorerError, also when they are another kind's."""
        missing, extra = _ARRAYS[kind] - arrays.keys(), arrays.keys() - _ARRAYS[kind]
        if missing or extra:
            said = [f"lack {', '.join(sorted(missing))}"] if missing else []
            said += [f"hold {', '.join(sorted(extra))}"] if extra else []
            raise ScorerError(f"the card says {kind!r}, but the probe's arrays {' and '.join(said)}")
        if kind == "product":
            return cls(arrays["probe.weight"], arrays["probe.bias"], product=True)
        if arrays["probe.bias"].shape != (1,):
            raise ScorerError(f"probe.bias is {_about(arrays['probe.bias'])}, expected float32[1]")
        bias = float(arrays["probe.bias"][0])
        if kind == "linear":
            return cls.linear(arrays["probe.weight"], bias)
        return cls(arrays["probe.hidden.weight"], arrays["probe.hidden.bias"], arrays["probe.weight"], bias)


def product_logit(u: NDArray[Any], v: NDArray[Any]) -> Float32Array:
    """The logit of σ(u) σ(v), float32 of the shape of ``u`` and ``v``; finite wherever they are."""
    both = np.logaddexp(np.logaddexp(-u, -v), -(u + v))
    return np.asarray(-both, dtype=np.float32)


def _about(array: NDArray[Any]) -> str:
    return f"{array.dtype}{list(array.shape)}"
