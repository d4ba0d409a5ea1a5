"""Memory: a model of 600 MB is quantised in less than 300 MB, because one block is there at a time."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS, LIMIT = 40, 300e6
pytestmark = pytest.mark.slow

MAKE = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

# Written file by file: the whole model is never in memory here either.
out, blocks, sharded = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "sharded"
out.mkdir(parents=True)
hidden, middle, vocabulary = 576, 1536, 128
LlamaConfig(hidden_size=hidden, intermediate_size=middle, vocab_size=vocabulary, num_hidden_layers=blocks,
            num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=128, tie_word_embeddings=True,
            architectures=["LlamaForCausalLM"]).save_pretrained(out)
words = Tokenizer(models.WordLevel({f"w{k}": k for k in range(vocabulary)}, unk_token="w0"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(out)
torch.manual_seed(0)
names = {f"self_attn.{p}_proj": (hidden, hidden) for p in "qkvo"}
names |= {"mlp.gate_proj": (middle, hidden), "mlp.up_proj": (middle, hidden), "mlp.down_proj": (hidden, middle)}
def block(index):
    prefix = f"model.layers.{index}."
    found = {f"{prefix}{name}.weight": torch.randn(shape) * shape[1] ** -0.5 for name, shape in names.items()}
    return found | {f"{prefix}{name}_layernorm.weight": torch.ones(hidden) for name in ("input", "post_attention")}
outside = {"model.embed_tokens.weight": torch.randn(vocabulary, hidden), "model.norm.weight": torch.ones(hidden)}
if not sharded:
    for index in range(blocks):
        outside |= block(index)
    save_file(outside, out / "model.safetensors", {"format": "pt"})
else:
    save_file(outside, out / "outside.safetensors", {"format": "pt"})
    where = dict.fromkeys(outside, "outside.safetensors")
    for first in range(0, blocks, 5):
        tensors = {}
        for index in range(first, first + 5):
            tensors |= block(index)
        save_file(tensors, out / f"shard-{first}.safetensors", {"format": "pt"})
        where |= dict.fromkeys(tensors, f"shard-{first}.safetensors")
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
(out.parent / "text.txt").write_text(" ".join(f"w{k}" for k in torch.randint(0, vocabulary, (2000,)).tolist()))
"""

RUN = """
import sys
import ptql.cli, ptql.calibration.trainer, lightning.pytorch.cli, tensorboard, torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from torch.utils.tensorboard import SummaryWriter

def status(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) * 1024

weight = torch.zeros(8, 8, requires_grad=True)
torch.optim.AdamW([weight]).step((lambda: (weight @ weight).sum()))  # what torch sets up at its first use
before = status("VmRSS")
code = ptql.cli.main(sys.argv[1:])
print("PEAK", status("VmHWM") - before, "BEFORE", before)
sys.exit(code)
"""


def python(script: str, *args: str | Path) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, *(str(arg) for arg in args)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc: this system doesn't tell the peak")
@pytest.mark.parametrize(("files", "method"), [("single", "omniquant"), ("sharded", "rtn")])
def test_one_block_is_in_memory_at_a_time(
    tmp_path: Path, files: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "model"
    python(MAKE, source, str(BLOCKS), files)
    assert sum(file.stat().st_size for file in source.glob("*.safetensors")) > 600e6
    monkeypatch.setenv("PTQL_CACHE", str(tmp_path / "cache"))
    recipe = ("-c", f"methods/{method}", "-c", "schemes/w4a16", "--trainer.accelerator", "cpu")
    epochs = () if method == "rtn" else ("--trainer.max_epochs", "1")
    text = ("--data.text", str(source.parent / "text.txt"), "--data.length", "32", "--data.samples", "4")
    run = ("--model.source", str(source), "--trainer.default_root_dir", str(tmp_path / "run"))
    out = python(RUN, "fit", *recipe, *epochs, *text, *run)
    peak, before = (int(part) for part in re.findall(r"PEAK (\d+) BEFORE (\d+)", out)[0])
    print(f"{peak / 1e6:.0f} MB above the {before / 1e6:.0f} MB of the imports")
    assert peak < LIMIT
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["fit"]["blocks"] == BLOCKS
    assert metrics["size_bytes"] < 100e6
    assert metrics["fit"]["seconds"] < 300
    shutil.rmtree(source)  # pytest keeps the directories of the last runs
