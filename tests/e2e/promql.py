"""What must be true of a query for it to be about series that exist, as queries of their own.

Dashboards' queries and recording rules have results on a healthy system, alerts have none. A misspelt name in
either looks like nothing going on. ``probes`` takes an expression apart into parts that all have results when
every name in it is right, whether or not the alert's condition holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import promql_parser as promql

_COMPARISONS = frozenset(("==", "!=", ">", "<", ">=", "<="))
_OFFSET = re.compile(r"\boffset\s+-?[0-9a-z]+")
_WORDS = re.compile(r'((\w+)=~"(\w+(?:\|\w+)+)")')
# Series that begin with their first event, which a healthy engine never causes: any action stands for them.
_UNBORN = {'action="unguarded"': 'action!=""'}


class Probe(NamedTuple):
    """A query that must have a finite value, in series of which one or more have all ``labels``."""

    expr: str
    labels: frozenset[str] = frozenset()


def recent(expr: str, offset: str = "5s") -> str:
    """``expr`` for a Prometheus that started a minute ago: every ``offset`` is replaced by a short one.

    Windows stay as they are. ``rate`` and ``increase`` take what a window holds, be it less than its length.
    """
    return _OFFSET.sub(f"offset {offset}", expr)


def unconditional(expr: str) -> str:
    """``expr`` with a result whatever the values are, if only the series exist.

    Every comparison gets ``bool``: 0 where it would have dropped a series. ``unless`` becomes ``and``, which
    needs both sides and matching labels; ``absent(x)`` becomes ``x``. A rule is rewritten rather than judged
    by its selectors alone: operands whose labels do not match give nothing, however right the selectors.
    """
    return str(promql.transform(_parse(expr), None, _unconditional))


def probes(expr: str) -> Iterator[Probe]:
    """The parts of ``expr`` that need a result each, the whole first.

    Beside the whole these are the operands of ``or``, of which one alone would do for the whole, and those of
    comparisons, which make a number of NaN; every selector, for each value that it lists, because
    aggregations and alternatives hide one that finds nothing; and every expression that is grouped or matched
    by labels, which must have them: Prometheus takes a label that does not exist for an empty one.
    """
    tree = _parse(expr)
    yield Probe(str(tree))
    yield from _parts(tree)


def _parse(expr: str) -> Any:
    for unborn, any_ in _UNBORN.items():
        expr = expr.replace(unborn, any_)
    return promql.parse(expr)


def _unconditional(node: Any) -> Any:
    if isinstance(node, promql.Call) and node.func.name == "absent":
        return node.args[0]
    if isinstance(node, promql.BinaryExpr):
        op, modifier = str(node.op), node.modifier or ""
        if op in _COMPARISONS and not (node.modifier and node.modifier.return_bool):
            return promql.parse(f"({node.lhs}) {op} bool {modifier} ({node.rhs})")
        if op == "unless":
            return promql.parse(f"({node.lhs}) and {modifier} ({node.rhs})")
    return None


def _parts(node: Any) -> Iterator[Probe]:
    match node:
        case promql.VectorSelector():
            yield from (Probe(selector) for selector in _alternatives(str(node)))
        case promql.MatrixSelector():
            yield from _parts(node.vector_selector)
        case promql.AggregateExpr():
            if node.modifier is not None and node.modifier.labels:
                yield Probe(str(node.expr), frozenset(node.modifier.labels))
            yield from _parts(node.expr)
        case promql.BinaryExpr():
            for side in (node.lhs, node.rhs):
                yield from _side(node, side)
                yield from _parts(side)
        case promql.ParenExpr() | promql.UnaryExpr() | promql.SubqueryExpr():
            yield from _parts(node.expr)
        case promql.Call():
            for argument in node.args:
                yield from _parts(argument)
        case promql.NumberLiteral() | promql.StringLiteral():
            pass
        case _:
            raise TypeError(f"{type(node).__name__} in {node}")


def _alternatives(selector: str) -> Iterator[str]:
    """``a{b=~"c|d"}`` as itself, ``a{b="c"}`` and ``a{b="d"}``: one that exists would do for the first."""
    yield selector
    for whole, label, values in _WORDS.findall(selector):
        for value in values.split("|"):
            yield selector.replace(whole, f'{label}="{value}"')


def _side(node: promql.BinaryExpr, side: Any) -> Iterator[Probe]:
    matching = node.modifier.matching if node.modifier else None
    if matching is not None and matching.labels:
        yield Probe(str(side), frozenset(matching.labels))
    if str(node.op) in {"or", *_COMPARISONS}:
        yield Probe(str(side))
