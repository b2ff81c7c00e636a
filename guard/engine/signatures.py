"""Signatures and members read out of source text with ``ast``: nothing is imported or need be installed.

The same reader made the table of known versions (from wheels) and looks at the installed vLLM, so what
differs between the two is vLLM and not the way of looking.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

Sources = Callable[[str], str | None]
"""Gives the source text of a module by its dotted name, or None when there is no such module."""

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Defined = _Function | ast.ClassDef


def installed(package: str) -> Sources:
    """The sources of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    roots = [Path(place).parent for place in (spec.submodule_search_locations or ())] if spec else []

    def source(module: str) -> str | None:
        stem = module.replace(".", "/")
        for root in roots:
            for path in (root / f"{stem}.py", root / stem / "__init__.py"):
                if path.is_file():
                    return path.read_text("utf-8")
        return None

    return source


class Reader:
    """Looks names of the form ``package.module:Class.method`` up in source text."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._trees: dict[str, ast.Module | None] = {}

    def signature(self, name: str) -> str | None:
        """The parameters with their defaults, as ``(self, request, flag=False)``; None when it is missing."""
        module, _, path = name.partition(":")
        owner, _, function = path.rpartition(".")
        found = self._method(module, owner, function) if owner else self._top_level(module, function)
        return _parameters(found) if isinstance(found, _Function) else None

    def members(self, name: str) -> frozenset[str] | None:
        """Names of the fields, attributes and methods of a class and its bases; None when it is missing."""
        module, _, path = name.partition(":")
        lineage = list(self._lineage(module, path))
        return frozenset(member for cls in lineage for member in _members(cls)) if lineage else None

    def _method(self, module: str, owner: str, name: str) -> _Defined | None:
        for depth, cls in enumerate(self._lineage(module, owner)):
            found = _named(cls.body, name)
            # A promise in a base does not stand for a method that the class has lost.
            if found is not None and (depth == 0 or not _is_abstract(found)):
                return found
        return None

    def _lineage(self, module: str, name: str) -> Iterator[ast.ClassDef]:
        """The class, then its bases as far as their sources can be found, depth first."""
        cls = self._top_level(module, name)
        if isinstance(cls, ast.ClassDef):
            yield cls
            for base in cls.bases:
                if isinstance(base, ast.Name):
                    yield from self._lineage(*self._origin(module, base.id))

    def _origin(self, module: str, name: str) -> tuple[str, str]:
        """Where a name that is used in ``module`` was defined."""
        tree = self._tree(module)
        for node in tree.body if tree else ():
            if isinstance(node, ast.ImportFrom) and node.module:
                above = module.rsplit(".", node.level)[0] + "." if node.level else ""
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return above + node.module, alias.name
        return module, name

    def _top_level(self, module: str, name: str) -> _Defined | None:
        tree = self._tree(module)
        return _named(tree.body, name) if tree else None

    def _tree(self, module: str) -> ast.Module | None:
        if module not in self._trees:
            text = self._sources(module)
            self._trees[module] = None if text is None else ast.parse(text)
        return self._trees[module]


def _named(body: list[ast.stmt], name: str) -> _Defined | None:
    # The last one wins, as it does when the module runs (overloads come first).
    return next((node for node in reversed(body) if isinstance(node, _Defined) and node.name == name), None)


def _is_abstract(node: _Defined) -> bool:
    return any(ast.unparse(decorator).endswith("abstractmethod") for decorator in node.decorator_list)


def _parameters(function: _Function) -> str:
    for argument in ast.walk(function.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return f"({ast.unparse(function.args)})"


def _members(cls: ast.ClassDef) -> Iterator[str]:
    for node in cls.body:
        if isinstance(node, _Function):
            yield node.name
            yield from _attributes(node)
        else:
            yield from _targets(node, ast.Name)


def _attributes(function: _Function) -> Iterator[str]:
    for node in ast.walk(function):
        if isinstance(node, ast.stmt):
            yield from _targets(node, ast.Attribute)


def _targets(node: ast.stmt, kind: type[ast.expr]) -> Iterator[str]:
    """Names assigned by a statement: plain ones, or those of ``self``."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    for target in targets:
        for part in target.elts if isinstance(target, ast.Tuple) else [target]:
            if kind is ast.Name and isinstance(part, ast.Name):
                yield part.id
            elif (
                kind is ast.Attribute
                and isinstance(part, ast.Attribute)
                and isinstance(part.value, ast.Name)
                and part.value.id == "self"
            ):
                yield part.attr
