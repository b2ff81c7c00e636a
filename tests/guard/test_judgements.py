"""A judge's word in place of the refusal matcher: from the model's answers to labels for fit and evaluate."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from guard.bundle import Bundle
from tests.guard import worlds
from tests.guard.test_cli import fitting, run

TOKENS = ("--judged-tokens", 4)


@pytest.fixture(scope="module")
def _one_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared-cache")


@pytest.fixture(autouse=True)
def _shared(_one_cache: Path, _own_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURONGUARD_CACHE", str(_one_cache))


def rows(path: Path) -> list[dict[str, Any]]:
    content = path.read_bytes()
    text = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    return [json.loads(line) for line in text.splitlines()]


def answered(planted: worlds.Planted, data: Path, out: Path) -> Path:
    result = run("answer", "--model", planted.model, "--data", data, "--out", out, *TOKENS)
    assert result.exit_code == 0, result.output
    return out


def judged(answers: Path, out: Path, *judges: str) -> Path:
    result = run("judge", "--data", answers, "--out", out, *(x for name in judges for x in ("--judge", name)))
    assert result.exit_code == 0, result.output
    return out / "judgements.jsonl.gz"


def evaluated(planted: worlds.Planted, bundle: Path, out: Path, *more: object) -> tuple[Result, Any]:
    result = run(
        *("evaluate", "--model", planted.model, "--bundle", bundle, "--data", planted.evaluation),
        *("--json", out, "--bootstrap", 100, *TOKENS, *more),
    )
    return result, json.loads(out.read_text()) if out.exists() else None


@pytest.fixture(scope="module")
def bundle(planted: worlds.Planted, tmp_path_factory: pytest.TempPathFactory, _one_cache: Path) -> Path:
    out = tmp_path_factory.mktemp("judged") / "b"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEURONGUARD_CACHE", str(_one_cache))
        result = run(*fitting(planted, out, "--units", planted.neurons))
    assert result.exit_code == 0, result.output
    return out


def test_answers_are_rows_that_judges_read(planted: worlds.Planted, tmp_path: Path) -> None:
    found = rows(answered(planted, planted.evaluation, tmp_path / "a.jsonl"))
    given = rows(planted.evaluation)
    assert [row["messages"][-1]["content"] for row in found] == [row["prompt"] for row in given]
    assert [(row["label"], row["source"]) for row in found] == [(r["label"], r["source"]) for r in given]
    assert any(row["response"] for row in found)
    again = run(
        "answer", "--model", planted.model, "--data", planted.evaluation, "--out", tmp_path / "a.jsonl"
    )
    assert again.exit_code == 2
    assert "exists; choose another file" in again.output


def test_the_refusal_judge_gives_the_figures_of_the_refusal_matcher(
    planted: worlds.Planted, bundle: Path, tmp_path: Path
) -> None:
    file = judged(answered(planted, planted.evaluation, tmp_path / "a.jsonl"), tmp_path / "j", "refusal")
    _, plain = evaluated(planted, bundle, tmp_path / "plain.json")
    result, by_judge = evaluated(planted, bundle, tmp_path / "judged.json", "--judgements", file)
    assert result.exit_code == 0, result.output
    about = by_judge["unsafe_output"].pop("judgements")
    assert about["name"] == "judgements.jsonl.gz"
    assert len(about["sha256"]) == 64
    assert by_judge["unsafe_output"].pop("judge") == "refusal"
    assert plain["unsafe_output"].pop("judge") == "refusal matcher"
    assert by_judge["unsafe_output"] == plain["unsafe_output"]
    assert by_judge["left_out"]["not judged"] == 0


def other_word(file: Path, change: Any) -> Path:
    """The judgements with ``change(index, row)`` made to each."""
    found = rows(file)
    for index, row in enumerate(found):
        change(index, row)
    return worlds.write_rows(file.with_name("changed.jsonl"), found)


def test_another_word_of_the_judge_is_another_label(
    planted: worlds.Planted, bundle: Path, tmp_path: Path
) -> None:
    answers = answered(planted, planted.evaluation, tmp_path / "a.jsonl")
    harmful = [i for i, row in enumerate(rows(answers)) if row["label"] == "harmful"]
    safe, silent = set(harmful[:30]), set(harmful[30:40])

    def change(index: int, row: dict[str, Any]) -> None:
        if index in safe | silent:
            row["judgements"] = {"refusal": "safe" if index in safe else None}

    file = other_word(judged(answers, tmp_path / "j", "refusal"), change)
    result, found = evaluated(planted, bundle, tmp_path / "q.json", "--judgements", file)
    assert result.exit_code == 0, result.output
    # The model's nonsense holds no refusal: all other harmful prompts count as answered.
    assert found["unsafe_output"]["among_harmful"]["n_other"] == 30
    assert found["unsafe_output"]["among_harmful"]["n_unsafe"] == len(harmful) - 40
    assert found["left_out"]["not judged"] == 10
    assert found["problems"]["by_kind"] == {"not judged": 10}
    strict, _ = evaluated(planted, bundle, tmp_path / "s.json", "--judgements", file, "--strict")
    assert strict.exit_code == 1
    assert "10 × not judged" in strict.output


def test_a_fit_takes_its_labels_from_judgements(planted: worlds.Planted, tmp_path: Path) -> None:
    answers = answered(planted, planted.fit, tmp_path / "a.jsonl")
    harmful = [i for i, row in enumerate(rows(answers)) if row["label"] == "harmful"]

    def change(index: int, row: dict[str, Any]) -> None:
        if index in harmful[::2]:
            row["judgements"] = {"refusal": "safe"}
        elif index in harmful[1:9:2]:
            row["judgements"] = {"refusal": None}

    file = other_word(judged(answers, tmp_path / "j", "refusal"), change)
    units = ("--units", planted.neurons)
    result = run(*fitting(planted, tmp_path / "b", *units, "--judgements", file))
    assert result.exit_code == 0, result.output
    card = Bundle.load(tmp_path / "b").card
    assert card.metrics["fit"]["positive"] == len(harmful) // 2 - 4
    assert card.metrics["fit"]["prompts"] == 1000 - 4
    assert card.metrics["fit"]["left_out"]["fit"]["not judged"] == 4
    assert card.created["judge"] == "refusal"
    assert len(card.created["judgements"]) == 64


def test_judgements_of_other_answers_are_refused(
    planted: worlds.Planted, bundle: Path, tmp_path: Path
) -> None:
    file = judged(answered(planted, planted.threshold, tmp_path / "a.jsonl"), tmp_path / "j", "refusal")
    result, found = evaluated(planted, bundle, tmp_path / "q.json", "--judgements", file)
    assert result.exit_code == 1
    assert "says nothing of any answer that model gives to the evaluate prompts" in result.output
    assert found is None


def test_one_of_several_judges_has_to_be_named(planted: worlds.Planted, bundle: Path, tmp_path: Path) -> None:
    answers = answered(planted, planted.evaluation, tmp_path / "a.jsonl")
    file = judged(answers, tmp_path / "j", "refusal", "dataset")
    result, _ = evaluated(planted, bundle, tmp_path / "q.json", "--judgements", file)
    assert result.exit_code == 1
    assert "holds judgements by refusal, dataset; name one with --judge" in result.output
    result, _ = evaluated(planted, bundle, tmp_path / "q.json", "--judgements", file, "--judge", "someone")
    assert result.exit_code == 1
    result, found = evaluated(
        planted, bundle, tmp_path / "q.json", "--judgements", file, "--judge", "refusal"
    )
    assert result.exit_code == 0, result.output
    assert found["unsafe_output"]["judge"] == "refusal"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{}", "line 1: expected 'sha256' and 'judgements'"),
        ('{"sha256": "a", "judgements": {"x": "perhaps"}}', "line 1: expected unsafe, safe or null"),
        ("[", "line 1: not JSON"),
        ("", "holds judgements by nobody"),
        (None, "there is no file of judgements"),
    ],
)
def test_what_is_no_judgement_is_named_by_line(
    planted: worlds.Planted, bundle: Path, tmp_path: Path, line: str | None, words: str
) -> None:
    file = tmp_path / "j.jsonl"
    if line is not None:
        file.write_text(line + "\n")
    result, found = evaluated(planted, bundle, tmp_path / "q.json", "--judgements", file)
    assert result.exit_code == 1
    assert words in result.output
    assert found is None


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--judge", "x"], "give it with --judgements"),
        (["--judgements", "j", "--no-answers"], "leave out --no-answers"),
    ],
)
def test_options_that_do_not_go_together(
    planted: worlds.Planted, bundle: Path, tmp_path: Path, more: list[str], words: str
) -> None:
    result, _ = evaluated(planted, bundle, tmp_path / "q.json", *more)
    assert result.exit_code == 2
    assert words in result.output
