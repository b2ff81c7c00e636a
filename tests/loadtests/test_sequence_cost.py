"""The benchmark of sequence probes: what it runs, and that it measures what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from guard.bundle import Bundle
from guard.engine.config import EXTRA_ARG
from guard.sealed import Keyring
from guard.verdict import Directive
from loadtests import grid, orders, random_model, sequence_cost, stepwise_child

RESULTS = Path(__file__).parents[2] / "docs" / "results"

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM and its dependencies warn a lot


@pytest.mark.parametrize("name", sequence_cost.POOLINGS)
def test_bundles_read_neurons_of_all_layers_and_pass_everything(tmp_path, monkeypatch, name):
    small = grid.sizes(3, 128, 200)
    monkeypatch.setitem(grid.MODELS, sequence_cost.MODEL, small)
    monkeypatch.setattr(sequence_cost, "PROBE", 30)
    model = random_model.make_model(tmp_path / "model", small)
    bundle = Bundle.load(sequence_cost.make_bundle(tmp_path, model, name))
    assert bundle.sequence.pooling == sequence_cost.POOLINGS[name]
    assert bundle.card.features == 30
    assert {threshold.probability for threshold in bundle.card.thresholds} == {1.0}


def test_throughput_is_that_of_a_batch_of_sixteen_and_of_its_steps():
    """Reading takes 2 s and 23 steps take 4.6 s; twice as long for both, or for one."""
    plain = {"prefill": [0.25] * 9, "decode": [0.2] * 9}

    def found(prefill, decode):
        return {"prefill": {"plain": plain["prefill"], "guarded": [prefill] * 9},
                "decode": {"plain": plain["decode"], "guarded": [decode] * 9}}  # fmt: skip

    slow = sequence_cost.figures(found(0.5, 0.4), "guarded")
    assert [slow[name]["median"] for name in ("throughput", "decode", "prefill")] == [0.5, 2.0, 2.0]
    reading = sequence_cost.figures(found(0.5, 0.2), "guarded")
    assert reading["throughput"]["median"] == pytest.approx(6.6 / 8.6)
    assert reading["plain_ms"] == {"prefill": 250.0, "decode": 200.0}
    table = sequence_cost.table({"pooling": {"ema": {"monitoring": slow, "monitoring, control": reading}}})
    assert "ema: monitoring | ≥ 0.97 | 0.500" in table


def test_the_page_shows_the_figures_that_are_kept():
    found = json.loads((RESULTS / "sequence-cost.json").read_text("utf-8"))
    assert sequence_cost.table(found) in (RESULTS / "sequence-cost.md").read_text("utf-8")
    assert found["pooling"].keys() == sequence_cost.POOLINGS.keys()


class Engine:
    """Takes what is asked of it and notes what of the guard was on; a request takes a step a token."""

    def __init__(self) -> None:
        self.guarded = True
        self.steps: list[tuple[bool, int]] = []
        self.asked: list[Any] = []
        self._left: list[int] = []

    def on(self) -> None:
        self.guarded = True

    def off(self) -> None:
        self.guarded = False

    def add_request(self, name: str, prompt: dict[str, list[int]], params: Any) -> None:
        self.asked.append((name, prompt["prompt_token_ids"], params))
        self._left.append(params.max_tokens)

    def step(self) -> None:
        self.steps.append((self.guarded, len(self._left)))
        self._left = [left - 1 for left in self._left if left > 1]

    def has_unfinished_requests(self) -> bool:
        return bool(self._left)

    def reset_prefix_cache(self) -> None:
        pass


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def run(engine):
    return stepwise_child.Run(engine, engine, Keyring.generate())


def test_each_prompt_is_read_in_every_way_and_each_way_comes_first_in_turn(engine, run):
    found = run.prefill([[1], [2], [3], [4], [5], [6]], cycles=3, watched=False)
    assert {way: len(seconds) for way, seconds in found.items()} == dict.fromkeys(stepwise_child.WAYS, 3)
    assert engine.steps == [(on, 2) for on in (False, True, False, True, False, False, False, False, True)]
    assert [prompt for _, prompt, _ in engine.asked[::2]] == [[1]] * 3 + [[3]] * 3 + [[5]] * 3


def test_answers_grow_by_one_token_in_each_way_and_are_read_guarded(engine, run):
    found = run.decode([[1], [2]], cycles=2, watched=False)
    assert {way: len(seconds) for way, seconds in found.items()} == dict.fromkeys(stepwise_child.WAYS, 2)
    assert [on for on, _ in engine.steps] == [True, *(False, True, False), *(True, False, False), True]


def test_requests_that_do_not_end_when_they_should_are_an_error(engine, run):
    engine.add_request("other", {"prompt_token_ids": [1]}, orders.parameters(None, None, 99))
    with pytest.raises(RuntimeError, match="more steps"):
        run.decode([[1]], cycles=1, watched=False)


def test_watched_answers_carry_an_order_that_never_stops_them():
    keys = Keyring.generate()
    sealed = orders.parameters(keys, stepwise_child.WATCHED, 4).extra_args[EXTRA_ARG]
    decision = Directive.open(sealed, keys, audience=orders.AUDIENCE).decision
    assert decision.monitor.logit == stepwise_child.OUT_OF_REACH
    assert decision.rules == ()
    assert orders.parameters(keys, None, 4).extra_args is None
