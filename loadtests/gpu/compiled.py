"""The operation under torch.compile: right, and without a copy of the features.

An operation that writes to its argument can make the compiler copy the argument first and back afterwards.
For the features that would be the cost of the whole buffer at every layer. The generated code shows it: a
tensor of the buffer's shape is allocated.
"""

from __future__ import annotations

import torch
import torch._inductor.config
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from guard.engine import ops  # noqa: F401 (registers the operation)
from loadtests.gpu.recorder import Recorder

HIDDEN, WIDTH, LAYERS = 64, 176, 3
ROWS, FEATURES = 37, 123
"""A shape that nothing else in the generated code has."""


class Tapped(nn.Module):
    """A small network with a tap in front of the second linear layer of each block."""

    index: Tensor
    features: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(HIDDEN, WIDTH) for _ in range(LAYERS))
        self.down = nn.ModuleList(nn.Linear(WIDTH, HIDDEN) for _ in range(LAYERS))
        self.register_buffer("index", torch.zeros(ROWS, FEATURES, dtype=torch.int64), persistent=False)
        self.register_buffer("features", torch.zeros(ROWS, FEATURES), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states ``[tokens, HIDDEN]``."""
        step = FEATURES // LAYERS
        for layer, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            inner = torch.nn.functional.silu(up(x))
            torch.ops.neuronguard.gather(
                inner, self.index, self.features, layer * step, (layer + 1) * step, WIDTH
            )
            x = x + down(inner)
        return x


def default(recorder: Recorder) -> None:
    """torch.compile as it comes, and with the setting that vLLM compiles with."""
    for setting in (True, False):
        name = f"enable_auto_functionalized_v2={setting}"
        with torch._inductor.config.patch(enable_auto_functionalized_v2=setting):
            copies = _check(recorder, name, mode=None)
        recorder.number(f"copies of the features in generated code, {name}", copies)
        if not setting:
            recorder.expect(copies == 0, f"the compiler copies the features {copies} times, as vLLM sets it")


def reduce_overhead(recorder: Recorder) -> None:
    """torch.compile with CUDA graphs of its own."""
    copies = _check(recorder, "reduce-overhead", mode="reduce-overhead")
    recorder.number("copies of the features in generated code", copies)


@torch.no_grad()
def _check(recorder: Recorder, name: str, mode: str | None) -> int:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Tapped().to(recorder.device)
    compiled = torch.compile(model, mode=mode)
    features = model.features
    address, worst, copies, nothing_read = features.data_ptr(), 0.0, 0, 0
    for turn in range(6):
        tokens = 50 if turn < 4 else 20  # fewer than ROWS at the end
        x = torch.randn(tokens, HIDDEN, device=recorder.device)
        model.index.random_(0, tokens * WIDTH)
        features.fill_(torch.nan)
        model(x)
        expected = features.clone()
        features.fill_(torch.nan)
        if turn == 0:
            _, codes = run_and_get_code(compiled, x)
            recorder.expect(any("gather" in code for code in codes), f"{name}: no code was generated")
            copies = sum(_copies(code) for code in codes)
        else:
            compiled(x)
        nothing_read += bool(features[0].isnan().all())
        same = torch.nan_to_num(features, 0.0) - torch.nan_to_num(expected, 0.0)
        worst = max(worst, float(same.abs().max()))
        recorder.expect(
            torch.equal(features.isnan(), expected.isnan()), f"{name}: other elements were filled"
        )
    recorder.expect(nothing_read == 0, f"{name}: in {nothing_read} runs the tap read nothing")
    recorder.expect(worst < 1e-4, f"{name}: features differ from eager by {worst:.2e}")
    recorder.expect(features.data_ptr() == address, f"{name}: the features have moved")
    recorder.number(f"largest difference to eager, {name}", worst)
    return copies


def _copies(code: str) -> int:
    shape = f"({ROWS}, {FEATURES})"
    return sum("empty_strided" in line and shape in line for line in code.splitlines())
