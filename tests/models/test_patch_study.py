"""The study of patches: which prompts serve what, what is patched where, and the whole of it on toy twins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from guard.locate.decoding import greedy
from guard.locate.hooks import at_inputs
from guard.locate.patching import dap_generate
from guard.prompts import Tokens
from models.recipe.patching import choice, curve, figures, first, report
from models.recipe.patching.positions import Reach, reaching
from models.recipe.patching.prompts import ROLES, draw
from models.recipe.patching.rankings import RANKINGS, scores
from models.recipe.patching.study import PAIRS, Lab, Size, about
from models.recipe.patching.ways import Way, answers, chosen, said, stored
from models.recipe.sources import (
    DEV_BENIGN,
    DEV_HARMFUL,
    TEST_BENIGN,
    TEST_HARMFUL,
    TRAIN_BENIGN,
    TRAIN_HARMFUL,
    Source,
)
from tests.guard import worlds
from tests.locate import contrast_toys as toys

LAYERS, WIDTH = 3, 48
PATCHED = toys.sites(toys.PLANTED)
SIZE = Size(
    locate=6, dev_harmful=6, dev_benign=4, harmful=9, benign=4, hard=4, texts=3, score_tokens=4, new_tokens=3
)


def files(sources: Sequence[Source]) -> set[str]:
    return {source.file for source in sources}


def test_units_are_located_on_trained_sources_chosen_on_dev_ones_and_reported_on_test_ones() -> None:
    assert all(role.sources for role in ROLES.values())
    assert files(ROLES["locate"].sources) <= files(TRAIN_HARMFUL)
    assert files(ROLES["dev harmful"].sources) <= files(DEV_HARMFUL)
    assert files(ROLES["dev benign"].sources) <= files(DEV_BENIGN)
    assert files(ROLES["harmful"].sources) <= files(TEST_HARMFUL)
    tested = files(ROLES["benign"].sources) | files(ROLES["hard"].sources)
    assert tested <= files(TEST_BENIGN)
    assert not tested & files((*TRAIN_BENIGN, *DEV_BENIGN))


def test_a_role_is_drawn_evenly_from_its_sources(data: Path) -> None:
    found = draw(data, "harmful", 10)
    sources = [prompt.source for prompt in found]
    assert sorted(sources.count(name) for name in set(sources)) == [3, 3, 4]
    assert draw(data, "harmful", 10) == found


@pytest.mark.parametrize("reach", ["all", "prompt", "last", "answer"])
def test_only_the_tokens_that_are_meant_are_patched(reach: Reach) -> None:
    """Against the whole text read anew for every token."""
    recipient, donor = toys.twins()
    prompts = toys.prompts()[:5]
    found = reaching(recipient, donor, PATCHED, prompts, reach, 4, 4096)
    assert found == [anew(recipient, donor, prompt, reach) for prompt in prompts]
    whole = dap_generate(recipient, donor, PATCHED, prompts, new_tokens=4)
    assert (found == whole) == (reach == "all")
    assert found != greedy(recipient, prompts, new_tokens=4)


def anew(recipient: Any, donor: Any, prompt: Tokens, reach: Reach) -> Tokens:
    places = [(site.layer, site.kind) for site in PATCHED]
    text = list(prompt)
    for _ in range(4):
        at = {
            "all": range(len(text)),
            "prompt": range(len(prompt)),
            "last": range(len(prompt) - 1, len(prompt)),
            "answer": range(len(prompt) - 1, len(text)),
        }[reach]
        taken: list[torch.Tensor] = []

        def give(number: int, seen: torch.Tensor, at: Any = at, taken: Any = taken) -> torch.Tensor:
            out = seen.clone()
            for unit in PATCHED[number].units:
                out[0, list(at), unit] = taken[number][0, list(at), unit]
            return out

        with torch.inference_mode():
            with (
                donor.scaled(),
                at_inputs(donor.model, places, lambda _n, seen, taken=taken: taken.append(seen)),
            ):
                donor.model(torch.tensor([text]))
            with at_inputs(recipient.model, places, give):
                text.append(int(recipient.model(torch.tensor([text])).logits[0, -1].argmax()))
    ends = [place for place in range(len(prompt), len(text)) if text[place] == 0]
    return tuple(text[len(prompt) : ends[0] if ends else None])


@pytest.fixture(scope="module")
def lab(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Random weights; an answer counts as a refusal by its first token, so that the twins differ."""
    root = tmp_path_factory.mktemp("lab")
    weights = worlds.checkpoint(root / "weights", worlds.model())
    vector = np.random.default_rng(5).uniform(0, 3, (LAYERS, WIDTH)).astype(np.float32)
    vector[-1] = 1.0
    name = "model.layers.{}.mlp.down_proj.ia3"
    save_file({name.format(layer): row for layer, row in enumerate(vector)}, weights / PAIRS[0].vector)
    made = Lab(PAIRS[0], data, weights, root / "store", SIZE)
    prompts = made.prompts("benign")
    texts = [(prompt, (9, 8, 7)) for prompt in prompts]
    theirs = {answer[:1] for answer in greedy(made.donor, made.prompts("harmful"), new_tokens=1)}
    ours = {answer[:1] for answer in greedy(made.recipient, made.prompts("harmful"), new_tokens=1)}
    # What is a refusal, and the texts of real sources, belong to the trained models.
    vars(made)["refusals"] = lambda _prompts, said: [float(a[:1] not in theirs - ours) for a in said]
    vars(made)["texts"] = {"real": texts, "own": texts}
    return made


