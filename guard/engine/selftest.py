"""The start-up self-test: known prompts go through the engine and must score as the bundle says.

The scheduler keeps the result (``SelfTestRun``) and turns every other request away until all prompts have
matched. Whoever starts the engine only has to send the prompts: ``run`` does it for the offline ``LLM``
class, ``guard.engine.frontend`` for the API server.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from guard.bundle import SelfTest
from guard.engine.errors import GuardStartupError


class SelfTestRun:
    """Expected against measured logits, for one dtype. Raises GuardStartupError when the dtype is unknown."""

    def __init__(self, expected: SelfTest, dtype: str) -> None:
        if dtype not in expected.logits:
            known = ", ".join(sorted(expected.logits))
            raise GuardStartupError(
                f"the bundle has no self-test scores for dtype {dtype}; serve with --dtype {known}, "
                "or fit the bundle again"
            )
        self._expected = expected.logits[dtype]
        self._tolerance = expected.tolerance[dtype]
        self._prompts = {tuple(prompt): index for index, prompt in enumerate(expected.prompts)}
        self._left = set(range(len(expected.prompts)))
        self.worst = 0.0
        """Largest |difference| seen, in logits."""

    @property
    def passed(self) -> bool:
        """Whether every prompt has matched."""
        return not self._left

    def index(self, prompt: Sequence[int] | None) -> int | None:
        """Which self-test prompt these token ids are."""
        return None if prompt is None else self._prompts.get(tuple(prompt))

    def record(self, index: int, logit: float) -> bool:
        """Compare one measured logit; True when it is within tolerance."""
        difference = abs(logit - self._expected[index])
        self.worst = max(self.worst, difference)
        if difference > self._tolerance:
            return False
        self._left.discard(index)
        return True


def run(llm: Any, prompts: Sequence[Sequence[int]]) -> None:
    """Send the self-test through vLLM's offline ``LLM``. Raises GuardStartupError when a prompt fails."""
    from vllm import SamplingParams

    outputs = llm.generate(
        [{"prompt_token_ids": list(prompt)} for prompt in prompts],
        SamplingParams(max_tokens=1, temperature=0.0),
        use_tqdm=False,
    )
    failed = sum(output.outputs[0].finish_reason == "error" for output in outputs)
    if failed:
        raise GuardStartupError(failure(failed, len(prompts)))


def failure(failed: int, total: int) -> str:
    """The sentence for a self-test that did not pass."""
    return (
        f"the guard's self-test failed on {failed} of {total} prompts: the engine does not read the scores "
        "that the bundle was made with; fit the bundle again for this model, dtype and vLLM version"
    )
