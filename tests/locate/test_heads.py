"""Safety heads: scores of heads whose part in a refusal is known, and the search for groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from guard import data
from guard.cache import Cache
from guard.checkpoint import Checkpoint
from guard.locate import sahara, ships
from guard.locate.ablation import Ablation, Head, ablated
from guard.locate.errors import LocateError
from guard.locate.heads import HeadsOptions, locate, query_heads, run
from guard.locate.unit_set import UnitSet
from loadtests.locate_heads import compare
from tests.guard import worlds
from tests.locate.heads_toys import COMPLY, REFUSE, harmful_prompts, planted_model, prompts, random_model

KINDS: tuple[Ablation, ...] = ("undifferentiated", "scaling")


def answers(model: Any, rows: list[tuple[int, ...]]) -> set[int]:
    """The most likely next tokens."""
    with torch.inference_mode():
        return {int(model(torch.tensor([row])).logits[0, -1].argmax()) for row in rows}


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("off", KINDS)
def test_planted_head_is_the_highest_for_every_query_and_carries_the_refusal(off: Ablation) -> None:
    model, rows, planted = planted_model([(1, 2)]), harmful_prompts(), Head(1, 2)
    for level in ("query", "dataset"):
        found = locate(model, rows, HeadsOptions(level=level, ablation=off, count=1))
        assert found.extra["group"].tolist() == [list(planted)]
        assert np.argwhere(found.selected["attention"]).tolist() == [list(planted)]
        assert found.extra["query_heads"][:, 0].tolist() == [list(planted)] * len(rows)
    assert answers(model, rows) == {REFUSE}
    with ablated(model, [planted], off):
        assert answers(model, rows) == {COMPLY}


def test_head_that_averages_is_found_by_scaling_alone() -> None:
    model, rows = planted_model([], averagers=[(1, 2)]), harmful_prompts()
    uniform, scaled = (locate(model, rows, HeadsOptions(level="query", ablation=off)) for off in KINDS)
    assert uniform.scores["attention"][1, 2] < 1e-12
    assert scaled.scores["attention"][1, 2] > 1.0
    assert scaled.extra["group"][0].tolist() == [1, 2]


@pytest.mark.parametrize("level", ["query", "dataset"])
def test_dead_head_scores_nothing(level: Any) -> None:
    model = random_model()
    model.model.layers[1].self_attn.o_proj.weight[:, 8:16] = 0.0
    scores = locate(model, prompts(6, 6, 9, 4), HeadsOptions(level=level, count=1)).scores["attention"]
    assert scores[1, 1] < 1e-12
    assert np.delete(scores.ravel(), 5).min() > 1e-3


def test_greedy_search_finds_two_heads_that_stand_in_for_each_other() -> None:
    model, rows = planted_model([(1, 0), (1, 1)], strength=0.25), harmful_prompts()
    found = locate(model, rows, HeadsOptions(level="query", count=2))
    assert found.extra["group"].tolist() == [[1, 0], [1, 1]]
    alone, together = found.extra["group_scores"]
    assert alone < 0.5
    assert together > 5.0
    with ablated(model, [Head(1, 0)]):
        assert answers(model, rows) == {REFUSE}
    with ablated(model, [Head(1, 0), Head(1, 1)]):
        assert answers(model, rows) == {COMPLY}


def test_search_compares_each_group_with_the_unablated_model() -> None:
    """Two heads that do much alone and nothing together are no group: a chain of steps would take both."""
    worth = {
        frozenset({Head(0, 0)}): 5.0,
        frozenset({Head(0, 1)}): 4.0,
        frozenset({Head(0, 2)}): 1.0,
        frozenset({Head(0, 0), Head(0, 1)}): 0.5,
        frozenset({Head(0, 0), Head(0, 2)}): 6.0,
        frozenset(Head(0, head) for head in range(3)): 1.0,
    }
    asked = []

    def score(group: tuple[Head, ...]) -> np.ndarray:
        asked.append(group)
        return np.array([[worth.get(frozenset({*group, Head(0, head)}), 0.0) for head in range(3)]])

    steps = sahara.search(score, 3)
    assert [step.head for step in steps] == [(0, 0), (0, 2), (0, 1)]
    assert [step.score for step in steps] == [5.0, 6.0, 1.0]
    assert asked == [(), ((0, 0),), ((0, 0), (0, 2))]
    assert np.isnan(steps[1].scores).tolist() == [[True, False, False]]


def test_search_refuses_more_heads_than_there_are_and_scores_that_are_none() -> None:
    with pytest.raises(LocateError, match="3 heads was asked for; the model has 2"):
        sahara.search(lambda group: np.ones((1, 2)), 3)
    with pytest.raises(LocateError, match="not finite"):
        sahara.search(lambda group: np.array([[1.0, np.nan]]), 1)


def test_highest_scores_are_selected_where_no_group_is_searched() -> None:
    model, rows = random_model(), prompts(6, 6, 9, 4)
    found = locate(model, rows, HeadsOptions(level="query", search="top", count=4))
    scores = found.scores["attention"]
    best = np.argsort(-scores.ravel())[:4]
    assert found.extra["group"].tolist() == [[place // 4, place % 4] for place in best]
    assert found.extra["group_scores"].tolist() == scores.ravel()[best].tolist()
    assert found.selected["attention"].sum() == 4
    assert scores == pytest.approx(found.extra["divergence"].mean(-1))


def test_divergence_is_that_of_the_next_token_distributions() -> None:
    model, (row,) = random_model(), prompts(7)
    found = locate(model, [row], HeadsOptions(level="query", ablation="scaling", epsilon=0.5, count=1))
    with torch.inference_mode():
        before = model(torch.tensor([row])).logits[0, -1].softmax(-1)
        with ablated(model, [Head(2, 3)], "scaling", epsilon=0.5):
            after = model(torch.tensor([row])).logits[0, -1].softmax(-1)
    expected = float((before * (before / after).log()).sum())
    assert found.scores["attention"][2, 3] == pytest.approx(expected, rel=1e-9)
    assert expected > 1e-3


def test_rotation_of_all_states_turns_the_right_subspace_and_not_the_left() -> None:
    states = gaussian(9, 6)
    rotation, _ = torch.linalg.qr(gaussian(6, 6, seed=1))
    for rank in (1, 3):
        left, right = (
            float(
                ships.turned(
                    ships.subspace(states, rank, side), ships.subspace(states @ rotation, rank, side)
                )
            )
            for side in ("left", "right")
        )
        assert left < 1e-9
        assert right > 10.0


def test_order_of_queries_does_not_matter() -> None:
    before, after, order = gaussian(9, 6), gaussian(9, 6, seed=1), torch.randperm(9)
    for side in ("left", "right"):
        one, other = (
            ships.turned(ships.subspace(before[rows], 2, side), ships.subspace(after[rows], 2, side))
            for rows in (torch.arange(9), order)
        )
        assert float(one) == pytest.approx(float(other), rel=1e-9)
    model, rows = random_model(), prompts(6, 6, 9, 4)
    scores = locate(model, rows, HeadsOptions(count=1)).scores["attention"]
    shuffled = locate(model, [rows[i] for i in (2, 0, 3, 1)], HeadsOptions(count=1)).scores["attention"]
    assert shuffled == pytest.approx(scores, rel=1e-6)


@pytest.mark.parametrize("degrees", [0.0, 1e-8, 1e-3, 1.0, 44.0, 46.0, 89.99, 90.0])
def test_angles_are_exact_from_tiny_to_right(degrees: float) -> None:
    radians = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    before = torch.eye(4, dtype=torch.float64)[:, :2]
    after = before.clone()
    after[0, 0], after[2, 0] = radians.cos(), radians.sin()
    # Another basis of the same plane, and the other sign: neither is an angle.
    after = after @ torch.tensor([[0.6, 0.8], [0.8, -0.6]], dtype=torch.float64)
    assert float(ships.turned(before, after)) == pytest.approx(degrees, rel=1e-6, abs=1e-13)


def test_subspaces_are_those_of_the_singular_value_decomposition() -> None:
    states = gaussian(7, 5)
    left, _, right = torch.linalg.svd(states)
    for side, expected in (("left", left[:, :2]), ("right", right[:2].T)):
        got = ships.subspace(states, 2, side)
        torch.testing.assert_close(got @ got.T, expected @ expected.T, rtol=0, atol=1e-10)


def test_heads_of_a_query_are_listed_most_divergent_first() -> None:
    divergences = np.array([[[0.1, 3.0], [0.5, 1.0]], [[0.2, 2.0], [0.4, 4.0]]])
    assert query_heads(divergences, 2).tolist() == [[[0, 1], [1, 1]], [[1, 1], [0, 0]]]


def test_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows, options = random_model(), prompts(6, 6, 9, 4), HeadsOptions(count=2)
    expected = locate(model, rows, options)
    cache, real = Cache(tmp_path), ships.turned
    seen: list[int] = []

    def stop(*arguments: Any) -> torch.Tensor:
        seen.append(1)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(ships, "turned", stop)
    with pytest.raises(KeyboardInterrupt):
        locate(model, rows, options, cache=cache, identity="toy")
    found = locate(model, rows, options, cache=cache, identity="toy")
    # Four of the six layers of the two steps were kept; the fifth was being measured.
    assert len(seen) == 5 + 2
    assert found.scores["attention"].tolist() == expected.scores["attention"].tolist()
    assert found.extra["group_scores"].tolist() == expected.extra["group_scores"].tolist()
    again = locate(model, rows, options, cache=cache, identity="toy")
    assert len(seen) == 5 + 2
    assert again.scores["attention"].tolist() == expected.scores["attention"].tolist()
    locate(model, rows, HeadsOptions(count=2, side="right"), cache=cache, identity="toy")
    locate(model, rows, options, cache=cache, identity="another")
    assert len(seen) == 5 + 2 + 6 + 6


def test_cost_counts_half_a_pass_for_half_the_blocks() -> None:
    cost = locate(random_model(), prompts(10, 10), HeadsOptions(count=1)).cost
    # Blocks of three: the unablated pass and the one row that it is held against, and 4 heads of each layer
    # from there on; in the last layer only the last token.
    blocks = 20 * 3 + 10 * 3 + 4 * (20 * 3 + 20 * 2 + 2 * 1)
    assert cost["tokens"] == pytest.approx(blocks / 3)
    assert cost["forward_passes"] == pytest.approx(cost["tokens"] / 10)
    assert cost["seconds"] > 0.0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"count": 0}, "count is 0; expected at least 1"),
        ({"rank": -1}, "rank is -1"),
        ({"limit": 0}, "limit is 0"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"epsilon": 1.0}, "epsilon is 1.0; expected 0 or more and less than 1"),
        ({"epsilon": -0.1}, "epsilon is -0.1"),
        ({"epsilon": float("nan")}, "epsilon is nan"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(LocateError, match=sentence):
        HeadsOptions(**options)


def test_too_few_prompts_for_an_angle_are_refused() -> None:
    with pytest.raises(LocateError, match="2 prompts are too few for a subspace of rank 2"):
        locate(random_model(), prompts(5, 6), HeadsOptions(rank=2))


def test_results_are_not_kept_without_a_name_for_the_weights(tmp_path: Path) -> None:
    with pytest.raises(LocateError, match="identity"):
        locate(random_model(), prompts(5, 6), cache=Cache(tmp_path))


def rows_of(label: str, number: int, seed: int) -> list[dict[str, Any]]:
    return [{"prompt": text, "label": label} for text in worlds.texts(number, seed=seed)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(worlds.checkpoint(tmp_path_factory.mktemp("model"), worlds.model()))


@pytest.mark.parametrize("template", ["chat", "query", "tulu", "none"])
def test_run_gives_a_set_of_heads_with_its_origin(
    tmp_path: Path, checkpoint: Checkpoint, template: Any
) -> None:
    file = worlds.write_rows(tmp_path / "a.jsonl", rows_of("harmful", 5, 0) + rows_of("benign", 3, 1))
    dataset = data.load("fit", [file])
    found = run(checkpoint, [dataset], HeadsOptions(count=2, template=template, limit=4))
    loaded = UnitSet.load(found.save(tmp_path / "units"))
    assert len(loaded) == 2
    assert loaded.scores["attention"].shape == (3, 4)
    assert loaded.provenance.model.weights_sha256 == checkpoint.weights_sha256
    assert loaded.provenance.data == dataset.files
    assert loaded.provenance.options["count"] == 2
    assert (len(loaded.provenance.template) == 64) == (template == "chat")
    tokenizer = checkpoint.load_tokenizer()
    texts = {
        "query": "## Query:{}\n## Answer:",
        "tulu": "<|user|>\n{}\n<|assistant|>\n",
        "none": "{}",
        "chat": "<|user|>{}<|end|><|assistant|>",
    }
    harmful = [prompt.text for prompt in dataset.prompts if prompt.label == "harmful"][:4]
    ids = [tuple(tokenizer(texts[template].format(text)).input_ids) for text in harmful]
    expected = locate(checkpoint.load_model(), ids, HeadsOptions(count=2))
    assert loaded.scores["attention"] == pytest.approx(expected.scores["attention"])


def test_run_without_a_harmful_prompt_that_fits_is_refused(tmp_path: Path, checkpoint: Checkpoint) -> None:
    benign = data.load("fit", [worlds.write_rows(tmp_path / "benign.jsonl", rows_of("benign", 3, 1))])
    with pytest.raises(LocateError, match="no harmful prompt"):
        run(checkpoint, [benign])
    row = {"prompt": "a" * 300, "label": "harmful"}
    long = data.load("fit", [worlds.write_rows(tmp_path / "long.jsonl", [row])])
    with pytest.raises(LocateError, match="none of the 1 harmful prompts fits the model's context of 256"):
        run(checkpoint, [long])


def test_benchmark_compares_ways_that_agree() -> None:
    found = compare(random_model(), prompts(6, 6, 9, 4, 7), layers=3, heads=4, pairs=3)
    assert found.difference < 1e-4
    assert found.speedup_over_single.median > 1.0
