from __future__ import annotations

import inspect
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import ptql.calibration.tokens as module
from ptql.calibration.texts import read_text
from ptql.calibration.tokens import (
    cache_directory,
    cached_windows,
    consecutive_windows,
    load_tokenizer,
    sample_windows,
    tokenize,
    tokenizer_digest,
)
from ptql.errors import InputError

TEXT = "Once upon a time, there was a little girl. " * 40


@pytest.fixture
def tokenizer(stories_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(stories_dir)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PTQL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def no_tokenizing(monkeypatch: pytest.MonkeyPatch):
    """A switch: after it is called, tokenising fails the test."""

    def fail(*_: object) -> None:
        pytest.fail("the text was tokenised again")

    return lambda: monkeypatch.setattr(module, "tokenize", fail)


# windows


def test_random_windows_are_those_of_the_published_loaders() -> None:
    tokens = torch.arange(1000)
    random.seed(2)
    starts = []
    for _ in range(8):  # GPTQ's get_wikitext2, line by line
        i = random.randint(0, 1000 - 64 - 1)
        starts.append(i)
    windows = sample_windows(tokens, 8, 64, 2)
    assert windows.shape == (8, 64)
    assert windows[:, 0].tolist() == starts
    assert torch.equal(windows - windows[:, :1], torch.arange(64).expand(8, 64))


def test_random_windows_leave_the_global_generator_alone() -> None:
    random.seed(0)
    state = random.getstate()
    sample_windows(torch.arange(100), 3, 10, 5)
    assert random.getstate() == state


def test_consecutive_windows_drop_the_rest() -> None:
    windows = consecutive_windows(torch.arange(23), 5)
    assert windows.tolist() == [list(range(i, i + 5)) for i in range(0, 20, 5)]


def test_a_text_of_exactly_one_window_is_enough() -> None:
    assert sample_windows(torch.arange(7), 2, 7, 0).tolist() == [list(range(7))] * 2
    assert consecutive_windows(torch.arange(7), 7).shape == (1, 7)
    assert sample_windows(torch.arange(8), 2, 7, 0)[:, 0].tolist() == [0, 0]  # as in the published loaders


@pytest.mark.parametrize("cut", [lambda t, n: sample_windows(t, 1, n, 0), consecutive_windows])
def test_a_text_shorter_than_a_window_is_refused(cut) -> None:
    with pytest.raises(InputError, match=r"text of 7 tokens.*window of 8; .*--data\.length 7"):
        cut(torch.arange(7), 8)
    with pytest.raises(InputError, match=r"text of 0 tokens.*window of 8; give a longer text$"):
        cut(torch.arange(0), 8)


# tokenizer


@pytest.mark.shared
def test_tokenize_adds_nothing_and_warns_of_nothing(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    assert tokenizer("a b")["input_ids"][0] == tokenizer.bos_token_id  # this tokenizer would add one
    tokens = tokenize(tokenizer, TEXT)
    assert tokens.dtype == torch.int64
    assert len(tokens) > tokenizer.model_max_length
    assert not set(tokens.tolist()) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(tokens).strip() == TEXT.strip()
    assert not caplog.records
    assert capfd.readouterr().err == ""


@pytest.mark.shared
def test_directories_without_a_usable_tokenizer_are_refused(stories_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(InputError, match="can't be loaded") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    # transformers makes a tokenizer of one special token for this model type, without any file
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt"}))
    with pytest.raises(InputError, match="no words"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(InputError, match="can't be loaded"):
        load_tokenizer(tmp_path)


def test_code_in_the_directory_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    config = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine"}))
    with pytest.raises(InputError, match="can't be loaded"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.shared
def test_digest_is_of_the_content(stories_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(stories_dir, tmp_path / "copy", ignore=shutil.ignore_patterns("model*")))
    for file in [copy, *copy.iterdir()]:
        file.chmod(0o755)
    first = tokenizer_digest(load_tokenizer(stories_dir))
    assert tokenizer_digest(load_tokenizer(copy)) == first

    content = json.loads((copy / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    (copy / "tokenizer.json").write_text(json.dumps(content))
    truncating = load_tokenizer(copy)
    assert tokenizer_digest(truncating) == first
    assert len(tokenize(truncating, TEXT)) > 8
    assert tokenizer_digest(truncating) == first  # also after the first call

    content["model"]["merges"].pop()
    (copy / "tokenizer.json").write_text(json.dumps(content))
    assert tokenizer_digest(load_tokenizer(copy)) != first


def test_digest_of_a_tokenizer_in_plain_python(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("a\nb\n")

    class Slow:
        name_or_path = str(tmp_path)
        vocab_files_names = {"vocab_file": "vocab.txt"}  # noqa: RUF012

    digest = inspect.unwrap(tokenizer_digest)  # without the type check, for this is no real tokenizer
    first = digest(Slow())
    assert digest(Slow()) == first
    (tmp_path / "vocab.txt").write_text("a\nc\n")
    assert digest(Slow()) != first


# cache


@pytest.mark.shared
def test_second_call_reads_the_cache(tokenizer: PreTrainedTokenizerBase, cache: Path, no_tokenizing) -> None:
    first = cached_windows(tokenizer, TEXT, 4, 32, 2)
    assert torch.equal(first, sample_windows(tokenize(tokenizer, TEXT), 4, 32, 2))
    assert len(list(cache.iterdir())) == 1  # and no temporary file
    no_tokenizing()
    assert torch.equal(cached_windows(tokenizer, TEXT, 4, 32, 2), first)


@pytest.mark.shared
def test_whatever_decides_the_windows_is_in_the_key(
    tokenizer: PreTrainedTokenizerBase, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached_windows(tokenizer, TEXT, 4, 32, 2)
    cached_windows(tokenizer, TEXT + " ", 4, 32, 2)
    cached_windows(tokenizer, TEXT, 5, 32, 2)
    cached_windows(tokenizer, TEXT, 4, 33, 2)
    cached_windows(tokenizer, TEXT, 4, 32, 3)
    assert len(list(cache.iterdir())) == 5
    tokenizer.add_tokens(["girl."])
    cached_windows(tokenizer, TEXT, 4, 32, 2)
    assert len(list(cache.iterdir())) == 6
    monkeypatch.setattr(module, "CACHE_FORMAT", "another")
    cached_windows(tokenizer, TEXT, 4, 32, 2)
    assert len(list(cache.iterdir())) == 7


def cut_short(content: bytes) -> bytes:
    return content[:-16]


def one_bit_off(content: bytes) -> bytes:
    return content[:-8] + bytes([content[-8] ^ 1]) + content[-7:]


@pytest.mark.shared
@pytest.mark.parametrize("damage", [cut_short, one_bit_off, lambda content: b""])
def test_a_damaged_file_is_made_again(tokenizer: PreTrainedTokenizerBase, cache: Path, damage) -> None:
    first = cached_windows(tokenizer, TEXT, 4, 32, 2)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert torch.equal(cached_windows(tokenizer, TEXT, 4, 32, 2), first)
    assert list(cache.iterdir()) == [file]
    assert len(file.read_bytes()) == len(whole)
    assert torch.equal(module.read_cached(file), first)


@pytest.mark.shared
def test_the_file_says_what_its_key_is_made_of(tokenizer: PreTrainedTokenizerBase, cache: Path) -> None:
    cached_windows(tokenizer, TEXT, 4, 32, 2)
    (file,) = cache.iterdir()
    with safe_open(file, "pt") as stored:
        header = stored.metadata()
        assert list(stored.keys()) == ["windows"]
    assert header["key"] == module.KEY_RULE
    assert (header["seed"], header["samples"], header["length"]) == ("2", "4", "32")
    assert header["tokenizer"] == tokenizer_digest(tokenizer)


@pytest.mark.shared
def test_a_cache_that_cannot_be_written_is_a_warning(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PTQL_CACHE", str(tmp_path / "file"))  # a file where a directory should be: root fails, too
    with pytest.warns(UserWarning, match="set PTQL_CACHE"):
        windows = cached_windows(tokenizer, TEXT, 4, 32, 2)
    assert windows.shape == (4, 32)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("PTQL_CACHE", "")
    assert cache_directory() == Path("/home/me/.cache/ptql/tokens")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_directory() == Path("/xdg/ptql/tokens")
    monkeypatch.setenv("PTQL_CACHE", "/own")
    assert cache_directory() == Path("/own/tokens")


@pytest.mark.smollm2
@pytest.mark.shared
def test_wikitext2_has_the_known_number_of_tokens(shared_dir: Path, smollm2_dir: Path) -> None:
    text = read_text(str(shared_dir / "data" / "text" / "wikitext2-test.txt"), "evaluation")
    tokens = tokenize(load_tokenizer(smollm2_dir), text)
    assert len(tokens) == 304_978
    assert consecutive_windows(tokens, 2048).shape == (148, 2048)
    usual = AutoTokenizer.from_pretrained(smollm2_dir)(text[:20_000], add_special_tokens=False)["input_ids"]
    assert tokens[: len(usual) - 10].tolist() == usual[:-10]
