"""A text to calibrate on or to measure with: from a file, Python's own documentation, or the hub."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any, Literal

from ptql.errors import InputError

Part = Literal["calibration", "evaluation"]
Rows = Literal["auto", "wikitext", "plain"]

WIKITEXT_HEADING = re.compile(r" = .+ = ?")

# The rows that GPTQ's loaders take, and OmniQuant and its successors after it. Of C4 and PTB this is "c4-new"
# and "ptb-new"; OmniQuant's published C4 figures are of random crops instead, so they differ a little.
WIKITEXT2 = {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"}
# `datasets` fetches every file it is told of, so each part of C4 names its own. The first shard is 0.8 GB of
# text; 10,000 documents (some 5 million tokens) are enough to sample from.
C4 = {"path": "allenai/c4"}
C4_TRAIN = {**C4, "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}}
C4_VALIDATION = {**C4, "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}}
# The main branch of this one is a Python script, so we read the hub's own conversion of it.
PTB = {"path": "ptb-text-only/ptb_text_only", "revision": "refs/convert/parquet"}
# (name, part) -> options of load_dataset, column, what the rows are joined with
HUB: dict[tuple[str, Part], tuple[dict[str, Any], str, str]] = {
    ("wikitext2", "calibration"): ({**WIKITEXT2, "split": "train"}, "text", "\n\n"),
    ("wikitext2", "evaluation"): ({**WIKITEXT2, "split": "test"}, "text", "\n\n"),
    ("c4", "calibration"): ({**C4_TRAIN, "split": "train[:10000]"}, "text", "\n\n"),
    ("c4", "evaluation"): ({**C4_VALIDATION, "split": "validation[:1100]"}, "text", " "),
    ("ptb", "calibration"): ({**PTB, "split": "train"}, "sentence", " "),
    ("ptb", "evaluation"): ({**PTB, "split": "test"}, "sentence", " "),
}
NAMES = ("pydoc", "wikitext2", "c4", "ptb")


def read_text(source: str, part: Part = "calibration", rows: Rows = "auto") -> str:
    """The whole text that `source` names.

    Args:
        source: A `.txt` file; a `.jsonl` file, whose `text` fields are joined with an empty line; `pydoc`,
            Python's own documentation; or `wikitext2`, `c4`, `ptb` from the hub (needs `ptql[hub]`).
        part: Which part or split of `pydoc` and of a hub text; a file is always taken whole.
        rows: How the lines of a `.txt` file are read. `wikitext` joins them as is usual for WikiText-2,
            `plain` changes nothing, `auto` is `wikitext` where the file begins with a WikiText heading.

    Raises:
        InputError: If the text can't be had, isn't UTF-8, or is empty.
    """
    if source == "pydoc":
        text = pydoc_text(part)
    elif source in NAMES:
        text = hub_text(source, part)
    else:
        text = file_text(source, rows)
    if not text.strip():
        raise InputError(f"text {source!r}: it is empty; give a text of at least one window of tokens")
    return text


def file_text(source: str, rows: Rows) -> str:
    """The text of a `.txt` or `.jsonl` file, with its line ends as they are."""
    suffix = Path(source).suffix.lower()
    if suffix not in (".txt", ".jsonl"):
        rule = f"a text is a .txt or .jsonl file or one of {', '.join(NAMES)}"
        raise InputError(f"text {source!r}: {rule}; name one of these")
    text = _content(source)
    if suffix == ".jsonl":
        return jsonl_text(source, text)
    first = next((line for line in io.StringIO(text) if line.strip()), "").rstrip("\r\n")
    if rows == "wikitext" or (rows == "auto" and WIKITEXT_HEADING.fullmatch(first)):
        return wikitext_rows(text)
    return text


def _content(file: str) -> str:
    try:
        return Path(file).read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"text {file!r}: {error.strerror}; give a readable file, or pydoc") from error
    except UnicodeDecodeError as error:
        raise InputError(f"text {file!r}: byte {error.start} isn't UTF-8; convert it to UTF-8") from error


def wikitext_rows(text: str) -> str:
    r"""Lines joined as is usual for WikiText-2: a row is a line with its `\n`, or nothing if blank."""
    lines = io.StringIO(text)  # which, unlike splitlines, ends a line at "\n" and nowhere else
    return "\n\n".join(row if row.strip() else "" for row in lines)


def jsonl_text(source: str, lines: str) -> str:
    """The field `text` of every line's JSON object, joined with an empty line; `source` is for messages."""
    return "\n\n".join(jsonl_rows(source, lines))


def jsonl_rows(source: str, lines: str) -> list[str]:
    """The field `text` of every line's JSON object; `source` is for messages."""
    texts = []
    for number, line in enumerate(lines.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            texts.append(json.loads(line)["text"])
            texts[-1].encode("utf-8")  # half a surrogate pair (\ud83d) is valid JSON, but no text
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            rule = "a line is a JSON object with a string `text`"
            raise InputError(f"text {source}:{number}: {rule}; correct or remove this line") from error
    return texts


def text_rows(source: str) -> list[str] | None:
    """The documents of a text that is divided into such; None if it is one piece.

    Args:
        source: A `.jsonl` file: its lines; `c4`, or another set of the hub (`owner/name`: split `train`, column
            `text`): its rows. What else `read_text` takes is one piece.

    Raises:
        InputError: It can't be had, or holds something else.
    """
    if source == "c4":
        return hub_rows(source, "calibration")
    if Path(source).suffix.lower() == ".jsonl":
        return jsonl_rows(source, _content(source))
    if source in NAMES or source.count("/") != 1 or Path(source).suffix or Path(source).exists():
        return None
    return _rows_of(source, {"path": source, "split": "train"}, "text")


def pydoc_text(part: Part) -> str:
    """CPython's language documentation, in English: long topics first, every third for evaluation.

    Many topics quote others whole (`compound` holds `for` and `if`), so a paragraph counts once, in the
    longest topic that has it: the two parts share none. In CPython 3.11 they are 64,180 and 26,502 tokens of
    SmolLM2's tokenizer (184,102 and 76,803 of stories260k's). Words and split differ between Python versions.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise InputError("text 'pydoc': this Python has no pydoc_data; give a .txt or .jsonl file") from error
    seen: set[str] = set()
    chosen = []
    for place, topic in enumerate(sorted(topics, key=lambda topic: (-len(topics[topic]), topic))):
        fresh = []
        for paragraph in topics[topic].strip("\n").split("\n\n"):
            words = " ".join(paragraph.split())  # a quoted paragraph may be indented or wrapped differently
            if words not in seen:
                seen.add(words)
                fresh.append(paragraph)
        if fresh and (place % 3 == 2) == (part == "evaluation"):
            chosen.append("\n\n".join(fresh))
    return "\n\n".join(chosen)


def hub_text(name: str, part: Part) -> str:
    """The rows of a hub data set joined into one text, as `HUB` says; `datasets` fetches it only once."""
    return HUB[name, part][2].join(hub_rows(name, part))


def hub_rows(name: str, part: Part) -> list[str]:
    """The rows of a hub data set, as `HUB` says."""
    options, column, _ = HUB[name, part]
    return _rows_of(name, options, column)


def _rows_of(name: str, options: dict[str, Any], column: str) -> list[str]:
    remedy = "give a .txt or .jsonl file, or pydoc"
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(f"text {name!r}: needs `datasets`; pip install 'ptql[hub]', or {remedy}") from error
    try:
        return list(load_dataset(**options)[column])
    except Exception as error:  # offline, a proxy, a full disk, a moved data set: many types, one remedy
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"text {name!r}: it can't be had from the hub ({reason}); {remedy}") from error
