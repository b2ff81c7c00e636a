"""Neurons in words: the tokens whose head rows the value vector points to."""

from __future__ import annotations

import pytest
import torch

from guard.locate.errors import LocateError
from guard.locate.neuron2word import neuron2word
from tests.guard import worlds
from tests.locate import contrast_toys as toys


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "gemma3_text"])
def test_a_planted_direction_is_read_as_its_token_in_both_signs(kind: str) -> None:
    model = toys.model(kind)
    norms = [model.model.norm]
    block = model.model.layers[2]
    if kind.startswith("gemma"):
        norms.append(block.post_feedforward_layernorm)
    with torch.no_grad():
        for norm in norms:
            # Gemma multiplies by 1 + weight.
            norm.weight.fill_(0.0 if kind.startswith("gemma") else 1.0)
        head = model.lm_head.weight
        for token, unit, sign in ((77, 5, 1.0), (123, 9, -1.0)):
            # Longer than the other rows, so that its own direction favours it and no other token.
            head[token] *= 5.0
            block.mlp.down_proj.weight[:, unit] = sign * head[token]
    found = neuron2word(model, [(2, 5), (2, 9)], top=4)
    assert [(words.layer, words.unit) for words in found] == [(2, 5), (2, 9)]
    assert found[0].positive[0] == 77
    assert found[1].negative[0] == 123
    assert 77 not in found[0].negative
    assert 123 not in found[1].positive
    assert len(found[0].positive) == len(found[0].negative) == 4


def test_words_are_the_heads_reading_of_the_column() -> None:
    model = toys.model()
    units = [(layer, unit) for layer in range(4) for unit in (0, 17, 47)]
    for words in neuron2word(model, units, batch=5):
        column = model.model.layers[words.layer].mlp.down_proj.weight[:, words.unit]
        for sign, tokens in ((1, words.positive), (-1, words.negative)):
            x = (sign * column).float()
            x = (x * torch.rsqrt(x.square().mean() + 1e-6)).double() * model.model.norm.weight
            logits = model.lm_head.weight @ x
            assert list(tokens) == logits.argsort(descending=True)[:20].tolist()


def test_the_norm_behind_the_mlp_takes_part() -> None:
    model = toys.model("gemma2")
    before = neuron2word(model, [(1, 3)])
    with torch.no_grad():
        model.model.layers[1].post_feedforward_layernorm.weight[::2] = -1.0
    assert neuron2word(model, [(1, 3)]) != before


def test_words_are_decoded_one_by_one() -> None:
    [words] = neuron2word(toys.model(), [(0, 1)], top=3)
    tokenizer = worlds.tokenizer()
    positive, negative = words.decoded(tokenizer)
    assert positive == [tokenizer.decode([token]) for token in words.positive]
    assert negative == [tokenizer.decode([token]) for token in words.negative]


@pytest.mark.parametrize("unit", [(4, 0), (0, 48), (0, -1), (-1, 0)])
def test_a_neuron_that_is_not_there_is_an_error(unit: tuple[int, int]) -> None:
    with pytest.raises(LocateError, match="there is no neuron"):
        neuron2word(toys.model(), [unit])
