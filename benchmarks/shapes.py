"""Llama models of real shapes with random weights and few blocks, to time calibration on.

    python benchmarks/shapes.py llama2-7b OUT --blocks 3 --tokenizer DIR
    python benchmarks/shapes.py custom OUT --hidden 64 --mlp 172 --heads 4 --kv_heads 2 --tokenizer DIR

Weights are normal numbers of standard deviation 0.02 in bfloat16, norms are ones, the head is the embedding. Normal
numbers are drawn once, 2^24 - 3 of them (a prime, so that no two rows of a matrix are equal), and every matrix is cut
out of their endless repetition at an offset of its own: writing is as fast as the disk, and no tensor is in memory.
Time and memory of calibration do not depend on the values; losses of such a model mean nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ptql.calibration.tokens import load_tokenizer  # noqa: E402

DRAWN = 2**24 - 3
CONTEXT = 8192
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama model.

    Args:
        name: What it is called in results.
        hidden: Width of the stream between blocks.
        mlp: Width inside the MLP.
        heads: Of queries; heads * head size = hidden.
        kv_heads: Of keys and values.
        blocks: Of the real model, for extrapolation.
    """

    name: str
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    blocks: int = 0

    def __post_init__(self) -> None:
        if self.hidden % (2 * self.heads) or self.heads % self.kv_heads:
            raise ValueError(
                f"hidden={self.hidden}, heads={self.heads}, kv_heads={self.kv_heads}: heads divide the width into even "
                "parts, and kv_heads divide heads; correct --hidden, --heads, --kv_heads"
            )

    @property
    def kv(self) -> int:
        """Outputs of the key projection, and of the value projection."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def linear_parameters(self) -> int:
        """Weights of a block's linear layers."""
        return 2 * self.hidden**2 + 2 * self.hidden * self.kv + 3 * self.hidden * self.mlp

    def learning_flops(self, samples: int, length: int) -> float:
        """Floating-point operations of one block over all samples, forward and backward, products alone.

        A linear layer makes 2 per weight and token, and twice as many backward (for its input and its weight): 6. The
        two products of causal attention make 2 * hidden for each pair of a token and one it sees, itself among them,
        and twice as many backward: 12 in all. What is computed anew backward, as fused attention does, or by a
        quantiser, is not work that the arithmetic asks for, and not counted.
        """
        pairs = length * (length + 1) / 2
        return samples * (6.0 * self.linear_parameters * length + 12.0 * self.hidden * pairs)

    def tensors(self, block: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor of a block."""
        sides = {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.kv, self.hidden),
            "self_attn.v_proj": (self.kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.mlp, self.hidden),
            "mlp.up_proj": (self.mlp, self.hidden),
            "mlp.down_proj": (self.hidden, self.mlp),
            "input_layernorm": (self.hidden,),
            "post_attention_layernorm": (self.hidden,),
        }
        for name, shape in sides.items():
            yield f"model.layers.{block}.{name}.weight", shape


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama2-7b", 4096, 11008, 32, 32, 32),
        Shape("llama2-13b", 5120, 13824, 40, 40, 40),
        Shape("llama2-70b", 8192, 28672, 64, 8, 80),
        Shape("llama3-8b", 4096, 14336, 32, 8, 32),
        Shape("llama3-70b", 8192, 28672, 64, 8, 80),
        Shape("llama3-405b", 16384, 53248, 128, 8, 126),
    )
}


def write_shape(shape: Shape, out: Path, blocks: int, tokenizer: Path | None = None, vocab: int | None = None) -> Path:
    """Write a model directory: one safetensors file a block, one for the rest; returns `out`.

    Args:
        shape: Of the blocks.
        out: New directory.
        blocks: How many are written.
        tokenizer: Directory whose tokenizer is copied.
        vocab: Rows of the embedding; as many as the tokenizer has tokens by default.

    Raises:
        ValueError: No vocabulary, or one smaller than the tokenizer's.
        OSError: `out` is there, or can't be written.
    """
    words = 0 if tokenizer is None else max(load_tokenizer(tokenizer).get_vocab().values()) + 1
    vocab = vocab or words
    if vocab < max(words, 1):
        raise ValueError(f"vocab={vocab}: an embedding has a row for each of {words} tokens; leave --vocab out")
    if blocks < 1:
        raise ValueError(f"blocks={blocks}: a model has 1 block or more; use --blocks 3")
    out.mkdir(parents=True)
    files = {f"block-{index:05d}.safetensors": dict(shape.tensors(index)) for index in range(blocks)}
    files["outside.safetensors"] = {
        "model.embed_tokens.weight": (vocab, shape.hidden),
        "model.norm.weight": (shape.hidden,),
    }
    normal = torch.empty(DRAWN, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(2))
    for number, (name, tensors) in enumerate(files.items()):
        _write_tensors(out / name, tensors, normal, number)
    weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
    _write_json(out / INDEX, {"metadata": {}, "weight_map": weight_map})
    _write_json(out / "config.json", _config(shape, blocks, vocab))
    for name in TOKENIZER if tokenizer is not None else ():
        if (file := Path(tokenizer or "") / name).is_file():
            shutil.copyfile(file, out / name)
    return out


def first_blocks(model: Path, out: Path, blocks: int) -> Path:
    """A model of the first `blocks` of another one that `write_shape` made, whose files are linked, not copied."""
    out.mkdir(parents=True)
    index = json.loads((model / INDEX).read_text(encoding="utf-8"))
    dropped = {f"block-{number:05d}.safetensors" for number in range(blocks, len(index["weight_map"]))}
    kept = {tensor: name for tensor, name in index["weight_map"].items() if name not in dropped}
    _write_json(out / INDEX, {"metadata": {}, "weight_map": kept})
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    _write_json(out / "config.json", {**config, "num_hidden_layers": blocks})
    for name in {*kept.values(), *(name for name in TOKENIZER if (model / name).is_file())}:
        os.symlink((model / name).absolute(), out / name)
    return out


def _config(shape: Shape, blocks: int, vocab: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "num_hidden_layers": blocks,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "vocab_size": vocab,
    }


def _write_tensors(path: Path, tensors: dict[str, tuple[int, ...]], normal: torch.Tensor, number: int) -> None:
    """A safetensors file: the length of a header, the header in JSON, then one tensor after the other."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in tensors.items():
        end = at + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    drawn = memoryview(normal.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for place, shape in enumerate(tensors.values()):
            if len(shape) == 1:
                file.write(torch.ones(shape, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
                continue
            offset, left = 2 * (1_000_003 * (16 * number + place + 1) % DRAWN), 2 * math.prod(shape)
            while left:
                left -= file.write(drawn[offset : offset + left])
                offset = 0


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=[*SHAPES, "custom"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="model directory whose tokenizer is copied")
    parser.add_argument("--vocab", type=int, help="rows of the embedding; the tokenizer's by default")
    for name in ("hidden", "mlp", "heads", "kv_heads"):
        parser.add_argument(f"--{name}", type=int, help="of a custom shape")
    args = parser.parse_args(arguments)
    sizes = {name: getattr(args, name) for name in ("hidden", "mlp", "heads", "kv_heads")}
    given = [name for name, size in sizes.items() if size is not None]
    if len(given) != (4 if args.shape == "custom" else 0):
        parser.error(f"{args.shape} with {', '.join(given) or 'no sizes'}: custom takes all four sizes, others none")
    try:
        shape = Shape("custom", **sizes) if args.shape == "custom" else SHAPES[args.shape]
        write_shape(shape, args.out, args.blocks, args.tokenizer, args.vocab)
    except (ValueError, OSError) as error:
        print(f"shapes: failed: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {args.blocks} blocks of {shape.linear_parameters / 1e6:.0f} million weights each")
    return 0


if __name__ == "__main__":
    sys.exit(main())
