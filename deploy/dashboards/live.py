"""The data of a dashboard's panels from a live Prometheus, as Grafana would ask for it."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import httpx

from deploy.dashboards.queries import concrete

_FIELD = re.compile(r"\{\{\s*(\w+)\s*\}\}")


class LiveError(Exception):
    """A panel has no data, or Prometheus does not answer its query."""


class Line(NamedTuple):
    """One series by its name in the legend; ``values`` are NaN where there is none. Times are Unix times."""

    name: str
    times: list[float]
    values: list[float]

    @property
    def last(self) -> float:
        """The last value that is a number; NaN if there is none."""
        return next((value for value in reversed(self.values) if not math.isnan(value)), math.nan)


@dataclass(frozen=True)
class Window:
    """What is looked at, in seconds: the ``length`` before ``end`` in steps of ``step``."""

    end: float
    length: float
    step: float = 15.0

    @property
    def times(self) -> list[float]:
        """All moments at which a value is asked for."""
        count = math.ceil(self.length / self.step)
        return [self.end - self.step * (count - index) for index in range(count + 1)]


def last_minutes(minutes: float) -> Window:
    """The time until now, at a step that makes 240 points at most and no less than the scrape interval."""
    return Window(end=time.time(), length=60 * minutes, step=max(15.0, minutes / 4))


def lines(client: httpx.Client, panel: dict[str, Any], window: Window) -> list[Line]:
    """The series of all queries of a panel.

    Raises LiveError naming the panel and the query if Prometheus refuses a query, cannot be reached or has no
    number for it.
    """
    found: list[Line] = []
    for target in panel["targets"]:
        where = f"panel {panel['title']!r}, query {target['refId']}"
        rate = f"{math.ceil(max(60.0, 4 * window.step))}s"
        expr = concrete(target["expr"], rate_interval=rate, range_=f"{math.ceil(window.length)}s")
        try:
            series = _ask(client, expr, window, bool(target.get("instant")))
        except (httpx.HTTPError, json.JSONDecodeError) as error:
            raise LiveError(f"{where}: {error}") from error
        named = [_line(one, target.get("legendFormat", ""), window) for one in series]
        if all(math.isnan(line.last) for line in named):
            raise LiveError(f"{where}: no data for {expr}")
        found += [line for line in named if not math.isnan(line.last)]
    return found


def per_bucket(cumulative: list[Line]) -> list[Line]:
    """A histogram's ``sum by (le)`` as the events in each bucket, lowest first. Names stay upper bounds."""
    ordered = sorted(cumulative, key=lambda line: float(line.name))
    nothing = Line("", ordered[0].times, [0.0] * len(ordered[0].times))
    return [
        Line(one.name, one.times, [b - a for a, b in zip(below.values, one.values, strict=True)])
        for below, one in pairwise([nothing, *ordered])
    ]


def _ask(client: httpx.Client, expr: str, window: Window, instant: bool) -> list[dict[str, Any]]:
    times = window.times
    if instant:
        path, parameters = "query", {"query": expr, "time": times[-1]}
    else:
        path = "query_range"
        parameters = {"query": expr, "start": times[0], "end": times[-1], "step": window.step}
    answer = client.post(f"/api/v1/{path}", data=parameters)
    document = answer.json() if answer.headers.get("content-type", "").startswith("application/json") else {}
    if document.get("status") != "success":
        raise httpx.HTTPError(f"HTTP {answer.status_code}, {document.get('error', 'not from Prometheus')}")
    series: list[dict[str, Any]] = document["data"]["result"]
    return series


def _line(series: dict[str, Any], legend: str, window: Window) -> Line:
    labels: dict[str, str] = series["metric"]
    name = _FIELD.sub(lambda match: labels.get(match[1], ""), legend) or ", ".join(
        f"{key}={value}" for key, value in labels.items()
    )
    if "value" in series:
        moment, value = series["value"]
        return Line(name, [float(moment)], [_number(value)])
    known = {round(float(moment), 1): _number(value) for moment, value in series["values"]}
    times = window.times
    return Line(name, times, [known.get(round(moment, 1), math.nan) for moment in times])


def _number(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else math.nan
