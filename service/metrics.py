"""Prometheus metrics. Every label has a small fixed set of values: never a key, user, prompt or free text.

``verdict`` is what the policy's rules said about the score, ``action`` what was done: in the mode ``observe``
they differ, and ``sum by (verdict)`` is what enforcing would have meant.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SCORES = (
    0.001,
    0.002,
    0.005,
    0.01,
    0.02,
    0.05,
    0.1,
    0.2,
    0.3,
    0.4,
    0.5,
    0.6,
    0.7,
    0.8,
    0.9,
    0.95,
    0.99,
    0.999,
)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
_SHORT = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)


class Metrics:
    """All metrics of one gateway, in one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.requests = Counter(
            "guard_requests_total",
            "Requests sent to the engine. verdict: what the rules said; action: what was done; "
            "'none': no valid verdict, 'unguarded': answered without one.",
            ("policy", "model", "verdict", "action", "mode", "stream"),
            registry=registry,
        )
        self.score = Histogram(
            "guard_score", "P(unsafe) of scored requests.", ("model",), buckets=_SCORES, registry=registry
        )
        self.time_to_verdict = Histogram(
            "guard_time_to_verdict_seconds",
            "From the arrival of a request's body to its verdict, for streams, checks and refusals. Left out "
            "are passed answers without stream, whose verdict travels with the whole answer.",
            buckets=_LONG,
            registry=registry,
        )
        self.request_seconds = Histogram(
            "guard_request_seconds",
            "From the arrival of a request to the last byte of its answer, if it was sent to the engine.",
            buckets=_LONG,
            registry=registry,
        )
        self.first_byte = Histogram(
            "guard_upstream_first_byte_seconds",
            "From sending a request to the engine to the first byte of a passed answer.",
            buckets=_LONG,
            registry=registry,
        )
        self.overhead = Histogram(
            "guard_gateway_overhead_seconds",
            "Time that the gateway itself adds before the first byte: from the arrival of a request's body "
            "to sending it on, and from the engine's verdict to the answer's status line.",
            buckets=_SHORT,
            registry=registry,
        )
        self.bypass = Counter(
            "guard_bypass_total",
            "Answers of the engine without a valid verdict. Not shown to clients, unless the policy says "
            "on_missing_verdict: open.",
            ("reason",),
            registry=registry,
        )
        self.errors = Counter(
            "guard_errors_total",
            "Failures by the part that failed. closed: the client got an error; open: it got an answer.",
            ("stage", "outcome"),
            registry=registry,
        )
        self.inflight = Gauge("guard_inflight_requests", "Requests being answered.", registry=registry)
        self.upstream_up = Gauge(
            "guard_upstream_up",
            "1 while the engine answers and its guard passed the self-test.",
            ("backend",),
            registry=registry,
        )
        self.bundle_info = Gauge(
            "guard_bundle_info",
            "1 for the bundle in force. probe: the question that it answers.",
            ("digest", "model", "probe"),
            registry=registry,
        )
