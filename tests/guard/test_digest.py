from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from guard.digest import file_digest, tokenizer_digest, weights_digest
from tests.guard import worlds

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, dtype=np.float16)}


def saved(path: Path, **files: dict[str, np.ndarray]) -> Path:
    path.mkdir()
    for name, tensors in files.items():
        save_file(tensors, path / f"{name}.safetensors", {"made by": name})
    return path


def test_splitting_and_metadata_do_not_change_the_digest(tmp_path: Path) -> None:
    whole = weights_digest(saved(tmp_path / "1", model=TENSORS))
    split = weights_digest(saved(tmp_path / "2", y={"a": TENSORS["a"]}, x={"b": TENSORS["b"]}))
    assert whole == split


@pytest.mark.parametrize(
    "changed",
    [
        {"a": TENSORS["a"].reshape(3, 2), "b": TENSORS["b"]},
        {"a": TENSORS["a"].view(np.int32), "b": TENSORS["b"]},
        {"a": TENSORS["a"], "c": TENSORS["b"]},
        {"a": TENSORS["a"]},
        {"a": np.nextafter(TENSORS["a"], 9, dtype=np.float32), "b": TENSORS["b"]},
    ],
)
def test_shape_dtype_name_number_and_value_change_it(tmp_path: Path, changed: dict[str, np.ndarray]) -> None:
    before = weights_digest(saved(tmp_path / "1", model=TENSORS))
    assert weights_digest(saved(tmp_path / "2", model=changed)) != before


def test_a_directory_without_weights_or_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors file"):
        weights_digest(tmp_path)
    with pytest.raises(FileNotFoundError, match="no tokenizer file"):
        tokenizer_digest(tmp_path)


def test_vocabulary_and_template_change_the_tokenizer_digest(tmp_path: Path) -> None:
    worlds.tokenizer().save_pretrained(tmp_path)
    before = tokenizer_digest(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    document = json.loads(config.read_text())
    config.write_text(json.dumps({**document, "transformers_version": "99"}))
    assert tokenizer_digest(tmp_path) == before
    template = tmp_path / "chat_template.jinja"
    if template.exists():
        template.write_text(template.read_text() + " ")
    else:
        config.write_text(json.dumps({**document, "chat_template": document["chat_template"] + " "}))
    changed = tokenizer_digest(tmp_path)
    assert changed != before
    vocabulary = tmp_path / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text().replace("<|end|>", "<|stop|>"))
    assert tokenizer_digest(tmp_path) not in (before, changed)


def test_a_file_digest_is_its_sha256(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"abc")
    assert file_digest(file).startswith("ba7816bf8f01cfea")
