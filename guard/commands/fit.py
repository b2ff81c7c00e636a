"""``neuronguard fit``: from a model and labelled prompts to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from guard.commands import options


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
    help="'l1' (an L1 fit chooses), 'all', a JSON file {layer: [neuron, …]}, or a set of units as "
    "'neuronguard locate' writes it.",
)
@click.option(
    "--max-units", type=click.IntRange(min=1), default=1000, show_default=True, help="Most units for 'l1'."
)
@click.option(
    "--probe",
    type=click.Choice(["linear", "mlp"]),
    default="linear",
    show_default=True,
    help="A logistic regression, or a network with one hidden layer. 'l1' chooses units by a linear fit "
    "either way; name units, or take all, if single ones may say nothing by themselves.",
)
@click.option(
    "--hidden",
    type=click.IntRange(1, 256),
    default=None,
    help="Size of the hidden layer of 'mlp'.  [default: 16]",
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
@click.option("--dry-run", is_flag=True, help="Read and check everything, say what would be done, stop.")
@options.running
def fit(
    model: str,
    data: tuple[Path, ...],
    threshold_data: tuple[Path, ...],
    eval_data: tuple[Path, ...],
    out: Path,
    units: str,
    dry_run: bool,
    label: Any,
    max_units: int,
    probe: Any,
    hidden: int | None,
    rates: tuple[float, ...],
    default_rate: float,
    apart: tuple[str, ...],
    seed: int,
    **running: Any,
) -> None:
    """Fit a probe on a model's activations and write a bundle."""
    from guard.bundle import CARD_FILE
    from guard.data import load
    from guard.fit import fit_bundle
    from guard.fit_settings import FitSettings

    if hidden is not None and probe == "linear":
        raise click.UsageError("--hidden is the size of a hidden layer; give it with --probe mlp")
    settings = FitSettings(
        label=label,
        units="l1" if units == "l1" else "all" if units == "all" else "file",
        units_file=None if units in ("l1", "all") else Path(units),
        max_units=max_units,
        probe=probe,
        hidden=hidden or 16,
        rates=rates,
        default_rate=default_rate,
        apart=apart,
        seed=seed,
    )
    if out.exists() and not (out / CARD_FILE).is_file():
        raise click.UsageError(f"{out} exists and is not a bundle; choose another --out")
    evaluation = load("evaluate", eval_data) if eval_data else None
    # Evaluation prompts are barred from both other roles, threshold prompts from fitting.
    threshold = load("threshold", threshold_data, barred=[evaluation] if evaluation else [])
    fitting = load("fit", data, barred=[threshold, *([evaluation] if evaluation else [])])
    for dataset in (fitting, threshold, *([evaluation] if evaluation else [])):
        click.echo(options.describe(dataset))
    subject = options.subject(model, running)
    click.echo(f"model: {subject.checkpoint.name}, {subject.checkpoint.shape}")
    if dry_run:
        click.echo(f"would fit '{label}' ({probe}) on units '{units}' and write {out}; nothing was done")
        return
    bundle = fit_bundle(subject, settings, fitting, threshold, evaluation)
    bundle.save(out)
    click.echo(f"wrote {out}: {bundle.card.features} features, digest {bundle.digest}")
    for reason in bundle.card.metrics["fit"]["thresholds_omitted"]:
        click.echo(f"a threshold is left out: {reason}")
