"""Every method reads prompts by the template that is asked for, and its set says which one that was."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from guard.checkpoint import Checkpoint
from guard.data import Dataset, Prompt, load
from guard.locate import capacity, contrast, heads, importance, templates
from guard.locate.errors import LocateError
from guard.locate.unit_set import UnitSet
from tests.guard import worlds

EXPECTED = {
    "chat": "<|user|>{}<|end|><|assistant|>",
    "query": "## Query:{}\n## Answer:",
    "tulu": "<|user|>\n{}\n<|assistant|>\n",
    "none": "{}",
}


@pytest.mark.parametrize("template", sorted(EXPECTED))
def test_a_prompt_looks_as_its_template_says(template: Any) -> None:
    tokenizer = worlds.tokenizer()
    text = "a {request} with braces"
    prompt = Prompt((("user", "before"), ("assistant", "then"), ("user", text)), "harmful", "s")
    single = Prompt((("user", text),), "harmful", "s")
    expected = tuple(tokenizer(EXPECTED[template].format(text)).input_ids)
    assert templates.render(tokenizer, single, template) == expected
    # A chat template renders earlier turns; a text has room for the last one alone.
    assert (templates.render(tokenizer, prompt, template) == expected) == (template != "chat")
    digest = hashlib.sha256(worlds.TEMPLATE.encode()).hexdigest()
    assert templates.identity(tokenizer, template) == (digest if template == "chat" else template)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(worlds.checkpoint(tmp_path_factory.mktemp("model"), worlds.model()))


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(worlds.checkpoint(tmp_path_factory.mktemp("twin"), worlds.model(seed=1)))


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    rows = [
        {"prompt": text, "label": "harmful" if number % 2 else "benign"}
        for number, text in enumerate(worlds.texts(8, seed=3))
    ]
    return load("fit", [worlds.write_rows(tmp_path / "prompts.jsonl", rows)])


@pytest.mark.parametrize("method", ["capacity", "contrast", "heads", "importance"])
def test_a_methods_template_decides_what_is_read_and_is_recorded(
    method: str, checkpoint: Checkpoint, twin: Checkpoint, data: Dataset
) -> None:
    def run(template: Any) -> UnitSet:
        if method == "contrast":
            options = contrast.ContrastOptions(new_tokens=4, template=template)
            return contrast.run(checkpoint, twin, data, options)
        if method == "heads":
            return heads.run(checkpoint, [data], heads.HeadsOptions(count=1, template=template))
        if method == "importance":
            return importance.run(checkpoint, data, importance.ImportanceOptions(template=template))
        return capacity.run(checkpoint, data, capacity.CapacityOptions(template=template))

    chat, bare = run("chat"), run("none")
    assert len(chat.provenance.template) == 64
    assert bare.provenance.template == "none"
    assert chat.provenance.cost["tokens"] > bare.provenance.cost["tokens"]
    assert any((chat.scores[name] != bare.scores[name]).any() for name in chat.scores)


@pytest.mark.parametrize(
    "options",
    [
        contrast.ContrastOptions,
        heads.HeadsOptions,
        importance.ImportanceOptions,
        capacity.CapacityOptions,
    ],
)
def test_an_unknown_template_is_an_error_when_options_are_made(options: Any) -> None:
    with pytest.raises(LocateError, match="template"):
        options(template="mine")
