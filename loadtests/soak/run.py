"""One soak of a running gateway: traffic, samples, rest, verdict."""

from __future__ import annotations

import asyncio
import time
from typing import Any, NamedTuple

from loadtests.soak.leaks import Finding, findings
from loadtests.soak.traffic import Traffic
from loadtests.soak.watch import Watch

SETTLED = 3
"""Equal samples in a row after which nothing is under way any more."""


class Result(NamedTuple):
    """What came of a soak."""

    findings: list[Finding]
    counts: dict[str, int]
    failed: dict[str, int]
    times: list[float]
    samples: list[dict[str, float]]

    @property
    def problems(self) -> list[str]:
        """Leaks and failures; empty if all is well."""
        leaks = [f"{one.name}: {one.leak}" for one in self.findings if one.leak]
        return leaks + [f"{count} × {what}" for what, count in self.failed.items()]

    @property
    def document(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return self._asdict() | {"findings": [one._asdict() for one in self.findings]}


async def soak(
    traffic: Traffic,
    watch: Watch,
    seconds: float,
    *,
    clients: int = 8,
    interval: float = 5.0,
    warm: float = 10.0,
    megabytes: float = 20.0,
) -> Result:
    """Warm up, rest, send traffic for so many seconds with a look every ``interval``, rest, and judge."""
    await traffic.run(warm, clients, seed=1)
    before = await rest(watch)
    traffic.counts.clear()
    times, samples = [], []
    began = time.monotonic()
    running = asyncio.create_task(traffic.run(seconds, clients, seed=2))
    while not running.done():
        samples.append(await asyncio.to_thread(watch.sample))
        times.append(time.monotonic() - began)
        await asyncio.wait({running}, timeout=interval)
    await running
    after = await rest(watch)
    found = findings(times, samples, before, after, megabytes, clients)
    return Result(found, dict(traffic.counts), dict(traffic.failed), times, samples)


async def rest(watch: Watch, within: float = 15.0) -> dict[str, float]:
    """What is there when nothing is asked: the first sample that repeats, or the last within the time.

    Memory may go on moving and is left out of the comparison.
    """
    last: dict[str, float] = {}
    until, equal = time.monotonic() + within, 0
    while equal < SETTLED and time.monotonic() < until:
        await asyncio.sleep(0.3)
        now = await asyncio.to_thread(watch.sample)
        state = {name: value for name, value in now.items() if not name.endswith("MB")}
        equal = equal + 1 if state == last else 0
        last, sample = state, now
    return sample
