"""Where the squared error of 4-bit blocks lies: how much of it in the first token, how much in the worst 1 %.

    python benchmarks/first_token.py MODEL --text wikitext2-valid.txt --results FILE.jsonl

Rounds a model to nearest, W4A4, block by block on its own quantised stream, and compares each block's output with
the full-precision stream. One JSON line a block.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import ptql  # noqa: E402

ptql.__path__.append(str(ROOT))  # callbacks/ as ptql.callbacks, from a checkout too

from benchmarks.accuracy import machine  # noqa: E402
from ptql.calibration.activations import Streams  # noqa: E402
from ptql.calibration.data import CalibrationData  # noqa: E402
from ptql.calibration.finish import finish_block  # noqa: E402
from ptql.calibration.quant_lm import QuantLM  # noqa: E402
from ptql.parts.weights import Affine  # noqa: E402
from ptql.recipe import ActivationScheme, IntScheme  # noqa: E402


def shares(output: Tensor, target: Tensor) -> dict[str, float]:
    """Mean squared error, and who holds it: [samples, tokens, hidden] both."""
    error = (output - target).square().sum(-1)
    relative = error / target.square().sum(-1)
    worst = error.flatten().topk(max(1, error.numel() // 100)).values
    return {
        "mse": (error.mean() / output.shape[-1]).item(),
        "mse_without_first_token": (error[:, 1:].mean() / output.shape[-1]).item(),
        "share_of_first_token": (error[:, 0].sum() / error.sum()).item(),
        "share_of_worst_percent": (worst.sum() / error.sum()).item(),
        "relative_error_of_first_token": relative[:, 0].mean().item(),
        "relative_error_of_median_token": relative.median().item(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", default="pydoc")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = {
        "weight": IntScheme(4),
        "activation": ActivationScheme(4),
        "weight_quantizer": Affine(clip=False),
    }
    model = QuantLM(args.model, **recipe)
    source = model.open()
    data = CalibrationData(args.text, args.samples, args.length, batch_size=min(4, args.samples))
    windows = data.windows(source.directory, source.context, source.family.bos)
    streams = Streams(source.shell(), windows, data.batch_size, device)
    command = f"python benchmarks/first_token.py MODEL --text {Path(args.text).name}"
    command += f" --samples {args.samples} --length {args.length}"
    for index in range(source.num_blocks):
        block = source.block(index, device)
        ranges = streams.teach(block, source.layout, model.objective.targets)
        task = model.block_task(index, model.student(block, source), source, ranges, streams.context)
        _, output = finish_block(task, streams, source.layout, ranges)
        row = {"block": index + 1, **shares(output, streams.targets["fp"])}
        print({key: round(value, 4) for key, value in row.items()}, flush=True)
        if args.results:
            with open(args.results, "a", encoding="utf-8") as sink:
                sink.write(json.dumps({**row, "command": command, **machine()}) + "\n")
        streams.advance(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
