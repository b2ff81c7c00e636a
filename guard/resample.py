"""The bootstrap of every figure: whole requests are drawn anew, source by source.

Rows that go back to one request (translations of it, attacks on it, a harmful row and its harmless twin) are
drawn together, for they are not independent. The number of requests of each source stays what it was, so that
an interval speaks about new requests of the same sources, not about new sources; how far sources differ is
shown by the worst of them. A resample is a weight for each row, so that no score is ever copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from guard.data import Prompt

Weights = NDArray[np.float64]
"""``[draws, n]``: how often each row was drawn."""
_CELLS = 4_000_000
"""Most weights that are held at a time."""


def requests_of(prompts: Sequence[Prompt]) -> NDArray[np.int64]:
    """The number of the underlying request of each prompt ``[n]``: rows of one source and pair share it."""
    names: dict[object, int] = {}
    keys = [(p.source, p.pair) if p.pair is not None else index for index, p in enumerate(prompts)]
    return np.array([names.setdefault(key, len(names)) for key in keys], dtype=np.int64)


@dataclass(frozen=True)
class Bootstrap:
    """How often to draw, and with which seed. The same rows are drawn alike for whatever is compared."""

    draws: int = 1000
    seed: int = 0

    def weights(
        self, sources: NDArray[np.str_], positive: NDArray[np.bool_], requests: NDArray[np.int64]
    ) -> Iterator[Weights]:
        """Weights of all draws, a block of draws at a time, for rows ``[n]``.

        Within a source, requests with positive rows only, with negative ones only and with both are drawn
        apart, so that no resample lacks a class.
        """
        random = np.random.default_rng(self.seed)
        _, request = np.unique(requests, return_inverse=True)
        kinds = np.zeros((2, request.max() + 1), dtype=bool)
        kinds[0, request[positive]] = True
        kinds[1, request[~positive]] = True
        _, source = np.unique(sources, return_inverse=True)
        source_of = np.empty(kinds.shape[1], dtype=np.int64)
        source_of[request] = source
        strata = source_of * 4 + kinds[0] * 2 + kinds[1]
        members = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]
        block = max(1, min(self.draws, _CELLS // len(positive)))
        for start in range(0, self.draws, block):
            rows = min(block, self.draws - start)
            drawn = np.zeros((rows, kinds.shape[1]))
            for inside in members:
                chosen = random.integers(len(inside), size=(rows, len(inside)))
                chosen += np.arange(rows)[:, None] * len(inside)
                counts = np.bincount(chosen.ravel(), minlength=rows * len(inside))
                drawn[:, inside] = counts.reshape(rows, len(inside))
            yield drawn[:, request]
