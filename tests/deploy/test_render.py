from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import httpx
import pytest

from deploy.dashboards.live import Line, LiveError, Window, last_minutes, lines, per_bucket
from deploy.dashboards.look import quantity, series_colours, value_text
from deploy.dashboards.render import FOLDER, main, places

LABELS = {
    "policy": "default",
    "action": "refuse",
    "verdict": "refuse",
    "mode": "enforce",
    "backend": "engine",
}
Answer = Callable[[str], list[dict[str, str]]]


def prometheus(series: Answer, value: str = "0.5") -> httpx.MockTransport:
    """Answers every query with a constant for each of ``series(query)``."""

    def answer(request: httpx.Request) -> httpx.Response:
        asked = {name: values[0] for name, values in parse_qs(request.content.decode()).items()}
        result: list[dict[str, Any]] = []
        for labels in series(asked["query"]):
            if request.url.path == "/api/v1/query":
                result.append({"metric": labels, "value": [float(asked["time"]), value]})
            else:
                start, end, step = (float(asked[name]) for name in ("start", "end", "step"))
                times = [start + step * index for index in range(int((end - start) / step + 1.5))]
                result.append({"metric": labels, "values": [[moment, value] for moment in times]})
        return httpx.Response(200, json={"status": "success", "data": {"result": result}})

    return httpx.MockTransport(answer)


def everything(query: str) -> list[dict[str, str]]:
    if query.startswith("sum by (le)"):
        return [{"le": bound} for bound in ("0.1", "0.5", "+Inf")]
    return [LABELS, LABELS | {"policy": "strict"}]


def run(out: Path, transport: httpx.BaseTransport, *more: str) -> int:
    return main(["--prometheus", "http://prometheus:9090", "--out", str(out), *more], transport)


@pytest.mark.parametrize("name", ["guard-overview", "engine"])
def test_a_png_twice_as_wide_as_it_is_shown(tmp_path: Path, name: str) -> None:
    out = tmp_path / "new" / "picture.png"
    assert run(out, prometheus(everything), "--dashboard", name) == 0
    content = out.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert int.from_bytes(content[16:20]) == 1800
    assert len(content) > 50_000


def test_zero_everywhere_can_be_drawn(tmp_path: Path) -> None:
    assert run(tmp_path / "picture.png", prometheus(everything, "0"), "--rows", "3") == 0


@pytest.mark.parametrize("value", ["0.5", "NaN"])
def test_no_data_is_an_error_that_names_the_panel(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    def answer(query: str) -> list[dict[str, str]]:
        return [] if "guard_bypass_total" in query and value != "NaN" else everything(query)

    assert run(tmp_path / "picture.png", prometheus(answer, value), "--rows", "1") == 1
    said = capsys.readouterr().err
    assert ("'Bypasses', query A: no data" if value != "NaN" else "'Endpoint', query A: no data") in said
    assert not (tmp_path / "picture.png").exists()


@pytest.mark.parametrize(
    ("response", "said"),
    [
        (httpx.Response(400, json={"status": "error", "error": "parse error"}), "HTTP 400, parse error"),
        (httpx.Response(502, text="Bad gateway"), "HTTP 502, not from Prometheus"),
    ],
)
def test_a_refused_query_is_an_error_that_names_the_panel(response: httpx.Response, said: str) -> None:
    panel = {"title": "Verdicts", "targets": [{"refId": "B", "expr": "up"}]}
    transport = httpx.MockTransport(lambda _: response)
    with (
        httpx.Client(base_url="http://prometheus:9090", transport=transport) as client,
        pytest.raises(LiveError, match=f"'Verdicts', query B: {said}"),
    ):
        lines(client, panel, last_minutes(5))


def test_gaps_are_nan_and_names_come_from_the_legend() -> None:
    window = Window(end=60.0, length=60.0)
    values = [[0.0, "1"], [30.0, "2"], [60.0, "NaN"]]
    result = [{"metric": {"policy": "default", "action": "tag"}, "values": values}]
    document = {"status": "success", "data": {"result": result}}
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json=document))
    panel = {
        "title": "Verdicts",
        "targets": [{"refId": "A", "expr": "up", "legendFormat": "{{policy}} would {{ action }}"}],
    }
    with httpx.Client(base_url="http://prometheus:9090", transport=transport) as client:
        (line,) = lines(client, panel, window)
    assert line.name == "default would tag"
    assert line.times == [0.0, 15.0, 30.0, 45.0, 60.0]
    assert [value for value in line.values if not math.isnan(value)] == [1.0, 2.0]
    assert line.last == 2.0


def test_cumulative_buckets_become_counts_of_their_own() -> None:
    cumulative = [Line("+Inf", [0.0], [7.0]), Line("0.1", [0.0], [2.0]), Line("0.5", [0.0], [6.0])]
    assert per_bucket(cumulative) == [
        Line("0.1", [0.0], [2.0]),
        Line("0.5", [0.0], [4.0]),
        Line("+Inf", [0.0], [1.0]),
    ]


def test_panels_keep_their_places_without_gaps_and_rows_can_be_chosen() -> None:
    board = json.loads((FOLDER / "guard-overview.json").read_text())
    placed, height = places(board)
    kinds = {place.panel["type"] for place in placed}
    assert "table" not in kinds
    filled = {top + line for panel, top in placed for line in range(panel["gridPos"]["h"])}
    assert filled == set(range(height))
    first, less = places(board, 1)
    assert [place.panel["type"] for place in first][:2] == ["row", "stat"]
    assert less == 5


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0, "s", "0 s"),
        (0.0123, "s", "12.3 ms"),
        (2.5e-5, "s", "25 µs"),
        (3.0, "s", "3 s"),
        (0.0448, "percentunit", "4.48 %"),
        (0.022, "reqps", "0.022 req/s"),
        (1024, "short", "1.02 K"),
        (3 * 2**20, "bytes", "3 MiB"),
        (0.5, "none", "0.5"),
        (math.nan, "s", "–"),
    ],
)
def test_quantities(value: float, unit: str, text: str) -> None:
    assert quantity(value, unit) == text


def test_words_and_colours_of_a_value() -> None:
    steps = [{"value": None, "color": "green"}, {"value": 0.5, "color": "dark-red"}]
    words = {"1": {"text": "UP", "color": "green"}}
    defaults = {
        "unit": "none",
        "decimals": 0,
        "thresholds": {"steps": steps},
        "mappings": [{"options": words}],
    }
    panel = {"fieldConfig": {"defaults": defaults}}
    assert value_text(panel, 1.0) == ("UP", "#73bf69")
    assert value_text(panel, 0.0) == ("0", "#73bf69")
    assert value_text(panel, 2.0) == ("2", "#c4162a")


def test_refusals_are_red_and_policies_differ_in_shade() -> None:
    rule = {"id": "color", "value": {"mode": "shades", "fixedColor": "red"}}
    overrides = [{"matcher": {"id": "byRegexp", "options": "/ refuse$/"}, "properties": [rule]}]
    panel = {"fieldConfig": {"defaults": {}, "overrides": overrides}}
    one, other, none = series_colours(panel, ["default refuse", "strict refuse", "p50"])
    assert one == "#f2495c"
    assert len({one, other, none}) == 3
