"""The engines behind one gateway, and which of them gets a request.

A request goes to the ready engine that serves its model, whose breaker is closed, and that has the fewest
requests to answer. With affinity, requests of one conversation go to one engine for the sake of its prefix
cache, as long as that one is not much busier than the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import count

from guard.verdict import EngineStatus
from service.engine import EngineWatch, ReadyEngine
from service.errors import ApiError, unavailable, unknown_model
from service.metrics import Metrics
from service.policy_file import Policies
from service.policy_store import Commit

_SLACK = 4
"""An engine with affinity may have this many requests more than twice the least busy one."""


@dataclass(frozen=True)
class Lane:
    """A ready engine that was chosen for a request."""

    watch: EngineWatch
    engine: ReadyEngine


class Pool:
    """All engines, ready or not."""

    def __init__(self, watches: Sequence[EngineWatch], metrics: Metrics, max_requests: int) -> None:
        self.watches = tuple(watches)
        self._metrics = metrics
        self._max_requests = max_requests
        self._turn = count()
        for watch in self.watches:
            watch.changed = self._show

    @property
    def ready(self) -> list[Lane]:
        """The engines that requests may be sent to, whatever their breakers say."""
        return [Lane(watch, watch.ready) for watch in self.watches if watch.ready is not None]

    @property
    def why(self) -> str:
        """Why engines are not ready; for operators, not for clients."""
        return "; ".join(
            watch.why if len(self.watches) == 1 else f"{watch.backend.name}: {watch.why}"
            for watch in self.watches
            if watch.ready is None
        )

    @property
    def outstanding(self) -> int:
        """Requests at all engines."""
        return sum(watch.backend.outstanding for watch in self.watches)

    def require(self) -> Lane:
        """Any ready engine. Raises ApiError 503 when there is none."""
        ready = self.ready
        if not ready:
            raise not_ready()
        return ready[0]

    def serving(self, model: str | None) -> Lane:
        """Any ready engine that serves ``model``, or the first one's model for None.

        Raises ApiError 503 when none is ready that might, 404 when none would.
        """
        first = self.require()
        if model is None:
            return first
        lane = next((lane for lane in self.ready if model in lane.engine.status.names), None)
        if lane is not None:
            return lane
        if any(watch.ready is None and model in watch.served for watch in self.watches):
            raise not_ready()
        raise unknown_model(model)

    @property
    def models(self) -> dict[str, EngineStatus]:
        """What the ready engines serve, each with the status of the first that does."""
        found: dict[str, EngineStatus] = {}
        for lane in self.ready:
            for name in lane.engine.status.names:
                found.setdefault(name, lane.engine.status)
        return found

    def choose(self, model: str, tried: Collection[EngineWatch], conversation: bytes | None) -> Lane:
        """The engine for a request that those in ``tried`` could not take.

        Raises ApiError 503 when none is left, or when as many requests are being answered as may be.
        """
        if self.outstanding >= self._max_requests:
            self._metrics.rejections.labels("saturated").inc()
            raise unavailable(
                "As many requests are being answered as can be. Try again later.",
                code="gateway_saturated",
                stage="backend",
            )
        able = [
            lane
            for lane in self.ready
            if model in lane.engine.status.names and lane.watch not in tried and not lane.watch.breaker.open
        ]
        if not able:
            raise not_ready()
        turn = next(self._turn)
        able = able[turn % len(able) :] + able[: turn % len(able)]  # equally busy ones take turns
        chosen = min(able, key=_busy)
        if conversation is not None and len(able) > 1:
            own = max(able, key=lambda lane: _weight(conversation, lane.watch.backend.name))
            if _busy(own) <= 2 * _busy(chosen) + _SLACK:
                return own
        return chosen

    def prepare(self, policies: Policies) -> Commit:
        """What a new policy file means for all engines. Raises PolicyError."""
        commits = [watch.prepare(policies) for watch in self.watches]

        def commit() -> None:
            for each in commits:
                each()

        return commit

    def _show(self) -> None:
        self._metrics.in_force((lane.engine.status, lane.engine.policies.values()) for lane in self.ready)


def not_ready() -> ApiError:
    """503 while no engine can take a request."""
    return unavailable("The model is not ready. Try again later.", code="engine_not_ready", stage="backend")


def _busy(lane: Lane) -> int:
    return lane.watch.backend.outstanding


def _weight(conversation: bytes, name: str) -> bytes:
    """Rendezvous hashing: when an engine leaves, only its own conversations move."""
    return hashlib.sha256(conversation + name.encode()).digest()
