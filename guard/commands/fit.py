"""``neuronguard fit``: from a model and labelled prompts to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import click

from guard.commands import options, sequence


@click.command()
@options.model
@click.option(
    "--data",
    multiple=True,
    required=True,
    type=options.PATH,
    help="Prompts to fit on, JSON lines; a file or a directory of files; repeatable.",
)
@click.option(
    "--threshold-data",
    multiple=True,
    required=True,
    type=options.PATH,
    help="Benign prompts of sources that are not fitted on; thresholds are set on them; repeatable.",
)
@click.option(
    "--eval-data",
    multiple=True,
    type=options.PATH,
    help="Prompts of sources that take no part; the bundle's card reports how it does on them; repeatable.",
)
@click.option(
    "--hard-negatives",
    "hard_data",
    multiple=True,
    type=options.PATH,
    help="Benign prompts that look harmful: fitted on with the rest, and reported apart; repeatable.",
)
@click.option("--out", required=True, type=options.PATH, help="Directory of the bundle.")
@click.option(
    "--label",
    type=click.Choice(["unsafe_output", "harmful_prompt"]),
    default="unsafe_output",
    show_default=True,
    help="What is predicted: an unsafe answer of this model, or a harmful request.",
)
@click.option(
    "--units",
    default="l1",
    show_default=True,
    help="'l1' (an L1 fit chooses), 'stability' (what L1 fits on halves of the prompts keep again and "
    "again), 'random', 'all', a JSON file {layer: [neuron, …]}, or a set as 'neuronguard locate' writes it.",
)
@click.option(
    "--max-units",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    help="Most units for 'l1', 'stability' and 'random'.",
)
@click.option(
    "--sites",
    type=click.Choice(["mlp", "attention", "both"]),
    default="mlp",
    show_default=True,
    help="Where units are chosen from: neurons (inputs of down_proj), heads (inputs of o_proj), or both.",
)
@click.option(
    "--layers",
    default="all",
    show_default=True,
    help="'all' (stacked), 'choose' (a single one, or all stacked: what ranks left-out sources best), or "
    "numbers such as 3,5-7.",
)
@click.option(
    "--probe",
    type=click.Choice(["linear", "mlp", "product"]),
    default="linear",
    show_default=True,
    help="A logistic regression; a network with one hidden layer; or P(harmful prompt) times P(the model "
    "complies), a logistic regression each. 'l1' chooses units by a linear fit either way; name units, or "
    "take all, if single ones may say nothing by themselves.",
)
@click.option(
    "--hidden",
    type=click.IntRange(1, 256),
    default=None,
    help="Size of the hidden layer of 'mlp'.  [default: 16]",
)
@sequence.pooling
@click.option(
    "--calibration",
    type=click.Choice(["platt", "isotonic"]),
    default="platt",
    show_default=True,
    help="How P(unsafe) is made of a logit; isotonic needs 1000 prompts.",
)
@click.option(
    "--rate",
    "rates",
    multiple=True,
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=(0.01, 0.005, 0.001),
    show_default=True,
    help="False-positive rate to set a threshold for; repeatable.",
)
@click.option(
    "--default-false-positive-rate",
    "default_rate",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.01,
    show_default=True,
    help="The rate that an engine enforces when nobody tells it otherwise.",
)
@options.apart
@click.option("--seed", type=int, default=0, show_default=True)
@options.strict
@click.option("--dry-run", is_flag=True, help="Read and check everything, say what would be done, stop.")
@options.judged
@options.running
@options.capturing
def fit(
    model: str,
    data: tuple[Path, ...],
    threshold_data: tuple[Path, ...],
    eval_data: tuple[Path, ...],
    hard_data: tuple[Path, ...],
    out: Path,
    units: str,
    strict: bool,
    dry_run: bool,
    label: Any,
    max_units: int,
    sites: str,
    layers: str,
    calibration: Any,
    probe: Any,
    hidden: int | None,
    rates: tuple[float, ...],
    default_rate: float,
    apart: tuple[str, ...],
    seed: int,
    pooling: str,
    window: int | None,
    ema_rate: float | None,
    temperature: float | None,
    heads: int | None,
    monitor_tokens: int | None,
    **running: Any,
) -> None:
    """Fit a probe on a model's activations and write a bundle."""
    from guard.bundle import CARD_FILE
    from guard.cost import planned
    from guard.data import load
    from guard.engine.errors import GuardStartupError
    from guard.fit import fit_bundle
    from guard.fit_settings import FitSettings, UnitChoice
    from guard.sites import SiteKind

    if hidden is not None and probe != "mlp":
        raise click.UsageError("--hidden is the size of a hidden layer; give it with --probe mlp")
    of_pooling = {"window": window, "ema_rate": ema_rate, "temperature": temperature, "heads": heads}
    settings = FitSettings(
        label=label,
        units=cast(UnitChoice, units) if units in _CHOSEN else "file",
        units_file=None if units in _CHOSEN else Path(units),
        max_units=max_units,
        sites=("mlp", "attention") if sites == "both" else (cast(SiteKind, sites),),
        layers="all" if layers == "all" else "choose" if layers == "choose" else _numbers(layers),
        calibration=calibration,
        probe=probe,
        hidden=hidden or 16,
        pooling=sequence.chosen(pooling, of_pooling, running["capture"]),
        monitor_tokens=monitor_tokens or 0,
        rates=rates,
        default_rate=default_rate,
        apart=apart,
        seed=seed,
    )
    if running["engine_options"] and running["capture"] != "engine":
        raise click.UsageError("--engine-option is for vLLM; give it with --capture engine")
    if out.exists() and not (out / CARD_FILE).is_file():
        raise click.UsageError(f"{out} exists and is not a bundle; choose another --out")
    evaluation = load("evaluate", eval_data, strict=strict) if eval_data else None
    # Evaluation prompts are barred from both other roles, threshold prompts from fitting.
    threshold = load("threshold", threshold_data, strict=strict, barred=[evaluation] if evaluation else [])
    reserved = [threshold, *([evaluation] if evaluation else [])]
    hard = load("fit", hard_data, strict=strict, barred=reserved) if hard_data else None
    fitting = load("fit", data, strict=strict, barred=[*reserved, *([hard] if hard else [])])
    for dataset in (fitting, *([hard] if hard else []), *reserved):
        click.echo(("hard negatives, " if dataset is hard else "") + options.describe(dataset))
    subject = options.subject(model, running)
    click.echo(f"model: {subject.checkpoint.name}, {subject.checkpoint.shape}")
    if dry_run:
        click.echo(planned(subject, settings, fitting, threshold, evaluation, hard))
        click.echo(f"would fit '{label}' ({probe}) on units '{units}' and write {out}; nothing was done")
        return
    try:
        bundle = fit_bundle(subject, settings, fitting, threshold, evaluation, hard)
    except GuardStartupError as error:
        raise click.ClickException(str(error)) from error
    finally:
        if subject.reader is not None:
            subject.reader.close()
    bundle.save(out)
    click.echo(f"wrote {out}: {bundle.card.features} features, digest {bundle.digest}")
    fitted = bundle.card.metrics["fit"]
    for reason in fitted["thresholds_omitted"]:
        click.echo(f"a threshold is left out: {reason}")
    for reason in fitted.get("monitor", {}).get("omitted", ()):
        click.echo(f"a limit is left out: {reason}")


_CHOSEN = ("all", "l1", "stability", "random")


def _numbers(text: str) -> tuple[int, ...]:
    """``3,5-7`` as (3, 5, 6, 7)."""
    found: set[int] = set()
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            found |= set(range(int(first), int(last if dash else first) + 1))
    except ValueError:
        found = set()
    if not found:
        raise click.BadParameter(
            f"{text!r} is neither all, choose, nor layers such as 3,5-7", param_hint="--layers"
        )
    return tuple(sorted(found))
