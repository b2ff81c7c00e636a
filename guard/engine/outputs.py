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

SLOTS_ATTRIBUTE = "neuronguard_slots"
"""Name of the extra attribute of ``SchedulerOutput``: ``{request id: number of its patch}`` in the step."""

PREFIX_ATTRIBUTE = "neuronguard_prefix"
"""Name of the extra attribute of ``SchedulerOutput``: ``{request id: output tokens}`` they did not sample."""


class ScoredOutput(AsyncModelRunnerOutput):
    """A step's output that is still being computed, with its scores."""

    def __init__(self, output: AsyncModelRunnerOutput, scores: PendingScores) -> None:
        self._output = output
        self._scores = scores

    def get_output(self) -> ModelRunnerOutput:
        """The step's output with the logits attached; waits for both."""
        output = self._output.get_output()
        setattr(output, LOGITS_ATTRIBUTE, self._scores.take())
        return output


def attach(output: Any, scores: PendingScores | None) -> Any:
    """The runner's output with ``scores``, which may be None. Raises RuntimeError for an unknown output."""
    if scores is None:
        return output
    if isinstance(output, AsyncModelRunnerOutput):
        return ScoredOutput(output, scores)
    if isinstance(output, ModelRunnerOutput):
        setattr(output, LOGITS_ATTRIBUTE, scores.take())
        return output
    raise RuntimeError(f"the guard cannot attach its scores to a {type(output).__name__}")
