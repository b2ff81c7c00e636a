"""The dashboard *Guard overview*: what the gateway decided, how fast, and what went wrong."""

from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as models

from deploy.dashboards import panels as p
from deploy.dashboards.expressions import TRAFFIC, in_range, per_second, quantile, ratio
from deploy.dashboards.layout import Annotation, Row, dashboard, variable

UID, TITLE = "guard-overview", "Guard overview"

_REQUESTS = "guard_requests_total"
_DRIFT = "model_digest:guard_score_bin"
"""Of the recording rules: they hold a formula of several lines."""
_OURS = 'stage!~"auth|request"'
"""Errors that are not the client's own mistakes."""
_CLOSED_TO_ALL = {"0": ("DOWN", p.BYPASS), "1": ("UP", p.PASS)}


def build() -> models.Dashboard:
    """The whole dashboard."""
    return dashboard(
        UID,
        TITLE,
        "What the guard's gateway blocks, tags and passes, how long it takes, and what fails.",
        variables=[
            variable("policy", "Policy", _REQUESTS, "policy", "Policies of the gateway."),
            variable("model", "Model", _REQUESTS, "model", "Names of the served models."),
        ],
        annotations=[_bundle_changes()],
        other=("guard-engine", "Engine"),
        rows=[
            Row("Now, and in the selected time range", _summary()),
            Row("Decisions", _decisions()),
            Row("Scores", _scores()),
            Row("Time", _time()),
            Row("Failures", _failures()),
            Row("Policies and load", _load()),
            Row("Gateway process", _process(), folded=True),
        ],
    )


def _bundle_changes() -> Annotation:
    in_force = "max by (digest, model, probe) (guard_bundle_info"
    return Annotation(
        "Bundle in force",
        f"{in_force}) unless {in_force} offset 1m)",
        title="Bundle {{digest}} in force",
        text="model {{model}}, probe {{probe}}",
        colour="blue",
    )


def _summary() -> list[p.Panel]:
    blocked = in_range(_REQUESTS, f'action="refuse",{TRAFFIC}')
    answerable = in_range(_REQUESTS, f'mode!="check",{TRAFFIC}')
    return [
        p.number(
            "Endpoint",
            "UP while every engine is reachable and its guard has passed the self-test. DOWN also when no "
            "gateway is scraped. When DOWN clients get 503: look at 'Engine as the gateway sees it' below, "
            "then at the gateway's log, which names the reason.",
            "none",
            # No gateway that could answer is an endpoint that is down.
            p.latest("min (guard_upstream_up) or vector(0)"),
            steps=p.GREEN_IF_ONE,
            words=_CLOSED_TO_ALL,
        ),
        p.number(
            "Blocked",
            "Requests refused in the time range. Compare with the same hours of other days; a jump is "
            "either an attack or a false-positive problem, and 'Blocked and tagged' shows which policy it "
            "is.",
            "short",
            p.latest(blocked),
        ),
        p.number(
            "Share blocked",
            "Refused requests as a share of all that were to be answered; score-only checks are left out. A "
            "share far above the policy's false-positive rate on ordinary traffic is worth reading the "
            "audit log.",
            "percentunit",
            p.latest(ratio(blocked, answerable)),
            decimals=None,
        ),
        p.number(
            "Bypasses",
            "Engine answers without a valid verdict. Must be 0. Otherwise the engine runs without the "
            "guard, with another key file, or something between gateway and engine changes headers: see "
            "'Bypasses by reason'.",
            "short",
            p.latest(in_range("guard_bypass_total")),
            steps=p.GREEN_IF_ZERO,
        ),
        p.number(
            "Unguarded answers",
            "Answers that reached a client without a verdict. Possible only under policies with "
            "on_missing_verdict: open. Must be 0; set the policy to closed while you look for the cause.",
            "short",
            # Counted here because this series exists from the start; that of guard_requests_total does not.
            p.latest(in_range("guard_errors_total", 'outcome="open"')),
            steps=p.GREEN_IF_ZERO,
        ),
        p.number(
            "Guard errors",
            "Requests that failed in gateway or engine, the client's own mistakes left out. Should be 0; "
            "'Errors by stage' names the part.",
            "short",
            p.latest(in_range("guard_errors_total", _OURS)),
            steps=p.GREEN_IF_ZERO,
        ),
        p.number(
            "Bundle in force",
            "First digits of the bundle's digest, and the question that its probe answers. Compare with the "
            "bundle you released; more than one means that gateways disagree.",
            "none",
            p.latest(
                'label_replace(max by (digest, probe) (guard_bundle_info{model=~"$model"}), '
                '"short", "$1", "digest", "(.{1,12}).*")',
                "{{short}} {{probe}}",
            ),
            text=options.BigValueTextMode.NAME,
        ),
        p.number(
            "Policies by mode",
            "How many policies enforce and how many only observe. An observing policy blocks nothing: make "
            "sure that every policy you rely on enforces.",
            "none",
            p.latest(
                'count by (mode) (group by (policy, mode) (guard_policy_info{policy=~"$policy"}))', "{{mode}}"
            ),
            text=options.BigValueTextMode.VALUE_AND_NAME,
            colours={"/enforce/": p.PASS, "/observe/": p.WOULD_REFUSE},
        ),
    ]


