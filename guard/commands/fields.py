"""Command-line options out of a dataclass: a method's options are declared once, where the method is."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import click

_SIMPLE: dict[type, Any] = {
    int: int,
    float: float,
    str: str,
    Path: click.Path(path_type=Path),
}


class _Kind(NamedTuple):
    """How a field's values look on the command line."""

    type: Any
    several: bool = False


def options_of(options: type[Any]) -> list[click.Option]:
    """One option for each field: its name, type and default, and the docstring under it as help.

    Texts, numbers, paths, ``Literal`` choices, ``X | None`` and tuples of these (a repeatable option) are
    known, and ``bool`` (``--name/--no-name``). ``metadata["help"]`` of a field goes before its docstring.
    Raises TypeError for a field of another type.
    """
    hints, documented = get_type_hints(options), field_docs(options)
    return [
        _option(field, hints[field.name], str(field.metadata.get("help") or documented.get(field.name, "")))
        for field in dataclasses.fields(options)
        if field.init
    ]


def _option(field: dataclasses.Field[Any], hint: Any, text: str) -> click.Option:
    kind, flag = _kind(field.name, hint), "--" + field.name.replace("_", "-")
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    settings: dict[str, Any] = {"type": kind.type, "multiple": kind.several, "help": _plain(text, kind)}
    if default is dataclasses.MISSING:
        settings |= {"required": True}
    else:
        settings |= {"default": default, "show_default": default is not None}
    if kind.type is bool:
        flag += f"/--no-{flag[2:]}"
    return click.Option([flag, field.name], **settings)


def _kind(name: str, hint: Any) -> _Kind:
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType) and type(None) in inside and len(inside) == 2:
        return _kind(name, next(each for each in inside if each is not type(None)))
    if origin is tuple and len(inside) == 2 and inside[1] is Ellipsis:
        return _Kind(_kind(name, inside[0]).type, several=True)
    if origin is Literal and all(isinstance(each, str) for each in inside):
        return _Kind(click.Choice(inside))
    if hint is bool:
        return _Kind(bool)
    if hint in _SIMPLE:
        return _Kind(_SIMPLE[hint])
    raise TypeError(f"the field {name!r} is {hint}, which is no type of a command-line option")


def _plain(text: str, kind: _Kind) -> str:
    text = " ".join(text.replace("``", "'").split())
    return f"{text} Repeatable." if kind.several else text


def field_docs(options: type[Any]) -> dict[str, str]:
    """The docstring under each field, also of inherited ones; nothing when the source is not at hand."""
    found: dict[str, str] = {}
    for each in reversed(options.__mro__[:-1]):
        found |= _own_docs(each)
    return found


def _own_docs(options: type[Any]) -> dict[str, str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(options)))
    except (OSError, TypeError):
        return {}
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    return {
        field.target.id: text.value.value
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }
