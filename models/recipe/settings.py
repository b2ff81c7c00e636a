"""Sizes, seeds and step counts of the recipe. Everything is counted in steps, nothing in wall-clock time."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the lab network."""

    width: int = 256
    layers: int = 7
    ff: int = 1024
    heads: int = 4
    head_width: int = 64
    vocabulary: int = 4096
    context: int = 512
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.width < 1 or self.layers < 2 or self.ff < 1:
            raise ValueError(f"width, layers (2 or more) and ff must be positive, got {self}")
        if self.head_width % 2:
            raise ValueError(f"head_width must be even for rotary positions, got {self.head_width}")