def _decisions() -> list[p.Panel]:
    stopped = "guard_answer_stopped_after_tokens"
    return [
        p.lines(
            "Blocked and tagged",
            "Requests refused or tagged each second, by policy. The main picture: a step after a change of "
            "bundle or policy is a changed threshold; a step without one is changed traffic.",
            "reqps",
            p.query(
                per_second(_REQUESTS, f'action=~"refuse|tag",{TRAFFIC}', "policy, action"),
                "{{policy}} {{action}}",
            ),
            width=24,
            height=10,
            colours={"/ tag$/": p.TAG, "/ refuse$/": p.REFUSE},
        ),
        p.lines(
            "Verdicts",
            "What the rules said about all scored requests, whatever the mode did with it; 'none' is an "
            "answer without a verdict. The total is the load on the guard.",
            "reqps",
            p.query(per_second(_REQUESTS, TRAFFIC, "verdict"), "{{verdict}}"),
            stacked=True,
            colours=p.OUTCOMES,
        ),
        p.lines(
            "What observing policies would have blocked",
            "Verdicts of policies in mode observe, which pass everything. Read before you let a policy "
            "enforce: this is what its users would have seen.",
            "reqps",
            p.query(
                per_second(_REQUESTS, f'mode="observe",verdict=~"refuse|tag",{TRAFFIC}', "policy, verdict"),
                "{{policy}} would {{verdict}}",
            ),
            colours={"/ would tag$/": p.TAG, "/ would refuse$/": p.WOULD_REFUSE},
        ),
        p.lines(
            "Answers stopped",
            "Choices that the monitor stopped as they grew, by policy and what became of their text. Empty "
            "without a policy that has a monitor. Far above the policy's rate for benign answers it is other "
            "traffic, or what the guard looks for.",
            "short",
            p.query(
                per_second("guard_answers_stopped_total", TRAFFIC, "policy, text"), "{{policy}} {{text}}"
            ),
        ),
        p.lines(
            "Tokens until a stop",
            "How many tokens of stopped choices were made. With text: keep a client has read most of them; "
            "no less than the debounce, and exact to the histogram's buckets.",
            "short",
            p.query(quantile(0.5, stopped, 'model=~"$model"'), "p50", ref="A"),
            p.query(quantile(0.95, stopped, 'model=~"$model"'), "p95", ref="B"),
        ),
    ]


