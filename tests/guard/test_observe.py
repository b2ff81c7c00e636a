from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from guard import observe
from guard.answers import answer
from guard.bundle import Site
from guard.cache import Cache
from guard.checkpoint import Checkpoint, CheckpointError
from guard.data import Dataset, Prompt
from guard.observe import Subject, chunks
from guard.prompts import encode
from tests.guard import worlds

UNITS = (Site(layer=1, kind="mlp", units=(0, 5)),)


def subject(root: Path, cache: Path | None) -> Subject:
    path = root / "model"
    if not path.exists():
        worlds.checkpoint(path, worlds.model())
    return Subject(Checkpoint.open(path), Cache(cache), new_tokens=4)


def dataset(*texts: str, label: Any = "harmful") -> Dataset:
    return Dataset("fit", tuple(Prompt((("user", text),), label, "s") for text in texts), (), {})


def ids(number: int) -> list[tuple[int, ...]]:
    tokenizer = worlds.tokenizer()
    return [encode(tokenizer, [{"role": "user", "content": text}]) for text in worlds.texts(number, seed=9)]


def test_answers_do_not_depend_on_the_batch() -> None:
    model, tokenizer = worlds.model(), worlds.tokenizer()
    prompts = ids(9)
    together = answer(model, tokenizer, prompts, new_tokens=6)
    assert together == [answer(model, tokenizer, [prompt], new_tokens=6)[0] for prompt in prompts]


def test_answers_are_what_the_model_says_token_by_token() -> None:
    model, tokenizer = worlds.model(), worlds.tokenizer()
    prompt = list(ids(1)[0])
    grown = list(prompt)
    for _ in range(5):
        with torch.no_grad():
            grown.append(int(model(input_ids=torch.tensor([grown])).logits[0, -1].argmax()))
        if grown[-1] == 0:
            break
    expected = tokenizer.decode(grown[len(prompt) :], skip_special_tokens=True)
    assert answer(model, tokenizer, [prompt], new_tokens=5) == [expected]


def test_a_second_run_loads_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ids(5)
    first = subject(tmp_path, tmp_path / "c")
    answers, features = first.answers(prompts), first.features(prompts, UNITS)
    again = subject(tmp_path, tmp_path / "c")
    monkeypatch.setattr(Checkpoint, "load_model", lambda *_: pytest.fail("the model was loaded"))
    assert again.answers(prompts) == answers
    np.testing.assert_array_equal(again.features(prompts, UNITS), features)


def test_nothing_is_read_back_for_other_units_weights_or_lengths(tmp_path: Path) -> None:
    prompts = ids(3)
    first = subject(tmp_path, tmp_path / "c")
    features = first.features(prompts, UNITS)
    other = first.features(prompts, (Site(layer=1, kind="mlp", units=(1, 5)),))
    assert not np.array_equal(features[:, 0], other[:, 0])
    first.answers(prompts)
    first.new_tokens = 9
    first.answers(prompts)
    assert len(list((tmp_path / "c" / "answers").rglob("*.json"))) == 2
    worlds.checkpoint(tmp_path / "b" / "model", worlds.model(seed=1))
    second = subject(tmp_path / "b", tmp_path / "c")
    assert not np.array_equal(second.features(prompts, UNITS), features)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ids(700)
    assert len(chunks(prompts)) >= 2
    read, original = [], observe.read_prompts

    def counted(model: Any, units: Any, chunk: Any, **settings: Any) -> Any:
        if len(read) == 1:
            raise KeyboardInterrupt
        read.append(len(chunk))
        return original(model, units, chunk, **settings)

    monkeypatch.setattr(observe, "read_prompts", counted)
    with pytest.raises(KeyboardInterrupt):
        subject(tmp_path, tmp_path / "c").features(prompts, UNITS)
    read.clear()
    read.append(0)
    monkeypatch.setattr(
        observe, "read_prompts", lambda *a, **k: (read.append(len(a[2])), original(*a, **k))[1]
    )
    features = subject(tmp_path, tmp_path / "c").features(prompts, UNITS)
    assert sum(read) == 700 - len(chunks(prompts)[0])
    np.testing.assert_array_equal(features, subject(tmp_path, None).features(prompts, UNITS))


def test_a_damaged_entry_is_made_again(tmp_path: Path) -> None:
    prompts = ids(3)
    features = subject(tmp_path, tmp_path / "c").features(prompts, UNITS)
    (entry,) = (tmp_path / "c").rglob("*.npy")
    entry.write_bytes(entry.read_bytes()[:20])
    np.testing.assert_array_equal(subject(tmp_path, tmp_path / "c").features(prompts, UNITS), features)


def test_an_inserted_prompt_changes_one_chunk() -> None:
    prompts = ids(1500)
    before = {tuple(chunk) for chunk in chunks(prompts)}
    after = {tuple(chunk) for chunk in chunks([*prompts[:600], (1, 2, 3), *prompts[600:]])}
    assert len(after - before) <= 2
    assert [p for chunk in chunks(prompts) for p in chunk] == prompts
    assert chunks([]) == []


def test_prompts_beyond_the_context_are_left_out_and_counted(tmp_path: Path) -> None:
    seen = subject(tmp_path, None).observe(dataset("short", "x" * 300), judge="none")
    assert [prompt.text for prompt in seen.prompts] == ["short"]
    assert seen.too_long == 1


def test_unsafe_is_harmful_and_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Subject, "answers", lambda *_: ["Here it is", "I'm sorry, but I can't help with that."]
    )
    one = subject(tmp_path, None)
    seen = one.observe(dataset("a", "b"))
    assert seen.refused.tolist() == [False, True]
    assert seen.unsafe.tolist() == seen.target("unsafe_output").tolist() == [True, False]
    assert seen.target("harmful_prompt").tolist() == [True, True]
    assert one.observe(dataset("a", "b", label="benign")).unsafe.tolist() == [False, False]


def test_only_what_is_asked_for_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def refuse(_: Subject, prompts: Any, name: str) -> list[str]:
        asked.append(len(prompts))
        return ["I can't help with that."] * len(prompts)

    monkeypatch.setattr(Subject, "answers", refuse)
    mixed = Dataset("fit", dataset("a", "b").prompts + dataset("c", label="benign").prompts, (), {})
    refused = [
        subject(tmp_path, None).observe(mixed, judge=judge).refused.tolist()
        for judge in ("all", "harmful", "none")
    ]
    assert asked == [3, 2, 0]
    assert refused == [[True] * 3, [True, True, False], [False] * 3]


def test_a_directory_without_a_usable_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        Checkpoint.open(tmp_path)
    path = worlds.checkpoint(tmp_path / "m", worlds.model())
    config = (path / "config.json").read_text()
    (path / "config.json").write_text(config.replace("LlamaForCausalLM", "GPT2LMHeadModel"))
    with pytest.raises(CheckpointError, match="GPT2LMHeadModel"):
        Checkpoint.open(path)
    (path / "config.json").write_text(config)
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \.safetensors"):
        Checkpoint.open(path)


def test_a_tokenizer_without_a_template_is_refused(tmp_path: Path) -> None:
    path = worlds.checkpoint(tmp_path / "m", worlds.model())
    bare = worlds.tokenizer()
    bare.chat_template = None
    (path / "chat_template.jinja").unlink(missing_ok=True)
    bare.save_pretrained(path)
    with pytest.raises(CheckpointError, match="no chat template"):
        Checkpoint.open(path).load_tokenizer()
