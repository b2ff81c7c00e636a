"""How long the gathers of a step take, beside the down projections of a 7B-like model in bfloat16."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

import torch

from guard.engine import ops  # noqa: F401 (registers the operation)
from loadtests.gpu.recorder import Recorder

HIDDEN, WIDTH = 4096, 14336
LAYERS, UNITS, BATCHES = (12, 32), (100, 1000, 5000), (1, 16, 64, 256)
MOST_REQUESTS = 256
"""Rows of the buffers; a step reads as many as it has tokens, up to these."""


def table(recorder: Recorder) -> None:
    """Microseconds a step, neurons spread evenly over the layers; every request of the batch is read."""
    device = recorder.device
    rows = []
    cases = itertools.product(LAYERS, UNITS, BATCHES) if recorder.on_cuda else [(2, 10, 1)]
    weight = torch.randn(WIDTH, HIDDEN, dtype=torch.bfloat16, device=device)
    for layers, units, batch in cases:
        x = torch.randn(batch, WIDTH, dtype=torch.bfloat16, device=device)
        result = torch.empty(batch, HIDDEN, dtype=torch.bfloat16, device=device)
        index = torch.randint(batch * WIDTH, (MOST_REQUESTS, units), device=device)
        features = torch.zeros(MOST_REQUESTS, units, dtype=torch.bfloat16, device=device)
        bounds = [units * layer // layers for layer in range(layers + 1)]
        spans = list(itertools.pairwise(bounds))

        def gathers(x=x, index=index, features=features, spans=spans) -> None:  # type: ignore[no-untyped-def]
            for begin, end in spans:
                torch.ops.neuronguard.gather(x, index, features, begin, end, WIDTH)

        def projections(x=x, result=result, layers=layers) -> None:  # type: ignore[no-untyped-def]
            for _ in range(layers):
                torch.mm(x, weight, out=result)

        ours, theirs = microseconds(gathers, device), microseconds(projections, device)
        rows.append(
            {
                "layers": layers,
                "neurons in all": units,
                "batch": batch,
                "gathers, µs": ours,
                "down projections, µs": theirs,
                "share": ours / theirs,
                "gathers launched one by one, µs": microseconds(gathers, device, recorded=False),
            }
        )
    recorder.number("a step", rows)


def microseconds(work: Callable[[], None], device: str, *, recorded: bool = True, repeats: int = 20) -> float:
    """Median time of ``work``; on the GPU in a recorded graph (as in vLLM), unless told otherwise."""
    for _ in range(3):
        work()
    if device == "cpu":
        times = []
        for _ in range(3):
            started = time.perf_counter()
            work()
            times.append(1e6 * (time.perf_counter() - started))
        return statistics.median(times)
    launch = work
    if recorded:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        launch = graph.replay
    times = []
    for _ in range(7):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        launch()
        begin.record()
        for _ in range(repeats):
            launch()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / repeats)
    return statistics.median(times)
