"""``neuronguard materialise``: make one model of a lab directory."""

from __future__ import annotations

import click


@click.command()
@click.argument("model")
def materialise(model: str) -> None:
    """Make the checkpoint of LAB_DIR:VARIANT in the user's cache and say where it lies."""
    from guard.lab import resolve

    click.echo(str(resolve(model)[0]))
