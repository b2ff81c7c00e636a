"""``neuronguard locate``: find the units that carry a model's safety, by one of four methods.

A method METHOD is the module ``guard.locate.METHOD`` with a dataclass ``MethodOptions`` and a function
``run``. Options of the command line are made out of the fields of the dataclass. ``run`` is given what its
parameters ask for by name, see ``_offer``; it returns a UnitSet. The module is imported when its sub-command
runs.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from guard.commands import fields, options

if TYPE_CHECKING:
    from guard.data import Dataset
    from guard.locate.unit_set import UnitSet

METHODS = {
    "capacity": "Neurons and heads that vary on harmful prompts and not on benign ones (Li & Kim).",
    "contrast": "Neurons that differ most between a model and its aligned twin (Chen et al.).",
    "heads": "Attention heads whose ablation changes the answer to harmful prompts most (Zhou et al.).",
    "importance": "Neurons and projection rows that every harmful prompt needs (Zhao et al.).",
}

_COMMON = (
    options.MODEL,
    click.Option(
        ["--data"],
        multiple=True,
        required=True,
        type=options.PATH,
        help="Prompts, JSON lines; a file or a directory of files; repeatable.",
    ),
    click.Option(["--out"], required=True, type=options.PATH, help="Directory of the set of units."),
)
_COMMON_NAMES = {"model", "donor", "data", "out"}
_DONOR = click.Option(["--donor"], help="The aligned twin of the model, named in the same way.")
_RUNNING: dict[str, tuple[str, dict[str, Any]]] = {
    "dtype": ("--dtype", {"type": click.Choice(["float32", "bfloat16", "float16", "float64"])}),
    "device": ("--device", {"help": "A torch device, such as cuda, or auto: over all there are."}),
    "batch_tokens": (
        "--batch-tokens",
        {"type": click.IntRange(min=1), "help": "About how many tokens go through the model at a time."},
    ),
    "seed": ("--seed", {"type": int}),
}
"""Parameters of ``run`` that are options where it has them; the defaults are those of the parameters."""
_NO_CACHE = click.Option(["--no-cache"], is_flag=True, help="Neither read nor keep what a run computes.")
_LIMIT = click.Option(
    ["--limit"], type=click.IntRange(min=1), help="Use the first prompts only: at most so many of each label."
)


class _Method(click.Command):
    """A method's sub-command. What it can do is known when it is called, for its module is imported then."""

    def __init__(self, name: str) -> None:
        super().__init__(name, help=METHODS[name])
        self._module: Any = None

    def make_context(self, *given: Any, **more: Any) -> click.Context:
        if self._module is None:
            self._module = _module(str(self.name))
            self.params = self._parameters()
        return super().make_context(*given, **more)

    @property
    def _options(self) -> Any:
        return getattr(self._module, f"{str(self.name).capitalize()}Options")

    def _parameters(self) -> list[click.Parameter]:
        asked = inspect.signature(self._module.run).parameters
        own = {str(option.name): option for option in fields.options_of(self._options)}
        # A method that has an option of its own for something knows a better default and a better help.
        running = [
            click.Option([flag, name], default=asked[name].default, show_default=True, **settings)
            for name, (flag, settings) in _RUNNING.items()
            if name in asked and name not in own
        ]
        files = [
            click.Option(
                [f"--{name}", name], type=options.PATH, help=f"Write the method's {name} to this file."
            )
            for name, parameter in asked.items()
            if str(parameter.annotation) in ("Path | None", "pathlib.Path | None")
        ]
        found = [
            *_COMMON,
            *([_DONOR] if "donor" in asked else []),
            *own.values(),
            *files,
            *([] if "limit" in own else [_LIMIT]),
            *running,
            *([_NO_CACHE] if "cache" in asked else []),
        ]
        names = [option.name for option in found]
        if len(set(names)) < len(names):
            raise TypeError(f"an option of {self.name} has the name of one of the command: {sorted(names)}")
        return list(found)

    def invoke(self, ctx: click.Context) -> None:
        given = dict(ctx.params)
        own = [str(option.name) for option in fields.options_of(self._options)]
        chosen = self._options(**{name: given.pop(name) for name in own})
        found = _run(self._module.run, chosen, given)
        found.save(given["out"])
        click.echo(f"wrote {given['out']}: {len(found)} of {found.candidates} units are selected")


class _Methods(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(METHODS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return _Method(cmd_name) if cmd_name in METHODS else None


@click.group(cls=_Methods)
def locate() -> None:
    """Find the units that carry a model's safety, and write them as a set of units."""


def _module(method: str) -> Any:
    name = f"guard.locate.{method}"
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise click.ClickException(
            f"this installation lacks the method {method!r}: there is no {name}"
        ) from error


def _run(run: Any, chosen: Any, given: dict[str, Any]) -> UnitSet:
    from guard.data import load
    from guard.locate.unit_set import refuse_target

    asked = inspect.signature(run).parameters
    if "donor" in asked and given["donor"] is None and asked["donor"].default is inspect.Parameter.empty:
        raise click.UsageError("this method compares two models; name the aligned twin with --donor")
    # Before the models are read: a run can take hours.
    refuse_target(given["out"])
    dataset = _first(load("fit", given["data"]), given.get("limit"))
    click.echo(options.describe(dataset))
    offered = _offer(chosen, dataset, given)
    found: UnitSet = run(**{name: offered[name] for name in asked if name in offered})
    if given.get("limit") is None:
        return found
    recorded = {**found.provenance.options, "limit": given["limit"]}
    return replace(found, provenance=found.provenance.model_copy(update={"options": recorded}))


def _offer(chosen: Any, dataset: Dataset, given: dict[str, Any]) -> dict[str, Any]:
    """Everything that ``run`` may ask for, by the name of its parameter."""
    from guard.cache import Cache, cache_root

    return {
        "checkpoint": options.open_model(given["model"]),
        "donor": options.open_model(given["donor"]) if given.get("donor") else None,
        "dataset": dataset,
        "datasets": (dataset,),
        "options": chosen,
        # What is given by the name of the parameter: how to run, and files for more results.
        **{name: value for name, value in given.items() if name not in _COMMON_NAMES},
        "cache": Cache(None if given.get("no_cache") else cache_root()),
        "progress": True,
    }


def _first(dataset: Dataset, limit: int | None) -> Dataset:
    """At most ``limit`` prompts of each label."""
    if limit is None:
        return dataset
    kept = [
        prompt
        for label in ("harmful", "benign")
        for prompt in [each for each in dataset.prompts if each.label == label][:limit]
    ]
    left_out = len(dataset.prompts) - len(kept)
    dropped = {**dataset.dropped, **({"beyond the limit": left_out} if left_out else {})}
    return replace(dataset, prompts=tuple(kept), dropped=dropped)
