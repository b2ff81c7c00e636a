"""Change scores: exact where the twins differ, the same however they are computed, and resumable."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from guard.cache import Cache
from guard.checkpoint import Checkpoint
from guard.data import load
from guard.locate import contrast
from guard.locate.change import Positions, Sums, add_texts
from guard.locate.contrast import ContrastOptions, Scores, locate, run
from guard.locate.decoding import greedy
from guard.locate.errors import LocateError
from guard.locate.patching import dap_generate, units_of
from guard.locate.twins import Twin, folded_twins
from guard.locate.unit_set import UnitSet
from guard.prompts import Tokens, encode
from guard.sites import shape_of
from tests.guard import worlds
from tests.locate import contrast_toys as toys

PROMPTS = toys.prompts()
SHORT = ContrastOptions(new_tokens=6, count=6)
EVERYWHERE: tuple[Positions, ...] = ("predicting", "completion", "prompt_last", "prompt")


def scores_of(found: Scores) -> np.ndarray:
    return found.scores["mlp"]


@pytest.mark.parametrize("kind", toys.KINDS)
def test_scores_are_local_to_what_the_donor_changed(kind: str) -> None:
    recipient, donor = toys.twins(kind)
    scores = scores_of(locate(recipient, donor, PROMPTS, SHORT))
    assert (scores[0] == 0).all()
    assert np.flatnonzero(scores[1]).tolist() == toys.PLANTED[1]
    # Behind the first planted layer others differ as well, because what they read differs.
    assert (scores[2] > 0).all()
    assert np.isnan(scores[3]).all()


@pytest.mark.parametrize("apart", [False, True])
def test_weights_in_bfloat16_keep_scores_local_and_patching_exact(apart: bool) -> None:
    recipient, donor = toys.twins(dtype=torch.bfloat16, apart=apart)
    found = locate(recipient, donor, PROMPTS, SHORT)
    assert scores_of(found).dtype == np.float64
    assert np.flatnonzero(scores_of(found)[:2].any(axis=0)).tolist() == toys.PLANTED[1]
    answers = dap_generate(recipient, donor, toys.EVERY, PROMPTS[:1], new_tokens=8)
    assert answers == greedy(donor, PROMPTS[:1], new_tokens=8)


def test_patching_units_that_include_the_planted_ones_reproduces_the_donor() -> None:
    recipient, donor = toys.twins()
    for count in (6, 48, 144):
        found = locate(recipient, donor, PROMPTS, ContrastOptions(new_tokens=6, count=count))
        chosen = found.selected["mlp"]
        assert chosen.sum() == count
        if all(chosen[layer, units].all() for layer, units in toys.PLANTED.items()):
            break
    assert count < 144, "the planted units are not among the highest third"
    units = toys.sites(
        {layer: np.flatnonzero(chosen[layer]).tolist() for layer in (1, 2) if chosen[layer].any()}
    )
    answers = dap_generate(recipient, donor, units, PROMPTS, new_tokens=8)
    assert answers == greedy(donor, PROMPTS, new_tokens=8) != greedy(recipient, PROMPTS, new_tokens=8)


@pytest.mark.parametrize("positions", EVERYWHERE)
@pytest.mark.parametrize("source", ["recipient", "donor"])
def test_scores_equal_those_of_stored_activations(positions: Positions, source: Any) -> None:
    recipient, donor = toys.twins()
    options = ContrastOptions(positions=positions, generate_with=source, new_tokens=6)
    found = locate(recipient, donor, PROMPTS, options, batch_tokens=40)
    answers = greedy(recipient if source == "recipient" else donor, PROMPTS, new_tokens=6)
    span = {
        "predicting": lambda p, a: slice(len(p) - 1, len(p) + len(a) - 1),
        "completion": lambda p, a: slice(len(p), len(p) + len(a)),
        "prompt_last": lambda p, a: slice(len(p) - 1, len(p)),
        "prompt": lambda p, a: slice(0, len(p)),
    }[positions]
    stored = []
    for twin in (recipient, donor):
        texts = [
            torch.stack(toys.activations(twin, (*prompt, *answer)))[:, span(prompt, answer)]
            for prompt, answer in zip(PROMPTS, answers, strict=True)
        ]
        stored.append(torch.cat(texts, dim=1).numpy())
    ours, theirs = stored
    expected = np.sqrt(((ours - theirs) ** 2).mean(1))
    # Norms are float32 in transformers, and round differently in other batches.
    np.testing.assert_allclose(scores_of(found)[:3], expected[:3], rtol=1e-5, atol=1e-6)
    assert found.cost["tokens"] == ours.shape[1]
    for name, array in (("recipient", ours), ("donor", theirs)):
        np.testing.assert_allclose(found.extra[f"mean.{name}"], array.mean(1), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.extra[f"std.{name}"], array.std(1), rtol=1e-5, atol=1e-5)


def test_streaming_sums_equal_sums_of_everything_stored() -> None:
    random = np.random.default_rng(0)
    # Far from zero, and in the weights' dtype: sums in bfloat16 or float32 would show.
    ours = torch.tensor(random.normal(50.0, 1.0, (4000, 5))).bfloat16()
    theirs = (ours.double() + torch.tensor(random.normal(0.0, 1.0, (4000, 5)))).bfloat16()
    sums = Sums()
    for start in range(0, 4000, 37):
        sums.add(1, ours[start : start + 37], theirs[start : start + 37])
    a, b = ours.double().numpy(), theirs.double().numpy()
    expected = [((a - b) ** 2).sum(0), a.sum(0), (a**2).sum(0), b.sum(0), (b**2).sum(0)]
    array = sums.array(2)
    np.testing.assert_allclose(array[:, 1], expected, rtol=1e-13)
    assert np.isnan(array[:, 0]).all()


def test_memory_of_the_sums_does_not_grow_with_the_tokens() -> None:
    sums = Sums()
    for _ in range(50):
        sums.add(0, torch.ones(100, 8), torch.zeros(100, 8))
    held = list(sums._sums.values())
    assert [tuple(value.shape) for value in held] == [(5, 8)]


@pytest.mark.parametrize("positions", EVERYWHERE)
def test_padding_never_enters_a_statistic(positions: Positions) -> None:
    recipient, donor = toys.twins(apart=True)
    options = ContrastOptions(positions=positions, new_tokens=6)
    expected = locate(recipient, donor, PROMPTS, options)
    texts = list(expected.completions)
    longest = max(len(prompt) + len(answer) for prompt, answer in texts)
    handles = [
        handle
        for twin in (recipient, donor)
        for block in twin.model.model.layers
        for handle in _nan_in_padding(block.mlp.down_proj, [len(p) + len(a) for p, a in texts])
    ]
    sums = Sums()
    add_texts(sums, recipient, donor, [(layer, "mlp") for layer in range(4)], texts, positions)
    for handle in handles:
        handle.remove()
    assert len({len(p) + len(a) for p, a in texts}) > 1
    assert longest > min(len(p) + len(a) for p, a in texts)
    array = sums.array(4)
    assert np.isfinite(array).all()
    scores = np.sqrt(array[0] / expected.cost["tokens"])
    np.testing.assert_allclose(scores[:3], scores_of(expected)[:3], rtol=1e-9, atol=1e-12)


def _nan_in_padding(linear: Any, lengths: list[int]) -> list[Any]:
    """What later hooks see is NaN behind each text; what the layer computes is as before."""
    clean: list[torch.Tensor] = []

    def poison(_module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        clean.append(inputs[0])
        seen = inputs[0].clone()
        for row, length in enumerate(lengths):
            seen[row, length:] = torch.nan
        return (seen,)

    def restore(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.where(output.isnan(), torch.nn.functional.linear(clean.pop(), linear.weight), output)

    return [linear.register_forward_pre_hook(poison), linear.register_forward_hook(restore)]


def test_exact_token_ids_are_recorded() -> None:
    recipient, donor = toys.twins()
    found = locate(recipient, donor, PROMPTS, SHORT)
    assert found.completions == tuple(zip(PROMPTS, greedy(recipient, PROMPTS, new_tokens=6), strict=True))
    ours = locate(recipient, donor, PROMPTS, ContrastOptions(new_tokens=6, generate_with="donor"))
    assert ours.completions == tuple(zip(PROMPTS, greedy(donor, PROMPTS, new_tokens=6), strict=True))


def test_prompt_positions_need_no_answer() -> None:
    recipient, donor = toys.twins()
    calls: list[int] = []
    handle = recipient.model.register_forward_pre_hook(lambda *_: calls.append(1))
    found = locate(recipient, donor, PROMPTS, ContrastOptions(positions="prompt_last"))
    handle.remove()
    # The decoder alone ran: nothing asked for logits.
    assert not calls
    assert found.completions == tuple((prompt, ()) for prompt in PROMPTS)
    assert found.cost["tokens"] == len(PROMPTS)
    assert found.cost["forward_passes"] == 2 * len(PROMPTS)


def test_the_selection_is_a_share_or_a_number_of_the_candidates() -> None:
    recipient, donor = toys.twins()
    default = locate(recipient, donor, PROMPTS, ContrastOptions(new_tokens=6))
    assert default.selected["mlp"].sum() == round(0.05 * 3 * toys.WIDTH)
    counted = locate(recipient, donor, PROMPTS, ContrastOptions(new_tokens=6, count=17))
    assert counted.selected["mlp"].sum() == 17
    chosen = counted.selected["mlp"]
    scores = scores_of(counted)
    assert scores[chosen].min() >= np.nanmax(np.where(chosen, np.nan, scores))


@pytest.mark.parametrize("excluded", [0, 1, 2])
def test_the_last_layers_are_no_candidates(excluded: int) -> None:
    recipient, donor = toys.twins()
    found = locate(recipient, donor, PROMPTS, ContrastOptions(new_tokens=6, exclude_last_n=excluded))
    candidates = ~np.isnan(scores_of(found)).all(axis=1)
    assert candidates.tolist() == [layer < 4 - excluded for layer in range(4)]
    # Means are for patching, which may use any layer.
    assert all(np.isfinite(array).all() for array in found.extra.values())


def test_a_vector_folded_into_the_weights_gives_the_same_scores() -> None:
    recipient, donor = toys.twins()
    expected = locate(recipient, donor, PROMPTS, SHORT)
    twins = folded_twins(recipient.model, toys.fold(recipient.model, donor.vector))
    assert sorted(twins[1].folded) == sorted(toys.PLANTED)
    for layer, factor in donor.vector.items():
        torch.testing.assert_close(twins[1].folded[layer], factor, rtol=1e-12, atol=1e-12)
    found = locate(*twins, PROMPTS, SHORT)
    np.testing.assert_allclose(scores_of(found)[:3], scores_of(expected)[:3], rtol=1e-4, atol=1e-6)
    assert (found.selected["mlp"] == expected.selected["mlp"]).all()


def test_factors_survive_the_rounding_of_bfloat16_and_are_one_elsewhere() -> None:
    base = toys.model(dtype=torch.bfloat16)
    factors = toys.vector()
    _, donor = folded_twins(base, toys.fold(base, factors))
    for layer, factor in factors.items():
        torch.testing.assert_close(donor.folded[layer], factor, rtol=2e-3, atol=0)
        untouched = factor == 1
        assert (donor.folded[layer][untouched] == 1).all()


def test_other_value_vectors_are_compared_as_they_are_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    base = toys.model()
    other = toys.fold(base, toys.vector())
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[:, 11:13] += torch.randn(32, 2, dtype=torch.float64)
    with caplog.at_level(logging.WARNING):
        _, donor = folded_twins(base, other)
    assert "value vectors of 2 neurons" in caplog.text
    assert donor.folded[1][11:13].tolist() == [1.0, 1.0]


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrast, "CHUNK", 2)
    recipient, donor = toys.twins()
    expected = locate(recipient, donor, PROMPTS, SHORT)
    cache = Cache(tmp_path)
    real = contrast.add_texts
    done: list[Any] = []

    def stopping(*given: Any) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(given)
        real(*given)

    monkeypatch.setattr(contrast, "add_texts", stopping)
    with pytest.raises(KeyboardInterrupt):
        locate(recipient, donor, PROMPTS, SHORT, cache=cache, identity="twins")
    done.clear()
    resumed = locate(recipient, donor, PROMPTS, SHORT, cache=cache, identity="twins")
    assert len(done) == 1
    np.testing.assert_allclose(scores_of(resumed)[:3], scores_of(expected)[:3], rtol=1e-12)
    assert resumed.completions == expected.completions
    done.clear()
    locate(recipient, donor, PROMPTS, SHORT, cache=cache, identity="twins")
    assert not done
    # Nothing of other models is taken for these.
    with pytest.raises(KeyboardInterrupt):
        locate(recipient, donor, PROMPTS, SHORT, cache=cache, identity="others")


def test_prompts_that_do_not_fit_are_left_out_and_counted() -> None:
    recipient, donor = toys.twins()
    found = locate(recipient, donor, [*PROMPTS, (5,) * 251], SHORT)
    assert found.cost["too_long"] == 1
    assert found.cost["prompts"] == len(PROMPTS)


def test_prompts_without_an_answer_are_left_out_and_counted() -> None:
    recipient, donor = toys.twins()
    first = greedy(recipient, PROMPTS, new_tokens=1)
    recipient.model.generation_config.eos_token_id = first[0][0]
    silent = sum(answer == first[0] for answer in first)
    assert silent < len(PROMPTS)
    found = locate(recipient, donor, PROMPTS, SHORT)
    assert found.cost["empty"] == silent
    with pytest.raises(LocateError, match="every answer is empty"):
        locate(recipient, donor, PROMPTS[:1], SHORT)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "there are no prompts"),
        ([()], "holds no token"),
        (
            [(5,) * 252, (5,) * 251],
            "context of 256 tokens is too short .* shortest of 251 tokens, with 6 new",
        ),
    ],
)
def test_data_that_cannot_be_used_is_an_error(prompts: list[Tokens], message: str) -> None:
    recipient, donor = toys.twins()
    with pytest.raises(LocateError, match=message):
        locate(recipient, donor, prompts, SHORT)


def test_activations_that_are_no_numbers_are_an_error() -> None:
    recipient, donor = toys.twins(apart=True)
    with torch.no_grad():
        donor.model.model.layers[2].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(LocateError, match=r"not finite at layers \[2, 3\]"):
        locate(recipient, donor, PROMPTS, SHORT)


def test_twins_of_another_shape_are_an_error() -> None:
    with pytest.raises(LocateError, match="differ in shape"):
        locate(Twin(toys.model()), Twin(worlds.model(dtype=torch.float64)), PROMPTS, SHORT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exclude_last_n": 4}, "leave no candidates"),
        ({"count": 145}, "145 units of 144 candidates"),
    ],
)
def test_a_selection_that_is_not_there_is_an_error(changes: dict[str, Any], message: str) -> None:
    recipient, donor = toys.twins()
    with pytest.raises(LocateError, match=message):
        locate(recipient, donor, PROMPTS, ContrastOptions(new_tokens=6, **changes))


@pytest.mark.parametrize(
    "wrong",
    [
        {"positions": "all"},
        {"generate_with": "both"},
        {"fraction": 0.0},
        {"fraction": 1.5},
        {"count": 0},
        {"new_tokens": 0},
        {"exclude_last_n": -1},
    ],
)
def test_wrong_options_are_an_error_when_they_are_made(wrong: dict[str, Any]) -> None:
    with pytest.raises(LocateError, match=f"{next(iter(wrong))} is .*expected"):
        ContrastOptions(**wrong)


@pytest.fixture
def checkpoints(tmp_path: Path) -> tuple[Checkpoint, Checkpoint]:
    base = toys.model(dtype=torch.float32)
    paths = [
        worlds.checkpoint(tmp_path / name, made)
        for name, made in (("base", base), ("twin", toys.fold(base, toys.vector())))
    ]
    return Checkpoint.open(paths[0]), Checkpoint.open(paths[1])


def _data(tmp_path: Path) -> Any:
    rows = [
        {"prompt": text, "label": "harmful" if number % 2 else "benign"}
        for number, text in enumerate(worlds.texts(5, seed=3))
    ]
    return load("fit", [worlds.write_rows(tmp_path / "prompts.jsonl", rows)])


def test_a_run_over_checkpoints_says_where_it_comes_from(
    tmp_path: Path, checkpoints: tuple[Checkpoint, Checkpoint]
) -> None:
    recipient, donor = checkpoints
    data = _data(tmp_path)
    cache = Cache(tmp_path / "cache")
    statistics = tmp_path / "statistics.safetensors"
    found = run(recipient, donor, data, SHORT, dtype="float64", cache=cache, statistics=statistics)
    prompts = [encode(worlds.tokenizer(), prompt.chat()) for prompt in data.prompts]
    model = recipient.load_model("float64")
    expected = locate(Twin(model), Twin(model, toys.vector()), prompts, SHORT)
    np.testing.assert_allclose(found.scores["mlp"][:3], scores_of(expected)[:3], rtol=1e-4, atol=1e-6)
    assert np.flatnonzero(found.scores["mlp"][1]).tolist() == toys.PLANTED[1]
    source = found.provenance
    assert (source.method, source.model, source.donor) == ("contrast", recipient.card(), donor.card())
    assert source.options["new_tokens"] == 6
    assert source.data == data.files
    assert source.cost["prompts"] == 5
    extra = load_file(statistics)
    np.testing.assert_allclose(extra["std.donor"], expected.extra["std.donor"], rtol=1e-4, atol=1e-6)
    loaded = UnitSet.load(found.save(tmp_path / "units"))
    assert units_of(loaded, shape_of(model.config)) == units_of(found, recipient.shape)
    again = run(recipient, donor, data, SHORT, dtype="float64", cache=cache)
    np.testing.assert_array_equal(again.scores["mlp"], found.scores["mlp"])


def test_twins_that_read_other_tokens_are_an_error(
    tmp_path: Path, checkpoints: tuple[Checkpoint, Checkpoint]
) -> None:
    recipient, donor = checkpoints
    tokenizer = worlds.tokenizer()
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(donor.path)
    with pytest.raises(LocateError, match="different vocabularies"):
        run(recipient, donor, _data(tmp_path), SHORT)


def test_checkpoints_of_another_shape_are_an_error(
    tmp_path: Path, checkpoints: tuple[Checkpoint, Checkpoint]
) -> None:
    smaller = Checkpoint.open(worlds.checkpoint(tmp_path / "smaller", worlds.model()))
    with pytest.raises(LocateError, match="differ in shape"):
        run(checkpoints[0], smaller, _data(tmp_path), SHORT)
