"""The dashboard *Engine*: the guard inside vLLM beside vLLM's own figures."""

from grafana_foundation_sdk.models import dashboard as models

from deploy.dashboards import panels as p
from deploy.dashboards.expressions import in_range, mean, per_second, quantile, ratio
from deploy.dashboards.layout import Row, dashboard, variable

UID, TITLE = "guard-engine", "Engine"

_MODEL = 'model_name=~"$model"'
_VERDICTS = "guard_engine_verdicts_total"


def build() -> models.Dashboard:
    """The whole dashboard."""
    return dashboard(
        UID,
        TITLE,
        "The guarded vLLM server: verdicts given inside the engine, and vLLM's own load and latency.",
        variables=[
            variable(
                "model",
                "Model",
                "vllm:num_requests_running",
                "model_name",
                "Names of the served models; chooses vLLM's series, the guard's cover the whole engine.",
            )
        ],
        annotations=[],
        other=("guard-overview", "Guard overview"),
        rows=[
            Row("Now, and in the selected time range", _summary()),
            Row("Guard in the engine", _guard()),
            Row("Load", _load()),
            Row("Latency", _latency()),
        ],
    )


def _summary() -> list[p.Panel]:
    return [
        p.number(
            "Guard",
            "READY once the start-up self-test of every engine has passed. NOT READY also while no engine is "
            "scraped. An engine that stays so has failed its self-test: its log names the difference.",
            "none",
            # No engine that could answer is a guard that is not ready.
            p.latest("min (guard_engine_ready) or vector(0)"),
            steps=p.GREEN_IF_ONE,
            words={"0": ("NOT READY", p.BYPASS), "1": ("READY", p.PASS)},
        ),
        p.number(
            "Direct requests",
            "Verdicts for requests that did not come through the gateway, so that no policy, API key or "
            "audit log covered them. Should be 0: close the engine's port to everything but the gateway.",
            "short",
            p.latest(in_range(_VERDICTS, 'source="direct"')),
            steps=((None, p.PASS), (0.5, p.DIRECT)),
        ),
        p.number(
            "Invalid directives",
            "Requests refused because their signed directive was invalid. A few at an engine's restart are "
            "normal. Otherwise engine and gateway have different key files or clocks, or somebody forges "
            "directives.",
            "short",
            p.latest(in_range("guard_engine_directive_errors_total")),
            steps=p.GREEN_IF_ZERO,
        ),
        p.number(
            "Missing verdicts",
            "Directed requests that the engine did not answer because no verdict was bound to them. Must be "
            "0; report it with the engine's log.",
            "short",
            p.latest(in_range("guard_engine_missing_verdicts_total")),
            steps=p.GREEN_IF_ZERO,
        ),
        p.number(
            "Running",
            "Requests that the engine computes now.",
            "short",
            p.latest(f"sum (vllm:num_requests_running{{{_MODEL}}})"),
        ),
        p.number(
            "Waiting",
            "Requests in the engine's queue now. If it is not 0 for minutes, the engine is too small for its "
            "load, and verdicts are as late as first tokens.",
            "short",
            p.latest(f"sum (vllm:num_requests_waiting{{{_MODEL}}})"),
        ),
        p.number(
            "KV cache",
            "Share of the KV cache in use, the fullest engine. Near 100 % requests wait or are preempted.",
            "percentunit",
            p.latest(f"max (vllm:kv_cache_usage_perc{{{_MODEL}}})"),
        ),
        p.number(
            "Preemptions",
            "Requests thrown out of the KV cache and computed again. Some under load are harmless; many mean "
            "that the KV cache is too small for the context lengths in use.",
            "short",
            p.latest(in_range("vllm:num_preemptions_total", _MODEL)),
        ),
    ]


def _guard() -> list[p.Panel]:
    return [
        p.lines(
            "Verdicts by source and action",
            "Verdicts each second. 'direct' is traffic that did not pass the gateway; it is guarded by the "
            "bundle's default threshold only, and should not exist in production.",
            "reqps",
            p.query(per_second(_VERDICTS, by="source, action"), "{{source}} {{action}}"),
            height=9,
            colours=p.OUTCOMES | {"/^direct /": p.DIRECT},
        ),
        p.lines(
            "Share of direct traffic",
            "Verdicts for requests that did not pass the gateway, as a share of all. Anything above 0: find "
            "the client and close the way.",
            "percentunit",
            p.query(ratio(per_second(_VERDICTS, 'source="direct"'), per_second(_VERDICTS)), "direct"),
            height=9,
            top=1,
            colours={"/direct/": p.DIRECT},
        ),
        p.lines(
            "Invalid directives by reason",
            "unknown_key and bad_mac: engine and gateway have different key files. no_key_file: the engine "
            "has none. expired: clocks differ, or requests travel for longer than a directive lives. "
            "wrong_audience: the engine has restarted, and the gateway does not know yet; a few are normal. "
            "too_many_live_directives: more requests than the engine keeps in mind. malformed, too_long, "
            "replayed and wrong_body: an attacker or a faulty proxy.",
            "reqps",
            p.query(per_second("guard_engine_directive_errors_total", by="reason"), "{{reason}}"),
            colours={"/./": p.ERROR},
        ),
        p.lines(
            "Missing verdicts",
            "Directed requests not answered because no verdict was bound. Clients got an error, not an "
            "unguarded answer. Anything but 0 is a fault of the guard.",
            "reqps",
            p.query(per_second("guard_engine_missing_verdicts_total"), "missing"),
            width=6,
            colours={"/./": p.BYPASS},
        ),
        p.states(
            "Self-test",
            "When each engine's guard was ready. A gap is a restart; an engine that does not come back has "
            "failed its self-test.",
            {"1": ("ready", p.PASS), "0": ("not ready", p.BYPASS)},
            p.query("max by (instance) (guard_engine_ready)", "{{instance}}"),
            width=6,
        ),
        p.lines(
            "Watched answers",
            "Answers that were stopped as they grew. observed: under policies that only observe, and would "
            "have been stopped; read before you let a policy enforce. failed: their scores did not come, and "
            "they ended in an error. Anything but 0 there is a fault of the guard.",
            "reqps",
            p.query(per_second("guard_engine_stops_total", by="source, outcome"), "{{source}} {{outcome}}"),
            colours={"/ stopped$/": p.REFUSE, "/ observed$/": p.WOULD_REFUSE, "/ failed$/": p.BYPASS},
        ),
        p.lines(
            "Tokens until a stop",
            "Tokens of an answer when it was stopped, or would have been. Exact to the histogram's buckets.",
            "short",
            p.query(quantile(0.5, "guard_engine_stop_tokens"), "p50", ref="A"),
            p.query(quantile(0.95, "guard_engine_stop_tokens"), "p95", ref="B"),
        ),
        p.listing(
            "Engines",
            "Bundle and versions of each engine. Rows that differ are a roll-out in progress or one that "
            "stopped half-way.",
            p.rows_of(
                "max by (instance, model, label, bundle, guard_version, vllm_version) (guard_engine_info)"
            ),
            transformations=[
                p.columns(
                    {
                        "instance": "engine",
                        "model": "model",
                        "label": "probe",
                        "bundle": "bundle",
                        "guard_version": "guard",
                        "vllm_version": "vLLM",
                    },
                    hidden=["Time", "Value"],
                )
            ],
        ),
    ]


