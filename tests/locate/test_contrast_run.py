"""Runs of activation contrast: what is left out, what is refused, and where a result comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from guard.cache import Cache
from guard.checkpoint import Checkpoint
from guard.data import load
from guard.locate.contrast import ContrastOptions, locate, run
from guard.locate.decoding import greedy
from guard.locate.errors import LocateError
from guard.locate.patching import units_of
from guard.locate.results import Scores
from guard.locate.twins import Twin
from guard.locate.unit_set import UnitSet
from guard.prompts import Tokens, encode
from guard.sites import shape_of
from tests.guard import worlds
from tests.locate import contrast_toys as toys

PROMPTS = toys.prompts()
SHORT = ContrastOptions(new_tokens=6, count=6)


def scores_of(found: Scores) -> np.ndarray:
    return found.scores["mlp"]


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
