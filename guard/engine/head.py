"""The probe on the device: from features to logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from guard.scorer import Scorer


class ProbeHead:
    """A bundle's probe, or one tensor-parallel rank's share of it.

    ``positions`` are the features this rank holds, in the order in which it holds them. The first layer is
    linear, so the ranks' shares of it are summed (``all_reduce``); everything after it is done once they are.
    Results are written to tensors that are allocated once, for at most ``max_requests`` rows.
    """

    def __init__(
        self,
        scorer: Scorer,
        positions: list[int],
        *,
        max_requests: int,
        dtype: torch.dtype,
        device: torch.device,
        all_reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        def new(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        self._weight = torch.from_numpy(scorer.weight[:, positions].T.copy()).to(device)
        self._bias = torch.from_numpy(scorer.bias).to(device)
        self._readout = None if scorer.readout is None else torch.from_numpy(scorer.readout).to(device)
        self._readout_bias = scorer.readout_bias
        self._product = scorer.product
        self._all_reduce = all_reduce
        # The probe is float32; features in another dtype are converted first.
        self._input = None if dtype == torch.float32 else new(max_requests, len(positions))
        self._hidden = new(max_requests, len(scorer.bias))
        self._logits = new(max_requests)

    @property
    def bytes(self) -> int:
        """Device memory of weights and results."""
        tensors = (self._weight, self._bias, self._readout, self._input, self._hidden, self._logits)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

    def logits(self, features: Tensor) -> Tensor:
        """Raw logits float32 ``[n]`` of features ``[n, features of this rank]`` in the model's dtype.

        The result is overwritten by the next call.
        """
        count = len(features)
        if self._input is not None:
            features = self._input[:count].copy_(features)
        hidden = torch.mm(features, self._weight, out=self._hidden[:count])
        if self._all_reduce is not None:
            hidden = self._all_reduce(hidden)
        hidden.add_(self._bias)
        if self._product:
            # -log(e^-u + e^-v + e^-(u+v)), see guard.scorer.
            u, v = hidden.neg_().unbind(1)
            logits = torch.logaddexp(u, v, out=self._logits[:count])
            return torch.logaddexp(logits, u.add_(v), out=logits).neg_()
        if self._readout is None:
            return hidden[:, 0]
        return torch.mv(hidden.relu_(), self._readout, out=self._logits[:count]).add_(self._readout_bias)
