"""``neuronguard units``: look at sets of units, compare them, and make their controls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from guard.commands import options

if TYPE_CHECKING:
    from guard.locate.unit_set import UnitSet

_REPORT = click.option(
    "--report", type=options.PATH, help="Write report.md and pictures to this directory, not to the screen."
)


@click.group()
def units() -> None:
    """Look at sets of units, compare them, and make their controls."""


@units.command()
@click.argument("directory", type=options.PATH)
@_REPORT
def show(directory: Path, report: Path | None) -> None:
    """Say where a set of units comes from, what it selects, and how its scores fall off."""
    from guard.locate.report import describe, write_set
    from guard.locate.unit_set import UnitSet

    found = UnitSet.load(directory)
    if report is None:
        click.echo(describe(found), nl=False)
    else:
        _say(write_set(found, report))


@units.command()
@click.argument("directories", type=options.PATH, nargs=-1, required=True)
@click.option("--json", "json_file", type=options.PATH, help="Write the figures to this file.")
@_REPORT
def compare(directories: tuple[Path, ...], json_file: Path | None, report: Path | None) -> None:
    """Hold two or more sets of units against each other, every one against every other.

    Of methods, seeds, data sets or models: shared units against chance, rank correlations of scores, and
    layers.
    """
    from guard.cache import write_whole
    from guard.locate.compare import compare_all
    from guard.locate.report import describe_pairs, document, write_pairs

    if len(directories) < 2:
        raise click.UsageError("name two sets of units or more")
    sets = _named(directories)
    compared = compare_all(sets)
    if json_file:
        text = json.dumps(document(compared), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_whole(json_file, lambda file: file.write(text.encode()))
    if report is None:
        click.echo(describe_pairs(compared), nl=False)
    else:
        _say(write_pairs(sets, compared, report))


@units.command()
@click.argument("directory", type=options.PATH)
@click.option("--out", required=True, type=options.PATH, help="Directory of the control.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random units.")
@click.option("--disjoint", is_flag=True, help="Draw no unit that is selected.")
@click.option(
    "--window",
    type=click.IntRange(min=0),
    help="Take as many units as are selected from this rank on, the best one being at 0, and none at random.",
)
def control(directory: Path, out: Path, seed: int, disjoint: bool, window: int | None) -> None:
    """Write a control of a set of units: random ones of the same layers, or a window of its ranking."""
    from guard.locate import controls
    from guard.locate.unit_set import UnitSet

    if window is not None and disjoint:
        raise click.UsageError("--disjoint is about random units; leave out --window")
    found = UnitSet.load(directory)
    if window is None:
        made = controls.random_like(found, seed=seed, disjoint=disjoint)
    else:
        made = controls.window(found, window)
    made.save(out)
    click.echo(f"wrote {out}: {len(made)} units")


@units.command()
@click.argument("directory", type=options.PATH)
@click.option("--model", required=True, help="The base model that the units were found on, or its twin.")
@click.option("--count", type=click.IntRange(min=1), default=10, show_default=True, help="Neurons to show.")
@click.option("--top", type=click.IntRange(min=1), default=20, show_default=True, help="Tokens of each.")
def words(directory: Path, model: str, count: int, top: int) -> None:
    """Say what the best MLP neurons of a set write: the tokens that each favours, active and below zero."""
    from guard.locate.errors import LocateError
    from guard.locate.neuron2word import neuron2word
    from guard.locate.unit_set import UnitSet

    found, checkpoint = UnitSet.load(directory), options.open_model(model)
    best = [(unit.layer, unit.unit) for unit in found.ranking() if unit.component == "mlp"][:count]
    if not best:
        raise LocateError(f"{directory} ranks no MLP neuron; only these write a direction of their own")
    tokenizer = checkpoint.load_tokenizer()
    for each in neuron2word(checkpoint.load_model(), best, top=top):
        click.echo(f"layer {each.layer}, neuron {each.unit}")
        for sign, tokens in zip(("+", "-"), each.decoded(tokenizer), strict=True):
            click.echo(f"  {sign} " + " ".join(repr(token) for token in tokens))


def _named(directories: tuple[Path, ...]) -> dict[str, UnitSet]:
    """Sets by the last parts of their paths: as many as tell them apart."""
    from guard.locate.unit_set import UnitSet

    paths = [path.resolve() for path in directories]
    if len(set(paths)) < len(paths):
        raise click.UsageError("a set of units is named twice")
    parts = 1
    while len({path.parts[-parts:] for path in paths}) < len(paths):
        parts += 1
    return {"/".join(path.parts[-parts:]): UnitSet.load(path) for path in paths}


def _say(files: list[Path]) -> None:
    for file in files:
        click.echo(f"wrote {file}")
