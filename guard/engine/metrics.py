"""Counters of the engine's API server, exposed beside vLLM's own on its ``/metrics``.

They cover all traffic, also what reaches vLLM without passing the gateway (``source="direct"``).
"""

from prometheus_client import Counter

VERDICTS = Counter(
    "guard_engine_verdicts",
    "Verdicts given by the engine, by the action taken, the policy's mode and where the request came from.",
    ("action", "mode", "source"),
)
DIRECTIVE_ERRORS = Counter(
    "guard_engine_directive_errors", "Requests refused because their directive was not valid.", ("reason",)
)
MISSING_VERDICTS = Counter(
    "guard_engine_missing_verdicts", "Directed requests that were not answered because no verdict was bound."
)
