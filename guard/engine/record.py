"""``worker_cls`` for fitting: the guard's own worker, which keeps what its taps read instead of deciding.

What a probe is fitted on is then what a serving engine reads, layer by layer, in its dtype and with its
kernels, quantised ones among them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from guard.engine.taps import Taps
from guard.engine.worker import GuardWorker

WORKER = "guard.engine.record.RecordingWorker"


class Recorded(NamedTuple):
    """What one rank has read since it was last asked."""

    positions: list[int]
    """Which of the bundle's features this rank holds."""
    rows: dict[str, Tensor]
    """Features float32 ``[len(positions)]`` by request id, on the host."""


class RecordingWorker(GuardWorker):
    """Keeps the features of every prompt that ends."""

    _rows: dict[str, Tensor]

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """As the guard's worker."""
        super().load_model(load_dummy_weights=load_dummy_weights)
        self._rows = {}

    def execute_model(self, scheduler_output: Any) -> Any:
        """As the guard's worker; afterwards the features are copied to the host."""
        output = super().execute_model(scheduler_output)
        if self._scores is not None and isinstance(self.taps, Taps):
            ids = self._scores.request_ids
            read = self.taps.features(len(ids)).to("cpu", torch.float32, copy=True)
            # A request that was preempted ends its prompt again, with the same features.
            self._rows.update(zip(ids, read.unbind(0), strict=True))
        return output

    def take_recorded(self) -> Recorded:
        """Everything read so far, and forget it."""
        rows, self._rows = self._rows, {}
        positions = self.taps.positions if isinstance(self.taps, Taps) else []
        return Recorded(positions, rows)
