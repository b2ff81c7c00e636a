"""The benchmark of patches: its bundles, its figures, and that it measures what it says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from guard.bundle import Bundle
from guard.sealed import Keyring
from loadtests import grid, patched, patched_child, random_model

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM and its dependencies warn a lot


def test_patched_are_five_per_cent_of_all_layers_but_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = grid.sizes(3, 128, 200)
    monkeypatch.setitem(grid.MODELS, patched.MODEL, small)
    monkeypatch.setattr(patched, "PROBE", 30)
    model = random_model.make_model(tmp_path / "model", small)
    for name, folder in patched.bundles(tmp_path, model).items():
        (patch,) = Bundle.load(folder).patches.values()
        assert patch.card.kind == name
        assert {site.layer for site in patch.card.sites} == {0, 1}
        assert sum(len(site.units) for site in patch.card.sites) == 20


def test_throughput_is_plain_over_patched_and_time_the_other_way() -> None:
    found = {
        "plain": [{"decode": 1.0, "first": 1.0}] * 3,
        "control": [{"decode": 1.0, "first": 1.0}] * 3,
        "slow": [{"decode": 2.0, "first": 3.0}] * 3,
    }
    assert patched.ratios(found, "decode", throughput=True)["slow"]["median"] == 0.5
    assert patched.ratios(found, "first", throughput=False)["slow"]["median"] == 3.0


class Recorder(patched.PatchedChild):
    """Keeps what it is asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def patched(
        self, prompts: list[list[int]], max_tokens: int, names: list[str | None] | None
    ) -> dict[str, float]:
        self.asked.append((prompts, names))
        return {}


def test_each_batch_runs_in_every_way_and_each_way_comes_first_in_turn() -> None:
    engine = Recorder()
    prompts = [[[turn]] * 16 for turn in range(4)]
    found = patched.rotate(engine, prompts, 8, {"one": ("dynamic", 1)})
    assert {name: len(runs) for name, runs in found.items()} == {"plain": 4, "control": 4, "one": 4}
    assert [asked for asked, _ in engine.asked] == [batch for batch in prompts for _ in range(3)]
    one = ["dynamic", *[None] * 15]
    assert [names for _, names in engine.asked[:6]] == [None, None, one, None, one, None]


def test_a_batch_that_was_not_patched_as_asked_is_no_measurement() -> None:
    completion = SimpleNamespace(token_ids=[1, 2])
    output = SimpleNamespace(request_id="0", finished=True, outputs=[completion], kv_transfer_params=None)
    left = [[output], []]
    engine = SimpleNamespace(
        add_request=lambda *_: None, has_unfinished_requests=lambda: len(left) > 1, step=lambda: left.pop(0)
    )
    llm = SimpleNamespace(llm_engine=engine, reset_prefix_cache=lambda: None)
    with pytest.raises(RuntimeError, match="not under"):
        patched_child.measure(llm, Keyring.generate(), [[5]], ["stored"], 2)
