"""Counters of the engine's API server, exposed beside vLLM's own on its ``/metrics``.

They cover all traffic, also what reaches vLLM without passing the gateway (``source="direct"``). Every
counter starts at zero for each value of its labels, so that Prometheus sees the first event as an increase.
"""

from itertools import product

from prometheus_client import Counter, Gauge, Histogram

from guard.sealed import SEAL_ERRORS
from guard.verdict import DIRECTIVE_ERRORS as REASONS
from guard.verdict import EngineStatus, Mode, RuleAction

VERDICTS = Counter(
    "guard_engine_verdicts",
    "Verdicts given by the engine, by the action taken, the policy's mode and where the request came from.",
    ("action", "mode", "source"),
)
UNSCORED_SHAPES = Counter(
    "guard_engine_unscored_shapes",
    "Verdicts on prompts that end otherwise than those the probe was fitted on.",
    ("action", "source"),
)
DIRECTIVE_ERRORS = Counter(
    "guard_engine_directive_errors", "Requests refused because their directive was not valid.", ("reason",)
)
MISSING_VERDICTS = Counter(
    "guard_engine_missing_verdicts", "Directed requests that were not answered because no verdict was bound."
)
CLOSED_ROUTES = Counter(
    "guard_engine_closed_routes", "Requests for routes of vLLM that a guarded engine does not answer."
)
EXCHANGES = Gauge(
    "guard_engine_exchanges",
    "Engine requests of HTTP requests that are being followed to their verdict or end.",
)
LEDGER = Gauge(
    "guard_engine_ledger_entries",
    "Requests in the scheduler's ledger when it last gave a verdict or let a judged request go.",
)
TASKS = Gauge("guard_engine_asyncio_tasks", "Tasks of the API server's event loop.")
STOPS = Counter(
    "guard_engine_stops",
    "Answers that were stopped as they grew, would have been (observed), or had no scores (failed).",
    ("outcome", "source"),
)
STOP_TOKENS = Histogram(
    "guard_engine_stop_tokens",
    "Tokens of an answer that had been scored when it was stopped, or would have been.",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
)
READY = Gauge("guard_engine_ready", "1 from the moment that the start-up self-test has passed.")
INFO = Gauge(
    "guard_engine_info",
    "1 for the bundle and the versions of this engine.",
    ("bundle", "model", "label", "guard_version", "vllm_version"),
)

_ACTIONS: tuple[RuleAction, ...] = ("pass", "tag", "patch", "escalate", "refuse")
_MODES: tuple[Mode, ...] = ("enforce", "observe")

for _action, _mode, _source in product(_ACTIONS, _MODES, ("gateway", "direct")):
    # Observed requests all pass.
    if _mode == "enforce" or _action == "pass":
        VERDICTS.labels(_action, _mode, _source)
for _source in ("gateway", "direct"):
    UNSCORED_SHAPES.labels("refuse", _source)
    UNSCORED_SHAPES.labels("pass", _source)
    VERDICTS.labels("error", "enforce", _source)
    for _outcome in ("stopped", "observed", "failed"):
        STOPS.labels(_outcome, _source)
for _reason in (*SEAL_ERRORS, *REASONS):
    DIRECTIVE_ERRORS.labels(_reason)


def show(status: EngineStatus) -> None:
    """Expose what this engine is and whether it may answer."""
    READY.set(status.state == "ready")
    INFO.labels(status.bundle, status.model, status.label, status.guard_version, status.vllm_version).set(1)
