"""The guard's schedulers under random traffic: nobody is shown what must not be, nobody loses anything."""

from __future__ import annotations

import os
import random
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings

from guard.patch import prefix, stored
from guard.patch_card import PatchSite
from guard.verdict import Decision, Rule
from tests.engine import world
from tests.engine.schedules import PREFIX, SCHEDULES, SLOTS, TAIL, Asked, Order, Schedule, Score, crowd

pytestmark = [  # vLLM and its dependencies warn a lot
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error:::guard"),
]
ANSWERED = ("pass", "tag", "patch")
MODES: dict[str, dict[str, Any]] = {
    "synchronous": {},
    "synchronous, crowded": {"crowded": True},
    "synchronous, by priority": {"policy": "priority", "crowded": True},
    "speculative": {"drafts": True, "crowded": True},
    "asynchronous": {"queue": 2},
    "asynchronous, crowded": {"queue": 2, "crowded": True},
    "asynchronous, by priority": {"queue": 2, "policy": "priority", "crowded": True},
    "asynchronous, second runner": {"queue": 2, "v2": True, "crowded": True},
}
# What the random schedules bring about now and then is brought about for certain here: the mode, the request
# in question, and the others.
LONG = Asked(length=290)
CASES: dict[str, tuple[str, Asked, Schedule]] = {
    "preempted before its verdict": (
        "synchronous, crowded",
        Asked(length=300),
        Schedule((Asked(length=300, max_tokens=20),)),
    ),
    "preempted in flight of the step that judges it, output delivered": (
        "asynchronous",
        LONG,
        # The other's 64th token needs the last free block in the step after the one that ends the prompt.
        Schedule((Asked(length=43, max_tokens=40),)),
    ),
    "preempted in flight of the step that judges it, output dropped": (
        "asynchronous",
        LONG,
        Schedule((), resets=((4, True),)),
    ),
    "preempted after its verdict": (
        "synchronous",
        Asked(length=150, max_tokens=40),
        Schedule((Asked(length=150, max_tokens=40),)),
    ),
    "stopped while its next token is in flight": ("asynchronous", Asked(length=20), Schedule(())),
    "aborted while the step that judges it is in flight": (
        "asynchronous",
        Asked(length=20, leaves=0, leaves_late=True),
        Schedule(()),
    ),
    "aborted in flight": ("asynchronous", Asked(length=20, leaves=3), Schedule(())),
}
SCORES: dict[str, tuple[Score, ...]] = {
    **dict.fromkeys(CASES, ("low", "high", "nan", "missing")),
    "preempted after its verdict": ("low",),
    "stopped while its next token is in flight": ("high", "nan", "missing"),
    "aborted in flight": ("low",),
}


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from tests.engine.schedulers import World

    root = tmp_path_factory.mktemp("simulated")
    model = world.make_model(root / "model")
    bundle = world.make_bundle(root / "bundle", model, tails=((TAIL,),))
    shape = bundle.card.model.shape
    sites = [PatchSite(layer=0, kind="mlp", units=(0, 1))]
    words = prefix("words", "some words", PREFIX)
    zero, half = (stored(name, sites, shape, scale=scale) for name, scale in (("zero", 0.0), ("half", 0.5)))
    bundle.with_patch(zero).with_patch(words).with_patch(half).save(root / "bundle")
    with pytest.MonkeyPatch.context() as patch:
        yield World(model, root / "bundle", root / "keys", patch)


def run(simulated: Any, mode: str, schedule: Schedule) -> Any:
    """Run a schedule and check all that must hold whatever happened."""
    from tests.engine.schedulers import Mode
    from tests.engine.simulation import simulate

    engine = simulate(simulated, Mode(**MODES[mode]), schedule)
    assert engine.scheduler.ledger.self_test.passed
    for i in range(len(simulated.bundle.card.self_test.prompts)):
        check_silent(engine.answers[f"self-test-{i}"], Asked(order="check"))
    for number, asked in enumerate(schedule.asked):
        answer = engine.answers[str(number)]
        if answer.aborted:
            check_begun(answer, asked, number)
        elif asked.action in ANSWERED:
            check_passed(answer, asked, number)
        else:
            check_silent(answer, asked)
            check_verdict(answer, asked, number)
    check_at_rest(engine.scheduler)
    return engine


def check_verdict(answer: Any, asked: Asked, number: int) -> None:
    """One verdict, its own, on the first output and on the last."""
    verdicts = [verdict for verdict in answer.verdicts if verdict is not None]
    assert answer.verdicts[0] is not None
    assert all(verdict == verdicts[0] for verdict in verdicts)
    assert verdicts[0].action == asked.action
    assert verdicts[0].prompt_tokens == asked.length
    assert verdicts[0].unscored_shape == asked.unscored
    if verdicts[0].action != "error":
        assert verdicts[0].logit == asked.logit(number)


