"""Pooling on the device: from the scores in the KV cache's address space to one number for each request.

``guard.pooling`` says what is computed; here it is done for many requests at once. A request's scores are
found through its block table, as attention finds its keys: whoever wrote them, in whatever chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv1d

from guard.engine.staging import KvPlaces
from guard.pooling import Pooling

MOST_AT_ONCE = 1 << 20
"""Scores that are brought together at a time; requests beyond that follow one by one."""


class Pooler:
    """One kind of pooling, on one device."""

    def __init__(self, pooling: Pooling, device: torch.device) -> None:
        self._pooling = pooling
        self._weights = torch.from_numpy(pooling.weights).to(device)
        """Of a moving average, the newest token first."""
        self._backwards = self._weights.flip(0).view(1, 1, -1)
        self._ages = torch.arange(pooling.window, device=device)

    @property
    def bytes(self) -> int:
        """Device memory."""
        tensors = (self._weights, self._backwards, self._ages)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def pool(
        self, scores: Tensor, places: KvPlaces, requests: Tensor, lengths: Tensor, longest: int
    ) -> Tensor:
        """The one number of each prompt: float32 ``[n]``.

        ``scores`` is ``[slots, channels]``, ``requests`` and ``lengths`` int64 ``[n]``: rows of the batch,
        and how many tokens of each count. ``longest`` is the largest length, known without asking the device.
        """
        if len(requests) > 1 and len(requests) * longest > MOST_AT_ONCE:
            parts = [
                self.pool(scores, places, requests[i : i + 1], lengths[i : i + 1], longest)
                for i in range(len(requests))
            ]
            return torch.cat(parts)
        positions = torch.arange(longest, device=scores.device)
        outputs = scores[_slots(places, requests, positions.expand(len(requests), -1))]
        there = positions < lengths.unsqueeze(1)
        if self._pooling.kind not in ("ema", "rolling"):
            return self._weighted(outputs, there)
        return self._largest(torch.where(there, outputs[..., 0], 0.0), there, lengths)

    def running(self, scores: Tensor, places: KvPlaces, requests: Tensor, last: Tensor) -> Tensor:
        """The number of the last ``window`` tokens of each request to position ``last``: float32 ``[n]``."""
        positions = last.unsqueeze(1) - self._ages
        there = positions >= 0
        outputs = scores[_slots(places, requests, positions.clamp_(min=0))]
        if self._pooling.kind not in ("ema", "rolling"):
            return self._weighted(outputs, there)
        sums = torch.where(there, outputs[..., 0], 0.0) @ self._weights
        return sums / (there.float() @ self._weights)

    def _largest(self, z: Tensor, there: Tensor, lengths: Tensor) -> Tensor:
        """The largest moving average of ``z`` ``[n, tokens]``."""
        window, tokens = self._pooling.window, z.shape[1]
        padded = torch.nn.functional.pad(z, (window - 1, 0)).unsqueeze(1)
        sums = conv1d(padded, self._backwards).squeeze(1)
        weight = self._weights.cumsum(0)
        total = (
            weight[:tokens] if tokens <= window else torch.cat([weight, weight[-1:].expand(tokens - window)])
        )
        first = (lengths.clamp(max=self._pooling.full) - 1).unsqueeze(1)
        counts = there & (torch.arange(tokens, device=z.device) >= first)
        return torch.where(counts, sums / total, -torch.inf).amax(1)

    def _weighted(self, outputs: Tensor, there: Tensor) -> Tensor:
        """Means weighted by a softmax over tokens, of ``outputs`` ``[n, tokens, channels]``."""
        heads, temperature = self._pooling.heads, self._pooling.temperature
        if temperature is not None:
            scores, values = outputs / temperature, outputs
        else:
            scores, values = outputs[..., :heads], outputs[..., heads:]
        mask = there.unsqueeze(2)
        weights = torch.where(mask, scores, -torch.inf).softmax(1)
        return (weights * torch.where(mask, values, 0.0)).sum((1, 2))


def _slots(places: KvPlaces, requests: Tensor, positions: Tensor) -> Tensor:
    """The slots of ``positions`` int64 ``[n, tokens]`` of ``requests`` ``[n]``.

    What lies beyond a request's last block is some slot or other: whoever asks masks it.
    """
    block = torch.div(positions, places.block_size, rounding_mode="floor")
    numbers = places.blocks[requests.unsqueeze(1), block].long()
    return numbers * places.block_size + positions - block * places.block_size
