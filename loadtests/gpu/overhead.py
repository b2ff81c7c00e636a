"""What the guard costs on this machine: a plain and a guarded engine in pairs, as in ``make bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from guard.bundle import Site
from loadtests import random_model
from loadtests.batches import batches, with_threshold
from loadtests.gpu.recorder import Recorder
from loadtests.gpu.world import in_both_dtypes, prepare
from loadtests.pairs import Child, Interval, Pair, run_pairs

PAIRS, WARM_UP = 30, 3
DECODED = 64
LAYERS, WIDTH = 12, 2048
ENGINE: dict[str, Any] = {
    "max_model_len": 512,
    "max_num_batched_tokens": 8192,
    "max_num_seqs": 64,
    "block_size": 32,
    "dtype": "bfloat16",
    "enforce_eager": False,
    "async_scheduling": None,
    "gpu_memory_utilization": 0.3,
}
"""Everything else is vLLM's default on a GPU: graphs, runner, scheduling."""


class GpuChild(Child):
    """An engine in vLLM's default mode on a GPU."""

    module = "loadtests.gpu.paired_child"


def measure(recorder: Recorder, units: int, pairs: int = PAIRS, most: int = 64, **engine: Any) -> None:
    """Throughput of decoding and time of prefill, by batch size, with ``units`` neurons in all."""
    made = prepare(recorder.folder, "large", recorder.device)
    bundle = passing(recorder.folder / f"units-{units}", made.model, units, recorder.device)
    logs = recorder.folder.parent / "logs"
    options = {**ENGINE, **engine}
    children: list[Child] = []
    rows = []
    try:
        # One after the other: each takes its share of the free memory when it starts.
        for name, guard in (("plain", None), ("guarded", bundle)):
            children.append(GpuChild(made.model, guard, options, logs / f"overhead-{units}-{name}.log"))
            ready = children[-1].wait_ready()
            recorder.number(f"blocks in the KV pool, {name}", ready["blocks"])
            recorder.number(f"memory of the guard, bytes, {name}", ready["bytes"])
        plain, guarded = children
        for batch in (size for size in (1, 16, 64) if size <= most):
            for kind, tokens in (("decode", DECODED), ("prefill", 1)):
                seed = 2 * batch + tokens
                prompts = batches(WARM_UP + pairs, batch, (60, 120), 256, seed)
                run_pairs(plain, guarded, prompts[:WARM_UP], tokens)
                rows.append(row(kind, batch, run_pairs(plain, guarded, prompts[WARM_UP:], tokens)))
    finally:
        for child in children:
            child.close()
    recorder.number("pairs", rows)


def row(kind: str, batch: int, pairs: list[Pair]) -> dict[str, Any]:
    """Medians over pairs with 95 % bootstrap intervals; wall-clock time."""
    ratio = Interval.of([pair.ratio("wall") for pair in pairs])
    if kind == "decode":
        ratio = Interval.of([1 / pair.ratio("wall") for pair in pairs])
    step = [1e6 * (p.guarded["wall"] - p.plain["wall"]) / p.plain["steps"] for p in pairs]
    return {
        "what": "throughput, guarded / plain" if kind == "decode" else "prefill time, guarded / plain",
        "batch": batch,
        "ratio": str(ratio),
        "added to a step, µs": str(Interval.of(step)),
        "plain step, µs": float(np.median([1e6 * p.plain["wall"] / p.plain["steps"] for p in pairs])),
        "pairs": len(pairs),
    }


def passing(folder: Path, model: Path, units: int, device: str) -> Path:
    """A bundle over ``units`` neurons, spread over all layers, that lets every request pass."""
    rng, shares = np.random.default_rng(units), [units * i // LAYERS for i in range(LAYERS + 1)]
    sites = tuple(
        Site(layer=i, kind="mlp", units=tuple(sorted(rng.choice(WIDTH, n, replace=False).tolist())))
        for i, n in enumerate(np.diff(shares).tolist())
    )
    (prompts,) = batches(1, 24, (20, 60), 256, seed=0)
    bundle = random_model.make_bundle(folder / "bundle", model, sites, prompts)
    # Few self-test prompts alone would make a narrow tolerance; the spread of scores is 1.
    return with_threshold(in_both_dtypes(model, bundle, 0.05, device), folder / "pass", 1.0)
