"""Options that several sub-commands share, and the objects they describe."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from guard.adapters import Adapter
    from guard.bundle import Bundle
    from guard.checkpoint import Checkpoint
    from guard.data import Dataset
    from guard.judgements import Judgements
    from guard.observe import Reader, Subject

PATH = click.Path(path_type=Path)

_MODEL_HELP = "A local Hugging Face checkpoint, or LAB_DIR:VARIANT."
MODEL = click.Option(["--model"], required=True, help=_MODEL_HELP)
"""For commands that are made and not decorated."""
model = click.option("--model", required=True, help=_MODEL_HELP)
apart = click.option(
    "--apart", multiple=True, help="Benign evaluation source to report without pooling it; repeatable."
)
strict = click.option(
    "--strict", is_flag=True, help="Stop at data with any problem, having listed all; default: leave it out."
)


def adapter(text: str) -> Adapter:
    """The adapter that ``NAME=DIR`` names."""
    from guard.adapters import Adapter

    name, equals, directory = text.partition("=")
    if not (name and equals and directory):
        raise click.BadParameter(f"{text!r} is not NAME=DIR")
    return Adapter.open(directory, name)


def bootstrap(command: Any) -> Any:
    """Add the options of every command that reports bootstrap intervals."""
    for option in (
        click.option(
            "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the draws."
        ),
        click.option(
            "--bootstrap",
            "draws",
            type=click.IntRange(min=100),
            default=1000,
            show_default=True,
            help="Draws for an interval.",
        ),
    ):
        command = option(command)
    return command


_RUNNING = (
    click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True),
    click.option("--device", default="cpu", show_default=True, help="A torch device, such as cuda."),
    click.option("--batch-tokens", type=click.IntRange(min=1), default=8192, show_default=True),
    click.option(
        "--judged-tokens",
        type=click.IntRange(1, 256),
        default=28,
        show_default=True,
        help="Length of the answers that are judged.",
    ),
    click.option("--no-cache", is_flag=True, help="Neither read nor keep answers and activations."),
)


def running(command: Any) -> Any:
    """Add the options of every command that runs a model."""
    for option in reversed(_RUNNING):
        command = option(command)
    return command


def open_model(text: str) -> Checkpoint:
    """The checkpoint that ``--model`` names."""
    from transformers.utils import logging

    from guard.checkpoint import Checkpoint
    from guard.lab import resolve

    # Loading takes seconds; answers and activations are what deserves a bar.
    logging.disable_progress_bar()
    path, name = resolve(text)
    return Checkpoint.open(path, name)


def belonging(bundle: Bundle, text: str) -> Checkpoint:
    """The checkpoint that ``--model`` names. Raises BundleError when the bundle belongs to another."""
    checkpoint = open_model(text)
    bundle.verify_model(
        shape=checkpoint.shape,
        weights_sha256=checkpoint.weights_sha256,
        tokenizer_sha256=checkpoint.tokenizer_sha256,
    )
    return checkpoint


def subject(text: str, running: dict[str, Any], under: str | None = None) -> Subject:
    """The model that ``--model`` names, ready to be observed as the running options say.

    ``under`` is a LoRA adapter to merge into it, as NAME=DIR.
    """
    from guard.cache import Cache, cache_root
    from guard.observe import Subject

    checkpoint = open_model(text)
    if under:
        checkpoint = checkpoint.under(adapter(under))
    return Subject(
        checkpoint,
        Cache(None if running["no_cache"] else cache_root()),
        dtype=running["dtype"],
        device=running["device"],
        batch_tokens=running["batch_tokens"],
        new_tokens=running["judged_tokens"],
        progress=True,
        reader=_reader(checkpoint, running) if running.get("capture") == "engine" else None,
        judgements=_judgements(running),
    )


def _judgements(running: dict[str, Any]) -> Judgements | None:
    from guard.judgements import Judgements

    if (file := running.get("judgements")) is None:
        if running.get("judge") is not None:
            raise click.UsageError("--judge chooses among judgements; give it with --judgements")
        return None
    return Judgements.load(file, running["judge"])


@contextmanager
def observing(text: str, running: dict[str, Any], under: str | None = None) -> Iterator[Subject]:
    """As :func:`subject`, for a block at whose end the engine is freed, if one ran the model."""
    from guard.engine.errors import GuardStartupError

    if running["engine_options"] and running["capture"] != "engine":
        raise click.UsageError("--engine-option is for vLLM; give it with --capture engine")
    found: Subject | None = None
    try:
        found = subject(text, running, under)
        yield found
    except GuardStartupError as error:
        raise click.ClickException(str(error)) from error
    finally:
        if found is not None and found.reader is not None:
            found.reader.close()


def _reader(checkpoint: Checkpoint, running: dict[str, Any]) -> Reader:
    from guard.engine.reader import EngineReader

    return EngineReader(checkpoint, running["dtype"], options=dict(running["engine_options"]))


def _engine_option(_context: Any, _parameter: Any, values: tuple[str, ...]) -> tuple[tuple[str, Any], ...]:
    """``NAME=VALUE`` as vLLM's ``LLM`` takes it: numbers, true and false as such, all else as text."""
    found = []
    for text in values:
        name, equals, value = text.partition("=")
        if not (name.isidentifier() and equals and value):
            raise click.BadParameter(f"{text!r} is not NAME=VALUE, such as max_model_len=4096")
        try:
            found.append((name, json.loads(value)))
        except ValueError:
            found.append((name, value))
    return tuple(found)


_CAPTURE = (
    click.option(
        "--capture",
        type=click.Choice(["transformers", "engine"]),
        default="transformers",
        show_default=True,
        help="What runs the model: transformers, or the guarded vLLM itself, in --dtype, for models that are "
        "too large for transformers or that it does not compute as they are served.",
    ),
    click.option(
        "--engine-option",
        "engine_options",
        multiple=True,
        metavar="NAME=VALUE",
        callback=_engine_option,
        help="Option of vLLM's LLM for --capture engine, such as tensor_parallel_size=2; repeatable.",
    ),
)


def capturing(command: Any) -> Any:
    """Add the options of commands that may run the model in vLLM."""
    for option in reversed(_CAPTURE):
        command = option(command)
    return command


_JUDGED = (
    click.option(
        "--judgements",
        type=PATH,
        help="What 'neuronguard judge' wrote (judgements.jsonl.gz) of the answers that 'neuronguard answer' "
        "wrote: an answer to a harmful prompt is unsafe if it says so, in place of the refusal matcher. "
        "Harmful prompts of whose answers it says nothing are left out.",
    ),
    click.option("--judge", metavar="NAME", help="Whose judgements to take, if there are several judges'."),
)


def judged(command: Any) -> Any:
    """Add the options of commands that take a judge's word for what is unsafe."""
    for option in reversed(_JUDGED):
        command = option(command)
    return command


def describe(dataset: Dataset) -> str:
    """One line about a data set, and what was wrong with its files."""
    from guard.data import listed

    left_out = ", ".join(f"{n} {reason}" for reason, n in dataset.dropped.items()) or "none"
    return (
        f"{dataset.role}: {dataset.count('harmful')} harmful, {dataset.count('benign')} benign, "
        f"{len(dataset.sources())} sources; left out: {left_out}"
        + (f"\n{listed(dataset.problems, dataset.role)}" if dataset.problems else "")
    )
