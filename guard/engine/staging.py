"""Which rows of a step's batch are final prompt tokens.

A batch is flat: request ``i`` owns rows ``start[i]`` to ``start[i+1]``, which are its positions from
``computed[i]`` on. The final prompt token of request ``i`` is at position ``prompt[i] - 1``, hence in row
``start[i] + prompt[i] - 1 - computed[i]``, if that lies within the request's rows. It is not simply the last
row: chunked prefill ends before it, a resumed request ends after it, draft tokens follow it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

IntArray = NDArray[np.integer[Any]]


class KvPlaces(NamedTuple):
    """Where the tokens of a step lie in the KV cache, on the device, as the runner filled it in."""

    slots: Tensor
    """int64, at least as long as the step has tokens: the slot of each."""
    blocks: Tensor
    """int32 ``[n or more, most blocks]``: the blocks of each request, in order."""
    block_size: int
    """Slots in a block; token ``t`` of a request lies in its block ``t // block_size``."""


class Layout(NamedTuple):
    """A step's batch as the runner laid it out, ``n`` requests in the runner's order."""

    request_ids: list[str]
    start: IntArray
    """Cumulative row offsets, at least ``n + 1``."""
    computed: IntArray
    """Tokens computed before this step, at least ``n``."""
    prompt: IntArray
    """Prompt lengths, at least ``n``."""
    places: KvPlaces | None = None
    """None where the runner does not say."""


class Staging:
    """The rows to read in the current step.

    ``rows`` has the fixed length ``max_requests``, the most final prompt tokens one step can hold; ``count``
    entries of it are valid. Nothing is allocated that grows with tokens.
    """

    def __init__(self, max_requests: int) -> None:
        self.rows: NDArray[np.int64] = np.zeros(max_requests, dtype=np.int64)
        self.requests: NDArray[np.int64] = np.zeros(max_requests, dtype=np.int64)
        """Which request of the batch each row belongs to."""
        self.count = 0
        self.request_ids: list[str] = []

    def clear(self) -> None:
        """Forget the last step."""
        self.count = 0
        self.request_ids = []

    def stage(self, layout: Layout) -> int:
        """Find the rows of a step; returns how many there are."""
        n = len(layout.request_ids)
        start = layout.start[:n]
        offset = layout.prompt[:n] - 1 - layout.computed[:n]
        hit = np.flatnonzero((offset >= 0) & (offset < layout.start[1 : n + 1] - start))
        self.count = len(hit)
        self.rows[: self.count] = start[hit] + offset[hit]
        self.requests[: self.count] = hit
        self.request_ids = [layout.request_ids[i] for i in hit]
        return self.count
