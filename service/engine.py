"""What the gateway knows of the engine: asked for in the background, and the policies bound to it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from guard.public_keys import PublicKeyError, read_public_keys
from guard.verdict import EngineStatus
from service.backend import Backend, BackendError
from service.breaker import Breaker
from service.errors import ConfigError, unavailable
from service.metrics import Metrics
from service.policy import BoundPolicy, PolicyError
from service.policy_file import Policies, bind
from service.policy_store import Commit, PolicyStore
from service.settings import PREFIX, Settings

logger = logging.getLogger("neuronguard.gateway")

_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 1.0
# A busy API server may miss one status request; that must not turn away everybody.
_MISSES_ALLOWED = 2


@dataclass(frozen=True)
class ReadyEngine:
    """An engine whose guard passed its self-test, and every policy in terms of its bundle."""

    status: EngineStatus
    policies: dict[str, BoundPolicy]
    source: Policies
    """The file that ``policies`` come from."""

    def policy(self, source: Policies, name: str) -> BoundPolicy:
        """A policy of the file that a request was admitted with, which may no longer be the one in force.

        Raises ApiError 503 when that file and this engine do not go together.
        """
        if source is self.source:
            return self.policies[name]
        try:
            return source.bind(name, self.status)
        except PolicyError as error:
            raise unavailable(
                "The model is not ready. Try again later.", code="engine_not_ready", stage="backend"
            ) from error


def signers(settings: Settings) -> frozenset[str] | None:
    """Public keys of which one must have signed a bundle; None: it may be unsigned. Raises ConfigError."""
    if settings.require_signed_by is None:
        return None
    try:
        return frozenset(read_public_keys(settings.require_signed_by))
    except PublicKeyError as error:
        raise ConfigError(f"{PREFIX}REQUIRE_SIGNED_BY is wrong: {error}.") from error


class EngineWatch:
    """Polls the engine's status until it is stopped, more and more slowly while the engine is away."""

    def __init__(self, backend: Backend, store: PolicyStore, metrics: Metrics, settings: Settings) -> None:
        self.backend = backend
        self.breaker = Breaker(settings.breaker_failures, settings.breaker_pause)
        self.served: frozenset[str] = frozenset()
        """The models of the last status that was heard."""
        self.changed: Callable[[], None] = lambda: None
        """Called when the engine has become ready, or ready with something else."""
        self._store = store
        self._metrics = metrics
        self._interval = settings.status_interval
        self._signers = signers(settings)
        self._ready: ReadyEngine | None = None
        self._why = "The engine has not been asked yet."
        self._misses = 0
        self._hurry = asyncio.Event()
        self._metrics.upstream_up.labels(backend.name).set(0)
        self._metrics.bundle_mismatch.labels(backend.name).set(0)

    @property
    def ready(self) -> ReadyEngine | None:
        """The engine, if requests may be sent to it now."""
        return self._ready

    @property
    def why(self) -> str:
        """Why the engine is not ready; for operators, not for clients."""
        return self._why

    def prepare(self, policies: Policies) -> Commit:
        """What a new policy file means for this engine. Raises PolicyError when they do not go together."""
        if self._ready is None or not policies.accepts(self._ready.status.bundle):
            return self.look_again
        ready = ReadyEngine(self._ready.status, bind(policies, self._ready.status), policies)

        def commit() -> None:
            self._ready = ready
            self.changed()

        return commit

    def look_again(self) -> None:
        """Ask at once, because something about a request was not as the last status said."""
        self._hurry.set()

    def failed(self) -> None:
        """The engine failed a request: it is asked how it is, and left alone if that goes on."""
        self.breaker.failed()
        self.look_again()

    def heard(self) -> None:
        """A verdict of the engine in force was just verified: status requests missed before do not count.

        In a burst the API server may be too busy for three of them in a row while it answers everybody.
        """
        self._misses = 0
        self.breaker.succeeded()

    async def run(self) -> None:
        """Poll for ever."""
        pause = _FIRST_PAUSE
        while True:
            try:
                await self.poll()
            except Exception as error:  # a dead watch would go on believing the last status for ever
                logger.exception("the status poll failed")
                self._lose(f"the status poll failed ({type(error).__name__})")
            if self._ready:
                pause, wait = _FIRST_PAUSE, self._interval
            else:
                pause, wait = min(pause * 1.6, _LONGEST_PAUSE), pause
            try:
                async with asyncio.timeout(wait):
                    await self._hurry.wait()
                await asyncio.sleep(_FIRST_PAUSE)  # many requests may fail at once: one poll for all of them
            except TimeoutError:
                pass
            self._hurry.clear()

    async def poll(self) -> None:
        """Ask once and draw the conclusions."""
        try:
            status = await self.backend.status()
        except BackendError as error:
            self._misses += 1
            if self._ready is None or self._misses > _MISSES_ALLOWED:
                self._lose(f"{error}")
            return
        self._misses = 0
        if status.state != "ready":
            self._lose(f"the engine is {status.state}: {status.detail}")
            return
        policies = self._store.current
        if self._ready is not None and self._ready.status == status and self._ready.source is policies:
            return
        why = self._not_accepted(status, policies)
        self._metrics.bundle_mismatch.labels(self.backend.name).set(why is not None)
        if why is not None:
            self._lose(why)
            return
        try:
            bound = bind(policies, status)
        except PolicyError as error:
            self._lose(str(error))
            return
        self._ready = ReadyEngine(status, bound, policies)
        self._why = ""
        self._metrics.upstream_up.labels(self.backend.name).set(1)
        self.served = frozenset(status.names)
        self.breaker.succeeded()  # it has just tested itself, or has a new name
        self.changed()
        logger.info(
            "engine ready: model %s, bundle %s, audience %s", status.model, status.bundle, status.audience
        )
        if not status.checks_shape:
            logger.warning(
                "the bundle %s does not say how prompts end: unscored_shape has no effect", status.bundle
            )

    def _not_accepted(self, status: EngineStatus, policies: Policies) -> str | None:
        if not policies.accepts(status.bundle):
            return f"the engine's bundle {status.bundle} is not under bundles in the policy file"
        if self._signers is not None and status.signed_by not in self._signers:
            signed = f"is signed by {status.signed_by}" if status.signed_by else "is not signed"
            return f"the engine's bundle {status.bundle} {signed}; none of the keys required has signed it"
        return None

    def _lose(self, why: str) -> None:
        if self._ready is not None or why != self._why:
            logger.warning("not ready: %s", why)
        lost = self._ready is not None
        self._ready = None
        self._why = why
        if lost:
            self.changed()
        self._metrics.upstream_up.labels(self.backend.name).set(0)
