"""``neuronguard judge``: were these answers unsafe? Several judges, and how far they agree."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from guard.commands import options

if TYPE_CHECKING:
    from guard.judges import Judge

KEY = "NEURONGUARD_JUDGE_KEY"


@click.command()
@click.option(
    "--data",
    multiple=True,
    required=True,
    type=options.PATH,
    help="Rows with prompt or messages, response, and perhaps label and response_label; repeatable.",
)
@click.option(
    "--judge",
    "judges",
    multiple=True,
    default=("refusal", "dataset"),
    show_default=True,
    metavar="refusal|dataset|URL",
    help="Who judges: the refusal matcher, the rows' response_label, or a model behind an OpenAI-compatible "
    f"address (http://HOST/v1; its key in {KEY}); repeatable.",
)
@click.option("--judge-model", help="Name of the model behind the address.")
@click.option(
    "--template",
    type=click.Choice(["llama-guard", "chat"]),
    default="chat",
    show_default=True,
    help="How the model is asked: with the conversation alone, or as a plain chat model with instructions.",
)
@click.option(
    "--timeout", type=click.FloatRange(0, min_open=True), default=60.0, show_default=True, help="Seconds."
)
@click.option("--retries", type=click.IntRange(0, 20), default=3, show_default=True)
@click.option("--concurrency", type=click.IntRange(1, 256), default=8, show_default=True)
@click.option(
    "--out", type=options.PATH, help="Write agreement.json and judgements.jsonl.gz to this directory."
)
@click.option("--no-cache", is_flag=True, help="Neither read nor keep the verdicts of a model.")
@options.strict
def judge(
    data: tuple[Path, ...],
    judges: tuple[str, ...],
    judge_model: str | None,
    out: Path | None,
    strict: bool,
    **asking: Any,
) -> None:
    """Judge the answers in data files, and say how far the judges agree (Cohen's kappa).

    A judge that fails gives no label. With --strict, any answer that a model could not judge is an error.
    """
    from guard.data import listed
    from guard.judges import JudgeError, load_answers
    from guard.judging import FILES, ask, document, lines, markdown
    from guard.report_folder import refuse_folder, write_folder

    chosen = [_judge(text, judge_model, asking) for text in judges]
    if out:
        refuse_folder(out, FILES)
    answers, problems = load_answers(data, strict=strict)
    if problems:
        click.echo(listed(problems, "answer"), err=True)
    views = ask(chosen, answers)
    found = document(answers, views, problems)
    models = [each.name for each, text in zip(chosen, judges, strict=True) if "://" in text]
    missing = {name: found["judges"][name]["not_judged"] for name in models}
    if strict and any(missing.values()):
        raise JudgeError(f"not every answer was judged: {found['judges'][models[0]]['reasons']}")
    if out:
        text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_folder(out, dict(zip(FILES, (text.encode(), lines(answers, views)), strict=True)))
    click.echo(markdown(found), nl=False)


def _judge(text: str, model: str | None, asking: dict[str, Any]) -> Judge:
    from guard.judges import DatasetJudge, RefusalJudge

    if text == "refusal":
        return RefusalJudge()
    if text == "dataset":
        return DatasetJudge()
    if not text.startswith(("http://", "https://")):
        raise click.UsageError(f"--judge {text!r}: expected refusal, dataset, or an address http(s)://…/v1")
    if not model:
        raise click.UsageError("--judge with an address needs --judge-model, the name of the model there")
    from guard.cache import Cache, cache_root
    from guard.chat_judge import ChatJudge

    settings = {name: value for name, value in asking.items() if name != "no_cache"}
    kept = Cache(None if asking["no_cache"] else cache_root())
    return ChatJudge(model, text, key=os.environ.get(KEY) or "none", cache=kept, **settings)
