"""The benchmark of sequence probes: what it runs, and that it measures what it says."""

from __future__ import annotations

from typing import Any

import pytest

from guard.bundle import Bundle
from guard.engine.config import EXTRA_ARG
from guard.sealed import Keyring
from guard.verdict import Directive
from loadtests import grid, patched_child, random_model, sequence_cost

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


def test_throughput_is_plain_over_scored_and_prefill_the_other_way():
    plain = [{"first": 1.0, "decode": 3.0}] * 3
    found = {"plain": plain, "control": plain, "monitoring": [{"first": 2.0, "decode": 6.0}] * 3}
    slow = sequence_cost.ratios(found)["monitoring"]
    assert [slow[name]["median"] for name in ("throughput", "decode", "prefill")] == [0.5, 0.5, 2.0]
    assert "monitoring | ≥ 0.97 | 0.500" in sequence_cost.table({"pooling": {"ema": {"monitoring": slow}}})


class Recorder(sequence_cost.WatchingChild):
    """Keeps what it is asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def batch(self, prompts: list[list[int]], max_tokens: int, watched: bool | None) -> dict[str, float]:
        self.asked.append((prompts, watched))
        return {}


def test_each_batch_runs_in_every_way_and_each_way_comes_first_in_turn():
    engine, prompts = Recorder(), [[[turn]] for turn in range(4)]
    sequence_cost.rotate(engine, prompts)
    assert [asked for asked, _ in engine.asked] == [batch for batch in prompts for _ in range(4)]
    assert [watched for _, watched in engine.asked[::4]] == [None, None, False, True]


def test_watched_answers_carry_an_order_that_never_stops_them():
    keys = Keyring.generate()
    sealed = patched_child.parameters(keys, None, 4, watched=True).extra_args[EXTRA_ARG]
    decision = Directive.open(sealed, keys, audience=patched_child.AUDIENCE).decision
    assert decision.monitor.logit == patched_child.OUT_OF_REACH
    assert decision.rules == ()
    assert patched_child.parameters(keys, None, 4).extra_args is None