def check_begun(answer: Any, asked: Asked, number: int) -> None:
    """Of a request whose client has gone: nothing, or the beginning of what it was to get."""
    assert answer.tokens == asked.answer(number)[: len(answer.tokens)]
    assert answer.finished is None
    if answer.outputs:
        assert asked.action in ANSWERED
        check_verdict(answer, asked, number)


def check_passed(answer: Any, asked: Asked, number: int) -> None:
    assert answer.tokens == asked.answer(number)
    assert answer.finished == "length"
    with_logprobs = [output.new_prompt_logprobs_tensors is not None for output in answer.outputs]
    assert with_logprobs[0] == (asked.logprobs is not None)
    check_verdict(answer, asked, number)
    assert answer.verdicts[-1] is not None


def check_silent(answer: Any, asked: Asked) -> None:
    from tests.engine.schedulers import END

    error = asked.action == "error"
    assert len(answer.outputs) == 1
    assert answer.finished == ("error" if error else "stop")
    # Direct streams need one token, which is not the model's, to show their end.
    assert answer.tokens == ([END] if asked.stream and not error else [])
    (output,) = answer.outputs
    assert output.new_prompt_logprobs_tensors is None
    assert (output.new_logprobs is None) == (asked.logprobs is None or not answer.tokens)
    if output.new_logprobs is not None:
        assert {part.shape[0] for part in output.new_logprobs[:3]} == {1}
        assert output.new_logprobs.logprobs.shape == (1, asked.logprobs + 1)


def check_at_rest(scheduler: Any) -> None:
    """Nothing is left of any request."""
    from tests.engine.schedulers import BLOCKS

    assert len(scheduler.ledger) == 0
    assert not scheduler.ledger.unjudged
    assert not scheduler.ledger.slots
    assert not scheduler.requests
    assert not scheduler.running
    assert not scheduler.waiting
    assert not scheduler.kv_holding_waiting
    assert not scheduler.deferred_waiting
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == BLOCKS - 1


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schedule=SCHEDULES)
@pytest.mark.parametrize("mode", MODES)
def test_whatever_happens_each_request_gets_its_own_verdict_and_its_own_tokens(
    simulated: Any, mode: str, schedule: Schedule
) -> None:
    for name, count in run(simulated, mode, schedule).seen.items():
        if count:
            event(name)


@pytest.mark.parametrize("mode", MODES)
def test_no_verdict_and_no_token_of_ten_thousand_requests_is_anothers(simulated: Any, mode: str) -> None:
    """1,280 in each mode, by turns: every score and every token tells whose it is."""
    seen, actions, preempted = Counter[str](), Counter[str](), 0
    for seed in range(4):
        schedule = crowd(320, seed)
        engine = run(simulated, mode, schedule)
        seen.update(engine.seen)
        preempted += len(engine.preempted)
        actions.update(asked.action for asked in schedule.asked)
    assert set(actions) == {*ANSWERED, "refuse", "checked", "error"}
    assert min(actions.values()) > 30
    assert preempted > 20
    assert sum(count for moment, count in seen.items() if moment.startswith("aborted")) > 20


@pytest.mark.parametrize(("case", "score"), [(case, score) for case in CASES for score in SCORES[case]])
def test_each_awkward_moment_is_reached_and_changes_nothing(simulated: Any, case: str, score: Score) -> None:
    mode, asked, others = CASES[case]
    engine = run(simulated, mode, replace(others, asked=(*others.asked, replace(asked, score=score))))
    assert engine.seen[case] > 0
    number = str(len(others.asked))
    assert engine.preempted == ({number} if case.startswith("preempted") else set())


@pytest.mark.parametrize("order", ["patch", "other", "stubborn", "begin"])
@pytest.mark.parametrize("case", CASES)
def test_a_request_that_is_patched_survives_each_of_them(simulated: Any, case: str, order: Order) -> None:
    """Among them: its flag falls in the step in which it is preempted."""
    mode, asked, others = CASES[case]
    patched = replace(asked, score="high", order=order)
    engine = run(simulated, mode, replace(others, asked=(*others.asked, patched)))
    # What its verdict ends, or the second run delays, does not come about for it.
    if "in flight of the step that judges it" in case or case.startswith("aborted while"):
        assert engine.seen[case] > 0
        number = str(len(others.asked))
        assert engine.preempted == ({number} if case.startswith("preempted") else set())


