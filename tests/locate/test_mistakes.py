"""What cannot be located: one sentence that names it, and no file, from the command line of every method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from guard.cli import main
from guard.commands import locate
from tests.guard import worlds

METHODS = sorted(locate.METHODS)
NO_HARMFUL = {
    "capacity": "no harmful prompts",
    "heads": "no harmful prompt",
    "importance": "no harmful prompts",
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURONGUARD_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worlds.checkpoint(tmp_path_factory.mktemp("models") / "model", worlds.model())


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = worlds.model()
    with torch.no_grad():
        made.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    return worlds.checkpoint(tmp_path_factory.mktemp("models") / "broken", made)


def rows(harmful: int, benign: int, **changes: Any) -> list[dict[str, Any]]:
    return [
        {"prompt": text, "label": "harmful" if number < harmful else "benign", **changes}
        for number, text in enumerate(worlds.texts(harmful + benign, seed=3))
    ]


def mistake(tmp_path: Path, method: str, model: Path, given: list[dict[str, Any]], *more: object) -> str:
    """The one sentence of a run that fails; nothing is left of it."""
    data = worlds.write_rows(tmp_path / "prompts.jsonl", given)
    out, extra = tmp_path / "units", tmp_path / "statistics.safetensors"
    arguments = ["locate", method, "--model", model, "--data", data, "--out", out, "--statistics", extra]
    if method == "contrast":
        arguments += [*([] if "--donor" in more else ["--donor", model]), "--new-tokens", 8]
    result = CliRunner().invoke(main, [str(each) for each in (*arguments, *more)])
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["prompts.jsonl"]
    message = " ".join(result.output.split())
    assert message.count("Error:") == 1
    return message.partition("Error:")[2]


@pytest.mark.parametrize("method", METHODS)
def test_activations_that_are_no_numbers(method: str, broken: Path, tmp_path: Path) -> None:
    said = mistake(tmp_path, method, broken, rows(4, 4))
    assert any(words in said for words in ("NaN or infinity", "not finite", "not numbers")), said
    assert any(words in said for words in ("another dtype", "wider dtype", "float32")), said


@pytest.mark.parametrize("method", METHODS)
def test_a_data_set_without_rows(method: str, model: Path, tmp_path: Path) -> None:
    assert "prompts.jsonl: holds no row" in mistake(tmp_path, method, model, [])


@pytest.mark.parametrize("method", METHODS)
def test_prompts_that_are_all_longer_than_the_context(method: str, model: Path, tmp_path: Path) -> None:
    given = rows(3, 3)
    for row in given:
        row["prompt"] *= 40
    said = mistake(tmp_path, method, model, given)
    assert "context of 256" in said, said


@pytest.mark.parametrize("method", sorted(NO_HARMFUL))
def test_prompts_without_a_harmful_one(method: str, model: Path, tmp_path: Path) -> None:
    assert NO_HARMFUL[method] in mistake(tmp_path, method, model, rows(0, 4))


@pytest.mark.parametrize("method", ["capacity", "importance"])
def test_prompts_without_a_benign_one_where_both_are_needed(method: str, model: Path, tmp_path: Path) -> None:
    assert "no benign prompts" in mistake(tmp_path, method, model, rows(4, 0))


@pytest.mark.parametrize(
    ("sizes", "words"),
    [({"intermediate_size": 40}, "differ in shape"), ({"hidden_size": 40}, "differ in shape")],
)
def test_a_twin_of_another_shape(model: Path, tmp_path: Path, sizes: dict[str, int], words: str) -> None:
    other = tmp_path / "cache" / "other"
    worlds.checkpoint(other, worlds.model(**sizes))
    assert words in mistake(tmp_path, "contrast", model, rows(4, 0), "--donor", other)
