"""Signatures and members as they are read out of source text."""

from __future__ import annotations

import inspect
import textwrap

import pytest

from guard.engine import signatures
from guard.engine.signatures import Reader, installed

MODULES = {
    "made.base": """
        class Base:
            def inherited(self, value: int = 0) -> None:
                self.late: int = value
            @abc.abstractmethod
            def promised(self): ...
    """,
    "made.deep.middle": """
        from made.base import Base as Other

        class Middle(Other):
            field: int
    """,
    "made.deep.near": """
        from .middle import Middle

        class Near(Middle): ...
    """,
    "made.one": """
        from typing import overload

        from .deep.near import Near as Middle

        LIMIT = 4

        class Class(Middle):
            a, b = 1, 2

            @overload
            def method(self, request: str) -> str: ...
            @decorated
            async def method(self, request: "str | int", /, *args, flag: bool = LIMIT, **kwargs) -> None:
                self.first, self.second = request
                other.third = self.fourth[0] = 1
                for self.fifth in args:
                    pass

        def function(parser): ...
    """,
}


@pytest.fixture
def reader():
    texts = {name: textwrap.dedent(text) for name, text in MODULES.items()}
    return Reader(texts.get)


@pytest.mark.parametrize(
    ("name", "signature"),
    [
        ("made.one:function", "(parser)"),
        ("made.one:Class.method", "(self, request, /, *args, flag=LIMIT, **kwargs)"),
        ("made.one:Class.inherited", "(self, value=0)"),
        ("made.base:Base.promised", "(self)"),
        ("made.one:Class.promised", None),
        ("made.one:Class.absent", None),
        ("made.one:Class", None),
        ("made.one:Absent.method", None),
        ("made.absent:function", None),
    ],
)
def test_signature_has_names_kinds_and_defaults_without_annotations(reader, name, signature):
    assert reader.signature(name) == signature


def test_members_are_fields_attributes_and_methods_of_the_class_and_its_bases(reader):
    expected = {"field", "a", "b", "method", "inherited", "late", "promised", "first", "second", "fifth"}
    assert reader.members("made.one:Class") == expected
    assert reader.members("made.one:Absent") is None


def test_installed_package_is_read_without_being_imported_and_agrees_with_inspect():
    found = Reader(installed("guard")).signature("guard.engine.signatures:Reader.signature")
    own = inspect.signature(signatures.Reader.signature).parameters
    assert found == f"({', '.join(own)})"


def test_absent_package_has_no_sources():
    assert installed("no_such_package")("no_such_package") is None