def _scores() -> list[p.Panel]:
    thresholds = f'min by (policy, action) (guard_policy_threshold{{action!="pass",{TRAFFIC}}})'
    score = 'model=~"$model"'
    return [
        p.density(
            "Scores",
            "P(unsafe) of scored requests, all policies. Healthy traffic lies at the bottom; mass that "
            "moves up across a threshold means other traffic or another bundle.",
            p.buckets(f"sum by (le) (increase(guard_score_bucket{{{score}}}[$__rate_interval]))"),
            axis="P(unsafe)",
        ),
        p.lines(
            "Score quantiles and thresholds",
            "Quantiles of P(unsafe), all policies, against the probabilities (dashed) from which a policy "
            "acts. A quantile near a threshold: a small drift changes many decisions. Quantiles are as "
            "exact as the histogram's buckets.",
            "none",
            p.query(quantile(0.5, "guard_score", score), "p50", ref="A"),
            p.query(quantile(0.9, "guard_score", score), "p90", ref="B"),
            p.query(quantile(0.99, "guard_score", score), "p99", ref="C"),
            p.query(thresholds, "{{policy}} {{action}}", ref="D"),
            height=9,
            top=1,
            colours={"/ tag$/": p.TAG, "/ refuse$/": p.REFUSE},
            dashed="/ (tag|refuse)$/",
        ),
        p.lines(
            "Score drift",
            "Population stability index of the last day's scores against those that the bundle's thresholds "
            "were set on. Below 0.1 they are alike; from 0.2 on (dashed) GuardScoreDrift fires, if there are "
            "500 scores. Near the mean that chance alone gives (dashed) it says nothing yet. Empty: the "
            "bundle keeps no reference, or nothing was scored.",
            "none",
            p.query(
                f"{_DRIFT}:psi1d{{{score}}} and {_DRIFT}:increase1d{{{score}}} > 0", "{{model}}", ref="A"
            ),
            p.query(f"{_DRIFT}:psi_by_chance1d{{{score}}}", "{{model}} by chance", ref="B"),
            p.query(f"0 * max({_DRIFT}:psi1d{{{score}}}) + 0.2", "alert", ref="C"),
            width=24,
            colours={"/ by chance$/": p.LIMIT, "/^alert$/": p.REFUSE},
            dashed="/( by chance|^alert)$/",
        ),
    ]


def _time() -> list[p.Panel]:
    verdict, first = "guard_time_to_verdict_seconds", "guard_upstream_first_byte_seconds"
    return [
        p.lines(
            "Time to verdict and to the engine's first byte",
            "From a request's arrival to its verdict, against the first byte of passed answers (dashed; for "
            "answers without stream that is the whole answer). Both grow when the engine queues. Verdicts "
            "that grow alone point to checks or refusals: see the Engine dashboard's queue and prefill "
            "times.",
            "s",
            p.query(quantile(0.5, verdict), "verdict p50", ref="A"),
            p.query(quantile(0.95, verdict), "verdict p95", ref="B"),
            p.query(quantile(0.99, verdict), "verdict p99", ref="C"),
            p.query(quantile(0.5, first), "first byte p50", ref="D"),
            p.query(quantile(0.95, first), "first byte p95", ref="E"),
            dashed="/^first byte/",
        ),
        p.lines(
            "Request duration",
            "From a request's arrival to the last byte of its answer. It depends mostly on the length of "
            "answers; compare with the engine's end-to-end latency before you suspect the gateway.",
            "s",
            *_quantiles("guard_request_seconds"),
        ),
        p.lines(
            "Gateway overhead",
            "Time that the gateway itself adds before the first byte. Milliseconds; when p99 grows, give the "
            "gateway more CPU or run another.",
            "s",
            p.query(quantile(0.5, "guard_gateway_overhead_seconds"), "p50", ref="A"),
            p.query(quantile(0.99, "guard_gateway_overhead_seconds"), "p99", ref="B"),
        ),
        p.lines(
            "In flight",
            "Requests being answered, and the most that gateways send to the engine at one time (dashed). "
            "At the limit requests wait and then get 503: raise the limit only if the engine's queue is "
            "short.",
            "short",
            p.query("sum (guard_inflight_requests)", "in flight", ref="A"),
            p.query("sum (guard_inflight_requests_limit)", "limit", ref="B"),
            colours={"/^limit$/": p.LIMIT},
            dashed="/^limit$/",
        ),
    ]


