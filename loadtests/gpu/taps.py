"""Taps on a small torch model that is recorded once and replayed, as vLLM does it. Needs no vLLM."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from guard.engine.buffers import STEPS_IN_FLIGHT, PendingScores
from guard.engine.taps import Taps
from loadtests.gpu import toy
from loadtests.gpu.recorder import Recorder

MOST = 16
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Of a logit: in bfloat16 the model itself may round otherwise in a graph than outside."""
LONG = 2_000_000_000
"""Clock cycles that the GPU is kept busy: about a second."""


class Replayed:
    """The small model with taps, recorded for some lengths; on a CPU it is simply called."""

    def __init__(self, dtype: torch.dtype, device: str, lengths: tuple[int, ...]) -> None:
        self.bundle = toy.make_bundle()
        self._plain = toy.make(device, dtype)
        self._device = device
        self._model = toy.make(device, dtype)
        self.taps = Taps(
            self.bundle,
            self._model,
            max_requests=MOST,
            dtype=dtype,
            device=torch.device(device),
            replayed=True,
        )
        self._inputs = {n: torch.zeros(n, toy.HIDDEN, dtype=dtype, device=device) for n in lengths}
        self._launch = {n: self._record(x) for n, x in self._inputs.items()}

    def _record(self, x: Tensor) -> Callable[[], object]:
        if self._device == "cpu":
            return lambda: self._model(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._model(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._model(x)
        return graph.replay

    @property
    def on_cuda(self) -> bool:
        """Whether it runs on the GPU."""
        return self._device == "cuda"

    def steps(self, tokens: int, count: int, seed: int) -> list[toy.Step]:
        """Random steps with their scores by plain torch."""
        return toy.steps(self._plain, self.bundle, tokens, count, MOST, self._device, seed)

    def launch(self, step: toy.Step) -> PendingScores | None:
        """A step as the worker runs it: stage, forward, score."""
        tokens = len(step.x)
        self.taps.clear()
        self.taps.stage(step.layout)
        self._inputs[tokens].copy_(step.x)
        self._launch[tokens]()
        scores = self.taps.score()
        self.taps.clear()
        return scores

    def dummy(self, tokens: int) -> None:
        """A replay that nobody staged."""
        self._launch[tokens]()


def worst(expected: Mapping[str, float], found: Mapping[str, float]) -> float:
    """Largest difference; infinite when the requests or the numbers are not those expected."""
    if expected.keys() != found.keys():
        return float("inf")
    differences = [abs(expected[rid] - found[rid]) for rid in expected]
    return max((d if d == d else float("inf") for d in differences), default=0.0)


@torch.no_grad()
def parity(recorder: Recorder) -> None:
    """Random batches of three lengths in random order, dummy replays between them."""
    for dtype, tolerance in TOLERANCE.items():
        lengths = (1, 40, 256)
        replayed = Replayed(dtype, recorder.device, lengths)
        steps = [s for n in lengths for s in replayed.steps(n, 40, seed=n)]
        order = torch.randperm(len(steps), generator=torch.Generator().manual_seed(0)).tolist()
        found = scored = 0.0
        for turn, number in enumerate(order):
            step = steps[number]
            if turn % 3 == 0:
                replayed.dummy(lengths[turn % len(lengths)])
            scores = replayed.launch(step)
            if turn % 4 == 0:
                replayed.dummy(lengths[(turn + 1) % len(lengths)])
            found = max(found, worst(step.logits, scores.take() if scores else {}))
            scored += len(step.logits)
        recorder.expect(scored > 100, f"only {scored} prompts ended: the steps have no power")
        recorder.expect(found <= tolerance, f"{dtype}: a score is off by {found:.2e}, at most {tolerance}")
        recorder.number(f"largest difference, {dtype}", found)
        recorder.number(f"prompts that ended, {dtype}", scored)


@torch.no_grad()
def in_flight(recorder: Recorder) -> None:
    """The GPU is kept busy while several steps are queued; then all of them are taken.

    On a CPU nothing is queued, but the scores of a step must outlive the next ones all the same.
    """
    replayed = Replayed(torch.float32, recorder.device, (40,))
    for depth in range(2, STEPS_IN_FLIGHT + 1):
        found = _queue(replayed, depth, seed=depth)
        recorder.number(f"largest difference, {depth} steps in flight", found)
        recorder.expect(found <= 1e-4, f"with {depth} steps in flight a score is off by {found:.2e}")
    if not recorder.on_cuda:
        return
    # One more than there are buffers must go wrong, or this check would notice nothing.
    found = _queue(replayed, STEPS_IN_FLIGHT + 1, seed=99)
    recorder.number(f"largest difference, {STEPS_IN_FLIGHT + 1} steps in flight (has to be large)", found)
    recorder.expect(found > 1e-2, "one step too many did no harm: the check does not see what it should")


def _queue(replayed: Replayed, depth: int, seed: int) -> float:
    steps = [s for s in replayed.steps(40, 20 * depth, seed) if s.logits][:depth]
    for step in steps:  # whatever CUDA loads at first use
        scores = replayed.launch(step)
        if scores is not None:
            scores.take()
    if replayed.on_cuda:
        torch.cuda.synchronize()
        torch.cuda._sleep(LONG)
    queued = [replayed.launch(step) for step in steps]
    taken = [scores.take() if scores else {} for scores in queued]
    return max(worst(step.logits, found) for step, found in zip(steps, taken, strict=True))


@torch.no_grad()
def synchronisation(recorder: Recorder) -> None:
    """With torch's alarm for waiting set, only taking the scores may wait; and the host runs ahead."""
    replayed = Replayed(torch.bfloat16, "cuda", (40,))
    steps = [s for s in replayed.steps(40, 40, seed=1) if s.logits][:STEPS_IN_FLIGHT]
    for step in steps:
        scores = replayed.launch(step)
        if scores is not None:
            scores.take()
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    busy = torch.cuda.Event()
    busy.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        queued = [replayed.launch(step) for step in steps]
    except RuntimeError as error:
        recorder.expect(False, f"staging or scoring waits for the GPU: {str(error).splitlines()[0]}")
        return
    finally:
        torch.cuda.set_sync_debug_mode("default")
    recorder.expect(not busy.query(), "the host did not run ahead of the GPU: something waited")
    found = max(
        worst(step.logits, scores.take() if scores else {})
        for step, scores in zip(steps, queued, strict=True)
    )
    recorder.expect(found <= TOLERANCE[torch.bfloat16], f"a score is off by {found:.2e}")
    recorder.number("largest difference", found)
