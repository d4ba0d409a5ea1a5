"""From text to windows of token ids, and a cache of them on disk.

A window is a cut from the middle of a text, without special tokens, unless the model's family needs `<bos>` at its
start: then it is `<bos>` and a cut that is one token shorter.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import uuid
import warnings
from contextlib import suppress
from pathlib import Path

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ptql.errors import InputError

CACHE_FORMAT = "1"  # raise it whenever the same key would give other tokens
KEY_RULE = """the file's name is the SHA-256 of the JSON object, keys sorted, of: format; tokenizer and text \
(each the SHA-256 of its content); seed, samples and length of the random windows; bos, the first token of a window, \
if the text does not begin it"""


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model directory; nothing is fetched and no code of the directory is run."""
    name = f"tokenizer {str(directory)!r}"
    if not Path(directory).is_dir():
        raise InputError(f"{name}: no such directory; give a Hugging Face model directory")
    remedy = "put the model's tokenizer.json and tokenizer_config.json there"
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # broken JSON, custom code, no files …: transformers has a type for each
        reason = str(error).strip().partition("\n")[0].rstrip(": ") or type(error).__name__
        raise InputError(f"{name}: it can't be loaded ({reason}); {remedy}") from error
    # Without tokenizer files transformers gives many model types one that turns every text into nothing.
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise InputError(f"{name}: its vocabulary has no words; {remedy}")
    return tokenizer


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Int[Tensor, " n"]:
    """Token ids of the whole text, however long, without special tokens."""
    # verbose=False: that a text is longer than the model's context is no news here
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def bos_token(tokenizer: PreTrainedTokenizerBase, needed: bool) -> int | None:
    """The id of `<bos>` if windows need it at their start, else None; `InputError` if there is none then."""
    if not needed:
        return None
    token = tokenizer.bos_token_id
    if not isinstance(token, int):
        raise InputError(
            f"tokenizer {tokenizer.name_or_path!r}: it has no bos_token, with which every window of this model must "
            "begin; put the model's own tokenizer_config.json there"
        )
    return token


def sample_windows(
    tokens: Int[Tensor, " n"], samples: int, length: int, seed: int, bos: int | None = None
) -> Int[Tensor, "{samples} {length}"]:
    """Windows that start at random places and may overlap: the draw of GPTQ's and OmniQuant's loaders."""
    cut = _text_length(tokens, length, bos)
    draw = random.Random(seed)
    last = max(len(tokens) - cut - 1, 0)  # they never draw the very last start, unless it is the only one
    starts = [draw.randint(0, last) for _ in range(samples)]
    return _begun(torch.stack([tokens[start : start + cut] for start in starts]), bos)


def consecutive_windows(
    tokens: Int[Tensor, " n"], length: int, bos: int | None = None
) -> Int[Tensor, "windows {length}"]:
    """Windows whose cuts follow one another without overlap; what is left at the end is dropped."""
    cut = _text_length(tokens, length, bos)
    windows = len(tokens) // cut
    return _begun(tokens[: windows * cut].view(windows, cut), bos)


def _text_length(tokens: Int[Tensor, " n"], length: int, bos: int | None) -> int:
    """Tokens of text in a window of `length`; `InputError` if the text has fewer."""
    added = 0 if bos is None else 1
    if (count := len(tokens)) < length - added:
        longest = count + added
        shorter = f", or use --data.length {longest} or less (eval: --length)" if longest > 1 else ""
        remedy = "give a longer text" + shorter
        raise InputError(f"text of {count} tokens: it is shorter than one window of {length}; {remedy}")
    return length - added


def _begun(cuts: Int[Tensor, "windows cut"], bos: int | None) -> Int[Tensor, "windows length"]:
    """The cuts, each behind `<bos>` if there is one."""
    return cuts if bos is None else torch.cat([cuts.new_full((len(cuts), 1), bos), cuts], dim=1)


def cached_windows(
    tokenizer: PreTrainedTokenizerBase, text: str, samples: int, length: int, seed: int, bos: int | None = None
) -> Int[Tensor, "{samples} {length}"]:
    """`sample_windows` of the tokenised text, from the cache on disk if they were made before."""
    header = {
        "format": CACHE_FORMAT,
        "tokenizer": tokenizer_digest(tokenizer),
        "text": hashlib.sha256(text.encode("utf-8")).hexdigest(),
        "seed": str(seed),
        "samples": str(samples),
        "length": str(length),
        **({} if bos is None else {"bos": str(bos)}),
    }
    key = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
    file = cache_directory() / f"{key}.safetensors"
    windows = read_cached(file)
    if windows is None:
        windows = sample_windows(tokenize(tokenizer, text), samples, length, seed, bos)
        write_cached(file, windows, {**header, "key": KEY_RULE})
    return windows


def cache_directory() -> Path:
    """Where token files are kept: `$PTQL_CACHE/tokens`, else `ptql/tokens` in the user's cache directory."""
    if own := os.environ.get("PTQL_CACHE"):
        return Path(own) / "tokens"
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "ptql" / "tokens"


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what decides a tokenizer's ids; two copies in different places have the same."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        # Truncation and padding don't touch our ids, and transformers resets them at the first call.
        content = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()
    digest = hashlib.sha256(type(tokenizer).__name__.encode())
    for name in sorted({"tokenizer_config.json", "added_tokens.json", *tokenizer.vocab_files_names.values()}):
        file = Path(tokenizer.name_or_path) / name
        if file.is_file():
            digest.update(f"{name} {file.stat().st_size}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def read_cached(file: Path) -> Tensor | None:
    """The windows in a cache file; None if there is no file, or one that is damaged anywhere."""
    try:
        with safe_open(file, "pt") as stored:
            windows = stored.get_tensor("windows").clone()  # no mapping of the file outlives this
            intact = (stored.metadata() or {}).get("checksum") == checksum(windows)
    except (OSError, SafetensorError):
        return None
    return windows if intact else None


def write_cached(file: Path, windows: Tensor, header: dict[str, str]) -> None:
    """Put the file into the cache in one step, so that no reader meets half of it; warn where that fails."""
    temporary = file.with_name(f".{file.stem}-{uuid.uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(save({"windows": windows}, {**header, "checksum": checksum(windows)}))
        os.replace(temporary, file)
    except OSError as error:
        rule = "tokens can't be kept there and are made again each time; set PTQL_CACHE to another directory"
        warnings.warn(f"token cache {file.parent} ({error.strerror}): {rule}", stacklevel=3)
    finally:
        with suppress(OSError):
            temporary.unlink()


def checksum(windows: Tensor) -> str:
    """SHA-256 of shape and ids."""
    return hashlib.sha256(f"{tuple(windows.shape)}".encode() + windows.numpy().tobytes()).hexdigest()
