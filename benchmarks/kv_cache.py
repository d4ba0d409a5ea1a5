"""What a packed cache of keys and values loses and saves: perplexity of long text read through it, and generation.

    python benchmarks/kv_cache.py --model NAME=DIR --model rptq=RUN/model --text wikitext2-test.txt \\
        --results RESULTS.jsonl
    python benchmarks/kv_cache.py --results RESULTS.jsonl --docs docs/transformers.md

Every window of text is read a few tokens at a time, all earlier ones through the cache; then the model writes. One JSON
line for each model and cache; a line that is in the results already is not made again. Beside ours are transformers'
own cache in 16 (or 32) bits and, where the package optimum-quanto is installed, its quantised one. The second command
puts a table between the lines <!-- begin: kv_cache --> and <!-- end: kv_cache --> of a Markdown file.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, QuantizedCache
from transformers.cache_utils import Cache

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import ptql  # noqa: E402
from benchmarks.calibration import probed_apart, read_rows  # noqa: E402
from benchmarks.calibration_tables import fill, markdown  # noqa: E402
from benchmarks.tables import short  # noqa: E402
from ptql.calibration.texts import read_text  # noqa: E402
from ptql.calibration.tokens import bos_token, consecutive_windows, load_tokenizer, tokenize  # noqa: E402
from ptql.evaluation.perplexity import token_losses  # noqa: E402
from ptql.families import family_of  # noqa: E402
from ptql.formats.ptql import unpack_block  # noqa: E402

OWN, PLAIN = "as the model says", "not packed"
QUANTO = "quanto"
BITS = (8, 4, 3, 2)
PROMPT = "Tell me a long story about an old lighthouse keeper, his dog, and the winter in which the ships stayed away."
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Make = Callable[[PreTrainedModel], Cache]
READ = ("machine", "dtype", "windows", "length", "text", "chunk")
"""What a table's rows have in common."""


def caches(model: PreTrainedModel, windows: Sequence[int]) -> Iterator[tuple[str, int, Make]]:
    """What a cache is called, its window, and how it is made for a model."""
    yield PLAIN, 0, lambda m: DynamicCache(config=m.config)
    try:
        ptql.PackedCache(model)
    except ptql.InputError:
        choices: list[tuple[str, dict[str, Any]]] = [(f"{bits} bits", {"bits": bits}) for bits in BITS]
        choices += [(f"{bits} bits, keys by channel", {"bits": bits, "keys": "channel"}) for bits in BITS[1:]]
        foreign = {f"{QUANTO}, {bits} bits": bits for bits in (4, 2)} if _has_quanto() else {}
    else:
        choices, foreign = [(OWN, {})], {}
    for name, how in choices:
        for window in windows:
            yield name, window, lambda m, how=how, w=window: ptql.PackedCache(m, window=w, **how)
    for name, bits in foreign.items():
        for window in windows[-1:]:
            yield (
                name,
                window,
                lambda m, b=bits, w=window: QuantizedCache("quanto", m.config, nbits=b, residual_length=w),
            )


def _has_quanto() -> bool:
    return find_spec("optimum") is not None and find_spec("optimum.quanto") is not None


def held_bytes(cache: Cache) -> int:
    """Of memory that a cache takes."""
    if isinstance(cache, ptql.PackedCache):
        return cache.stored_bytes()
    total = 0
    for layer in cache.layers:
        for name in ("keys", "values", "_quantized_keys", "_quantized_values"):
            total += _bytes(getattr(layer, name, None))
    return total


def _bytes(tensor: Tensor | None) -> int:
    """Of a tensor, or of what quanto's holds."""
    if tensor is None:
        return 0
    if (flatten := getattr(tensor, "__tensor_flatten__", None)) is not None:
        names, _ = flatten()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


@torch.no_grad()
def perplexity(model: PreTrainedModel, make: Make, windows: Tensor, chunk: int) -> dict[str, Any]:
    """Of windows [n, tokens], each read `chunk` tokens at a time, and what their cache takes at the end."""
    loss, held, tokens = 0.0, 0, windows.shape[1]
    began = time.perf_counter()
    for window in windows.split(1):
        cache, ids, logits = make(model), window.to(model.device), []
        for part in ids.split(chunk, dim=1):
            logits.append(model(part, past_key_values=cache, use_cache=True).logits)
        loss += token_losses(torch.cat(logits, dim=1), ids).item()
        held = held_bytes(cache)
    seconds = time.perf_counter() - began
    mean = loss / (len(windows) * (tokens - 1))
    return {
        "ppl": math.exp(mean) if mean < 700 else "inf",
        "cache_bytes": held,
        "cache_tokens": tokens,
        "seconds_perplexity": round(seconds, 2),
    }