def _load() -> list[p.Panel]:
    return [
        p.lines(
            "Requests running and waiting",
            "A queue that does not drain is overload: add engines or lower the gateway's limit of requests "
            "in flight.",
            "short",
            p.query(f"sum (vllm:num_requests_running{{{_MODEL}}})", "running", ref="A"),
            p.query(f"sum (vllm:num_requests_waiting{{{_MODEL}}})", "waiting", ref="B"),
            width=8,
        ),
        p.lines(
            "KV cache use",
            "Share of the KV cache in use, by engine. At 100 % requests are preempted.",
            "percentunit",
            p.query(
                f"max by (instance, engine) (vllm:kv_cache_usage_perc{{{_MODEL}}})",
                "{{instance}} {{engine}}",
            ),
            width=8,
            top=1,
        ),
        p.lines(
            "Preemptions",
            "Requests thrown out of the KV cache each second and computed again later; their users wait.",
            "reqps",
            p.query(per_second("vllm:num_preemptions_total", _MODEL), "preempted"),
            width=8,
        ),
        p.lines(
            "Tokens",
            "Tokens read and written each second. The guard works on prompts: refused requests cost prompt "
            "tokens and hardly any written ones.",
            "short",
            p.query(per_second("vllm:prompt_tokens_total", _MODEL), "prompt", ref="A"),
            p.query(per_second("vllm:generation_tokens_total", _MODEL), "generation", ref="B"),
            width=8,
        ),
        p.lines(
            "Requests finished by reason",
            "stop: the model ended the answer; length: it was cut at its limit; abort: the client left, or "
            "the engine dropped the request; error: vLLM failed.",
            "reqps",
            p.query(
                per_second("vllm:request_success_total", _MODEL, "finished_reason"), "{{finished_reason}}"
            ),
            width=8,
            stacked=True,
            colours={"/stop/": p.PASS, "/length/": p.CHECKED, "/abort/": p.CLIENT, "/error/": p.ERROR},
        ),
        p.lines(
            "Prefix cache hit rate",
            "Share of prompt tokens found in the prefix cache; 0 while nothing is asked. A drop means other "
            "system prompts or a cache that is too small.",
            "percentunit",
            p.query(
                ratio(
                    per_second("vllm:prefix_cache_hits_total", _MODEL),
                    per_second("vllm:prefix_cache_queries_total", _MODEL),
                ),
                "hits",
            ),
            width=8,
            top=1,
        ),
    ]


def _latency() -> list[p.Panel]:
    return [
        p.lines(
            "Time to first token",
            "vLLM's own measure, which includes queueing. The guard's verdict is ready no later than this "
            "token.",
            "s",
            *_quantiles("vllm:time_to_first_token_seconds"),
        ),
        p.lines(
            "Time between tokens",
            "How fast answers flow. It grows with the batch; the guard does no work here.",
            "s",
            *_quantiles("vllm:inter_token_latency_seconds"),
        ),
        p.lines(
            "End-to-end latency",
            "From a request's arrival at the engine to its last token. Compare with the gateway's request "
            "duration: the difference is gateway and network.",
            "s",
            *_quantiles("vllm:e2e_request_latency_seconds"),
        ),
        p.lines(
            "Where the time goes",
            "Mean time of a request in queue, prefill and decode. Queue: too much load. Prefill: long "
            "prompts. Decode: long answers. Means, because the lowest of vLLM's buckets is 0.3 s.",
            "s",
            *(
                p.query(mean(f"vllm:request_{stage}_time_seconds", _MODEL), stage, ref=ref)
                for ref, stage in zip("ABC", ("queue", "prefill", "decode"), strict=True)
            ),
        ),
    ]


def _quantiles(histogram: str) -> list[p.Target]:
    return [
        p.query(quantile(q, histogram, _MODEL), name, ref=ref)
        for ref, name, q in (("A", "p50", 0.5), ("B", "p95", 0.95), ("C", "p99", 0.99))
    ]
