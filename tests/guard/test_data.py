from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from guard.data import DataError, expand, listed, load
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
        ('{"prompt": "x", "label": "benign", "attack": ["a"]}', r"line 2: 'attack' must be text, found list"),
        ('{"messages": [{"role": "user", "content": " "}], "label": "benign"}', r"line 2: the last of"),
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
def test_a_malformed_row_is_left_out_and_named_by_file_and_line(
    tmp_path: Path, line: str, message: str
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(row()) + "\n" + line + "\n" + json.dumps(row("end", "harmful")) + "\n")
    found = load("fit", [file])
    assert [p.text for p in found.prompts] == ["hi", "end"]
    (problem,) = found.problems
    assert re.search(f"a.jsonl, {message}", str(problem))
    assert found.dropped == {problem.kind: 1}
    with pytest.raises(DataError, match=f"a.jsonl, {message}"):
        load("fit", [file], strict=True)


NOT_TEXT = [
    (b'\xff\xfe{"prompt"', "line 1: byte 0 is not UTF-8"),
    (json.dumps(row()).encode().replace(b"hi", b"gr\xfc\xdfe"), "line 1: byte 14 is not UTF-8"),
    (b'{"prompt": "\\ud800 x", "label": "benign"}', "line 1: 'prompt' holds half of a surrogate pair"),
    (b"[" * 100_000, "line 1: not JSON"),
    (b'{"prompt": "x", "label": "benign", "pair": ' + b"9" * 5000 + b"}", "line 1: not JSON"),
]


@pytest.mark.parametrize(("line", "message"), NOT_TEXT)
def test_lines_that_no_reader_takes_are_named_too(tmp_path: Path, line: bytes, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(line + b"\n" + b"".join(json.dumps(row(*r)).encode() + b"\n" for r in BOTH))
    found = load("evaluate", [file])
    assert [message in str(problem) for problem in found.problems] == [True]
    assert len(found.prompts) == 2


BOTH = [("calm", "benign"), ("not calm", "harmful")]


def test_all_problems_are_listed_at_once_and_counted_by_kind(tmp_path: Path) -> None:
    first = write_rows(tmp_path / "a.jsonl", [row(), row(""), row("x", "maybe"), row("bad", "harmful")])
    second = write_rows(tmp_path / "b.jsonl", [row("y", 1), {"label": "benign"}])
    found = load("evaluate", [first, second])
    assert found.dropped == {"no prompt": 2, "unknown label": 2}
    with pytest.raises(DataError) as caught:
        load("evaluate", [first, second], strict=True)
    head, *lines = str(caught.value).splitlines()
    assert head == "the evaluate data have 4 problems (2 × no prompt, 2 × unknown label)"
    assert [line.split(":")[0].split("/")[-1] for line in lines] == [
        "a.jsonl, line 2", "a.jsonl, line 3", "b.jsonl, line 1", "b.jsonl, line 2",
    ]  # fmt: skip


def test_a_long_list_of_problems_ends_in_a_count(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [row(*r) for r in BOTH] + [row("")] * 30)
    assert listed(load("fit", [file]).problems, "fit").splitlines()[-1] == "  and 10 more"


def test_missing_and_empty_files_are_errors_and_damaged_ones_are_left_out_whole(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data file .*gone\.jsonl"):
        load("fit", [tmp_path / "gone.jsonl"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no"):
        load("fit", [tmp_path / "empty"])
    (tmp_path / "nothing.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"nothing\.jsonl: holds no row"):
        load("fit", [tmp_path / "nothing.jsonl"])


def damaged(tmp_path: Path) -> dict[str, bytes]:
    lines = "".join(json.dumps(row(f"prompt {i}")) + "\n" for i in range(5000)).encode()
    packed = gzip.compress(lines)
    middle = len(packed) // 2
    return {
        "cut off": packed[:-9],
        "another byte in the middle": packed[:middle] + bytes([packed[middle] ^ 255]) + packed[middle + 1 :],
        "another checksum": packed[:-8] + bytes(4) + packed[-4:],
        "not gzip at all": lines,
    }


@pytest.mark.parametrize("how", list(damaged(Path())))
def test_no_row_of_a_damaged_gzip_file_is_used(tmp_path: Path, how: str) -> None:
    broken = tmp_path / "a.jsonl.gz"
    broken.write_bytes(damaged(tmp_path)[how])
    whole = write_rows(tmp_path / "b.jsonl", [row(*r) for r in BOTH])
    found = load("fit", [broken, whole])
    assert [p.text for p in found.prompts] == ["calm", "not calm"]
    (problem,) = found.problems
    assert "a.jsonl.gz: cannot be read beyond line" in str(problem)
    assert problem.kind == "unreadable file"
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: cannot be read beyond line \d+"):
        load("fit", [broken])


def test_a_packed_file_needs_no_suffix_and_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(b"\xef\xbb\xbf" + json.dumps(row("x")).encode()))
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(row("y", "harmful")).encode() + b"\r\n")
    found = load("fit", [tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    assert [p.text for p in found.prompts] == ["x", "y"]
    assert not found.problems


def test_a_prompt_in_two_splits_or_two_roles_is_named_with_both_places(tmp_path: Path) -> None:
    first = write_rows(tmp_path / "a.jsonl", [row("same", split="train"), row("bad", "harmful")])
    second = write_rows(tmp_path / "b.jsonl", [row("other"), row("SAME", split="test")])
    (problem,) = load("evaluate", [first, second]).problems
    assert problem.kind == "duplicate across splits"
    assert re.search(r"b\.jsonl, line 2: in split 'test', .* in 'train': .*a\.jsonl, line 1$", str(problem))
    held_out = load("evaluate", [first])
    (problem,) = load("threshold", [second], barred=[held_out]).problems
    assert re.search(r"b\.jsonl, line 2: the same prompt is in .*a\.jsonl, line 1$", str(problem))


def test_one_class_is_a_problem_but_not_where_thresholds_are_set(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [row("x"), row("y")])
    assert "all prompts of the evaluate data are benign" in str(load("evaluate", [file]).problems[0])
    assert not load("threshold", [file], strict=True).problems
    with pytest.raises(DataError, match="all prompts of the fit data are benign"):
        load("fit", [file], strict=True)


def test_what_a_row_says_about_itself_is_kept_with_its_place(tmp_path: Path) -> None:
    more = {"attack": "suffix", "pair": 7, "language": "de", "split": "dev"}
    file = write_rows(tmp_path / "a.jsonl", [row("x", lang="fr", group="g"), row("y", "harmful", **more)])
    first, second = load("evaluate", [file]).prompts
    assert (first.language, first.pair, first.attack, first.line) == ("fr", "g", None, 1)
    assert (second.attack, second.pair, second.language, second.split) == ("suffix", "7", "de", "dev")
    assert (second.path, second.line) == (file, 2)


def test_errors_do_not_quote_the_prompt(tmp_path: Path) -> None:
    file = write_rows(
        tmp_path / "a.jsonl",
        [row("a secret text", "bad"), row("a secret text"), row("A secret text!", "harmful")],
    )
    with pytest.raises(DataError) as caught:
        load("fit", [file], strict=True)
    assert "secret" not in str(caught.value)
