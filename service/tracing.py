"""Traces: a client's ``traceparent`` goes on to the engine, and spans go to a collector if one is set.

The packages of OpenTelemetry are needed for the second only (``neuronguard[otlp]``). A trace holds what the
audit log holds: never a prompt, an answer or a key. The names of attributes stand here and nowhere else,
since the conventions for guardrails of generative models are not stable yet.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from service.errors import ConfigError
from service.settings import Settings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span as OtelSpan

POLICY = "guard.policy"
MODE = "guard.mode"
VERDICT = "guard.verdict"
ACTION = "guard.action"
BUNDLE = "guard.bundle"
PROBABILITY = "guard.probability"
JUDGE = "guard.judge"
ERROR = "error.type"
MODEL = "gen_ai.request.model"
ENGINE = "server.address"
ROUTE = "http.route"
STATUS = "http.response.status_code"

_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

Value = str | int | float | bool | None


class Span(Protocol):
    """One piece of work."""

    traceparent: str | None
    """What those who are asked to do a part of it are sent."""

    def child(self, name: str) -> Span:
        """A part of it."""

    def end(self, attributes: Mapping[str, Value]) -> None:
        """It is over. Attributes that are None are left out."""


class Passing:
    """Without a collector: the client's own ``traceparent`` goes on as it is."""

    def __init__(self, traceparent: str | None) -> None:
        self.traceparent = traceparent

    def child(self, name: str) -> Passing:
        """Itself: nothing is recorded."""
        return self

    def end(self, attributes: Mapping[str, Value]) -> None:
        """Nothing to do."""


class Tracing:
    """Makes the span of each request."""

    def __init__(self, settings: Settings) -> None:
        """Raises ConfigError when a collector is set and the packages are not installed."""
        self._provider = None if settings.otlp_endpoint is None else _provider(str(settings.otlp_endpoint))

    def request(self, name: str, headers: Mapping[str, str]) -> Span:
        """The span of one request, a part of the client's if it sent one."""
        sent = headers.get("traceparent", "")
        parent = sent if _TRACEPARENT.fullmatch(sent) else None
        if self._provider is None:
            return Passing(parent)
        return _Recorded.root(self._provider, name, parent)

    def close(self) -> None:
        """Send what is left; blocks for some seconds at most."""
        if self._provider is not None:
            self._provider.shutdown()


class _Recorded:
    """A span that goes to the collector."""

    def __init__(self, provider: TracerProvider, span: OtelSpan) -> None:
        self._provider = provider
        self._span = span
        context = span.get_span_context()
        self.traceparent: str | None = (
            f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"
        )

    @classmethod
    def root(cls, provider: TracerProvider, name: str, parent: str | None) -> _Recorded:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = TraceContextTextMapPropagator().extract({"traceparent": parent} if parent else {})
        tracer = provider.get_tracer("neuronguard")
        return cls(provider, tracer.start_span(name, context=context, kind=SpanKind.SERVER))

    def child(self, name: str) -> _Recorded:
        from opentelemetry.trace import SpanKind, set_span_in_context

        tracer = self._provider.get_tracer("neuronguard")
        context = set_span_in_context(self._span)
        return _Recorded(self._provider, tracer.start_span(name, context=context, kind=SpanKind.CLIENT))

    def end(self, attributes: Mapping[str, Value]) -> None:
        for name, value in attributes.items():
            if value is not None:
                self._span.set_attribute(name, value)
        self._span.end()


def _provider(endpoint: str) -> TracerProvider:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            f"NEURONGUARD_OTLP_ENDPOINT needs the package {error.name}; install neuronguard[otlp]."
        ) from error
    provider = TracerProvider(resource=Resource.create({"service.name": "neuronguard-gateway"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=5)))
    return provider