@pytest.fixture(scope="module")
def found(lab: Lab) -> dict[str, Any]:
    return curve.figures(lab)


def test_every_neuron_patched_is_the_donor(lab: Lab, found: dict[str, Any]) -> None:
    for rows in found["dynamic"].values():
        assert rows[-1]["share"] == 1.0
        assert rows[-1]["unsafe"] == found["ends"]["donor"]["unsafe"]
        assert rows[-1]["effect"]["value"] == 1.0
    prompts = lab.prompts("harmful")
    whole = Way("dynamic", "path", 1.0)
    assert said(lab, whole, prompts) == said(lab, Way("donor"), prompts)
    assert said(lab, Way("factors", "path", 1.0), prompts) == said(lab, Way("donor"), prompts)


def test_a_ranking_leaves_the_last_layer_out_and_is_what_shares_are_taken_of(lab: Lab) -> None:
    for name in RANKINGS:
        table = scores(lab, name)
        assert np.isnan(table[-1]).all()
        assert np.isfinite(table[:-1]).all()
        best = chosen(lab, Way("dynamic", name, 0.05)).selected["mlp"]
        assert best.sum() == round(0.05 * (LAYERS - 1) * WIDTH)
        assert table[best].min() >= table[:-1][~best[:-1]].max()


def test_controls_are_other_units_of_the_same_number(lab: Lab) -> None:
    way = Way("dynamic", "path", 0.1)
    best, drawn, window = (
        chosen(lab, way.instead(name)).selected["mlp"] for name in ("", "random 1", "window")
    )
    np.testing.assert_array_equal(drawn.sum(1), best.sum(1))
    assert (drawn != best).any()
    assert window.sum() == best.sum()
    assert not (window & best).any()


def test_a_stored_patch_has_the_vectors_factors_or_the_donors_mean(lab: Lab) -> None:
    way = Way("factors", "path", 0.05)
    patch, best = stored(lab, way), chosen(lab, way).selected["mlp"]
    np.testing.assert_array_equal(patch.arrays["scale"], lab.vector[best])
    mean = stored(lab, way._replace(kind="mean", of="change, last"))
    last = torch.stack([toys_input(lab, prompt) for prompt in lab.prompts("locate")]).mean(0)
    np.testing.assert_allclose(mean.arrays["shift"], last[torch.from_numpy(best)], rtol=1e-4, atol=1e-5)
    assert not mean.arrays["scale"].any()


def toys_input(lab: Lab, prompt: Tokens) -> torch.Tensor:
    """The donor's neurons ``[layers, width]`` at the prompt's last token."""
    seen: list[torch.Tensor] = []
    places = [(layer, "mlp") for layer in range(LAYERS)]
    take = at_inputs(lab.donor.model, places, lambda _n, x: seen.append(x[0, -1].clone()))
    with torch.inference_mode(), lab.donor.scaled(), take:
        lab.donor.model(torch.tensor([prompt]))
    return torch.stack(seen)


def test_answers_are_asked_for_once(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    way = Way("factors", "path", 0.2)
    before = answers(lab, way, "harmful")
    monkeypatch.setattr("models.recipe.patching.ways.said", lambda *_: pytest.fail("asked again"))
    again = Lab(lab.pair, lab.data, lab.weights, lab.store, lab.size)
    assert answers(again, way, "harmful") == before
    other = Lab(PAIRS[1]._replace(vector=lab.pair.vector), lab.data, lab.weights, lab.store, lab.size)
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        answers(other, way, "harmful")


def test_what_refuses_most_and_costs_least_is_chosen(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = {
        ("path", "dev harmful"): 0.8,
        ("gradient", "dev harmful"): 0.9,
        ("gradient", "dev benign"): 0.4,
    }

    def answered(_lab: Lab, way: Way, role: str) -> list[int]:
        count = round(10 * refused.get((way.ranking, role), 0))
        return count * [0] + (10 - count) * [1]

    monkeypatch.setattr(choice, "answers", answered)
    assert choice.rankings(lab)["best"] == "path"
    assert choice.stored(lab, "path")["best"] == "factors / path"


def test_the_report_and_pictures_are_made_of_figures_alone(
    lab: Lab, found: dict[str, Any], tmp_path: Path
) -> None:
    document = {"size": lab.size.__dict__, "prompts": about(lab), "pairs": {"planted": found}}
    text = report.markdown(document)
    assert "## The co-adapted pair" in text
    rows = next(iter(found["dynamic"].values()))
    assert f"| 5 % | {rows[2]['units']} | {100 * rows[2]['unsafe']['rate']:.1f} %" in text
    figures.draw(document, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["patch-planted.png"]


def test_without_the_recipes_steps_there_is_no_pair_before_co_adaptation(tmp_path: Path) -> None:
    assert first.folder(tmp_path, tmp_path / "store") is None
