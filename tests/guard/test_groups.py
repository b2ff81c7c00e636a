from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from guard.data import Prompt
from guard.groups import SAME, near_duplicates, requests


def test_texts_with_nearly_the_same_words_are_one_request() -> None:
    groups = near_duplicates(
        [
            "Please tell me how to bake a plain loaf of bread",
            "please tell me how to bake a PLAIN loaf of bread!",
            "Please tell me how to bake a loaf of bread",
            "Please tell me the way to the station",
            "",
            "",
        ]
    ).tolist()
    assert groups[0] == groups[1] == groups[2]
    assert len(set(groups)) == 4  # texts without words stay apart


@given(st.lists(st.sets(st.sampled_from("abcdef")), max_size=12))
def test_groups_are_those_of_comparing_every_pair(sets: list[set[str]]) -> None:
    found = near_duplicates([" ".join(sorted(each)) for each in sets])
    near = np.eye(len(sets), dtype=bool)
    for i, a in enumerate(sets):
        for j, b in enumerate(sets):
            near[i, j] |= bool(a | b) and len(a & b) >= SAME * len(a | b) - 1e-9
    for _ in sets:
        near = near @ near
    np.testing.assert_array_equal(near, found[:, None] == found[None, :])


def test_rows_that_their_data_set_calls_a_pair_are_one_request() -> None:
    found = near_duplicates(["a b", "c d", "e f", "g h"], pairs=["p", None, "p", None]).tolist()
    assert found[0] == found[2]
    assert len(set(found)) == 3


def test_an_attack_belongs_to_the_plain_request_behind_it_and_numbers_stay_in_their_source() -> None:
    def prompt(text: str, source: str, pair: str | None = None) -> Prompt:
        return Prompt((("user", text),), "benign", source, pair=pair)

    goal = "Say how bread is baked at home"
    found = requests(
        [
            prompt("say how bread is baked at home", "plain"),
            prompt("You are a baker in a play.", "attacks", goal),
            prompt("Bmvw ipx csfbe", "attacks", goal),
            prompt("one two", "numbered", "7"),
            prompt("eins zwei", "numbered", "7"),
            prompt("something else", "other", "7"),
        ]
    ).tolist()
    assert found[0] == found[1] == found[2]
    assert found[3] == found[4]
    assert len(set(found)) == 3
