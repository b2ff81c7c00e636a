"""The options of ``neuronguard fit`` that are about probes of every token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from guard.pooling import Pooling

_KINDS: Mapping[str, Mapping[str, int | float]] = {
    "last": {},
    "ema": {"window": 64, "ema_rate": 0.125},
    "rolling": {"window": 16},
    "softmax": {"window": 64, "temperature": 1.0},
    "attention": {"window": 64, "heads": 2},
}
"""What each kind has to be told, and what it is told by default."""

_OPTIONS = (
    click.option(
        "--pooling",
        type=click.Choice(list(_KINDS)),
        default="last",
        show_default=True,
        help="Which tokens of a prompt are read: the last one; or every one, by a linear probe whose outputs "
        "become one logit: the largest exponential moving average, the largest mean of --window tokens, "
        "the mean weighted by a softmax, or by --heads of attention.",
    ),
    click.option(
        "--window",
        type=click.IntRange(1, 1024),
        default=None,
        help="Tokens in a moving average, and in what a monitor sees.  [default: 16 for rolling, else 64]",
    ),
    click.option(
        "--ema-rate",
        type=click.FloatRange(0, 1, min_open=True),
        default=None,
        help="Weight of the newest token in an exponential average.  [default: 0.125]",
    ),
    click.option(
        "--temperature",
        type=click.FloatRange(0, min_open=True),
        default=None,
        help="Of the softmax over a probe's outputs, in logits.  [default: 1]",
    ),
    click.option(
        "--heads", type=click.IntRange(1, 8), default=None, help="Heads of attention.  [default: 2]"
    ),
    click.option(
        "--monitor-tokens",
        type=click.IntRange(min=1),
        default=None,
        help="Have the benign threshold prompts answered by the model in at most so many tokens, and set "
        "limits on the answers, at which an engine may stop one as it grows.  [default: none]",
    ),
)


def pooling(command: Any) -> Any:
    """Add the options."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def chosen(kind: str, given: Mapping[str, Any], capture: str) -> Pooling | None:
    """The pooling that the options describe; ``given`` are those but for the kind, None where not given.

    Raises click.UsageError for an option of another kind.
    """
    from pydantic import ValidationError

    from guard.pooling import Pooling

    defaults = _KINDS[kind]
    for name, value in given.items():
        if value is not None and name not in defaults:
            kinds = ", ".join(each for each, has in _KINDS.items() if name in has)
            raise click.UsageError(f"--{name.replace('_', '-')} goes with --pooling {kinds}, not {kind}")
    if kind == "last":
        return None
    if capture == "engine":
        raise click.UsageError(
            "--capture engine reads the last token only; fit a sequence probe with --capture transformers"
        )
    values = {**defaults, **{name: value for name, value in given.items() if value is not None}}
    if "ema_rate" in values:
        values["rate"] = values.pop("ema_rate")
    try:
        return Pooling.model_validate({"kind": kind, **values})
    except ValidationError as error:
        raise click.UsageError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error
