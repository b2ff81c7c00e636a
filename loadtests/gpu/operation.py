"""``torch.ops.neuronguard.gather`` alone: needs torch and nothing else."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from guard.engine import ops  # noqa: F401 (registers the operation)
from loadtests.gpu.recorder import Recorder

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS = (1, 2, 7, 64, 1000, 8192)
WIDTH, FEATURES, BEGIN, END = 176, 41, 5, 37
"""The operation fills columns BEGIN to END of FEATURES; the others must stay as they are."""
UNTOUCHED = -7.0
REPLAYS = 100


def layer_input(tokens: int, width: int, dtype: torch.dtype, device: str, layout: str) -> Tensor:
    """A random ``[tokens, width]`` whose memory is laid out as the name says."""
    if layout == "every second column":
        return torch.randn(tokens, 2 * width, device=device).to(dtype)[:, ::2]
    if layout == "transposed":
        return torch.randn(width, tokens, device=device).to(dtype).T
    if layout == "a leading dimension":
        return torch.randn(1, tokens, width, device=device).to(dtype)
    return torch.randn(tokens, width, device=device).to(dtype)


def random_index(rows: int, tokens: int, width: int, device: str) -> Tensor:
    """Elements of an input ``[tokens, width]``, as ``[rows, FEATURES]``."""
    return torch.randint(tokens * width, (rows, FEATURES), device=device)


def gather(x: Tensor, index: Tensor, out: Tensor, begin: int = BEGIN, end: int = END) -> None:
    """The operation as a tap calls it."""
    torch.ops.neuronguard.gather(x, index, out, begin, end, x.shape[-1])


def wanted(x: Tensor, index: Tensor, out_before: Tensor) -> Tensor:
    """What the operation must leave, by plain indexing."""
    result = out_before.clone()
    rows = min(len(index), x.numel() // x.shape[-1])
    part = index[:rows, BEGIN:END]
    flat = x.reshape(-1, x.shape[-1])
    values = flat[part // x.shape[-1], part % x.shape[-1]]
    result[:rows, BEGIN:END] = values.to(result.dtype)
    return result


def indexing(recorder: Recorder) -> None:
    """Equal to indexing for all dtypes, lengths and layouts, also with more rows than tokens."""
    layouts = ("contiguous", "every second column", "transposed", "a leading dimension")
    cases = 0
    for dtype, tokens, layout, rows in itertools.product(DTYPES, TOKENS, layouts, (8, 300)):
        x = layer_input(tokens, WIDTH, dtype, recorder.device, layout)
        index = random_index(rows, tokens, WIDTH, recorder.device)
        for out_dtype in {dtype, torch.float32}:
            out = torch.full((rows, FEATURES), UNTOUCHED, dtype=out_dtype, device=recorder.device)
            expected = wanted(x, index, out)
            gather(x, index, out)
            cases += 1
            recorder.expect(
                torch.equal(out, expected),
                f"not as indexing: {dtype} to {out_dtype}, {tokens} tokens, {layout}, {rows} rows",
            )
    recorder.number("cases", cases)
    if recorder.on_cuda:  # as large as a step of a large model: element numbers beyond 2^26
        x = layer_input(8192, 14336, torch.bfloat16, "cuda", "contiguous")
        index = random_index(256, 8192, 14336, "cuda")
        out = torch.zeros(256, FEATURES, dtype=torch.bfloat16, device="cuda")
        expected = wanted(x, index, out)
        gather(x, index, out)
        recorder.expect(torch.equal(out, expected), "not as indexing: 8192 × 14336")
    _wrong_width(recorder)


def _wrong_width(recorder: Recorder) -> None:
    x = torch.zeros(4, WIDTH, device=recorder.device)
    index = torch.zeros(4, FEATURES, dtype=torch.int64, device=recorder.device)
    out = torch.zeros(4, FEATURES, device=recorder.device)
    try:
        torch.ops.neuronguard.gather(x, index, out, BEGIN, END, WIDTH + 1)
    except ValueError:
        return
    recorder.expect(False, "an input of another width than the index was made for was accepted")


def graph(recorder: Recorder) -> None:
    """Captured once and replayed with other contents; nothing is allocated meanwhile."""
    for dtype, tokens in itertools.product(DTYPES, (1, 64, 8192)):
        rows = 32
        x = layer_input(tokens, WIDTH, dtype, "cuda", "contiguous")
        index = random_index(rows, tokens, WIDTH, "cuda")
        out = torch.full((rows, FEATURES), UNTOUCHED, dtype=dtype, device="cuda")
        _warm_up(x, index, out)
        out.fill_(UNTOUCHED)
        captured = torch.cuda.CUDAGraph()
        before = _allocations()
        with torch.cuda.graph(captured):
            gather(x, index, out)
        during = _allocations() - before
        recorder.number(f"allocations while recording, {dtype}, {tokens} tokens", during)
        wrong = allocated = 0
        for _ in range(REPLAYS):
            x.normal_()
            index.random_(0, tokens * WIDTH)
            expected = wanted(x, index, out)
            torch.cuda.synchronize()
            before = _allocations()
            captured.replay()
            torch.cuda.synchronize()
            allocated += _allocations() - before
            wrong += not torch.equal(out, expected)
        recorder.expect(
            wrong == 0, f"{wrong} of {REPLAYS} replays gave a wrong result: {dtype}, {tokens} tokens"
        )
        recorder.expect(allocated == 0, f"{allocated} allocations in replays: {dtype}, {tokens} tokens")
    recorder.number("replays of each graph", REPLAYS)


def _warm_up(x: Tensor, index: Tensor, out: Tensor) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            gather(x, index, out)
    torch.cuda.current_stream().wait_stream(stream)


def _allocations() -> int:
    return int(torch.cuda.memory_stats().get("allocation.all.allocated", 0))
