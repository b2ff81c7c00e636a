from __future__ import annotations

import pytest
from tokenizers.processors import TemplateProcessing

from guard.prompts import TemplateError, encode, ends_with_tail, prompt_tails
from tests.guard import worlds


def test_the_tail_is_what_the_template_puts_after_the_user() -> None:
    assert prompt_tails(worlds.tokenizer()) == ((0, 2),)


def test_every_prompt_ends_with_a_tail() -> None:
    tokenizer = worlds.tokenizer()
    tails = prompt_tails(tokenizer)
    for messages in (
        [{"role": "user", "content": "hi"}],
        [{"role": "system", "content": "x"}, {"role": "user", "content": "it?"}],
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ],
    ):
        assert ends_with_tail(encode(tokenizer, messages), tails)
    assert not ends_with_tail((1, 70, 2), tails)
    assert not ends_with_tail((0, 2), tails)


def test_ids_are_those_of_the_template_rendered_and_tokenised_once() -> None:
    tokenizer = worlds.tokenizer()
    messages = [{"role": "user", "content": "Was ist das? ✓"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(encode(tokenizer, messages)) == ids


def test_no_token_is_added_that_the_template_does_not_write() -> None:
    tokenizer = worlds.tokenizer()
    # Many tokenizers put a first token in front of plain text; templates write it themselves.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", 3)]
    )
    assert tokenizer("x").input_ids[0] == 3
    assert encode(tokenizer, [{"role": "user", "content": "x"}])[0] == 1


def test_a_template_with_a_different_end_after_a_system_turn_gives_two_tails() -> None:
    tokenizer = worlds.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}"
        "{% if messages[0]['role'] == 'system' %}<|system|>{% endif %}<|assistant|>"
    )
    assert prompt_tails(tokenizer) == ((2,), (3, 2))


def test_a_template_that_refuses_system_turns_is_accepted() -> None:
    tokenizer = worlds.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}<|assistant|>"
    )
    assert prompt_tails(tokenizer) == ((2,),)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "adds nothing after"),
        ("<|user|><|assistant|>", "drops the user's text"),
        ("{{ raise_exception('never') }}", "cannot render"),
    ],
)
def test_a_template_without_a_recognisable_end_is_refused(template: str, message: str) -> None:
    tokenizer = worlds.tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(TemplateError, match=message):
        prompt_tails(tokenizer)
