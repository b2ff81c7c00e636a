"""``neuronguard compare``: two bundles on the same prompts."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from guard.commands import options


@click.command()
@click.argument("a", type=options.PATH)
@click.argument("b", type=options.PATH)
@click.option(
    "--model",
    "models",
    multiple=True,
    required=True,
    help="A local Hugging Face checkpoint, or LAB_DIR:VARIANT; given twice, A's and then B's.",
)
@click.option(
    "--data",
    multiple=True,
    required=True,
    type=options.PATH,
    help="Prompts that neither was fitted on, JSON lines; a file or a directory of files; repeatable.",
)
@click.option(
    "--question",
    type=click.Choice(["harmful_prompt", "unsafe_output"]),
    default="harmful_prompt",
    show_default=True,
    help="What counts as positive: a harmful request, or one that the model also answers.",
)
@click.option("--json", "json_file", type=options.PATH, help="Write the figures to this file.")
@options.apart
@options.strict
@options.bootstrap
@options.running
@options.capturing
def compare(
    a: Path,
    b: Path,
    models: tuple[str, ...],
    data: tuple[Path, ...],
    question: Any,
    json_file: Path | None,
    apart: tuple[str, ...],
    strict: bool,
    draws: int,
    seed: int,
    **running: Any,
) -> None:
    """Test whether bundle B is better than bundle A, or worse, on prompts that both have scored."""
    from guard.bundle import Bundle
    from guard.cache import write_whole
    from guard.comparison import compare_bundles, markdown
    from guard.data import load
    from guard.resample import Bootstrap

    if len(models) > 2:
        raise click.UsageError("give --model once for both bundles, or twice")
    bundles = Bundle.load(a), Bundle.load(b)
    dataset = load("evaluate", data, strict=strict)
    click.echo(options.describe(dataset), err=True)
    with ExitStack() as stack:
        subjects = [stack.enter_context(options.observing(each, running)) for each in models]
        document = compare_bundles(
            bundles,
            (subjects[0], subjects[-1]),
            dataset,
            question=question,
            apart=apart,
            bootstrap=Bootstrap(draws, seed),
        )
    if json_file:
        text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_whole(json_file, lambda file: file.write(text.encode()))
    click.echo(markdown(document), nl=False)