def _failures() -> list[p.Panel]:
    return [
        p.lines(
            "Errors by stage",
            "Failures each second by the part that failed; 'open' ones got an answer without a verdict. "
            "auth and request are the clients' own mistakes; backend is an engine that is down, slow or "
            "full; directive and verdict point to keys or clocks; guard to a failure inside the engine; "
            "internal is a bug.",
            "reqps",
            p.query(per_second("guard_errors_total", by="stage, outcome"), "{{stage}} {{outcome}}"),
            colours={"/./": p.ERROR, "/^(auth|request) /": p.CLIENT, "/ open$/": p.BYPASS},
        ),
        p.lines(
            "Bypasses by reason",
            "Engine answers without a valid verdict. missing: the engine's guard is not active or a proxy "
            "drops headers; unknown_key and bad_mac: different key files; wrong_nonce and other_order: an "
            "answer to another request. Anything but 0 needs a person.",
            "reqps",
            p.query(per_second("guard_bypass_total", by="reason"), "{{reason}}"),
            colours={"/./": p.BYPASS},
        ),
        p.states(
            "Engine as the gateway sees it",
            "When each engine was ready, and when it served a bundle that the policy file allows. Not "
            "allowed: add the new digest under bundles, or give the engine the old bundle back.",
            {"1": ("yes", p.PASS), "0": ("no", p.BYPASS)},
            p.query("min by (backend) (guard_upstream_up)", "{{backend}} ready", ref="A"),
            p.query("1 - max by (backend) (guard_bundle_mismatch)", "{{backend}} bundle allowed", ref="B"),
            width=24,
            height=5,
        ),
    ]


def _load() -> list[p.Panel]:
    threshold = f'min by (policy) (guard_policy_threshold{{action="%s",{TRAFFIC}}})'
    return [
        p.listing(
            "Policies in force",
            "Each policy's mode, what it does when a verdict is missing, and the lowest P(unsafe) at which "
            "it acts with the bundle in force. An empty cell: it never takes that action. Check after each "
            "release of a bundle or a policy file.",
            p.rows_of(
                'max by (policy, mode, on_missing_verdict) (guard_policy_info{policy=~"$policy"})', ref="A"
            ),
            p.rows_of(threshold % "tag", ref="B"),
            p.rows_of(threshold % "refuse", ref="C"),
            transformations=[
                p.joined_by("policy"),
                p.columns(
                    {
                        "policy": "policy",
                        "mode": "mode",
                        "on_missing_verdict": "on missing verdict",
                        "Value #B": "tags from",
                        "Value #C": "refuses from",
                    },
                    hidden=["Time", "Time 1", "Time 2", "Time 3", "Value #A"],
                ),
            ],
            width=12,
        ),
        p.lines(
            "Requests by policy",
            "All requests sent to the engine, by policy. It shows whose traffic has changed when another "
            "panel moves.",
            "reqps",
            p.query(per_second(_REQUESTS, TRAFFIC, "policy"), "{{policy}}"),
            height=6,
        ),
    ]


def _process() -> list[p.Panel]:
    # Only the gateways' processes, whatever the scrape job is called.
    ours = "* on (instance, job) group_left max by (instance, job) (guard_build_info)"
    return [
        p.lines(
            "CPU cores used",
            "CPU time used by each gateway process. One process uses at most one core: near 1, run another.",
            "none",
            p.query(f"rate(process_cpu_seconds_total[$__rate_interval]) {ours}", "{{instance}}"),
            width=8,
        ),
        p.lines(
            "Memory",
            "Resident memory of each gateway process. It should level off; steady growth is a leak.",
            "bytes",
            p.query(f"process_resident_memory_bytes {ours}", "{{instance}}"),
            width=8,
        ),
        p.lines(
            "Open files",
            "File descriptors, about two for each request in flight, and the system's limit (dashed).",
            "short",
            p.query(f"process_open_fds {ours}", "{{instance}} open", ref="A"),
            p.query(f"process_max_fds {ours}", "{{instance}} limit", ref="B"),
            width=8,
            colours={"/ limit$/": p.LIMIT},
            dashed="/ limit$/",
        ),
    ]


def _quantiles(histogram: str) -> list[p.Target]:
    return [
        p.query(quantile(q, histogram), name, ref=ref)
        for ref, name, q in (("A", "p50", 0.5), ("B", "p95", 0.95), ("C", "p99", 0.99))
    ]
