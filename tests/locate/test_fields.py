from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner

from guard.commands.fields import field_docs, options_of

Colour = Literal["red", "blue"]


@dataclass(frozen=True)
class Everything:
    """One field of each kind."""

    needed: int
    share: float = 0.5
    """Of ``all``,
    or of some."""
    colour: Colour = "red"
    name: str | None = None
    switch: bool = False
    off_switch: bool = True
    file: Path | None = None
    colours: tuple[Colour, ...] = ("red", "blue")
    layers: tuple[int, ...] = ()
    made: tuple[str, ...] = field(default_factory=lambda: ("a",))
    told: int = field(default=3, metadata={"help": "From the metadata."})
    """Not this."""
    derived: int = field(default=0, init=False)


def parse(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    command = click.Command("x", params=list(options_of(Everything)), callback=found.update)
    result = CliRunner().invoke(command, arguments)
    if result.exit_code:
        raise ValueError(result.output)
    return found


def shown() -> str:
    command = click.Command("x", params=list(options_of(Everything)))
    return " ".join(CliRunner().invoke(command, ["--help"]).output.split())


def test_left_alone_the_options_make_the_dataclass_with_its_defaults() -> None:
    assert Everything(**parse("--needed", "3")) == Everything(3)


def test_every_kind_of_field_is_read() -> None:
    given = parse(
        "--needed", "1", "--share", "0.25", "--colour", "blue", "--name", "n", "--switch", "--no-off-switch",
        "--file", "a/b", "--colours", "blue", "--layers", "1", "--layers", "2", "--made", "z", "--told", "4",
    )  # fmt: skip
    assert Everything(**given) == Everything(
        1, 0.25, "blue", "n", True, False, Path("a/b"), ("blue",), (1, 2), ("z",), 4
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing option '--needed'"),
        (["--needed", "x"], "not a valid integer"),
        (["--needed", "1", "--colour", "green"], "not one of 'red', 'blue'"),
        (["--needed", "1", "--colours", "green"], "not one of 'red', 'blue'"),
        (["--needed", "1", "--derived", "1"], "No such option"),
    ],
)
def test_what_a_field_cannot_be_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(*arguments)


def test_the_docstring_under_a_field_is_its_help() -> None:
    text = shown()
    assert "--share FLOAT Of 'all', or of some. [default: 0.5]" in text
    assert "From the metadata." in text
    assert "Not this" not in text
    assert "--colours [red|blue] Repeatable. [default: red, blue]" in text
    assert "--needed INTEGER [required]" in text


def test_without_the_source_there_is_no_help_and_no_error() -> None:
    made = type("Made", (), {"__annotations__": {"a": int}, "a": 1, "__module__": "nowhere"})
    assert field_docs(made) == {}


def test_a_field_of_a_type_that_no_option_has_is_an_error_of_the_method() -> None:
    @dataclass(frozen=True)
    class Odd:
        table: dict[str, int]

    with pytest.raises(TypeError, match="the field 'table' is dict"):
        options_of(Odd)
