"""Whether this engine may answer anybody: the self-test over HTTP's own path, and the status it leads to."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from itertools import product
from typing import Any

from guard import __version__
from guard.bundle import GuardCard
from guard.engine.config import GuardConfig
from guard.engine.errors import GuardStartupError
from guard.engine.exchange import CURRENT, Exchange
from guard.engine.metrics import show
from guard.engine.selftest import failure
from guard.engine.support import can_watch
from guard.verdict import EngineState, EngineStatus


class Readiness:
    """State of the engine behind one API server."""

    def __init__(
        self,
        engine_client: Any,
        config: GuardConfig,
        card: GuardCard,
        audience: str,
        adapters: Mapping[str, Any] | None = None,
        signed_by: str | None = None,
    ) -> None:
        """``adapters`` are the server's ``LoRARequest`` objects by name; ``signed_by`` as in the status."""
        import vllm

        model = engine_client.vllm_config.model_config
        name = model.served_model_name
        self.status = EngineStatus(
            state="starting",
            detail="the self-test is running",
            audience=audience,
            model=name[0] if isinstance(name, list) else name,
            adapters=tuple(sorted(config.adapters)),
            max_model_len=model.max_model_len,
            bundle=config.bundle_sha256,
            signed_by=signed_by,
            reference=card.reference,
            label=card.label,
            thresholds=card.thresholds,
            patches=tuple(patch.name for patch in card.patches),
            monitor=card.monitor if can_watch(card, engine_client.vllm_config) else (),
            checks_shape=bool(card.prompt_tails),
            default=config.default,
            guard_version=__version__,
            vllm_version=vllm.__version__,
        )
        show(self.status)
        self._engine_client = engine_client
        self._prompts = card.self_test.prompts
        self._served = config.adapters
        self._adapters = adapters or {}
        # Every data-parallel rank has an engine core, a scheduler and a self-test of its own.
        ranks = engine_client.vllm_config.parallel_config.data_parallel_size
        self._ranks = (None,) if ranks == 1 else tuple(range(ranks))

    def set(self, state: EngineState, detail: str) -> None:
        """Change the state; ``detail`` is a sentence for people. What is stopping is never ready again."""
        if self.status.state == "stopping" and state == "ready":
            return
        self.status = self.status.model_copy(update={"state": state, "detail": detail})
        show(self.status)

    async def run_self_test(self) -> None:
        """Send the bundle's prompts through every rank, under every adapter. Raises GuardStartupError.

        The scheduler compares the scores (``guard.engine.ledger``); a prompt that does not match ends there
        in an error, and so does everything else until all have matched.
        """
        missing = sorted(self._served.keys() - self._adapters.keys())
        if missing:
            raise GuardStartupError(
                f"the guard is to serve the LoRA adapters {', '.join(missing)}, which the server has not "
                "loaded; name them in --lora-modules"
            )
        parts = product(self._ranks, (None, *sorted(self._served)), range(len(self._prompts)))
        passed = await asyncio.gather(*(self._send(*part) for part in parts))
        if not all(passed):
            raise GuardStartupError(failure(passed.count(False), len(passed)))
        self.set("ready", f"all {len(passed)} self-test prompts matched")

    async def _send(self, rank: int | None, adapter: str | None, index: int) -> bool:
        from vllm import SamplingParams

        exchange = Exchange("self-test")
        CURRENT.set(exchange)  # each call runs in a task, hence in a context, of its own
        async for _ in self._engine_client.generate(
            {"prompt_token_ids": list(self._prompts[index])},
            SamplingParams(max_tokens=1, temperature=0.0),
            f"neuronguard-self-test-{rank or 0}-{adapter or ''}-{index}",
            lora_request=self._adapters[adapter] if adapter else None,
            data_parallel_rank=rank,
        ):
            pass
        return exchange.binding is not None and exchange.binding.action == "checked"
