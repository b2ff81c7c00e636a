"""guard.capture on the device against the CPU: what fitting on a GPU reads. Needs no vLLM."""

from __future__ import annotations

import numpy as np

from guard.bundle import Bundle
from loadtests.gpu import world
from loadtests.gpu.recorder import Recorder


def compare(recorder: Recorder, model: str) -> None:
    """Scores of all prompts, one by one and padded in batches, by dtype."""
    made = world.prepare(recorder.folder, model, recorder.device)
    bundle = Bundle.load(made.bundle)
    exact = np.array(made.logits["float32"], np.float32)
    rows = []
    for dtype in ("float32", "bfloat16"):
        on_cpu = world.scores(made.model, bundle, made.prompts, dtype, "cpu")
        for batch in (1, 16):
            here = world.scores(made.model, bundle, made.prompts, dtype, recorder.device, batch=batch)
            tolerance = made.tolerance[dtype]
            far = float(np.abs(here - on_cpu).max())
            rows.append(
                {
                    "dtype": dtype,
                    "prompts at a time": batch,
                    "largest difference to the CPU": far,
                    "largest difference to float32": float(np.abs(here - exact).max()),
                    "tolerance": tolerance,
                }
            )
            recorder.expect(
                bool(np.isfinite(here).all()) and far <= tolerance,
                f"{dtype}, {batch} at a time: a score is off by {far:.2e}, at most {tolerance:.2e}",
            )
    recorder.number("spread of the scores", float(exact.std()))
    recorder.number("scores", rows)
