"""Memory for what crosses between host and device in a step, without making either wait. Only torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

STEPS_IN_FLIGHT = 4
"""Steps whose copies may be under way at once; vLLM has two with asynchronous scheduling."""


class PendingScores:
    """Logits of one step, perhaps still being copied."""

    def __init__(
        self, request_ids: list[str], host: Tensor, done: Any, where: NDArray[np.bool_] | None = None
    ) -> None:
        self._request_ids = request_ids
        self._host = host
        self._done = done
        self._where = where

    @property
    def request_ids(self) -> list[str]:
        """Whose they are, in the order of the step's rows."""
        return self._request_ids

    def take(self) -> dict[str, float]:
        """Raw logits by request id; waits until they are there."""
        if self._done is not None:
            self._done.synchronize()
        return dict(zip(self._request_ids, self._host.tolist(), strict=True))

    def take_array(self) -> NDArray[np.float32]:
        """The same as an array in their order, −inf where they do not count; waits until they are there."""
        if self._done is not None:
            self._done.synchronize()
        values = self._host.numpy()
        return values.copy() if self._where is None else np.where(self._where, values, -np.inf)


class ScoreBuffers:
    """Host memory for what goes to the device (rows) and what comes back (logits), used in turn."""

    def __init__(self, max_requests: int, device: torch.device) -> None:
        self._device = device
        self._on_host = device.type == "cpu"
        self._rows_turn = self._logits_turn = 0
        if not self._on_host:
            shape = (STEPS_IN_FLIGHT, max_requests)
            self._rows = torch.zeros(shape, dtype=torch.int64, pin_memory=True)
            self._logits = torch.zeros(shape, dtype=torch.float32, pin_memory=True)
            self._device_rows = torch.zeros(max_requests, dtype=torch.int64, device=device)

    @property
    def bytes(self) -> int:
        """Device memory."""
        return 0 if self._on_host else self._device_rows.numel() * self._device_rows.element_size()

    def to_device(self, rows: NDArray[np.int64]) -> Tensor:
        """Rows ``[n]`` of a step's batch, as a tensor on the device."""
        if self._on_host:
            return torch.from_numpy(rows)
        self._rows_turn = (self._rows_turn + 1) % STEPS_IN_FLIGHT
        count = len(rows)
        staged = self._rows[self._rows_turn, :count]
        staged.numpy()[:] = rows
        return self._device_rows[:count].copy_(staged, non_blocking=True)

    def to_host(
        self, request_ids: list[str], logits: Tensor, where: NDArray[np.bool_] | None = None
    ) -> PendingScores:
        """Start to bring logits ``[n]`` to the host; ``where`` says which of them count."""
        if self._on_host:
            # The next step overwrites them, and may come before these are taken.
            return PendingScores(request_ids, logits.clone(), None, where)
        self._logits_turn = (self._logits_turn + 1) % STEPS_IN_FLIGHT
        host = self._logits[self._logits_turn, : len(request_ids)]
        host.copy_(logits, non_blocking=True)
        done = torch.Event(self._device)
        done.record()
        return PendingScores(request_ids, host, done, where)


class StagedIntegers:
    """Small arrays of integers on their way to the device, several at a time."""

    def __init__(self, arrays: int, most: int, device: torch.device) -> None:
        self._on_host = device.type == "cpu"
        self._turn = 0
        if not self._on_host:
            self._staged = torch.zeros((STEPS_IN_FLIGHT, arrays, most), dtype=torch.int64, pin_memory=True)
            self._there = torch.zeros((arrays, most), dtype=torch.int64, device=device)

    @property
    def bytes(self) -> int:
        """Device memory."""
        return 0 if self._on_host else self._there.numel() * self._there.element_size()

    def send(self, *arrays: NDArray[np.int64]) -> list[Tensor]:
        """The arrays, all ``[n]``, as tensors on the device; the next call overwrites them there."""
        if self._on_host:
            return [torch.from_numpy(array) for array in arrays]
        self._turn = (self._turn + 1) % STEPS_IN_FLIGHT
        count = len(arrays[0])
        staged = self._staged[self._turn, :, :count]
        for row, array in enumerate(arrays):
            staged[row].numpy()[:] = array
        return list(self._there[:, :count].copy_(staged, non_blocking=True))


class TokenSlots:
    """A number for each token of a step, the same storage in every step: 0, or which patch it is under."""

    def __init__(self, max_tokens: int, device: torch.device) -> None:
        self._on_host = device.type == "cpu"
        numbers = torch.zeros(max_tokens, dtype=torch.int64)
        self.numbers: NDArray[np.int64] = numbers.numpy()
        """To be written on the host, then sent."""
        self.there = numbers if self._on_host else numbers.to(device)
        """int64 ``[max_tokens]`` on the device."""
        self._turn = 0
        if not self._on_host:
            self._staged = torch.zeros((STEPS_IN_FLIGHT, max_tokens), dtype=torch.int64, pin_memory=True)

    @property
    def bytes(self) -> int:
        """Device memory."""
        return self.there.numel() * self.there.element_size()

    def send(self, count: int) -> None:
        """Bring the first ``count`` numbers to the device."""
        if self._on_host:
            return
        self._turn = (self._turn + 1) % STEPS_IN_FLIGHT
        staged = self._staged[self._turn, :count]
        staged.numpy()[:] = self.numbers[:count]
        self.there[:count].copy_(staged, non_blocking=True)
