"""``neuronguard evaluate``: how a bundle does on sources that took no part in fitting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from guard.commands import options


@click.command()
@options.model
@click.option("--bundle", "directory", required=True, type=options.PATH, help="Directory of the bundle.")
@click.option(
    "--eval-data",
    multiple=True,
    required=True,
    type=options.PATH,
    help="Prompts to test on, JSON lines; a file or a directory of files; repeatable.",
)
@click.option("--json", "json_file", type=options.PATH, help="Write the figures to this file.")
@click.option(
    "--markdown", "markdown_file", type=options.PATH, help="Write the tables to this file, not to the screen."
)
@click.option(
    "--adapter", metavar="NAME=DIR", help="Test the model with this LoRA adapter merged in, in memory."
)
@options.apart
@options.running
def evaluate(
    model: str,
    directory: Path,
    eval_data: tuple[Path, ...],
    json_file: Path | None,
    markdown_file: Path | None,
    adapter: str | None,
    apart: tuple[str, ...],
    **running: Any,
) -> None:
    """Flag rates, with intervals, on sources that took no part in fitting."""
    from guard.bundle import Bundle
    from guard.cache import write_whole
    from guard.data import load
    from guard.evaluate import evaluate_bundle
    from guard.report import markdown

    bundle = Bundle.load(directory)
    dataset = load("evaluate", eval_data)
    click.echo(options.describe(dataset), err=True)
    document = evaluate_bundle(bundle, options.subject(model, running, adapter), dataset, apart=apart)
    text = markdown(document)
    if json_file:
        figures = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
        write_whole(json_file, lambda file: file.write(figures.encode()))
    if markdown_file:
        write_whole(markdown_file, lambda file: file.write(text.encode()))
    else:
        click.echo(text)
