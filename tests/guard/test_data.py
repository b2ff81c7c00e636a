from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from guard.data import DataError, expand, load
from guard.digest import file_digest
from tests.guard.worlds import write_rows


def row(prompt: str = "hi", label: str | None = "benign", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "label": label, **more}


def test_plain_and_gzipped_files_read_alike(tmp_path: Path) -> None:
    rows = [row("Grüße"), row("bad", "harmful", source="elsewhere")]
    plain = write_rows(tmp_path / "a.jsonl", rows)
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    first, second = load("fit", [plain]), load("fit", [packed])
    assert [p.text for p in first.prompts] == [p.text for p in second.prompts] == ["Grüße", "bad"]
    assert [p.source for p in second.prompts] == ["b", "elsewhere"]
    assert second.files[0].sha256 == file_digest(packed)
    assert (second.files[0].harmful, second.files[0].benign) == (1, 1)


def test_a_directory_stands_for_its_data_files(tmp_path: Path) -> None:
    write_rows(tmp_path / "b.jsonl", [row()])
    write_rows(tmp_path / "a.jsonl", [row()])
    (tmp_path / "notes.txt").write_text("no data")
    assert [p.name for p in expand([tmp_path, tmp_path / "a.jsonl"])] == ["a.jsonl", "b.jsonl"]


def test_messages_are_what_counts_when_they_are_there(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "be nice"}, {"role": "user", "content": "last"}]
    file = write_rows(tmp_path / "a.jsonl", [row("other", messages=messages)])
    (prompt,) = load("fit", [file]).prompts
    assert prompt.chat() == messages
    assert prompt.text == "last"


def test_duplicates_go_whatever_their_case_and_punctuation(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [row("What's up?"), row("whats  UP"), row("what else")])
    dataset = load("fit", [file])
    assert [p.text for p in dataset.prompts] == ["What's up?", "what else"]
    assert dataset.dropped == {"duplicate": 1}


def test_prompts_of_signs_alone_are_not_all_the_same(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [row("???"), row("!!!")])
    assert len(load("fit", [file]).prompts) == 2


def test_a_prompt_labelled_both_ways_is_left_out(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [row("x"), row("X!", "harmful"), row("y")])
    dataset = load("fit", [file])
    assert [p.text for p in dataset.prompts] == ["y"]
    assert dataset.dropped == {"duplicate": 1, "labels disagree": 1}


def test_rows_without_a_label_are_counted(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [row("x", None), row("y")])
    assert load("fit", [file]).dropped == {"no label": 1}


def test_prompts_of_another_role_are_barred(tmp_path: Path) -> None:
    held_out = load("evaluate", [write_rows(tmp_path / "a.jsonl", [row("Shared prompt"), row("own")])])
    dataset = load(
        "fit", [write_rows(tmp_path / "b.jsonl", [row("shared PROMPT."), row("mine")])], barred=[held_out]
    )
    assert [p.text for p in dataset.prompts] == ["mine"]
    assert dataset.dropped == {"used in another role": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2: not JSON"),
        ("[1]", r"line 2: expected an object, found list"),
        ('{"prompt": "x"}', r"line 2: no 'label'"),
        ('{"prompt": "x", "label": "bad"}', r"line 2: 'label' is 'bad'; expected harmful, benign or null"),
        ('{"label": "benign"}', r"line 2: no 'prompt'"),
        ('{"prompt": "  ", "label": "benign"}', r"line 2: no 'prompt'"),
        ('{"prompt": "x", "label": "benign", "source": 7}', r"line 2: 'source' must be text"),
        ('{"label": "benign", "messages": "x"}', r"line 2: 'messages' must be a list"),
        ('{"label": "benign", "messages": []}', r"line 2: 'messages' must end with a user turn"),
        (
            '{"label": "benign", "messages": [{"role": "assistant", "content": "x"}]}',
            r"line 2: 'messages' must end with a user turn",
        ),
        (
            '{"label": "benign", "messages": [{"role": "tool", "content": "x"}]}',
            r"line 2: each of 'messages'",
        ),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(row()) + "\n" + line + "\n")
    with pytest.raises(DataError, match=f"a.jsonl, {message}"):
        load("fit", [file])


def test_missing_empty_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data file .*gone\.jsonl"):
        load("fit", [tmp_path / "gone.jsonl"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no"):
        load("fit", [tmp_path / "empty"])
    damaged = tmp_path / "a.jsonl.gz"
    damaged.write_bytes(gzip.compress(b'{"prompt": "x", "label": "benign"}\n' * 50)[:-9])
    with pytest.raises(DataError, match=r"cannot read .*a\.jsonl\.gz"):
        load("fit", [damaged])


def test_errors_do_not_quote_the_prompt(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [row("a secret text", "bad")])
    with pytest.raises(DataError) as caught:
        load("fit", [file])
    assert "secret" not in str(caught.value)
