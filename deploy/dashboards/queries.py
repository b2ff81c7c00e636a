"""Every query of a dashboard, and its queries as plain PromQL, for checks against a Prometheus."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::\w+)?\}|([A-Za-z_]\w*))")
_LABEL_VALUES = re.compile(r"label_values\((?P<selector>.+),\s*(?P<label>\w+)\)")
_ANY = ("policy", "model")


class Query(NamedTuple):
    """One query. ``panel`` says where: ``title / refId``, ``variable name`` or ``annotation name``."""

    dashboard: str
    panel: str
    expr: str


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every panel of a dashboard's JSON object but the rows, also those inside collapsed rows."""
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            yield from panel["panels"]
        else:
            yield panel


def queries(dashboard: dict[str, Any]) -> Iterator[Query]:
    """Every query of a dashboard's JSON object, with Grafana's variables in it.

    An annotation's query has results only at the events it marks; all others have some on a healthy system.
    """
    uid = dashboard["uid"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield Query(uid, f"variable {variable['name']}", variable["query"])
    for annotation in dashboard["annotations"]["list"]:
        yield Query(uid, f"annotation {annotation['name']}", annotation["expr"])
    for panel in panels(dashboard):
        for target in panel["targets"]:
            yield Query(uid, f"{panel['title']} / {target['refId']}", target["expr"])


def concrete(expr: str, rate_interval: str = "1m", range_: str = "5m") -> str:
    """``expr`` as Prometheus takes it: all policies and models, and the given durations.

    ``label_values(selector, label)`` becomes one series for each value. Raises ValueError for a variable that
    the dashboards do not have.
    """
    values = dict.fromkeys(_ANY, ".*") | {"__rate_interval": rate_interval, "__range": range_}

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in values:
            raise ValueError(f"unknown variable ${name} in {expr}")
        return values[name]

    plain = _VARIABLE.sub(value, expr)
    if found := _LABEL_VALUES.fullmatch(plain):
        return f"group by ({found['label']}) ({found['selector']})"
    return plain
