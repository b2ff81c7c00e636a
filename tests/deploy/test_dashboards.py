import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client import REGISTRY, CollectorRegistry, Metric, ProcessCollector

import guard.engine.metrics
from deploy.dashboards.__main__ import FOLDER, main, outdated, render, rendered
from deploy.dashboards.queries import Query, concrete, panels, queries
from service.metrics import Metrics
from tests.deploy.alerting import RULES

PROVISIONING = FOLDER.parent / "provisioning"

# vLLM is not imported here; these are the names in vllm/v1/metrics/loggers.py of 0.32, as it exports them.
VLLM = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:num_preemptions_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:request_queue_time_seconds_sum",
    "vllm:request_queue_time_seconds_count",
    "vllm:request_prefill_time_seconds_sum",
    "vllm:request_prefill_time_seconds_count",
    "vllm:request_decode_time_seconds_sum",
    "vllm:request_decode_time_seconds_count",
}
# Its labels, beside those that Prometheus adds to every series.
VLLM_LABELS = {"model_name", "engine", "finished_reason", "le"}
TARGET_LABELS = {"instance", "job"}


def _read(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return loaded


DASHBOARDS = {name: _read(name) for name in ("guard-overview.json", "engine.json")}
PANELS = [
    pytest.param(panel, id=f"{board['uid']}-{panel['title']}")
    for board in DASHBOARDS.values()
    for panel in panels(board)
]
QUERIES = [query for board in DASHBOARDS.values() for query in queries(board)]


def _labels() -> dict[str, set[str]]:
    """Every series name that gateway, engine and their process collectors export, with its labels."""
    gateway = CollectorRegistry()
    ProcessCollector(registry=gateway)
    own = {name: metric for name, metric in vars(Metrics(gateway)).items() if hasattr(metric, "_labelnames")}
    engine = vars(guard.engine.metrics)
    found: dict[str, set[str]] = dict.fromkeys(VLLM, VLLM_LABELS)
    for metric in (*own.values(), *engine.values()):
        if not hasattr(metric, "_labelnames"):
            continue
        family: Metric = metric.describe()[0]
        labels = set(metric._labelnames)
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(
            family.type, ("",)
        )
        for suffix in suffixes:
            found[family.name + suffix] = labels | ({"le"} if suffix == "_bucket" else set())
    for family in gateway.collect():
        if family.name.startswith("process_"):
            for sample in family.samples:
                found[sample.name] = set()
    return found


# The labels that a recorded series has are the first part of its name.
RECORDED = {
    rule["record"]: set(rule["record"].partition(":")[0].split("_")) for rule in RULES if "record" in rule
}
KNOWN = _labels() | RECORDED


def _selectors(node: Any) -> Iterator[promql_parser.VectorSelector]:
    if isinstance(node, promql_parser.VectorSelector):
        yield node
        return
    for name in ("expr", "lhs", "rhs", "vector_selector", "param"):
        if (child := getattr(node, name, None)) is not None:
            yield from _selectors(child)
    for argument in getattr(node, "args", None) or ():
        yield from _selectors(argument)


def _parsed(query: Query) -> Any:
    return promql_parser.parse(concrete(query.expr))


def _name(query: Query) -> str:
    return f"{query.dashboard}-{query.panel}"


def test_files_are_what_the_code_says() -> None:
    assert outdated(FOLDER) == [], "run: python -m deploy.dashboards"
    assert rendered().keys() == {path.name for path in FOLDER.iterdir()} == DASHBOARDS.keys()


def test_the_command_writes_and_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"], tmp_path) == 1
    assert main([], tmp_path) == 0
    assert main(["--check"], tmp_path) == 0
    assert not capsys.readouterr().out
    (tmp_path / "engine.json").write_text("{}")
    (tmp_path / "stray.json").write_text("{}")
    capsys.readouterr()
    assert main(["--check"], tmp_path) == 1
    said = capsys.readouterr().err
    assert "engine.json is out of date" in said
    assert "stray.json" in said
    assert "guard-overview.json" not in said


@pytest.mark.parametrize("name", DASHBOARDS)
def test_the_sdk_reads_back_what_it_wrote(name: str) -> None:
    register_default_plugins()  # without these, panels' options are read as bags of anything
    original = _read(name)
    again = json.loads(render(Dashboard.from_json(_read(name))))
    # Reading, the SDK writes out default drawing options where a panel has none.
    for read, written in zip(panels(again), panels(original), strict=True):
        if "custom" not in written["fieldConfig"]["defaults"]:
            read["fieldConfig"]["defaults"].pop("custom", None)
    # The SDK's annotation has no fields for what the Prometheus data source adds.
    for annotation in original["annotations"]["list"]:
        assert annotation.keys() >= {"titleFormat", "textFormat", "step"}
        for field in ("titleFormat", "textFormat", "step"):
            del annotation[field]
    assert again == original


@pytest.mark.parametrize("name", DASHBOARDS)
def test_ids_are_unique_and_nothing_overlaps(name: str) -> None:
    board = DASHBOARDS[name]
    everything = [panel for top in board["panels"] for panel in (top, *top.get("panels", ()))]
    assert max(Counter(panel["id"] for panel in everything).values()) == 1
    assert all(panel["id"] > 0 for panel in everything)
    for panel in everything:
        place = panel["gridPos"]
        assert place["w"] > 0
        assert place["h"] > 0
        assert 0 <= place["x"] <= 24 - place["w"]
    for one, other in combinations(everything, 2):
        a, b = one["gridPos"], other["gridPos"]
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        below = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or below, (one["title"], other["title"])


@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_line_of_panels_is_full(name: str) -> None:
    widths: Counter[int] = Counter()
    for panel in panels(DASHBOARDS[name]):
        widths[panel["gridPos"]["y"]] += panel["gridPos"]["w"]
    assert set(widths.values()) == {24}


@pytest.mark.parametrize("panel", PANELS)
def test_every_panel_is_complete(panel: dict[str, Any]) -> None:
    assert panel["title"].strip()
    assert len(panel["description"]) > 20
    assert panel["fieldConfig"]["defaults"]["unit"]
    source = {"type": "prometheus", "uid": "${datasource}"}
    assert panel["datasource"] == source
    assert panel["targets"]
    assert all(target["datasource"] == source for target in panel["targets"])
    assert max(Counter(target["refId"] for target in panel["targets"]).values()) == 1
    if panel["type"] in ("timeseries", "statetimeline") and len(panel["targets"]) > 1:
        assert all(target["legendFormat"] for target in panel["targets"])


def test_titles_and_uids_are_unique() -> None:
    for board in DASHBOARDS.values():
        assert max(Counter(panel["title"] for panel in panels(board)).values()) <= 2
    assert {board["uid"] for board in DASHBOARDS.values()} == {"guard-overview", "guard-engine"}


def test_dashboards_link_to_each_other_and_to_the_guide() -> None:
    links = {board["uid"]: {link["url"] for link in board["links"]} for board in DASHBOARDS.values()}
    assert "/d/guard-engine" in links["guard-overview"]
    assert "/d/guard-overview" in links["guard-engine"]
    assert all("/public/neuronguard/operations.txt" in urls for urls in links.values())


@pytest.mark.parametrize("name", DASHBOARDS)
def test_variables_offer_all_values(name: str) -> None:
    source, *others = DASHBOARDS[name]["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == ("datasource", "datasource", "prometheus")
    assert source["current"]["value"] == "prometheus"
    assert others
    for variable in others:
        assert variable["multi"]
        assert variable["includeAll"]
        assert variable["allValue"] == ".*"


@pytest.mark.parametrize("query", QUERIES, ids=_name)
def test_every_query_asks_for_series_and_labels_that_exist(query: Query) -> None:
    selectors = list(_selectors(_parsed(query)))
    assert selectors
    for selector in selectors:
        assert selector.name in KNOWN, query
        for matcher in selector.matchers.matchers:
            assert matcher.name in KNOWN[str(selector.name)] | TARGET_LABELS, query


@pytest.mark.parametrize("query", QUERIES, ids=_name)
def test_every_aggregation_is_by_labels_that_exist(query: Query) -> None:
    expr = concrete(query.expr)
    names = {selector.name for selector in _selectors(_parsed(query))}
    labels = TARGET_LABELS.union(*(KNOWN[str(name)] for name in names))
    for group in re.findall(r"\bby \(([^)]*)\)", expr):
        assert {label.strip() for label in group.split(",")} <= labels, query


@pytest.mark.parametrize("query", QUERIES, ids=_name)
def test_every_label_with_a_variable_is_filtered(query: Query) -> None:
    """A panel that ignored the choice of policies or models would show other traffic than its neighbours."""
    if not re.match(r"(variable|annotation) ", query.panel):
        for selector in _selectors(_parsed(query)):
            matched = {matcher.name for matcher in selector.matchers.matchers}
            wanted = {"policy", "model", "model_name"} & KNOWN[str(selector.name)]
            # These lists show what an engine is, whichever model is chosen.
            if selector.name not in ("guard_engine_info",):
                assert wanted <= matched, query


def test_rates_follow_the_zoom_and_counts_the_range() -> None:
    for query in QUERIES:
        windows = set(re.findall(r"\[([^\]]*)\]", query.expr))
        assert windows <= {"$__rate_interval", "$__range"}, query
    for board in DASHBOARDS.values():
        for panel in panels(board):
            for target in panel["targets"]:
                assert ("[$__range]" in target["expr"]) <= target["instant"], panel["title"]


def test_only_the_endpoint_and_the_guard_take_absence_for_zero() -> None:
    absent = {query.panel for query in QUERIES if "vector(0)" in query.expr}
    assert absent == {"Endpoint / A", "Guard / A"}


def test_concrete_replaces_every_form_of_a_variable() -> None:
    given = 'sum(rate(a_total{policy=~"$policy",model=~"${model:regex}"}[$__rate_interval])) / b[$__range]'
    assert concrete(given, "2m", "1h") == 'sum(rate(a_total{policy=~".*",model=~".*"}[2m])) / b[1h]'
    assert concrete('label_replace(a, "b", "$1", "c", "(.*)")') == 'label_replace(a, "b", "$1", "c", "(.*)")'
    assert concrete('label_values(a{b="c,d"}, e)') == 'group by (e) (a{b="c,d"})'
    with pytest.raises(ValueError, match=r"unknown variable \$other"):
        concrete("a{b=~'$other'}")


def test_queries_include_folded_rows_variables_and_annotations() -> None:
    found = {query.panel for query in queries(DASHBOARDS["guard-overview.json"])}
    assert {"variable policy", "annotation Bundle in force", "Memory / A", "Blocked / A"} <= found


def test_the_engines_metrics_are_those_of_the_process() -> None:
    """``KNOWN`` is read from attributes; a metric that is registered elsewhere would be missed."""
    registered = {family.name for family in REGISTRY.collect() if family.name.startswith("guard_engine_")}
    known = {name for name in KNOWN if name.startswith("guard_engine_")}
    assert {re.sub("_(total|bucket|count|sum)$", "", name) for name in known} == registered


def test_provisioning_names_what_the_dashboards_ask_for() -> None:
    sources = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yml").read_text())["datasources"]
    by_uid = {source["uid"]: source for source in sources}
    prometheus, alertmanager = by_uid["prometheus"], by_uid["alertmanager"]
    assert prometheus["url"] == "http://prometheus:9090"
    assert prometheus["jsonData"]["timeInterval"] == "15s"
    assert prometheus["jsonData"]["httpMethod"] == "POST"
    assert prometheus["jsonData"]["alertmanagerUid"] == "alertmanager"
    assert alertmanager["url"] == "http://alertmanager:9093"
    assert alertmanager["jsonData"]["implementation"] == "prometheus"
    assert not any(source["editable"] for source in sources)
    (provider,) = yaml.safe_load((PROVISIONING / "dashboards" / "guard.yml").read_text())["providers"]
    assert provider["folder"] == "neuronguard"
    assert provider["options"]["path"] == "/var/lib/grafana-dashboards"
    assert provider["disableDeletion"] is True
    assert provider["allowUiUpdates"] is False
