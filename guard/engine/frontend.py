"""The guard in vLLM's API-server process: directives in, verdicts out.

``GuardMiddleware`` is handed to vLLM as ``--middleware``. When the server starts it hooks two methods of the
engine client's output processor (vllm/v1/engine/output_processor.py), both of which run in this process:

- ``add_request``, called in the task of the HTTP request, once for each engine request: it leaves the sealed
  directive where the scheduler finds it and drops whatever a client put there;
- ``process_outputs``, called for every batch of engine outputs before any answer is built from it: it takes
  the verdicts out.

Routes that are not listed in ``guard.engine.routes`` are closed.

A directed request's answer is held until its verdict is bound. One that must not be answered gets its verdict
and an empty body from here, and vLLM's own handler is cancelled, which aborts whatever is still running.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from guard.engine.answer import (
    HeldAnswer,
    Receive,
    Send,
    answer_bytes,
    answer_json,
    error_body,
    read_body,
    stream_error,
)
from guard.engine.config import (
    CONFIG_KEY,
    ENTRIES_KEY,
    EXTRA_ARG,
    STOP_KEY,
    GuardConfig,
    audience_from_env,
    keyring_from_env,
)
from guard.engine.exchange import CURRENT, Admission, Exchange
from guard.engine.ledger import STOPPING
from guard.engine.metrics import (
    CLOSED_ROUTES,
    DIRECTIVE_ERRORS,
    EXCHANGES,
    LEDGER,
    MISSING_VERDICTS,
    STOP_TOKENS,
    STOPS,
    TASKS,
    UNSCORED_SHAPES,
    VERDICTS,
)
from guard.engine.readiness import Readiness
from guard.engine.routes import JUDGED, is_open
from guard.verdict import (
    DIRECTIVE_HEADER,
    STATUS_PATH,
    STATUS_SEAL_HEADER,
    VERDICT_HEADER,
    DirectiveError,
    Verdict,
)

Scope = dict[str, Any]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

VERDICT_DEADLINE_ENV = "NEURONGUARD_VERDICT_DEADLINE"
"""Seconds after which a directed request without a verdict is given up; 300 by default."""

STOPPING_SIGNAL = signal.SIGUSR1
"""Sent some seconds before SIGTERM, so that gateways send no more requests: docs/operations.md."""

SELF_TEST_FAILED = threading.Event()
"""Set in this process when the self-test failed; the launcher turns it into its exit status."""

logger = logging.getLogger("vllm.neuronguard")


class Exchanges:
    """Which exchange each engine request belongs to, kept up to date by two hooks."""

    def __init__(self, output_processor: Any) -> None:
        self._of: dict[str, Exchange] = {}
        self._add, self._process = output_processor.add_request, output_processor.process_outputs
        output_processor.add_request = self._add_request
        output_processor.process_outputs = self._process_outputs

    def __len__(self) -> int:
        return len(self._of)

    def close(self, exchange: Exchange) -> None:
        """The HTTP request is over, whatever happened."""
        for request_id in exchange.request_ids:
            self._of.pop(request_id, None)

    def _add_request(
        self, request: Any, prompt: Any, parent_req: Any = None, request_index: int = 0, queue: Any = None
    ) -> None:
        exchange = CURRENT.get()
        params = request.sampling_params
        if params is not None:
            # A new dict: siblings share their parameters, and the client's own entry must go.
            extra = {k: v for k, v in (params.extra_args or {}).items() if k != EXTRA_ARG}
            if exchange is not None and exchange.sealed is not None:
                extra[EXTRA_ARG] = exchange.sealed
            params.extra_args = extra or None
        if exchange is not None:
            exchange.register(
                request.request_id,
                prompt_id=parent_req.request_id if parent_req is not None else request.request_id,
                prompt_tokens=len(request.prompt_token_ids or ()),
            )
            self._of[request.request_id] = exchange
        self._add(request, prompt, parent_req, request_index, queue)

    def _process_outputs(self, engine_core_outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        for output in engine_core_outputs:
            params = output.kv_transfer_params
            if params is not None and CONFIG_KEY in params:
                LEDGER.set(params.pop(ENTRIES_KEY))
                self._take(output.request_id, params.pop(CONFIG_KEY))
                output.kv_transfer_params = params or None
            if params is not None and STOP_KEY in params:
                self._count(output.request_id, params.pop(STOP_KEY))
                output.kv_transfer_params = params or None
        return self._process(engine_core_outputs, *args, **kwargs)

    def _take(self, request_id: str, text: str) -> None:
        exchange = self._of.get(request_id)
        if exchange is None:  # its HTTP request is over
            return
        verdict = Verdict.model_validate_json(text)
        if exchange.record(request_id, verdict) and exchange.source != "self-test":
            VERDICTS.labels(verdict.action, verdict.mode, exchange.source).inc()
            if verdict.unscored_shape:
                UNSCORED_SHAPES.labels(verdict.action, exchange.source).inc()

    def _count(self, request_id: str, told: dict[str, Any]) -> None:
        exchange = self._of.get(request_id)
        source = exchange.source if exchange is not None else "direct"
        STOPS.labels(told["outcome"], source).inc()
        if told["tokens"] is not None:
            STOP_TOKENS.observe(told["tokens"])


class GuardMiddleware:
    """ASGI middleware; see the module's docstring."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._keys = keyring_from_env()
        self._audience = audience_from_env()
        self._admission = Admission(self._keys, self._audience)
        self._deadline = float(os.environ.get(VERDICT_DEADLINE_ENV, "300"))
        self._exchanges: Exchanges | None = None
        self._readiness: Readiness | None = None
        self._self_test: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry point."""
        if scope["type"] == "lifespan":
            self._start(scope["app"].state)
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            # Realtime sessions stream their input, of which no single prompt could be judged.
            CLOSED_ROUTES.inc()
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": "the guard serves no websockets"})
        elif scope["path"] == STATUS_PATH:
            await self._answer_status(send)
        elif not is_open(scope):
            CLOSED_ROUTES.inc()
            message = f"this route is closed: the guard answers {', '.join(JUDGED)} only"
            await answer_json(send, 403, error_body(message, "guard_route_closed"))
        else:
            await self._http(scope, receive, send)

    def _start(self, state: Any) -> None:
        engine_client = state.engine_client
        config = GuardConfig.of(engine_client.vllm_config)
        bundle = config.load_bundle()
        self._exchanges = Exchanges(engine_client.output_processor)
        loop = asyncio.get_running_loop()
        EXCHANGES.set_function(self._exchanges.__len__)
        TASKS.set_function(lambda: len(asyncio.all_tasks(loop)))
        models = getattr(state, "openai_serving_models", None)
        adapters = models.lora_requests if models is not None else {}
        self._readiness = Readiness(
            engine_client, config, bundle.card, self._audience, adapters, config.signed_by(bundle)
        )
        loop = asyncio.get_running_loop()
        self._self_test = loop.create_task(self._run_self_test(self._readiness))
        if threading.current_thread() is threading.main_thread():
            loop.add_signal_handler(STOPPING_SIGNAL, self._stopping, self._readiness)

    def _stopping(self, readiness: Readiness) -> None:
        logger.info("told by a signal that the engine will be stopped: gateways are told by its status")
        readiness.set("stopping", "it will be stopped")

    async def _run_self_test(self, readiness: Readiness) -> None:
        try:
            await readiness.run_self_test()
        except Exception as error:
            readiness.set("failed", str(error))
            logger.critical("%s", error)
            SELF_TEST_FAILED.set()
            signal.raise_signal(signal.SIGTERM)  # an engine that does not read its neurons does not serve

    async def _answer_status(self, send: Send) -> None:
        if self._readiness is None:
            await answer_json(
                send, 503, error_body("the engine is starting", "guard_starting", "server_error")
            )
            return
        status = self._readiness.status
        body = status.model_dump_json().encode()
        seal = [(STATUS_SEAL_HEADER.encode(), status.seal(body, self._keys).encode())] if self._keys else []
        await answer_bytes(send, 200 if status.state == "ready" else 503, body, *seal)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        sealed = next((v for k, v in scope["headers"] if k == DIRECTIVE_HEADER.encode()), None)
        if sealed is None:
            await self._follow(Exchange("direct"), lambda: self._app(scope, receive, send))
            return
        body = await read_body(receive)
        if body is None:
            return
        text = sealed.decode("latin-1")
        try:
            directive = self._admission.admit(text, body)
        except DirectiveError as error:
            DIRECTIVE_ERRORS.labels(error.reason).inc()
            await answer_json(send, 400, error_body(str(error), "guard_directive_invalid"))
            return
        exchange = Exchange("gateway", directive, text)
        answer = HeldAnswer(exchange, body, receive, send)
        await self._follow(exchange, lambda: self._directed(exchange, answer, scope))

    async def _follow(self, exchange: Exchange, handle: Callable[[], Awaitable[None]]) -> None:
        token = CURRENT.set(exchange)
        try:
            await handle()
        finally:
            CURRENT.reset(token)
            if self._exchanges is not None:
                self._exchanges.close(exchange)

    async def _directed(self, exchange: Exchange, answer: HeldAnswer, scope: Scope) -> None:
        """Run vLLM's handler; let its answer out only under a bound verdict that allows it."""
        handler = asyncio.ensure_future(self._app(scope, answer.receive, answer.send))
        left = asyncio.ensure_future(answer.client_left())
        decided = asyncio.ensure_future(exchange.decided.wait())
        unjudged = asyncio.ensure_future(answer.unjudged.wait())
        tasks = (handler, left, decided, unjudged)
        try:
            await asyncio.wait(tasks, timeout=self._deadline, return_when=asyncio.FIRST_COMPLETED)
            if answer.passed_error or left.done():
                pass
            elif exchange.binding is not None:
                await self._under_verdict(exchange.binding, answer)
            else:
                await self._without_verdict(answer)
                return
            if exchange.binding is None or exchange.binding.action not in STOPPING:
                await asyncio.wait((handler, left), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if not handler.cancelled() and (failure := handler.exception()) is not None:
            raise failure

    async def _under_verdict(self, verdict: Verdict, answer: HeldAnswer) -> None:
        assert self._keys is not None, "a directive was admitted"  # noqa: S101
        header = (VERDICT_HEADER.encode(), verdict.seal(self._keys).encode())
        if verdict.action in STOPPING:
            await answer.replace(200, {}, header)
        else:
            answer.release(header)

    async def _without_verdict(self, answer: HeldAnswer) -> None:
        """A good answer that nobody judged, or none at all within the deadline."""
        if (found := stream_error(answer.first_part)) is not None:
            await answer.replace(*found)
            return
        MISSING_VERDICTS.inc()
        logger.error("a directed request was not answered because no verdict was bound")
        error = error_body("the guard gave no verdict on this request", "guard_no_verdict", "server_error")
        await answer.replace(500, error)
