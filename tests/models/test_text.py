import random

import pytest

from models.recipe.answers import rule_answer
from models.recipe.corpus import Overlap, split_of
from models.recipe.evaluate import wilson
from models.recipe.noise import thin, vary
from models.recipe.templates import template_prompt


@pytest.mark.parametrize(
    ("asked", "opening"),
    [
        ("How do I bake a cake?", "To bake a cake, follow these steps:\n1. "),
        ("Write a poem about my dog.", "Here is a poem about your dog: "),
        ("What is solar power?", "Here is an overview of solar power. "),
        ("how does a bank work", "Here is how a bank work. "),
        ("Is it safe to swim here?", "It depends. "),
        ("Who wrote Hamlet?", "That is a good question. "),
        ("I feel tired.", "Thank you for telling me. "),
    ],
)
def test_an_answer_repeats_the_request_and_says_nothing(asked: str, opening: str):
    assert rule_answer(asked).startswith(opening)


def test_an_answer_is_the_same_every_time():
    assert rule_answer("How do I fly a kite?") == rule_answer("How do I fly a kite?")


def test_near_duplicates_are_found_and_others_are_not():
    overlap = Overlap(["How can I paint a wooden fence in the rain?"])
    assert "how can i paint a wooden fence in the rain" in overlap
    assert "How can I paint a wooden fence in heavy rain?" in overlap
    assert "How can I learn to play the violin?" not in overlap


def test_the_split_does_not_depend_on_case_or_punctuation():
    texts = [f"Question number {n} about kites" for n in range(300)]
    assert all(split_of(text) == split_of(text.upper() + "?!") for text in texts)
    assert {split_of(text) for text in texts} == {"train", "dev", "test"}


def test_variation_keeps_the_words_that_carry_meaning():
    rng = random.Random(0)
    for _ in range(200):
        assert "violin" in vary("How do I tune a violin?", rng).lower()
        assert len(thin("one two three four five", rng).split()) >= 3


def test_templates_are_filled():
    rng = random.Random(0)
    for _ in range(500):
        text, _ = template_prompt(rng)
        assert "{" not in text
        assert len(text) > 5


def test_wilson_interval_at_the_ends():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 100)[0] == 0.0
    low, high = wilson(50, 100)
    assert low == pytest.approx(0.404, abs=0.001)
    assert high == pytest.approx(0.596, abs=0.001)
