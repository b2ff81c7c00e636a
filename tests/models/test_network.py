from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from guard.ia3 import fold_checkpoint
from models.recipe.decode import Session, greedy, groups
from models.recipe.export import save_model, save_vector
from models.recipe.network import Network
from models.recipe.scores import change_scores, random_units, static_edit, top_units
from models.recipe.settings import tiny
from models.recipe.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def net() -> Network:
    torch.manual_seed(0)
    made = Network(tiny().model)
    with torch.no_grad():
        for parameter in made.parameters():
            # Large weights, so that a wrong position or scale is seen; bfloat16 values, as they are stored.
            parameter.copy_((parameter * 8).bfloat16().float() if parameter.dim() == 2 else parameter)
    return made


@pytest.fixture(scope="module")
def vector(net: Network) -> torch.Tensor:
    made = 1 + torch.randn(net.config.layers, net.config.ff, generator=torch.Generator().manual_seed(1))
    made[-1] = 1
    return made


@pytest.fixture(scope="module")
def checkpoint(net: Network, vector: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_model(folder, net, train_tokenizer(["some words to learn from"] * 20, net.config.vocabulary))
    save_vector(folder / "vector.safetensors", vector)
    return folder


def tokens(rows: int = 3, length: int = 11) -> torch.Tensor:
    return torch.randint(0, 300, (rows, length), generator=torch.Generator().manual_seed(2))


def test_the_checkpoint_says_what_the_network_says(net: Network, checkpoint: Path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(net.logits(net(tokens())), model(tokens()).logits, atol=1e-4, rtol=1e-4)


def test_a_folded_vector_is_the_scaled_network(
    net: Network, vector: torch.Tensor, checkpoint: Path, tmp_path: Path
):
    folded = fold_checkpoint(
        checkpoint, tmp_path / "folded", vector=checkpoint / "vector.safetensors", alpha=0.5
    )
    model = AutoModelForCausalLM.from_pretrained(folded, dtype=torch.float32)
    with torch.no_grad():
        ours = net.logits(net(tokens(), 1 + 0.5 * (vector - 1)))
        torch.testing.assert_close(ours, model(tokens()).logits, atol=0.05, rtol=0.05)


def test_the_cache_changes_nothing(net: Network, vector: torch.Tensor):
    ids = tokens()
    session = Session(net, vector)
    with torch.no_grad():
        whole = net.logits(net(ids, vector)[:, -1])
        session.feed(ids[:, :6])
        session.feed(ids[:, 6:10])
        torch.testing.assert_close(session.feed(ids[:, 10:]), whole, atol=1e-4, rtol=1e-4)


def test_prompts_are_decoded_in_their_own_order(net: Network):
    prompts = [[1, 9, 2], [1, 8, 7, 2], [1, 5, 2]]
    together = greedy(net, prompts, 5)
    assert together == [greedy(net, [prompt], 5)[0] for prompt in prompts]
    assert groups(prompts, 1) == [[0], [2], [1]]


def test_change_scores_see_the_scale_where_it_is(net: Network):
    vector = torch.ones(net.config.layers, net.config.ff)
    vector[1, 7] = 3.0
    scores = change_scores(net, vector, [[1, 9, 2], [1, 8, 7, 2]], 4)
    assert (scores[0] == 0).all()
    assert top_units(scores, 1 / (2 * net.config.ff)) == [(1, 7)]


def test_random_controls_have_the_same_counts_and_other_units():
    units = [(0, 1), (0, 2), (1, 3)]
    control = random_units(units, 20, seed=0)
    assert [layer for layer, _ in control] == [0, 0, 1]
    assert not set(control) & set(units)


def test_a_static_edit_is_one_elsewhere(vector: torch.Tensor):
    edited = static_edit(vector, [(0, 3)])
    assert edited[0, 3] == vector[0, 3]
    assert (edited != 1).sum() == 1


def test_the_tokenizer_loads_and_splits_digits(checkpoint: Path):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert len(tokenizer.encode("2026")) == 4
