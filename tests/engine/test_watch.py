"""Answers that are watched as they grow: the rule, and the schedulers that carry it out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from guard.engine.ledger import Ledger
from guard.engine.watch import Watch
from guard.monitor import Monitor, Stop
from guard.pooling import Pooling
from guard.sealed import Keyring
from guard.verdict import Decision, Directive, Rule
from tests.engine import world
from tests.engine.cards import PROMPTS, card
from tests.engine.schedules import DECISIONS, TAIL, Asked, Schedule, crowd

pytestmark = [  # vLLM and its dependencies warn a lot
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error:::guard"),
]
KEYS = Keyring.generate()


def seen(values: list[float | None], *, debounce: int = 1, stops: bool = True) -> list[Any]:
    watch = Watch(Monitor(logit=1.0, debounce=debounce), "n" * 16, stops=stops, armed=True)
    return [watch.see(value, tokens) for tokens, value in enumerate(values, 1)]


def test_an_answer_ends_at_the_first_token_that_counts():
    *before, found = seen([0.0, 0.99, 1.0])
    assert before == [None, None]
    assert (found.outcome, found.cut) == ("stopped", True)
    assert found.stop == Stop(nonce="n" * 16, tokens=3, logit=1.0)


def test_tokens_that_count_must_come_in_a_row():
    found = seen([2.0, 2.0, 0.0, 2.0, 2.0, 2.0], debounce=3)
    assert found[:5] == [None] * 5
    assert found[5].stop.tokens == 6


def test_observed_answers_go_on_and_are_counted_once():
    first, *later = seen([2.0, 2.0, 0.0, 2.0], stops=False)
    assert (first.outcome, first.cut) == ("observed", False)
    assert later == [None] * 3


@pytest.mark.parametrize("value", [None, math.nan])
def test_an_answer_whose_score_is_missing_does_not_go_on(value):
    (found,) = seen([value])
    assert (found.outcome, found.cut, found.stop) == ("failed", True, None)
    (observed,) = seen([value], stops=False)
    assert (observed.outcome, observed.cut) == ("failed", False)


def test_nothing_is_stopped_before_its_verdict():
    watch = Watch(Monitor(logit=1.0), None, stops=True)
    assert watch.see(9.0, 1) is None


def ledger(probe: str, *, watches: bool) -> Ledger:
    pooling = Pooling(kind="rolling") if probe == "sequence" else None
    made = Ledger(
        card(probe=probe, pooling=pooling),
        bundle="b" * 64,
        dtype="float32",
        default=Decision(policy="d", rules=()),
        keys=KEYS,
        audience="here",
        watches=watches,
    )
    for i, (prompt, logit) in enumerate(zip(PROMPTS, (1.0, -1.0), strict=True)):
        made.open(f"t{i}", prompt=prompt, prompt_tokens=len(prompt), directive=None)
        made.judge(f"t{i}", logit)
        made.close(f"t{i}")
    return made


def judged(made: Ledger, mode: str = "enforce") -> Any:
    decision = Decision(
        policy="p", mode=mode, rules=(Rule(above=0.5, action="refuse"),), monitor=Monitor(logit=0.0)
    )
    sealed = Directive.issue(decision, audience="here", body=b"").seal(KEYS)
    made.open("r", prompt=[9, 7], prompt_tokens=2, directive=sealed)
    return made.judge("r", -3.0)


def test_engine_that_cannot_watch_fails_closed_when_told_to():
    made = ledger("linear", watches=False)
    assert (judged(made).action, judged(made).reason) == ("error", "directive_no_monitor")


def test_verdict_says_that_the_whole_prompt_was_read():
    assert judged(ledger("sequence", watches=True)).read == "prompt"
    assert judged(ledger("sequence", watches=True), "check").action == "checked"


@pytest.mark.parametrize(("mode", "watched"), [("enforce", True), ("observe", True), ("check", False)])
def test_answers_are_watched_from_the_verdict_until_the_end(mode, watched):
    made = ledger("sequence", watches=True)
    judged(made, mode)
    assert [watch.armed for watch in made.watched.values()] == [True] * watched
    made.close("r")
    assert not made.watched


# Under random traffic.

LIMIT = 5.0
MODES: dict[str, dict[str, Any]] = {
    "synchronous": {},
    "synchronous, crowded": {"crowded": True},
    "asynchronous": {"queue": 2},
    "asynchronous, crowded": {"queue": 2, "crowded": True},
    "asynchronous, second runner": {"queue": 2, "v2": True, "crowded": True},
}


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from loadtests.random_model import with_sequence_probe
    from tests.engine.schedulers import World

    root = tmp_path_factory.mktemp("watched")
    model = world.make_model(root / "model")
    bundle = world.make_bundle(root / "bundle", model, tails=((TAIL,),))
    prompts = world.prompts(60, seed=1000)
    pooling = Pooling(kind="rolling", window=4)
    with_sequence_probe(bundle, world.make_reference(model), pooling, prompts).save(root / "bundle")
    with pytest.MonkeyPatch.context() as patch:
        watched = DECISIONS["open"].model_copy(update={"monitor": Monitor(logit=LIMIT, debounce=2)})
        patch.setitem(DECISIONS, "open", watched)
        yield World(model, root / "bundle", root / "keys", patch)


def rises(number: int) -> int:
    """From which token of its answer on a request scores above the limit; some never do."""
    return 2 + number % 9


def scored(runner: Any, scheduled: Any, step: Any) -> Any:
    """Attach what the worker would: the score after the last token that was read."""
    from guard.engine.outputs import RUNNING_ATTRIBUTE, WATCHED_ATTRIBUTE

    if getattr(scheduled, WATCHED_ATTRIBUTE, False):
        values = []
        for rid, tokens in zip(step.output.req_ids, step.output.sampled_token_ids, strict=True):
            if not tokens:
                values.append(np.inf)  # in the middle of being computed again: nobody may count this
                continue
            read = runner._known[rid] - 1 - runner._prompt[rid]
            values.append(-np.inf if read <= 0 else LIMIT + (read >= rises(runner.numbers[rid])) - 0.5)
        setattr(step.output, RUNNING_ATTRIBUTE, np.array(values, dtype=np.float32))
    return step


@pytest.mark.parametrize("mode", MODES)
def test_watched_answers_end_where_they_must_and_no_others(
    simulated: Any, mode: str, monkeypatch: Any
) -> None:
    """Random traffic with preemptions, clients that leave, and neighbours that are not watched."""
    from tests.engine import simulation
    from tests.engine.schedulers import Mode

    run = simulation.Runner.run
    monkeypatch.setattr(
        simulation.Runner, "run", lambda self, scheduled: scored(self, scheduled, run(self, scheduled))
    )
    stopped = preempted = 0
    for seed in range(2):
        schedule = crowd(200, seed)
        asked = tuple(
            replace(one, order="open" if number % 2 else "observe", score="low", max_tokens=12, odd=False,
                    early=False, length=max(2, one.length))
            for number, one in enumerate(schedule.asked)
        )  # fmt: skip
        engine = simulation.simulate(simulated, Mode(**MODES[mode]), replace(schedule, asked=asked))
        for number, one in enumerate(asked):
            stopped += check(engine.answers[str(number)], one, number, simulated.keys)
        preempted += len(engine.preempted)
        assert not engine.scheduler.ledger.watched
        assert not engine.scheduler.requests
    assert stopped > 50
    assert preempted > 10


def check(answer: Any, asked: Asked, number: int, keys: Keyring) -> bool:
    """Whether the answer was stopped, and that it is what it must be."""
    whole, cut = asked.answer(number), rises(number) + 1  # two in a row
    must = asked.order == "open" and cut < asked.max_tokens
    want = whole[:cut] if must else whole
    if answer.aborted:
        assert answer.tokens == want[: len(answer.tokens)]
        return False
    assert answer.tokens == want
    assert answer.finished == ("stop" if must else "length")
    if must:
        nonce = answer.verdicts[0].nonce
        assert Stop.of_reason(answer.outputs[-1].stop_reason, keys, nonce=nonce).tokens == cut
        assert answer.verdicts[-1] == answer.verdicts[0]
    return must


@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
def test_a_worker_that_sends_no_scores_ends_watched_answers(simulated: Any, mode: str) -> None:
    from tests.engine.schedulers import Mode
    from tests.engine.simulation import simulate

    asked = tuple(Asked(order=order) for order in ("open", "observe"))
    engine = simulate(simulated, Mode(**MODES[mode]), Schedule(asked))
    failed, other = engine.answers["0"], engine.answers["1"]
    assert (failed.finished, failed.tokens) == ("error", asked[0].answer(0)[:1])
    assert (other.finished, other.tokens) == ("length", asked[1].answer(1))
