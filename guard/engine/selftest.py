"""The start-up self-test: known prompts go through the engine and must score as the bundle says.

The scheduler keeps the result (``SelfTestRun``) and turns every other request away until all prompts have
matched. Whoever starts the engine only has to send the prompts: ``run`` does it for the offline ``LLM``
class, ``guard.engine.frontend`` for the API server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from guard.bundle import SelfTest
from guard.engine.errors import GuardStartupError


class Expected(NamedTuple):
    """What the prompts must score under one adapter, or under none."""

    logits: tuple[float, ...]
    tolerance: float


Key = tuple[str | None, int]
"""Name of the LoRA adapter, or None for the model itself, and index of the prompt."""


class SelfTestRun:
    """Expected against measured logits, for one dtype and all adapters that are served.

    ``adapters`` are the scores under each adapter by its name. Raises GuardStartupError when the dtype is
    unknown.
    """

    def __init__(
        self, expected: SelfTest, dtype: str, adapters: Mapping[str, Mapping[str, Expected]] | None = None
    ) -> None:
        base = {name: Expected(logits, expected.tolerance[name]) for name, logits in expected.logits.items()}
        self._expected: dict[str | None, Expected] = {None: _of_dtype(base, dtype)}
        for name, scores in (adapters or {}).items():
            self._expected[name] = _of_dtype(scores, dtype, f" under the adapter {name}")
        self._prompts = {tuple(prompt): index for index, prompt in enumerate(expected.prompts)}
        self._left = {(name, index) for name in self._expected for index in self._prompts.values()}
        self.worst = 0.0
        """Largest |difference| seen, in logits."""

    @property
    def passed(self) -> bool:
        """Whether every prompt has matched."""
        return not self._left

    def key(self, prompt: Sequence[int] | None, adapter: str | None = None) -> Key | None:
        """Which self-test prompt these token ids are, under ``adapter``."""
        index = None if prompt is None else self._prompts.get(tuple(prompt))
        return None if index is None or adapter not in self._expected else (adapter, index)

    def record(self, key: Key, logit: float) -> bool:
        """Compare one measured logit; True when it is within tolerance."""
        adapter, index = key
        expected = self._expected[adapter]
        difference = abs(logit - expected.logits[index])
        self.worst = max(self.worst, difference)
        if not difference <= expected.tolerance:  # also when it is no number
            return False
        self._left.discard(key)
        return True


def _of_dtype(scores: Mapping[str, Expected], dtype: str, where: str = "") -> Expected:
    if dtype not in scores:
        raise GuardStartupError(
            f"the bundle has no self-test scores{where} for dtype {dtype}; serve with --dtype "
            f"{', '.join(sorted(scores))}, or fit the bundle again"
        )
    return scores[dtype]


def run(llm: Any, prompts: Sequence[Sequence[int]], adapters: Sequence[Any] = ()) -> None:
    """Send the self-test through vLLM's offline ``LLM``, also under each ``LoRARequest`` of ``adapters``.

    Raises GuardStartupError when a prompt fails.
    """
    from vllm import SamplingParams

    failed, total = 0, 0
    for adapter in (None, *adapters):
        outputs = llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            SamplingParams(max_tokens=1, temperature=0.0),
            use_tqdm=False,
            lora_request=adapter,
        )
        failed += sum(output.outputs[0].finish_reason == "error" for output in outputs)
        total += len(outputs)
    if failed:
        raise GuardStartupError(failure(failed, total))


def failure(failed: int, total: int) -> str:
    """The sentence for a self-test that did not pass."""
    return (
        f"the guard's self-test failed on {failed} of {total} prompts: the engine does not read the scores "
        "that the bundle was made with; fit the bundle again for this model, dtype and vLLM version"
    )
