"""What is looked at during a soak: processes from outside, and the gauges that they show."""

from __future__ import annotations

import contextlib
import urllib.request

import psutil
from prometheus_client.parser import text_string_to_metric_families

GAUGES = {
    "guard_inflight_requests": "requests held",
    "guard_upstream_outstanding_requests": "requests at engines",
    "guard_asyncio_tasks": "tasks",
    "guard_engine_exchanges": "exchanges",
    "guard_engine_ledger_entries": "ledger entries",
    "guard_engine_asyncio_tasks": "tasks",
    "vllm:num_requests_running": "running requests",
    "vllm:num_requests_waiting": "waiting requests",
    "vllm:kv_cache_usage_perc": "share of KV blocks",
}
"""Gauges and how they are called here. Series of one gauge are added up."""


class Watch:
    """Processes and their children by name, and the addresses of their metrics."""

    def __init__(self, processes: dict[str, int], metrics: dict[str, str]) -> None:
        self._processes = {name: psutil.Process(pid) for name, pid in processes.items()}
        self._metrics = metrics

    def sample(self) -> dict[str, float]:
        """The value of each series now."""
        found: dict[str, float] = {}
        for name, parent in self._processes.items():
            for number, process in enumerate([parent, *parent.children(recursive=True)]):
                who = name if not number else f"{name}, child {number}"
                with contextlib.suppress(psutil.NoSuchProcess):
                    found[f"{who}: MB"] = process.memory_info().rss / 1e6
                    found[f"{who}: files"] = process.num_fds()
                    found[f"{who}: threads"] = process.num_threads()
        for name, url in self._metrics.items():
            with urllib.request.urlopen(url, timeout=10) as answer:
                text = answer.read().decode()
            for family in text_string_to_metric_families(text):
                if family.name in GAUGES:
                    value = sum(sample.value for sample in family.samples)
                    found[f"{name}: {GAUGES[family.name]}"] = value
        return found
