"""What prompts look like to a model while units are located: its own chat template, or a paper's."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

from guard.data import Dataset, Prompt
from guard.prompts import Tokens, encode

Template = Literal["chat", "query", "tulu", "none"]
"""``chat``: the model's own; ``query``: Zhou et al.'s ``## Query:``; ``tulu``: Chen et al.'s ``<|user|>``;
``none``: the bare text. All but the first take the last user turn alone."""
TEXTS: dict[Template, str] = {
    "query": "## Query:{text}\n## Answer:",
    "tulu": "<|user|>\n{text}\n<|assistant|>\n",
    "none": "{text}",
}


def render(tokenizer: Any, prompt: Prompt, template: Template) -> Tokens:
    """Token ids of a prompt. Texts that are no chat get the special tokens that the tokenizer adds itself."""
    if template == "chat":
        return encode(tokenizer, prompt.chat())
    return tuple(tokenizer(TEXTS[template].format(text=prompt.text), verbose=False).input_ids)


def tokens_of(tokenizer: Any, dataset: Dataset, template: Template) -> tuple[list[Tokens], list[Tokens]]:
    """The harmful and the benign prompts of a data set, as token ids."""
    found: dict[str, list[Tokens]] = {"harmful": [], "benign": []}
    for prompt in dataset.prompts:
        found[prompt.label].append(render(tokenizer, prompt, template))
    return found["harmful"], found["benign"]


def identity(tokenizer: Any, template: Template) -> str:
    """How a provenance names it: the SHA-256 of the chat template, or the name of another."""
    if template != "chat":
        return template
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()
