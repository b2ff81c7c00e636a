"""Mean and variance of a stream, channel by channel, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Count, mean and sum of squared deviations of rows ``[*, channels]`` in float64.

    Blocks are merged as in Chan, Golub and LeVeque (1983): the result is that of two passes over all rows,
    however they are cut. A channel that never changes has a variance of exactly zero.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self.squares: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Take in ``[n, channels]``; the sums stay on the device of the first block."""
        if len(rows) == 0:
            return
        rows = rows.double()
        # Deviations from the first row: equal rows then leave exact zeros, whatever their size.
        shifted = rows - rows[0]
        centre = shifted.mean(0)
        self.merge(len(rows), rows[0] + centre, (shifted - centre).square().sum(0))

    def merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        """Take in another stream's count, mean and sum of squared deviations."""
        if self.mean is None or self.squares is None:
            self.count, self.mean, self.squares = count, mean.clone(), squares.clone()
            return
        total = self.count + count
        step = mean.to(self.mean) - self.mean
        self.squares += squares.to(self.squares) + step.square() * (self.count * count / total)
        self.mean += step * (count / total)
        self.count = total

    def variance(self) -> Tensor:
        """Unbiased variance ``[channels]``, NaN below two rows."""
        if self.squares is None or self.count < 2:
            return torch.full_like(self.squares, torch.nan) if self.squares is not None else torch.empty(0)
        return self.squares / (self.count - 1)
