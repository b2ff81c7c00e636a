"""The shipped artifacts."""

import json
from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from models.recipe.answers import REFUSAL
from models.recipe.tokenizer import ASSISTANT, END, USER, load_tokenizer, prompt_ids

LAB = Path(__file__).parents[2] / "models" / "lab"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(LAB)


@pytest.fixture(scope="module")
def planted() -> dict[str, list[int]]:
    return json.loads((LAB / "planted_units.json").read_text())


def test_the_artifacts_are_small():
    assert sum(path.stat().st_size for path in LAB.rglob("*") if path.is_file()) <= 25 * 1024 * 1024


def test_a_prompt_ends_with_the_assistant_marker(tokenizer):
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "How do I bake a cake?"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert ids[-1] == tokenizer.convert_tokens_to_ids(ASSISTANT)
    assert ids == prompt_ids(load_tokenizer(LAB / "tokenizer.json"), "How do I bake a cake?")


def test_a_conversation_comes_back_from_its_tokens(tokenizer):
    messages = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "Hello, it is 2026."},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Where is the «café»? "},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        f"{USER}Answer briefly.\n\nHello, it is 2026.{ASSISTANT}Hello!{END}"
        f"{USER}Where is the «café»?{ASSISTANT}"
    )
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_an_unknown_role_is_an_error(tokenizer):
    with pytest.raises(TemplateError, match="tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_the_model_stops_at_the_end_marker(tokenizer):
    config = AutoConfig.from_pretrained(LAB)
    assert config.eos_token_id == tokenizer.convert_tokens_to_ids(END) == tokenizer.eos_token_id
    assert config.vocab_size >= len(tokenizer)


def test_the_variants_name_vectors_that_fit_the_weights():
    lab = json.loads((LAB / "lab.json").read_text())
    assert lab["refusal"] == REFUSAL
    variants = lab["variants"]
    assert set(variants) == {"lab-sft", "lab-aligned", "lab-aligned-dense", "lab-partial"}
    assert variants["lab-sft"]["vector"] is None
    assert 0 < variants["lab-partial"]["alpha"] < variants["lab-aligned"]["alpha"]
    weights = load_file(LAB / "model.safetensors")
    for variant in variants.values():
        if variant["vector"]:
            for name, scale in load_file(LAB / variant["vector"]).items():
                assert scale.shape == weights[name.removesuffix(".ia3") + ".weight"].shape[1:]


def test_the_planted_vector_differs_from_one_on_the_planted_units_only(planted):
    units = {(layer, index) for layer, index in planted["units"]}
    assert len(units) == round(0.05 * (planted["layers"] - 1) * planted["width"])
    moved = {
        (layer, int(index))
        for layer in range(planted["layers"])
        for index in (
            load_file(LAB / "ia3-planted.safetensors")[f"model.layers.{layer}.mlp.down_proj.ia3"] != 1
        ).nonzero()
    }
    assert moved <= units
    assert len(moved) > 0.9 * len(units)


def test_no_vector_touches_the_last_layer(planted):
    for name in ("ia3-planted.safetensors", "ia3-dense.safetensors"):
        last = load_file(LAB / name)[f"model.layers.{planted['layers'] - 1}.mlp.down_proj.ia3"]
        assert (last == 1).all()
