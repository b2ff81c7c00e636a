"""``neuronguard tune``: make a model safer by its units, keep that while it is tuned on, or train a donor.

Options of the command line are made out of the fields of a method's dataclass (``guard.tune.options``), which
is imported when a sub-command runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from guard.commands import fields, options

_COMMON = (
    options.MODEL,
    click.Option(
        ["--data"],
        multiple=True,
        required=True,
        type=options.PATH,
        help="Requests with answers, JSON lines; a file or a directory of files; repeatable.",
    ),
    click.Option(["--out"], required=True, type=options.PATH, help="Directory to write; it must not exist."),
    click.Option(
        ["--checkpoints"],
        type=options.PATH,
        help="Where an interrupted run is kept, to go on from; by default in the user's cache.",
    ),
)
_UNITS = (
    click.Option(
        ["--units"],
        multiple=True,
        type=options.PATH,
        help="A set that 'locate' wrote, or a units file; of several, all their units. Repeatable.",
    ),
    click.Option(
        ["--foundation"],
        multiple=True,
        type=options.PATH,
        help="Units that general ability needs: these are taken away from the others. Repeatable.",
    ),
)
_ABOUT = {
    "budget": "Train redundant units alone, as the budget of an alignment (Li & Kim).",
    "freeze": "Tune for another task while safety-critical units stay (Li & Kim).",
    "full": "Train every weight: what the others are held against.",
    "ia3": "Train an aligned twin as an (IA)³ vector, the donor of a patch.",
    "lora": "Train an aligned twin as a LoRA adapter.",
    "rsn": "Tune for another task while safety units that are no foundation units stay (Zhao et al.).",
    "sn": "Train the safety units alone, on refusals (SN-Tune, Zhao et al.).",
}


class _Method(click.Command):
    def __init__(self, name: str) -> None:
        super().__init__(name, help=_ABOUT[name])
        self._spec: Any = None

    def make_context(self, *given: Any, **more: Any) -> click.Context:
        if self._spec is None:
            from guard.tune.methods import METHODS

            self._spec = METHODS[self.name]  # type: ignore[index]
            units = () if self._spec.units == "none" else _UNITS
            self.params = [*_COMMON, *units, *fields.options_of(self._spec.options)]
        return super().make_context(*given, **more)

    def invoke(self, ctx: click.Context) -> None:
        from guard.tune.run import tune as run

        given = dict(ctx.params)
        own = [str(option.name) for option in fields.options_of(self._spec.options)]
        chosen = self._spec.options(**{name: given.pop(name) for name in own})
        record = run(
            self.name,  # type: ignore[arg-type]
            options.open_model(given["model"]),
            given["data"],
            chosen,
            given["out"],
            units=given.get("units", ()),
            foundation=given.get("foundation", ()),
            store=given["checkpoints"],
            progress=True,
        )
        _say(given["out"], record)


def _say(out: Path, record: dict[str, Any]) -> None:
    share, course = record["parameters"], record["course"]
    click.echo(
        f"wrote {out}: {record['output']['kind']}; {share['trained']} of {share['total']} numbers trained "
        f"({100 * share['share']:.3g} %) in {course['steps']} steps; loss {course['losses'][0][1]:.4g} to "
        f"{course['losses'][-1][1]:.4g}"
    )


class _Methods(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_ABOUT)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return _Method(cmd_name) if cmd_name in _ABOUT else None


@click.group(cls=_Methods)
def tune() -> None:
    """Make a model safer by its units, keep that while it is tuned on, or train a patch's donor."""
