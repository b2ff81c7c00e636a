"""Sizes, seeds and step counts of the recipe. Everything is counted in steps, nothing in wall-clock time."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the lab network."""

    width: int = 256
    layers: int = 6
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


@dataclass(frozen=True)
class PhaseConfig:
    """Schedule of one training phase."""

    steps: int
    rows: int
    """Rows drawn for the phase; must fill `steps` batches."""
    seed: int
    warmup: int
    decay_from: float
    """Part of the steps after which rates fall linearly to zero."""
    weight_rate: float = 0.0
    """AdamW rate of embedding and norms (base) or of all shared weights (co-adaptation)."""
    muon_rate: float = 0.0
    """Muon rate of the block matrices."""
    vector_rate: float = 0.0
    """Adam rate of the (IA)³ vector."""
    harmful: float = 0.5
    """Harmful share of the rows with the vector on."""
    off: float = 0.0
    """Share of rows with the vector off."""
    widest: bool = False
    """Whether rows are drawn with all that was added for the last phase."""
    buckets: tuple[tuple[int, int], ...] = ((36, 168), (56, 108), (96, 64), (224, 27))
    """(length, rows) of the batches, rising."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay_from <= 1:
            raise ValueError(f"decay_from is a part of the steps between 0 and 1, got {self.decay_from}")

    def rate(self, step: int) -> float:
        """Factor on the learning rates at a step: linear warm-up, plateau, linear decay."""
        start = self.decay_from * self.steps
        falling = 1.0 if step < start else (self.steps - step) / max(1.0, self.steps - start)
        return min(1.0, (step + 1) / max(1, self.warmup)) * falling


@dataclass(frozen=True)
class Settings:
    """The whole recipe."""

    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer_rows: int = 40_000
    prompt_weight: float = 0.2
    base: PhaseConfig = PhaseConfig(
        steps=1400, rows=190_000, seed=1, warmup=60, decay_from=0.4, weight_rate=4e-3, muon_rate=0.02
    )
    dense: PhaseConfig = PhaseConfig(
        steps=300,
        rows=30_000,
        seed=2,
        warmup=20,
        decay_from=0.5,
        vector_rate=0.03,
        harmful=0.35,
        buckets=((32, 64), (48, 64), (96, 32)),
    )
    coadapt: PhaseConfig = PhaseConfig(
        steps=500,
        rows=90_000,
        seed=3,
        warmup=20,
        decay_from=0.4,
        weight_rate=6e-4,
        vector_rate=1e-2,
        harmful=0.35,
        off=0.4,
    )
    widen: PhaseConfig = PhaseConfig(
        steps=300,
        rows=55_000,
        seed=5,
        warmup=20,
        decay_from=0.3,
        weight_rate=5e-4,
        vector_rate=8e-3,
        harmful=0.42,
        off=0.35,
        widest=True,
    )
    final_dense: PhaseConfig = PhaseConfig(
        steps=300,
        rows=30_000,
        seed=4,
        warmup=20,
        decay_from=0.5,
        vector_rate=0.03,
        harmful=0.38,
        widest=True,
        buckets=((32, 64), (48, 64), (96, 32)),
    )
    planted_share: float = 0.05
    """Part of the units (of all layers) whose scale may differ from one in the co-adapted twin."""
    score_prompts: int = 200
    """Harmful training prompts over which change scores are taken."""
    score_tokens: int = 24
    """Tokens of the base's own answer over which they are taken."""
    compiled: bool = True
    bfloat16: bool = True
    save_every: int = 100


def tiny() -> Settings:
    """A toy of the same shape, for tests: seconds on one core."""
    buckets = ((24, 8), (64, 4))
    phase = PhaseConfig(
        steps=4,
        rows=60,
        seed=1,
        warmup=2,
        decay_from=0.5,
        weight_rate=1e-3,
        muon_rate=0.01,
        vector_rate=0.02,
        harmful=0.4,
        off=0.4,
        buckets=buckets,
    )
    return Settings(
        model=ModelConfig(width=32, layers=3, ff=48, heads=2, head_width=16, vocabulary=320, context=64),
        tokenizer_rows=60,
        base=phase,
        dense=phase,
        coadapt=phase,
        widen=phase,
        final_dense=phase,
        score_prompts=4,
        score_tokens=4,
        compiled=False,
        bfloat16=False,
        save_every=2,
    )
