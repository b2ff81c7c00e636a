"""Steady load on the gateways that say they are ready, and what was wrong with any answer.

Clients choose gateways as a load balancer does: they ask ``/readyz`` from time to time and send nothing to
one that does not answer 200. Nothing is sent twice: what fails has failed.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import httpx
import openai

GUARDED = ("pass", "refuse")
"""Actions of an answer that the engine has judged, under policies that only refuse."""


@dataclass(frozen=True)
class Prompts:
    """What is asked: one question that the guard passes, and one that it refuses."""

    model: str
    harmless: str
    harmful: str
    max_tokens: int = 24


@dataclass
class Report:
    """What the clients saw."""

    asked: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    """Answers by question, whether they were streamed, and what the guard did."""
    failed: list[str] = field(default_factory=list)
    """Every request without a whole answer."""
    unguarded: list[str] = field(default_factory=list)
    """Every answer without a verdict, and every one that enforcing would have refused."""


class Load:
    """Clients in threads of their own."""

    def __init__(self, gateways: Sequence[str], prompts: Prompts, pause: float, probe: float) -> None:
        self._gateways = gateways
        self._prompts = prompts
        self._pause = pause
        self._probe = probe
        self._ready: tuple[str, ...] = tuple(gateways)
        self._turn = itertools.count()
        self._lock = threading.Lock()
        self._over = threading.Event()
        self.enforced = threading.Event()
        """Set from the moment that every gateway enforces."""
        self.report = Report()

    def probe(self) -> None:
        """What a load balancer does."""
        with httpx.Client(timeout=2.0) as client:
            while not self._over.wait(self._probe):
                ready = []
                for url in self._gateways:
                    with contextlib.suppress(httpx.HTTPError):
                        if client.get(f"{url}/readyz").status_code == 200:
                            ready.append(url)
                self._ready = tuple(ready)

    def run(self) -> None:
        """One client: question after question until it is over."""
        clients = {
            url: openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60.0)
            for url in self._gateways
        }
        try:
            while not self._over.wait(self._pause):
                turn = next(self._turn)
                ready = self._ready
                if not ready:
                    self._failed("there is no gateway that is ready")
                    continue
                self._ask(clients[ready[turn % len(ready)]], harmful=turn % 3 == 2, stream=turn % 2 == 1)
        finally:
            for client in clients.values():
                client.close()

    def stop(self) -> None:
        """Ask nothing more."""
        self._over.set()

    def _failed(self, what: str) -> None:
        with self._lock:
            self.report.asked += 1
            self.report.failed.append(f"{time.strftime('%X')} {what}")

    def _ask(self, client: openai.OpenAI, harmful: bool, stream: bool) -> None:
        enforced = self.enforced.is_set()  # before it is sent
        name = f"{'harmful' if harmful else 'harmless'}, {'streamed' if stream else 'whole'}"
        try:
            action = self._answer(client, harmful, stream)
        except (openai.OpenAIError, httpx.HTTPError, ValueError) as error:
            self._failed(f"{name} at {client.base_url}: {type(error).__name__}: {error}")
            return
        with self._lock:
            self.report.asked += 1
            self.report.kinds[f"{name}: {action}"] += 1
            if action not in GUARDED or (enforced and harmful and action != "refuse"):
                self.report.unguarded.append(f"{time.strftime('%X')} {name} at {client.base_url}: {action}")

    def _answer(self, client: openai.OpenAI, harmful: bool, stream: bool) -> str:
        """What the guard did, once the answer is here to its end. Raises ValueError when it has none."""
        text = self._prompts.harmful if harmful else self._prompts.harmless
        asked = client.chat.completions.with_raw_response.create(
            model=self._prompts.model,
            messages=[{"role": "user", "content": text}],
            max_tokens=self._prompts.max_tokens,
            stream=stream,
        )
        action = str(asked.headers.get("x-guard-action", "none"))
        answer = asked.parse()
        if isinstance(answer, openai.Stream):
            reasons = [choice.finish_reason for chunk in answer for choice in chunk.choices]
            ended = bool(reasons) and reasons[-1] is not None
        else:
            ended = answer.choices[0].finish_reason is not None
        if not ended:
            raise ValueError("the answer has no end")
        return action


@contextlib.contextmanager
def load(
    gateways: Sequence[str], prompts: Prompts, *, clients: int = 2, pause: float = 0.1, probe: float = 0.3
) -> Iterator[Load]:
    """Load while the block runs. The report is complete after it.

    ``pause`` and ``probe`` are seconds: between two questions of a client, and between two looks at whether
    gateways are ready.
    """
    found = Load(gateways, prompts, pause, probe)
    threads = [threading.Thread(target=found.probe)]
    threads += [threading.Thread(target=found.run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        found.stop()
        for thread in threads:
            thread.join(120)
