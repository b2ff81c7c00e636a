"""Whether this engine may answer anybody: the self-test over HTTP's own path, and the status it leads to."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from guard import __version__
from guard.bundle import GuardCard
from guard.engine.config import GuardConfig
from guard.engine.errors import GuardStartupError
from guard.engine.exchange import CURRENT, Exchange
from guard.engine.metrics import show
from guard.engine.selftest import failure
from guard.verdict import EngineStatus


class Readiness:
    """State of the engine behind one API server."""

    def __init__(self, engine_client: Any, config: GuardConfig, card: GuardCard, audience: str) -> None:
        import vllm

        model = engine_client.vllm_config.model_config
        name = model.served_model_name
        self.status = EngineStatus(
            state="starting",
            detail="the self-test is running",
            audience=audience,
            model=name[0] if isinstance(name, list) else name,
            max_model_len=model.max_model_len,
            bundle=config.bundle_sha256,
            label=card.label,
            thresholds=card.thresholds,
            default=config.default,
            guard_version=__version__,
            vllm_version=vllm.__version__,
        )
        show(self.status)
        self._engine_client = engine_client
        self._prompts = card.self_test.prompts

    def set(self, state: Literal["starting", "ready", "failed"], detail: str) -> None:
        """Change the state; ``detail`` is a sentence for people."""
        self.status = self.status.model_copy(update={"state": state, "detail": detail})
        show(self.status)

    async def run_self_test(self) -> None:
        """Send the bundle's prompts through the engine. Raises GuardStartupError when one fails.

        The scheduler compares the scores (``guard.engine.ledger``); a prompt that does not match ends there
        in an error, and so does everything else until all have matched.
        """
        passed = await asyncio.gather(*(self._send(index) for index in range(len(self._prompts))))
        if not all(passed):
            raise GuardStartupError(failure(passed.count(False), len(passed)))
        self.set("ready", f"all {len(passed)} self-test prompts matched")

    async def _send(self, index: int) -> bool:
        from vllm import SamplingParams

        exchange = Exchange("self-test")
        CURRENT.set(exchange)  # each call runs in a task, hence in a context, of its own
        prompt = {"prompt_token_ids": list(self._prompts[index])}
        params = SamplingParams(max_tokens=1, temperature=0.0)
        async for _ in self._engine_client.generate(prompt, params, f"neuronguard-self-test-{index}"):
            pass
        return exchange.binding is not None and exchange.binding.action == "checked"
