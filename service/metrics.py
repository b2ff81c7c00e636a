"""Prometheus metrics. Every label has a small fixed set of values: never a key, user, prompt or free text.

``verdict`` is what the policy's rules said about the score, ``action`` what was done: in the mode ``observe``
they differ, and ``sum by (verdict)`` is what enforcing would have meant.

Counters whose first event matters start at zero for every value of their labels: to Prometheus a series that
appears with the value 1 has not increased.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from guard import __version__
from guard.sealed import SEAL_ERRORS
from guard.verdict import VERDICT_ERRORS, Action, EngineStatus, Mode, RuleAction
from service.errors import STAGES
from service.policy import BoundPolicy

_LOW, _HIGH = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05), (0.95, 0.99, 0.999)
_SCORES = (*_LOW, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, *_HIGH)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
_SHORT = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


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
            "guard_score", "P(unsafe) of scored prompts.", ("model",), buckets=_SCORES, registry=registry
        )
        self.score_bins = Counter(
            "guard_score_bin",
            "Scored requests by the bin of the bundle's reference that P(unsafe) falls into, lowest first.",
            ("model", "digest", "bin"),
            registry=registry,
        )
        self.score_reference = Gauge(
            "guard_score_reference",
            "Prompts in each bin when the bundle was fitted; class: benign ones that its thresholds were set "
            "on, or harmful ones.",
            ("model", "digest", "bin", "class"),
            registry=registry,
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
        self.unscored_shapes = Counter(
            "guard_unscored_shape_total",
            "Verdicts on prompts that end otherwise than those the probe was fitted on, by what was done.",
            ("policy", "model", "action"),
            registry=registry,
        )
        self.errors = Counter(
            "guard_errors_total",
            "Failures by the part that failed. closed: the client got an error; open: it got an answer.",
            ("stage", "outcome"),
            registry=registry,
        )
        for reason in (*SEAL_ERRORS, *VERDICT_ERRORS):
            self.bypass.labels(reason)
        for stage in STAGES:
            self.errors.labels(stage, "closed")
        self.errors.labels("verdict", "open")
        self.errors.labels("audit", "open")
        self.inflight = Gauge(
            "guard_inflight_requests",
            "Requests being answered, those for health, metrics and the API's description aside.",
            registry=registry,
        )
        self.outstanding = Gauge(
            "guard_upstream_outstanding_requests",
            "Requests that were sent to engines and whose answers have not ended.",
            registry=registry,
        )
        self.tasks = Gauge("guard_asyncio_tasks", "Tasks of the gateway's event loop.", registry=registry)
        self.inflight_limit = Gauge(
            "guard_inflight_requests_limit",
            "Most requests that are sent to the engine at one time; more get a 503 at once.",
            registry=registry,
        )
        self.upstream_up = Gauge(
            "guard_upstream_up",
            "1 while the engine answers and its guard passed the self-test.",
            ("backend",),
            registry=registry,
        )
        self.stopped = Counter(
            "guard_answers_stopped_total",
            "Choices of answers that the monitor stopped as they grew. style: of the policy's refusals; "
            "text: what became of the text so far.",
            ("policy", "model", "style", "text"),
            registry=registry,
        )
        self.stopped_after = Histogram(
            "guard_answer_stopped_after_tokens",
            "Tokens of a choice until the monitor stopped it.",
            ("model",),
            buckets=_TOKENS,
            registry=registry,
        )
        self.retries = Counter(
            "guard_upstream_retries_total",
            "Requests sent to another engine because no connection to the first was made.",
            registry=registry,
        )
        self.bundle_info = Gauge(
            "guard_bundle_info",
            "1 for the bundle in force. probe: the question that it answers; signed_by: the key that signed "
            "it, or none.",
            ("digest", "model", "probe", "signed_by"),
            registry=registry,
        )
        self.bundle_mismatch = Gauge(
            "guard_bundle_mismatch",
            "1 while the engine's guard runs a bundle that the policy file does not list under bundles, or "
            "that none of the keys required has signed.",
            ("backend",),
            registry=registry,
        )
        self.policy_info = Gauge(
            "guard_policy_info",
            "1 for each policy in force.",
            ("policy", "mode", "on_missing_verdict"),
            registry=registry,
        )
        self.policy_threshold = Gauge(
            "guard_policy_threshold",
            "Lowest P(unsafe) at which a policy takes an action, with the bundle in force.",
            ("policy", "model", "action"),
            registry=registry,
        )
        self.policy_reloads = Counter(
            "guard_policy_reloads_total",
            "Times that the policy file was read again. failed: the old policies stayed in force.",
            ("result",),
            registry=registry,
        )
        for result in ("done", "failed"):
            self.policy_reloads.labels(result)
        self.test_refusals = Counter(
            "guard_test_refusals_total",
            "Requests refused because they are the test string; they are in no other count of refusals.",
            ("policy",),
            registry=registry,
        )
        self.rejections = Counter(
            "guard_rejections_total",
            "Requests turned away for the load they are: rate and concurrency of their key, or saturated.",
            ("reason",),
            registry=registry,
        )
        for reason in ("rate", "concurrency", "saturated"):
            self.rejections.labels(reason)
        self.judgements = Counter(
            "guard_judgements_total",
            "Questions to judges about escalated requests. failed: the judge's on_error decided.",
            ("judge", "outcome"),
            registry=registry,
        )
        self.judge_seconds = Histogram(
            "guard_judge_seconds",
            "How long judges took to answer or to fail.",
            ("judge",),
            buckets=_LONG,
            registry=registry,
        )
        self.build_info = Gauge("guard_build_info", "1 for the version.", ("version",), registry=registry)
        self.build_info.labels(__version__).set(1)

    def in_force(self, engines: Iterable[tuple[EngineStatus, Iterable[BoundPolicy]]]) -> None:
        """Show the bundles of all ready engines and the policies as bound to them, in place of any before."""
        for family in (self.bundle_info, self.policy_info, self.policy_threshold, self.score_reference):
            family.clear()
        binned: set[tuple[str, ...]] = set()
        for status, policies in engines:
            signed_by = status.signed_by or "none"
            self.bundle_info.labels(status.bundle, status.model, status.label, signed_by).set(1)
            self.score.labels(status.model)
            binned |= self._show_reference(status)
            for bound in policies:
                self._show(status, bound)

        self._keep_bins(binned)

    def scored(self, model: str, status: EngineStatus, bundle: str, probability: float) -> None:
        """Count a score that the engine of this status gave under ``bundle``."""
        self.score.labels(model).observe(probability)
        # Between the start of another bundle and the next status the bins are not those of this score.
        if status.reference is not None and bundle == status.bundle:
            self.score_bins.labels(model, bundle, _bin(status.reference.bin_of(probability))).inc()

    def _show_reference(self, status: EngineStatus) -> set[tuple[str, ...]]:
        """The reference for each model that is served under it; returns the labels of the bins."""
        reference, shown = status.reference, set[tuple[str, ...]]()
        if reference is None:
            return shown
        for model, number in product(status.names, range(reference.bins)):
            labels = model, status.bundle, _bin(number)
            self.score_bins.labels(*labels)
            self.score_reference.labels(*labels, "benign").set(reference.benign[number])
            self.score_reference.labels(*labels, "harmful").set(reference.harmful[number])
            shown.add(labels)
        return shown

    def _keep_bins(self, wanted: set[tuple[str, ...]]) -> None:
        """Forget the bins of bundles that are no longer in force, so that series do not pile up."""
        (family,) = self.score_bins.collect()
        there = {
            (s.labels["model"], s.labels["digest"], s.labels["bin"])
            for s in family.samples
            if s.name.endswith("_total")
        }
        for labels in there - wanted:
            self.score_bins.remove(*labels)

    def _show(self, status: EngineStatus, bound: BoundPolicy) -> None:
        decision, policy = bound.decision, bound.policy
        self.policy_info.labels(bound.name, decision.mode, policy.on_missing_verdict).set(1)
        self.test_refusals.labels(bound.name)
        for rule in reversed(decision.rules):  # the first rule of an action is the one that shows
            self.policy_threshold.labels(bound.name, status.model, rule.action).set(rule.above)
        refuses = decision.unscored_shape == "refuse" and decision.mode == "enforce"
        self.unscored_shapes.labels(bound.name, status.model, "refuse" if refuses else "pass")
        if decision.monitor is not None and decision.mode == "enforce":
            self.stopped.labels(*stop_labels(bound, status.model))
            self.stopped_after.labels(status.model)
        said: list[RuleAction] = ["pass", "tag", "refuse"]
        there = {rule.action for rule in decision.rules}
        said += [action for action in ("patch", "escalate") if action in there]
        for verdict, stream in product(said, ("true", "false")):
            for action in _done(verdict, decision.mode):
                self.requests.labels(bound.name, status.model, verdict, action, decision.mode, stream)

    def known_judges(self, names: Iterable[str]) -> None:
        """Start the counters of judges at zero."""
        for name, outcome in product(names, ("safe", "unsafe", "failed")):
            self.judgements.labels(name, outcome)


def stop_labels(bound: BoundPolicy, model: str) -> tuple[str, str, str, str]:
    """The labels under which a policy's stopped choices are counted."""
    text = bound.policy.monitor.text if bound.policy.monitor is not None else "keep"
    return bound.name, model, bound.policy.refusal.style, text


def _done(verdict: RuleAction, mode: Mode) -> tuple[Action, ...]:
    if mode != "enforce":
        return ("pass",)
    if verdict == "patch":
        return ("patch", "refuse")
    return ("pass", "refuse") if verdict == "escalate" else (verdict,)


def _bin(number: int) -> str:
    """A bin's label: two digits, so that labels sort as bins do."""
    return f"{number:02}"
