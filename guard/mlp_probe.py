"""Fitting a probe with one hidden layer: for what no weighted sum of activations can tell.

The network is scikit-learn's MLPClassifier, fitted by L-BFGS on standardised features. Its penalty is that of
the linear probe's, alpha = 1 / C, on both layers of weights, so strengths mean the same for both kinds.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from sklearn.utils.class_weight import compute_sample_weight

from guard.probe import BoolArray, Standard, need_both
from guard.scorer import Float32Array, Scorer

STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0)
"""Inverse regularisation strengths that are tried. Where the penalty is too strong for the data, a network of
two layers falls to zero, which a linear fit never does; hence more of the weak ones."""
STEPS = 300
"""Most L-BFGS steps. What is left to gain after them is in the training loss, not on held-out sources."""


@dataclass(frozen=True)
class HiddenLayer:
    """A network with ``hidden`` rectified units on standardised features, classes weighted equally."""

    hidden: int = 16
    seed: int = 0
    """Of the first weights; the same seed and data give the same network."""
    strengths: Sequence[float] = STRENGTHS

    def path(self, features: Float32Array, positive: BoolArray, strengths: Sequence[float]) -> list[Scorer]:
        """One network for each strength, all from the same first weights. Raises ProbeError."""
        need_both(positive)
        standard = Standard.of(features)
        # L-BFGS computes in float64; converted once here, it is not converted again at each step.
        standardised = standard.apply(features).astype(np.float64)
        weights = compute_sample_weight("balanced", positive)
        scorers = []
        for strength in strengths:
            network = MLPClassifier(
                (self.hidden,),
                activation="relu",
                solver="lbfgs",
                alpha=1.0 / strength,
                max_iter=STEPS,
                max_fun=2 * STEPS,
                random_state=self.seed,
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                network.fit(standardised, positive, sample_weight=weights)
            scorers.append(_folded(network, standard))
        return scorers


def _folded(network: MLPClassifier, standard: Standard) -> Scorer:
    """The network as a function of raw features: only its first layer sees the standardisation."""
    (first, last), (first_bias, last_bias) = network.coefs_, network.intercepts_
    weight, bias = standard.fold(first.T, first_bias)
    return Scorer(weight, bias, last[:, 0].astype(np.float32), float(last_bias[0]))
