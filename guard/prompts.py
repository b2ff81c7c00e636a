"""From a conversation to the token ids a server sees, and what the chat template puts at their end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Tokens = tuple[int, ...]

_SYSTEM = [{"role": "system", "content": "Be brief."}]
_EARLIER = [{"role": "user", "content": "Good morning"}, {"role": "assistant", "content": "Hello"}]
# They end in different characters, so that what all renderings share comes from the template alone.
_ENDINGS = ("What time is it?", "Name a colour", "Count to 7", "Stop!", "List (three)", "no.")


class TemplateError(ValueError):
    """The chat template does not end prompts in a way that the guard can recognise."""


def encode(tokenizer: Any, messages: Sequence[dict[str, str]]) -> Tokens:
    """Token ids of a conversation with the header of the answer to come, as a chat endpoint makes them.

    The template is rendered to text and tokenised without further special tokens, in this order: it is what
    vLLM's chat endpoint does (``add_special_tokens`` is false there by default).
    """
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def prompt_tails(tokenizer: Any) -> tuple[Tokens, ...]:
    """The token ids that end every prompt the template makes: what follows the last user turn.

    Found by rendering conversations that share nothing but the template and taking their common end.
    Conversations with a system turn or earlier turns may end differently; every ending is returned.
    Raises TemplateError when an ending is empty, or is all there is.
    """
    tails: list[Tokens] = []
    for before in ([], _SYSTEM, _EARLIER):
        try:
            prompts = [encode(tokenizer, [*before, {"role": "user", "content": end}]) for end in _ENDINGS]
        except Exception as error:
            # Templates refuse what they do not support (often the system role) by raising.
            if not before:
                raise TemplateError(f"the chat template cannot render a user turn: {error}") from error
            continue
        tail = _common_end(prompts)
        if not tail:
            raise TemplateError(
                "the chat template adds nothing after the user's text, so that the guard could not tell a "
                "complete prompt from a part of one; use a template with a generation prompt"
            )
        if any(len(tail) == len(prompt) for prompt in prompts):
            raise TemplateError("the chat template drops the user's text")
        if tail not in tails:
            tails.append(tail)
    return tuple(tails)


def _common_end(prompts: Sequence[Tokens]) -> Tokens:
    length = 0
    for column in zip(*(reversed(prompt) for prompt in prompts), strict=False):
        if len(set(column)) > 1:
            break
        length += 1
    return prompts[0][len(prompts[0]) - length :]


def ends_with_tail(prompt: Tokens, tails: Sequence[Tokens]) -> bool:
    """Whether a prompt ends the way the probe was fitted on."""
    return any(prompt[len(prompt) - len(tail) :] == tail for tail in tails if len(prompt) > len(tail))
