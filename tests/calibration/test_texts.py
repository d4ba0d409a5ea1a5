from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ptql.calibration.texts import read_text
from ptql.errors import InputError


def test_a_text_file_is_read_to_the_byte(tmp_path: Path) -> None:
    raw = "one\r\n\r\ntwo\u2028 = Not a heading = \n\n"
    file = tmp_path / "a.txt"
    file.write_bytes(raw.encode())
    assert read_text(str(file)) == raw
    assert read_text(str(file), "evaluation") == raw


WIKI = " \n = Title = \n \n Some words\x85 more words \n\n = = Section = = \n"


@pytest.mark.parametrize("rows", ["auto", "wikitext"])
def test_wikitext_rows_follow_the_published_rule(tmp_path: Path, rows: str) -> None:
    file = tmp_path / "wiki.txt"
    file.write_bytes(WIKI.encode())
    # the rule as the data set's users write it; the shared data's README has the same two lines
    lines = file.read_bytes().decode().split("\n")[:-1]
    expected = "\n\n".join("" if row.strip() == "" else row + "\n" for row in lines)
    assert read_text(str(file), rows=rows) == expected
    assert expected.count("words\x85 more") == 1


def test_rows_can_be_told_apart_from_plain_text(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(WIKI.encode())
    assert read_text(str(file), rows="plain") == WIKI
    file.write_text("words\n\n = Title = \n")
    assert read_text(str(file)) == "words\n\n = Title = \n"  # only the first line decides
    assert read_text(str(file), rows="wikitext") == "words\n\n\n\n\n = Title = \n"


def test_a_last_wikitext_row_without_line_end_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" = Title = \n\nlast")
    assert read_text(str(tmp_path / "a.txt")) == " = Title = \n\n\n\n\nlast"


def test_json_lines_are_joined_with_an_empty_line(tmp_path: Path) -> None:
    file = tmp_path / "a.JSONL"
    documents = ["first\nline", "second \u2028 é", " = Title = \n"]
    lines = [json.dumps({"text": text, "other": 1}, ensure_ascii=False) for text in documents]
    file.write_bytes("\r\n\n".join(lines).encode())
    assert read_text(str(file)) == "\n\n".join(documents)


@pytest.mark.parametrize("line", ["{", '{"txt": "a"}', '{"text": 3}', '["text"]', "7", "null", r'{"text": "\ud83d"}'])
def test_a_bad_json_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n\n' + line + "\n")
    with pytest.raises(InputError, match=r"a\.jsonl:3: a line is a JSON object") as caught:
        read_text(str(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "No such file"),
        ("latin.txt", b"ab\xe9 c", "byte 2 isn't UTF-8"),
        ("latin.jsonl", b'{"text": "\xe9"}', "byte 10 isn't UTF-8"),
        ("empty.txt", b"", "it is empty"),
        ("blank.txt", b" \n\n", "it is empty"),
        ("empty.jsonl", b"\n", "it is empty"),
        ("a.csv", b"text\nwords\n", r"\.txt or \.jsonl file or one of pydoc, wikitext2, c4, ptb"),
        ("wikitext", None, r"\.txt or \.jsonl"),
    ],
)
def test_other_input_is_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_text(str(tmp_path / name))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.txt").mkdir()
    with pytest.raises(InputError, match="Is a directory"):
        read_text(str(tmp_path / "d.txt"))


def test_pydoc_has_two_parts_without_a_common_paragraph() -> None:
    parts = [read_text("pydoc", "calibration"), read_text("pydoc", "evaluation")]
    first, second = ([" ".join(p.split()) for p in part.split("\n\n")] for part in parts)
    assert not set(first) & set(second)
    assert len(set(first)) == len(first)
    assert len(parts[0]) > 200_000
    assert len(parts[1]) > 80_000
    assert read_text("pydoc") == parts[0]


def test_pydoc_topics_stay_whole() -> None:
    assert 'The "for" statement is used to iterate' in read_text("pydoc") + read_text("pydoc", "evaluation")


def test_pydoc_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(InputError, match="no pydoc_data"):
        read_text("pydoc")


@pytest.mark.parametrize(
    ("name", "part", "path", "split", "column", "separator"),
    [
        ("wikitext2", "calibration", "Salesforce/wikitext", "train", "text", "\n\n"),
        ("wikitext2", "evaluation", "Salesforce/wikitext", "test", "text", "\n\n"),
        ("c4", "calibration", "allenai/c4", "train[:10000]", "text", "\n\n"),
        ("c4", "evaluation", "allenai/c4", "validation[:1100]", "text", " "),
        ("ptb", "calibration", "ptb-text-only/ptb_text_only", "train", "sentence", " "),
        ("ptb", "evaluation", "ptb-text-only/ptb_text_only", "test", "sentence", " "),
    ],
)
def test_hub_texts(
    monkeypatch: pytest.MonkeyPatch, name: str, part: str, path: str, split: str, column: str, separator: str
) -> None:
    asked = {}

    def load_dataset(**options: object) -> dict[str, list[str]]:
        asked.update(options)
        return {column: ["", " = A = \n", "b"]}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_text(name, part) == separator.join(["", " = A = \n", "b"])
    assert (asked["path"], asked["split"]) == (path, split)
    assert "trust_remote_code" not in asked
    if files := asked.get("data_files"):  # only the file that is read
        assert list(files) == [split.partition("[")[0]]


def test_hub_texts_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(**options: object) -> None:
        raise ConnectionError("Couldn't reach the Hub\nand more")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(InputError, match=r"'c4'.*\(Couldn't reach the Hub\); give a \.txt") as caught:
        read_text("c4")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"'ptb': needs `datasets`; pip install 'ptql\[hub\]'"):
        read_text("ptb")


@pytest.mark.shared
def test_the_usual_wikitext2_file(shared_dir: Path) -> None:
    file = shared_dir / "data" / "text" / "wikitext2-test.txt"
    assert hashlib.sha256(file.read_bytes()).hexdigest().startswith("173c87a5")
    text = read_text(str(file))
    assert text == read_text(str(file), rows="wikitext")
    raw = read_text(str(file), rows="plain")
    assert len(raw.split("\n")[:-1]) == 4358
    assert text.startswith("\n\n = Robert Boulter = \n\n\n\n\n Robert Boulter is")


@pytest.mark.shared
def test_the_shared_c4_documents(shared_dir: Path) -> None:
    text = read_text(str(shared_dir / "data" / "text" / "c4-train.jsonl"))
    assert 2_000_000 < len(text.encode()) < 2_222_052