@torch.no_grad()
def generation(model: PreTrainedModel, make: Make, prompt: Tensor, count: int) -> dict[str, Any]:
    """What the model writes after `prompt` [1, tokens], the likeliest token each time, and what its cache takes."""
    on_gpu = model.device.type == "cuda"
    cache = make(model)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    ids = model.generate(  # pyright: ignore[reportCallIssue]
        prompt.to(model.device),
        attention_mask=torch.ones_like(prompt).to(model.device),
        past_key_values=cache,
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    seconds = time.perf_counter() - began
    found = {
        "written": ids[0, prompt.shape[1] :].tolist(),
        "generated_bytes": held_bytes(cache),
        "generated_tokens": cache.get_seq_length(),
        "seconds_generation": round(seconds, 2),
    }
    return {**found, "peak_gpu_bytes": torch.cuda.max_memory_allocated()} if on_gpu else found


def story(model: PreTrainedModel, directory: Path, make: Make, count: int) -> dict[str, Any]:
    """`generation` of the prompt, as the chat template has it where there is one."""
    tokenizer = load_tokenizer(directory)
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": PROMPT}]
        said = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    else:
        said = PROMPT
    prompt = tokenizer(said, add_special_tokens=False, return_tensors="pt")["input_ids"]
    found = generation(model, make, prompt, count)
    return {**found, "written": tokenizer.decode(found["written"])}


def table(rows: list[dict[str, Any]]) -> str:
    """For each machine and way of reading a line that says so, then a line for each cache."""
    places: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        places.setdefault(tuple(row[key] for key in READ), []).append(row)
    parts = []
    for (machine, dtype, windows, length, text, chunk), own in places.items():
        words = f"{machine}, {dtype}; {windows} × {length} tokens of {text}, {chunk} at a time."
        parts.append(f"{words}\n\n{_of_one_place(own)}")
    return "\n".join(parts)


def _of_one_place(rows: list[dict[str, Any]]) -> str:
    """A line for each cache; the bytes beside those of the cache that is not packed."""
    plain, lines = {row["model"]: row for row in rows if row["cache"] == PLAIN}, []
    for row in rows:
        base = plain.get(row["model"])
        share = "" if base is None else f"{row['cache_bytes'] / base['cache_bytes']:.3f}"
        words = row["written"].split()
        lines.append(
            [
                row["model"],
                row["cache"],
                str(row["window"]) if row["cache"] != PLAIN else "",
                short(row["ppl"]),
                share,
                "" if base in (None, row) else f"{_shared_start(words, base['written'].split())}",
                f"{len(set(words)) / max(len(words), 1):.2f}",
            ]
        )
    head = ["model", "cache", "window", "ppl through it", "of its bytes unpacked"]
    head += ["words until the text differs", "distinct words of all"]
    return markdown(head, lines, words=2)


def _shared_start(first: list[str], second: list[str]) -> int:
    """Words that two texts begin with alike."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=DIR", help="may be repeated")
    parser.add_argument("--text", metavar="FILE")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--length", type=int, default=4096, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window", type=int, action="append", help="of the caches; 0, 32 and 128 by default")
    parser.add_argument("--chunk", type=int, default=16, help="tokens that are read at a time")
    parser.add_argument("--generate", type=int, default=512, help="tokens that are written")
    parser.add_argument("--dtype", choices=DTYPES, help="bfloat16 on a GPU by default, else float32")
    parser.add_argument("--docs", type=Path, metavar="FILE.md", help="put the results' table there")
    args = parser.parse_args(arguments)
    if args.docs is not None:
        page = fill(args.docs.read_text(encoding="utf-8"), f"\n{table(read_rows(args.results))}\n", "kv_cache")
        args.docs.write_text(page, encoding="utf-8")
        return 0
    if not args.model or args.text is None:
        parser.error("--model and --text are needed, or --docs")
    machine = probed_apart()
    device = "cuda" if machine["gpus"] else "cpu"
    dtype = args.dtype or ("bfloat16" if machine["gpus"] else "float32")
    keys = ("model", "cache", "window", "length", "windows", "chunk", "dtype", "text", "machine")
    done = {tuple(row[key] for key in keys) for row in read_rows(args.results)}
    for name, _, directory in (given.partition("=") for given in args.model):
        tokenizer = load_tokenizer(directory)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=DTYPES[dtype]).eval()
        model.to(device)  # pyright: ignore[reportArgumentType]
        if hasattr(model.config, "quantization_config"):
            unpack_block(model)  # whose weights would be unpacked for every token
            model.to(DTYPES[dtype])  # pyright: ignore[reportArgumentType]
        family = family_of(model.config.model_type)
        tokens = tokenize(tokenizer, read_text(args.text, "evaluation"))
        windows = consecutive_windows(tokens, args.length, bos_token(tokenizer, family.bos))[: args.windows]
        for cache, window, make in caches(model, args.window or (0, 32, 128)):
            row = {"model": name, "cache": cache, "window": window, "length": args.length, "windows": len(windows)}
            row |= {"chunk": args.chunk, "dtype": dtype, "text": Path(args.text).name, "machine": machine["machine"]}
            if tuple(row[key] for key in keys) in done:
                continue
            row |= perplexity(model, make, windows, args.chunk) | story(model, Path(directory), make, args.generate)
            command = ["benchmarks/kv_cache.py", "--model", f"{name}=DIR", "--text", Path(args.text).name]
            command += ["--length", str(args.length), "--windows", str(args.windows), "--chunk", str(args.chunk)]
            command += [word for size in args.window or () for word in ("--window", str(size))]
            with open(args.results, "a", encoding="utf-8") as sink:
                sink.write(json.dumps({**row, "command": shlex.join(["python", *command]), **machine}) + "\n")
            print(name, cache, window, row["ppl"], row["cache_bytes"], repr(row["written"][:60]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