@pytest.mark.parametrize("orders", list(permutations(("none", "patch", "other"))))
@pytest.mark.parametrize("mode", ["synchronous", "asynchronous", "asynchronous, second runner"])
def test_copies_of_a_prompt_share_blocks_with_those_under_the_same_patch_alone(
    simulated: Any, mode: str, orders: tuple[Order, ...]
) -> None:
    """One after the other over a warm cache, each twice; the content of blocks is checked in every step."""
    asked = tuple(
        Asked(length=100, shared=100, order=order, score="high", max_tokens=4, arrives=12 * place)
        for place, order in enumerate((*orders, *orders))
    )
    taken = run(simulated, mode, Schedule(asked)).runner.blocks.taken
    whole = 96  # of 100 tokens: six blocks
    for number, order in enumerate((*orders, *orders)):
        first = (0, whole if number else 0)
        second = [(SLOTS[order], whole if number >= len(orders) else 0)] if order in SLOTS else []
        assert taken[str(number)] == [first, *second]


def test_every_verdict_says_how_many_requests_the_ledger_holds_and_the_last_says_none(simulated: Any) -> None:
    from guard.engine.config import ENTRIES_KEY
    from tests.engine.schedulers import Mode
    from tests.engine.simulation import Engine

    engine = Engine(simulated, Mode())
    engine.self_test()
    for number in range(3):
        asked = Asked(length=40, max_tokens=2 + number)
        engine.add(str(number), asked.prompt(number), asked, number, -9.0)
    engine.finish()
    outputs = [output for number in range(3) for output in engine.answers[str(number)].outputs]
    said = [(output.kv_transfer_params or {}).get(ENTRIES_KEY) for output in outputs]
    assert [entries for entries in said if entries is not None] == [3, 2, 2, 1, 2, 0]


def patched_salt(simulated: Any) -> tuple[Any, str]:
    """An engine that was just started, and the salt of a run that it has patched."""
    from tests.engine.schedulers import Mode
    from tests.engine.simulation import Engine

    engine, asked = Engine(simulated, Mode()), Asked(length=200, order="patch", score="high")
    engine.self_test()
    engine.add("patched", asked.prompt(1), asked, 1, 9.0)
    patched = engine.scheduler.requests["patched"]
    engine.finish()
    return engine, patched.cache_salt


def test_nobody_can_name_the_salt_under_which_patched_blocks_are_kept(simulated: Any) -> None:
    """Clients of vLLM itself choose salts; the bundle's digest and the patch's name are no secrets."""
    asked, found, salts = Asked(length=200, order="patch", score="high"), [], ["foreign"]
    for _ in range(2):
        engine, salt = patched_salt(simulated)
        salts.append(salt)
        for salt in salts[-2:]:
            request = simulated.request("other", asked.prompt(1), Asked(length=200), salt=salt)
            found.append(engine.scheduler.kv_cache_manager.get_computed_blocks(request)[1])
    # The patched run's own salt finds its blocks, that of the same run in another start does not.
    assert found == [0, 192, 0, 192]


def test_the_salt_of_patched_blocks_follows_from_nothing_that_can_be_known(
    simulated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither from when and where the engine was started, nor from seeds, which vLLM sets for all of them.

    128 bits are drawn anew for every start: no hexadecimal digit has few values in two dozen of them.
    """
    salts = []
    for _ in range(24):
        with monkeypatch.context() as patch:
            for clock in ("time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns"):
                patch.setattr(time, clock, lambda clock=clock: 10**9 if clock.endswith("_ns") else 1e9)
            patch.setattr(os, "getpid", lambda: 1)
            patch.setattr(uuid, "getnode", lambda: 1)
            random.seed(0)
            np.random.seed(0)
            torch.manual_seed(0)
            salts.append(patched_salt(simulated)[1])
    values = [len(set(column)) for column in zip(*salts, strict=True)]
    assert sum(value >= 6 for value in values) >= 30


@pytest.mark.parametrize("mode", MODES)
def test_the_scheduler_is_of_the_engines_own_kind(simulated: Any, mode: str) -> None:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    from tests.engine.schedulers import Mode

    chosen = Mode(**MODES[mode])
    assert isinstance(simulated.scheduler(chosen), AsyncScheduler) == (chosen.queue > 1)


def test_an_engine_whose_own_policy_names_an_unknown_patch_does_not_start(simulated: Any) -> None:
    from guard.engine.errors import GuardStartupError
    from tests.engine.schedulers import Mode

    default = Decision(policy="own", rules=(Rule(above=0.5, action="patch", patch="nowhere"),))
    with pytest.raises(GuardStartupError, match=r"'nowhere', which is none of .* \(zero, words, half\)"):
        simulated.scheduler(Mode(), default)
