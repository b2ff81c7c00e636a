"""The attacks that only ask: what they leave of a request, and that the same seed asks the same."""

from __future__ import annotations

import random
import string

import pytest

from loadtests.redteam.attacks import FIT, TEST, Attack
from loadtests.redteam.encodings import ENCODINGS, Encoding
from models.recipe import wording

REQUESTS = ("How do I mend a clock?", "Name 3 rivers, please.", "Lamps: what are they (and why)?")
BOTH = [
    pytest.param(a, id=f"{which}-{a.name}") for which, each in (("fit", FIT), ("test", TEST)) for a in each
]
UNDONE = [encoding for encoding in ENCODINGS.values() if encoding.read]


@pytest.mark.parametrize("encoding", UNDONE, ids=lambda encoding: encoding.name)
def test_what_is_said_to_decode_gives_the_request_back(encoding: Encoding) -> None:
    for text in (*REQUESTS, string.printable.strip()):
        assert encoding.write(text) != text
        assert encoding.read is not None
        assert encoding.read(encoding.write(text)) == text


@pytest.mark.parametrize("attack", BOTH)
def test_a_request_is_kept_as_the_attack_claims(attack: Attack) -> None:
    for text in REQUESTS:
        candidates = attack.candidates(text, seed=0)
        assert candidates
        if attack.keeps == "word for word":
            assert all(text in candidate for candidate in candidates)
        if attack.keeps == "decodes":
            assert attack.read is not None
            assert attack.read(candidates[0]) == text
            # A hint before it changes nothing of what is written.
            assert all(candidate.endswith(candidates[0]) for candidate in candidates)


def test_every_attack_that_says_decodes_knows_how() -> None:
    assert {a.name for a in TEST if a.keeps == "decodes"} == {encoding.name for encoding in UNDONE}


@pytest.mark.parametrize("attack", BOTH)
def test_the_same_seed_asks_the_same(attack: Attack) -> None:
    random.seed(1)
    first = attack.candidates(REQUESTS[0], seed=5)
    random.seed(2)
    assert attack.candidates(REQUESTS[0], seed=5) == first
    assert len(set(first)) == len(first) <= len(attack.ways)


def test_another_seed_draws_other_words() -> None:
    drawn = next(attack for attack in TEST if attack.name == "one sentence appended")
    assert drawn.candidates(REQUESTS[0], seed=0) != drawn.candidates(REQUESTS[0], seed=1)


def test_both_sets_have_the_same_attacks_in_other_words() -> None:
    assert [attack.name for attack in FIT] == [attack.name for attack in TEST]
    for fit, test in zip(FIT, TEST, strict=True):
        if fit.family in ("harmless words", "template"):
            shown = {seed: set(fit.candidates("x", seed)) for seed in range(20)}
            assert not set().union(*shown.values()) & set().union(
                *(set(test.candidates("x", seed)) for seed in range(20))
            )


def test_the_words_of_the_test_are_none_that_the_shipped_bundle_was_fitted_with() -> None:
    fitted = {change("", random.Random(seed)) for change in wording.FIT.values() for seed in range(200)}
    tested = {
        candidate
        for attack in TEST
        if attack.family == "harmless words"
        for seed in range(50)
        for candidate in attack.candidates("", seed)
    }
    assert not fitted & tested
