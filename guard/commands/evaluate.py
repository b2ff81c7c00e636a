"""``neuronguard evaluate``: how a bundle does on sources that took no part in fitting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from guard.commands import options

_FILES = ("report.json", "report.html")


@click.command()
@options.model
@click.option("--bundle", "directory", required=True, type=options.PATH, help="Directory of the bundle.")
@click.option(
    "--data",
    "--eval-data",
    "data",
    multiple=True,
    required=True,
    type=options.PATH,
    help="Prompts to test on, JSON lines, gzipped or not; a file or a directory of files; repeatable.",
)
@click.option(
    "--out",
    type=options.PATH,
    help="Write report.json and report.html to this directory; it appears whole or not at all.",
)
@click.option("--json", "json_file", type=options.PATH, help="Write the figures to this file.")
@click.option(
    "--markdown", "markdown_file", type=options.PATH, help="Write the tables to this file, not to the screen."
)
@click.option(
    "--adapter", metavar="NAME=DIR", help="Test the model with this LoRA adapter merged in, in memory."
)
@options.apart
@options.strict
@click.option(
    "--answers/--no-answers",
    default=True,
    show_default=True,
    help="Have the model answer, for the question whether its answer is unsafe; most of the time goes there.",
)
@click.option(
    "--baselines",
    is_flag=True,
    help="Measure the baselines as well: words, random units, residual stream, token embeddings.",
)
@click.option(
    "--fit-data",
    multiple=True,
    type=options.PATH,
    help="The files that the bundle was fitted on, for --baselines; without them the baselines are fitted on "
    "the other sources of --data, which flatters them; repeatable.",
)
@options.bootstrap
@options.judged
@options.running
@options.capturing
def evaluate(
    model: str,
    directory: Path,
    data: tuple[Path, ...],
    out: Path | None,
    json_file: Path | None,
    markdown_file: Path | None,
    adapter: str | None,
    apart: tuple[str, ...],
    strict: bool,
    answers: bool,
    baselines: bool,
    fit_data: tuple[Path, ...],
    draws: int,
    seed: int,
    **running: Any,
) -> None:
    """Flag rates and rankings, with intervals, on sources that took no part in fitting.

    The figures for "is the request harmful" are in report.json under overall and by_source; those for "will
    the answer be unsafe", under unsafe_output.
    """
    from guard.bundle import Bundle
    from guard.cache import write_whole
    from guard.data import load
    from guard.evaluation import evaluate_bundle
    from guard.report import markdown
    from guard.report_folder import refuse_folder, write_folder
    from guard.resample import Bootstrap

    if markdown_file and not answers:
        raise click.UsageError("--markdown shows the model's answers; leave out --no-answers")
    if running["judgements"] and not answers:
        raise click.UsageError("--judgements are of the model's answers; leave out --no-answers")
    if fit_data and not baselines:
        raise click.UsageError("--fit-data is for the baselines; give --baselines as well")
    if out:
        refuse_folder(out, _FILES)
    bundle = Bundle.load(directory)
    dataset = load("evaluate", data, strict=strict)
    click.echo(options.describe(dataset), err=True)
    fitted = load("fit", fit_data, barred=[dataset], strict=strict) if fit_data else None
    if out:
        # Before the work: what draws the page may not be installed.
        from guard.report_page import page
    curves = {}
    with options.observing(model, running, adapter) as subject:
        found = evaluate_bundle(
            bundle,
            subject,
            dataset,
            apart=apart,
            answers=answers,
            bootstrap=Bootstrap(draws, seed),
            strict=strict,
        )
        if baselines:
            from guard import protocol_baselines

            rows, scores = protocol_baselines.measure(bundle, subject, found, Bootstrap(draws, seed), fitted)
            found.document["baselines"] = rows
            curves = protocol_baselines.drawn(scores)
    figures = (json.dumps(found.document, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
    if out:
        write_folder(out, dict(zip(_FILES, (figures, page(found, curves).encode()), strict=True)))
        click.echo(f"wrote {', '.join(str(out / name) for name in _FILES)}", err=True)
    if json_file:
        write_whole(json_file, lambda file: file.write(figures))
    if markdown_file:
        text = markdown(found.document)
        write_whole(markdown_file, lambda file: file.write(text.encode()))
    elif answers and not out:
        click.echo(markdown(found.document))
    elif not (out or json_file):
        click.echo(figures.decode())
