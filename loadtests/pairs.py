"""Paired comparison of a plain and a guarded engine: same prompts, alternating order, one run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import bootstrap


class Child:
    """A child process of ``loadtests.child``."""

    module = "loadtests.child"

    def __init__(self, model: Path, bundle: Path | None, engine: dict[str, Any], log: Path) -> None:
        job = {"model": str(model), "bundle": bundle and str(bundle), "engine": engine}
        self._log = log.open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-m", self.module, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"an engine of the benchmark ended; see {self._log.name}")
        answer: dict[str, float] = json.loads(line)
        return answer

    def wait_ready(self) -> dict[str, float]:
        """Return when the engine is up, with what it says of itself."""
        return self._answer()

    def run(self, prompts: list[list[int]], max_tokens: int, *, guard: bool = True) -> dict[str, float]:
        """Run one batch and return its timings; a guarded engine can run it as plain vLLM."""
        assert self._process.stdin is not None
        command = {"prompts": prompts, "max_tokens": max_tokens, "guard": guard}
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._log.close()


class Interval(NamedTuple):
    """A median with its 95 % bootstrap interval."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: list[float]) -> Interval:
        """Percentile bootstrap of the median, 5,000 resamples, seeded."""
        sample = np.asarray(values)
        result = bootstrap((sample,), np.median, n_resamples=5000, method="percentile", random_state=0)
        low, high = result.confidence_interval
        return cls(float(np.median(sample)), float(low), float(high), len(values))

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Pair(NamedTuple):
    """Timings of one batch on both engines."""

    plain: dict[str, float]
    guarded: dict[str, float]

    def ratio(self, clock: str) -> float:
        """Guarded over plain."""
        return self.guarded[clock] / self.plain[clock]


def run_pairs(plain: Child, guarded: Child, batches: list[list[list[int]]], max_tokens: int) -> list[Pair]:
    """Each batch on both engines, the order alternating from batch to batch."""
    pairs = []
    for index, prompts in enumerate(batches):
        order = (plain, guarded) if index % 2 == 0 else (guarded, plain)
        first, second = (engine.run(prompts, max_tokens) for engine in order)
        pairs.append(Pair(first, second) if index % 2 == 0 else Pair(second, first))
    return pairs
