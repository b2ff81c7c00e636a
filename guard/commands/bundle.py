"""``neuronguard bundle``: look at a bundle, and check that it belongs to a model."""

from __future__ import annotations

from pathlib import Path

import click

from guard.commands import options


@click.group()
def bundle() -> None:
    """Look at a bundle."""


@bundle.command()
@click.argument("directory", type=options.PATH)
def show(directory: Path) -> None:
    """Say what a bundle guards, what it reads and where its thresholds lie."""
    from guard.bundle import Bundle

    loaded = Bundle.load(directory)
    card = loaded.card
    click.echo(f"bundle     {loaded.digest}")
    click.echo(
        f"model      {card.model.name} ({card.model.architecture}), weights {card.model.weights_sha256}"
    )
    click.echo(f"label      {card.label}")
    hidden = f", {loaded.scorer.hidden} hidden units" if card.probe == "mlp" else ""
    click.echo(f"probe      {card.probe}{hidden}")
    click.echo(f"reads      {card.features} features at {len(card.sites)} sites")
    for threshold in card.thresholds:
        default = ", the default" if threshold == card.threshold(card.default_false_positive_rate) else ""
        click.echo(
            f"threshold  {100 * threshold.false_positive_rate:g} % false positives: P(unsafe) ≥ "
            f"{threshold.probability:.6f}; true rate at most {100 * threshold.upper95:.2f} % (95 %, "
            f"{threshold.benign} benign prompts){default}"
        )
    for name, tolerance in card.self_test.tolerance.items():
        click.echo(f"self-test  {len(card.self_test.prompts)} prompts, {name} within {tolerance:.3g}")
    for file in card.data:
        click.echo(f"data       {file.role}: {file.name}, {file.harmful} harmful, {file.benign} benign")


@bundle.command()
@click.argument("directory", type=options.PATH)
@options.model
def verify(directory: Path, model: str) -> None:
    """Check that a bundle belongs to a model and that its self-test scores come out."""
    from guard.bundle import Bundle
    from guard.self_test import check

    loaded = Bundle.load(directory)
    checkpoint = options.open_model(model)
    loaded.verify_model(
        shape=checkpoint.shape,
        weights_sha256=checkpoint.weights_sha256,
        tokenizer_sha256=checkpoint.tokenizer_sha256,
    )
    for dtype, difference in check(loaded, checkpoint).items():
        accepted = loaded.card.self_test.tolerance[dtype]
        click.echo(f"{dtype}: largest difference {difference:.3g}, accepted {accepted:.3g}")
    click.echo(f"{directory} belongs to {checkpoint.name}")
