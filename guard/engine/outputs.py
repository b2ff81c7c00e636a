"""Scores on their way from the device to the scheduler, without making the device wait.

On an accelerator the copy to the host is queued behind the forward pass and waited for only where vLLM
waits for the sampled tokens anyway: in ``sample_tokens``, or, with asynchronous scheduling, in the
``get_output`` of its ``AsyncModelRunnerOutput`` (vllm/v1/outputs.py), which another thread calls.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from guard.engine.buffers import PendingScores

LOGITS_ATTRIBUTE = "neuronguard_logits"
"""Name of the extra attribute of ``ModelRunnerOutput``: ``{request id: raw logit}``."""

IDLE_ATTRIBUTE = "neuronguard_idle"
"""Name of the extra attribute of ``SchedulerOutput``: true when nobody in the step waits for a verdict."""

WATCHED_ATTRIBUTE = "neuronguard_watched"
"""Name of the extra attribute of ``SchedulerOutput``: true when an answer in the step is watched."""

RUNNING_ATTRIBUTE = "neuronguard_running"
"""Name of the extra attribute of ``ModelRunnerOutput``: pooled scores of growing answers, float32 ``[n]`` in
the order of its requests, −inf where no answer has begun."""

SLOTS_ATTRIBUTE = "neuronguard_slots"
"""Name of the extra attribute of ``SchedulerOutput``: ``{request id: number of its patch}`` in the step."""

PREFIX_ATTRIBUTE = "neuronguard_prefix"
"""Name of the extra attribute of ``SchedulerOutput``: ``{request id: output tokens}`` they did not sample."""


class ScoredOutput(AsyncModelRunnerOutput):
    """A step's output that is still being computed, with its scores."""

    def __init__(
        self, output: AsyncModelRunnerOutput, scores: PendingScores | None, running: PendingScores | None
    ) -> None:
        self._output = output
        self._scores = scores
        self._running = running

    def get_output(self) -> ModelRunnerOutput:
        """The step's output with the logits attached; waits for both."""
        return _with(self._output.get_output(), self._scores, self._running)


def attach(output: Any, scores: PendingScores | None, running: PendingScores | None = None) -> Any:
    """The runner's output with what there is of the two. Raises RuntimeError for an unknown output."""
    if scores is None and running is None:
        return output
    if isinstance(output, AsyncModelRunnerOutput):
        return ScoredOutput(output, scores, running)
    if isinstance(output, ModelRunnerOutput):
        return _with(output, scores, running)
    raise RuntimeError(f"the guard cannot attach its scores to a {type(output).__name__}")


def _with(
    output: ModelRunnerOutput, scores: PendingScores | None, running: PendingScores | None
) -> ModelRunnerOutput:
    if scores is not None:
        setattr(output, LOGITS_ATTRIBUTE, scores.take())
    if running is not None:
        setattr(output, RUNNING_ATTRIBUTE, running.take_array())
    return output
