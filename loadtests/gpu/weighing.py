"""``torch.ops.neuronguard.weigh`` alone: what a sequence probe's taps do. Needs torch and nothing else."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from guard.engine import ops  # noqa: F401 (registers the operation)
from loadtests.gpu.operation import DTYPES, TOKENS, layer_input
from loadtests.gpu.recorder import Recorder

WIDTH, MOST = 176, 8200
"""Columns of an input, and rows of what is written, of which an input fills the first ones."""
UNTOUCHED = -7.0
TOLERANCE = 1e-3
"""On sums of ``WIDTH`` products of standard normal numbers, in float32."""
REPLAYS = 100


def weigh(x: Tensor, columns: Tensor, weight: Tensor, out: Tensor) -> None:
    """The operation as a tap calls it."""
    torch.ops.neuronguard.weigh(x, columns, weight, out, x.shape[-1])


def wanted(x: Tensor, columns: Tensor, weight: Tensor) -> Tensor:
    """The same in float64 on the host."""
    rows = x.reshape(-1, x.shape[-1]).double().cpu()
    return (rows[:, columns.cpu()] if len(columns) else rows) @ weight.double().cpu().t()


def products(recorder: Recorder) -> None:
    """Equal to a product in float64, for all dtypes, lengths and layouts; rows beyond are left alone."""
    worst = 0.0
    for dtype, tokens, columns, channels in itertools.product(DTYPES, TOKENS, (0, 41), (1, 4)):
        chosen = torch.randperm(WIDTH, device=recorder.device)[:columns]
        weight = torch.randn(channels, columns or WIDTH, device=recorder.device)
        for layout in ("contiguous", "every second column", "a leading dimension"):
            x = layer_input(tokens, WIDTH, dtype, recorder.device, layout)
            out = torch.full((MOST, channels), UNTOUCHED, device=recorder.device)
            weigh(x, chosen, weight, out)
            difference = (out[:tokens].double().cpu() - wanted(x, chosen, weight)).abs().max().item()
            worst = max(worst, difference)
            case = f"{dtype}, {tokens} tokens, {columns or 'all'} columns, {channels} channels, {layout}"
            recorder.expect(difference <= TOLERANCE, f"off by {difference:.2e}: {case}")
            recorder.expect(bool((out[tokens:] == UNTOUCHED).all()), f"rows beyond the input: {case}")
    recorder.number("largest difference", worst)


def graph(recorder: Recorder) -> None:
    """Captured once and replayed with other contents."""
    for dtype, tokens, columns in itertools.product(DTYPES, (1, 64, 8192), (0, 41)):
        chosen = torch.randperm(WIDTH, device="cuda")[:columns]
        weight = torch.randn(4, columns or WIDTH, device="cuda")
        x = layer_input(tokens, WIDTH, dtype, "cuda", "contiguous")
        out = torch.zeros(MOST, 4, device="cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                weigh(x, chosen, weight, out)
        torch.cuda.current_stream().wait_stream(stream)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            weigh(x, chosen, weight, out)
        wrong = 0
        for _ in range(REPLAYS):
            x.normal_()
            captured.replay()
            torch.cuda.synchronize()
            off = (out[:tokens].double().cpu() - wanted(x, chosen, weight)).abs().max().item()
            wrong += off > TOLERANCE
        case = f"{dtype}, {tokens} tokens, {columns or 'all'} columns"
        recorder.expect(wrong == 0, f"{wrong} of {REPLAYS} replays gave a wrong result: {case}")
    recorder.number("replays of each graph", REPLAYS)
