"""A model's tokenizer as the fields of a GGUF file, by which llama.cpp cuts texts into the same tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase

from ptql.errors import InputError
from ptql.export.spm_scores import spm_scores

REMEDY = "use --format dense, and llama.cpp's own converter"
SPACE = "▁"
_END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_END}"
QWEN2 = rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_END}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_END}"
)
PRE_TOKENIZERS: dict[tuple[Any, ...], str] = {
    ("gpt2", False): "gpt-2",
    ("digits", "gpt2", False): "smollm",
    (LLAMA3, True): "llama-bpe",
    (LLAMA3, False): "smaug-bpe",
    (QWEN2, False): "qwen2",
    (_TEKKEN, True): "tekken",
}
"""How texts are cut before they are merged, and whether whole words need no merges: the name by which llama.cpp does
the same (`llama-vocab.cpp`)."""


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp needs of a tokenizer.

    Args:
        model: `gpt2` for byte-level pairs, `llama` for what SentencePiece does.
        pre: How texts are cut before.
        tokens: All, by id.
        types: Of the tokens.
        merges: Of byte-level pairs, the first one first.
        scores: Of SentencePiece's tokens: pairs that make the highest are joined first.
        space: SentencePiece puts a space before a text.
        special: Ids of `bos` and so on.
        adds: Whether `bos` and `eos` are put around a text.
        template: Of chats.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[gguf.TokenType]
    merges: list[str] | None
    scores: list[float] | None
    space: bool | None
    special: dict[str, int]
    adds: dict[str, bool]
    template: str | list[dict[str, str]] | None

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.space is not None:
            writer.add_add_space_prefix(self.space)
        for name, id in self.special.items():
            getattr(writer, f"add_{name}_token_id")(id)
        for name, added in self.adds.items():
            getattr(writer, f"add_add_{name}_token")(added)
        if self.template is not None:
            writer.add_chat_template(self.template)


def vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """The fields of a tokenizer.

    Args:
        tokenizer: The model's.
        size: Rows of the embedding; ids that the tokenizer does not have are filled up.

    Raises:
        InputError: llama.cpp would cut texts in another way.
    """
    if not tokenizer.is_fast:
        raise InputError(f"{type(tokenizer).__name__}: a tokenizer without tokenizer.json is not written; {REMEDY}")
    described = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    model = described["model"]
    if model["type"] != "BPE":
        raise InputError(f"tokenizer: a model of the kind {model['type']} is not written, BPE is; {REMEDY}")
    pairs = [_pair(pair) for pair in model["merges"]]
    tokens, types = _tokens(described, size)
    kinds: dict[str, Any]
    if model.get("byte_fallback"):
        scores = spm_scores(model["vocab"], pairs, {t["content"] for t in described["added_tokens"]})
        kinds = {
            "model": "llama",
            "pre": "default",
            "merges": None,
            "scores": [scores.get(token, 0.0) for token in tokens],
            "space": _space_before(described),
        }
    else:
        kinds = {
            "model": "gpt2",
            "pre": _pre_tokenizer(described),
            "merges": [f"{left} {right}" for left, right in pairs],
            "scores": None,
            "space": None,
        }
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    one = tokenizer("a")["input_ids"]
    adds = {"bos": one[0] == ids["bos"], "eos": len(one) > 1 and one[-1] == ids["eos"]}
    return Vocabulary(
        **kinds,
        tokens=tokens,
        types=types,
        special={name: id for name, id in ids.items() if id is not None},
        adds=adds,
        template=_template(tokenizer),
    )


def _tokens(described: dict[str, Any], size: int) -> tuple[list[str], list[gguf.TokenType]]:
    """All tokens and their types, by id."""
    model, added = described["model"], {token["id"]: token for token in described["added_tokens"]}
    by_id = {id: token for token, id in model["vocab"].items()} | {id: t["content"] for id, t in added.items()}
    if max(by_id) >= size:
        raise InputError(
            f"tokenizer: it has a token {max(by_id)}, and the model {size} rows of embeddings; give the tokenizer that "
            "belongs to the model"
        )
    tokens, types = [], []
    for id in range(size):
        token, kind = by_id.get(id, f"[PAD{id}]"), gguf.TokenType.NORMAL
        if id not in by_id:
            kind = gguf.TokenType.UNUSED
        elif id in added and added[id]["special"]:
            kind = gguf.TokenType.CONTROL
        elif id in added:
            # llama.cpp looks for these in the text itself
            token, kind = token.replace(SPACE, " "), gguf.TokenType.USER_DEFINED
        elif model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kind = gguf.TokenType.BYTE
        tokens.append(token)
        types.append(kind)
    return tokens, types


def _pair(merge: str | list[str]) -> tuple[str, str]:
    """The two sides, written together with a space between in older files."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The parts of a sequence."""
    if part is None:
        return []
    return [step for each in part[inner] for step in _steps(each, inner)] if part["type"] == "Sequence" else [part]


def _pre_tokenizer(described: dict[str, Any]) -> str:
    """llama.cpp's name of what happens before the merges, of a byte-level tokenizer."""
    normalizers = [step["type"] for step in _steps(described["normalizer"], "normalizers")]
    cuts: list[Any] = []
    for step in _steps(described["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Digits" and step["individual_digits"]:
            cuts.append("digits")
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            cuts.append(step["pattern"].get("Regex"))
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            cuts += ["gpt2"] if step["use_regex"] else []
        else:
            cuts.append(step["type"])
    name = PRE_TOKENIZERS.get((*cuts, bool(described["model"].get("ignore_merges"))))
    # llama.cpp does not compose letters and accents into one character, which most texts have already
    if name is None or normalizers not in ([], ["NFC"]):
        raise InputError(
            f"tokenizer: it prepares texts in a way that is not known (normalizer {normalizers}, cuts {cuts}), of "
            f"which llama.cpp needs the name; those of {', '.join(PRE_TOKENIZERS.values())} are known; {REMEDY}"
        )
    return name


def _space_before(described: dict[str, Any]) -> bool:
    """Whether a space is put before a text, of a tokenizer that writes spaces as ▁."""
    steps = _steps(described["normalizer"], "normalizers") + _steps(described["pre_tokenizer"], "pretokenizers")
    spaces, before = False, False
    for step in steps:
        if step["type"] == "Prepend" and step["prepend"] == SPACE:
            before = True
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE:
            spaces = True
        elif step["type"] == "Metaspace" and step["replacement"] == SPACE and not step["split"]:
            spaces, before = True, step["prepend_scheme"] != "never"
        else:
            spaces = False
            break
    if not spaces:
        raise InputError(
            f"tokenizer: llama.cpp has no {', '.join(step['type'] for step in steps) or 'nothing'} before the merges "
            f"of a SentencePiece model, only spaces as {SPACE}; {REMEDY}"
        )
    return before


def _template(tokenizer: PreTrainedTokenizerBase) -> str | list[dict[str, str]] | None:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return [{"name": name, "template": text} for name, text in template.items()]
    return template
