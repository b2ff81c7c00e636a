"""``neuronguard answer``: a model's own answers to prompts, for judges."""

from __future__ import annotations

import json
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
    help="Prompts, JSON lines; a file or a directory of files; repeatable.",
)
@click.option("--out", required=True, type=options.PATH, help="File for the answers, JSON lines.")
@options.strict
@options.running
@options.capturing
def answer(model: str, data: tuple[Path, ...], out: Path, strict: bool, **running: Any) -> None:
    """Write the model's greedy answers: the prompts with a 'response' each, as neuronguard judge reads them.

    Fit and evaluate take what the judge then says by --judgements, with the same --judged-tokens. The file
    holds prompts and answers as they are.
    """
    from guard.cache import write_whole
    from guard.data import load

    if out.exists():
        raise click.UsageError(f"{out} exists; choose another file")
    dataset = load("evaluate", data, strict=strict)
    click.echo(options.describe(dataset), err=True)
    with options.observing(model, running) as subject:
        fitting, too_long = subject.encoded(dataset)
        answers = subject.answers([tokens for _, tokens in fitting], dataset.role)
    lines = [
        json.dumps(
            {
                "messages": prompt.chat(),
                "label": prompt.label,
                "source": prompt.source,
                **({"pair": prompt.pair} if prompt.pair else {}),
                "response": text,
            },
            ensure_ascii=False,
        )
        for (prompt, _), text in zip(fitting, answers, strict=True)
    ]
    write_whole(out, lambda file: file.write("".join(f"{line}\n" for line in lines).encode()))
    click.echo(f"wrote {out}: {len(lines)} answers, {too_long} prompts too long", err=True)
