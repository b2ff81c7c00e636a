"""From rows to token ids: prompts as a server sees them, answers as the model would have to write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from guard.locate.decoding import end_tokens, greedy
from guard.locate.errors import LocateError
from guard.locate.twins import Twin
from guard.prompts import Tokens, encode
from guard.tune.errors import TuneError
from guard.tune.options import TuneOptions
from guard.tune.rows import Row

_PROBE = "An answer"


class Text(NamedTuple):
    """One request with its answer; the answer's end token is part of it unless it was cut."""

    prompt: Tokens
    answer: Tokens
    rejected: Tokens = ()
    """DPO's other answer; empty for SFT."""


def texts(
    rows: Sequence[Row], model: Any, tokenizer: Any, options: TuneOptions, *, progress: bool
) -> list[Text]:
    """Token ids of all rows that fit, with the model's own answers where rows lack one. Raises TuneError."""
    context = min(options.longest, int(model.config.max_position_embeddings))
    fitting = [
        (row, prompt)
        for row in rows
        if len(prompt := encode(tokenizer, row.prompt.chat())) + _least(row, options) <= context
    ]
    if not fitting:
        raise TuneError(f"no prompt leaves room for an answer in {context} tokens; raise 'longest'")
    end = end_token(model, tokenizer)
    own = _own(fitting, model, options, end, progress)

    def tokens(text: str) -> Tokens:
        return (*tokenizer(text, add_special_tokens=False, verbose=False).input_ids, end)

    made = []
    for number, (row, prompt) in enumerate(fitting):
        answer = own[number] if row.answer is None else tokens(row.answer)
        rejected: Tokens = ()
        if options.objective == "dpo":
            rejected = own[number] if row.rejected is None else tokens(row.rejected)
        room = context - len(prompt)
        text = Text(prompt, answer[:room], rejected[:room])
        # An own answer may be empty, or equal the preferred one: there is nothing to learn from it.
        if text.answer and (options.objective == "sft" or (text.rejected and text.rejected != text.answer)):
            made.append(text)
    if not made:
        raise TuneError("the model's own answers leave no row to learn from: each is empty or the wanted one")
    return made


def _lacks(row: Row, options: TuneOptions) -> bool:
    """Whether an answer of the model's own is needed."""
    return row.answer is None or (options.objective == "dpo" and row.rejected is None)


def _least(row: Row, options: TuneOptions) -> int:
    """Tokens that must be left for an answer; one that is read has a token and its end at least."""
    return options.own_answers or 2 if _lacks(row, options) else 2


def _own(
    fitting: Sequence[tuple[Row, Tokens]],
    model: Any,
    options: TuneOptions,
    end: int,
    progress: bool,
) -> dict[int, Tokens]:
    """The model's own greedy answers, by the number of the row that lacks one."""
    needed = [number for number, (row, _) in enumerate(fitting) if _lacks(row, options)]
    length = options.own_answers
    if not needed or length is None:
        return {}
    try:
        answers = greedy(
            Twin(model),
            [fitting[number][1] for number in needed],
            new_tokens=length,
            progress=progress,
            name="own answers",
        )
    except LocateError as error:
        raise TuneError(str(error)) from error
    # One that came to its end has it; one that was cut has none.
    return {n: (*a, end) if len(a) < length else a for n, a in zip(needed, answers, strict=True)}


def end_token(model: Any, tokenizer: Any) -> int:
    """The token that ends an answer: the one the chat template puts there, else the model's first one.

    Models may have several. Raises TuneError when there is none.
    """
    ends = end_tokens(model)
    if not ends:
        raise TuneError("the model has no end token (eos_token_id), so that no answer could end")
    turns = [{"role": "user", "content": "A request"}, {"role": "assistant", "content": _PROBE}]
    rendered = str(tokenizer.apply_chat_template(turns, tokenize=False))
    behind = tokenizer(rendered.rpartition(_PROBE)[2], add_special_tokens=False, verbose=False).input_ids
    return int(next((token for token in behind if token in ends), ends[0]))
