"""Seconds that channels take to be clustered, beside scikit-learn's k-means on the CPU, which RPTQ's code calls.

    python benchmarks/clustering.py --results RESULTS.jsonl
    python benchmarks/clustering.py --results RESULTS.jsonl --docs docs/methods/rptq.md

The sites of one block, as wide as those of the models named; points are those of random activations with a few wide
channels. Both begin ten times and keep the best; the sum of squared distances that each ends with is shown. The second
command puts a table between the lines <!-- begin: clustering --> and <!-- end: clustering --> of a Markdown file.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.calibration import probed_apart, read_rows  # noqa: E402
from benchmarks.calibration_tables import fill, markdown  # noqa: E402
from ptql.functional.clustering import cluster_labels  # noqa: E402

Site = tuple[int, int, int, int]
"""Heads, channels of each, features, clusters."""
SHAPES: dict[str, list[Site]] = {
    "SmolLM2 135M": [(1, 576, 2, 32), (3, 64, 4, 4), (3, 64, 2, 4), (1, 576, 2, 32), (1, 1536, 2, 32)],
    "OPT 6.7B": [(1, 4096, 2, 32), (32, 128, 4, 4), (32, 128, 2, 4), (1, 4096, 2, 32), (1, 16384, 2, 32)],
    "Llama 2 7B": [(1, 4096, 2, 32), (32, 128, 4, 4), (32, 128, 2, 4), (1, 4096, 2, 32), (1, 11008, 2, 32)],
}
BEGINNINGS = 10


def points(site: Site, seed: int) -> Tensor:
    """Largest and smallest values of random channels, one of fifty of which is ten times as wide."""
    heads, channels, features, _ = site
    generator = torch.Generator().manual_seed(seed)
    width = torch.rand(heads, channels, 1, generator=generator) + 0.5
    wide = torch.rand(heads, channels, 1, generator=generator) < 0.02
    ends = torch.randn(heads, channels, features, generator=generator).abs() + 2
    sign = torch.tensor([1.0, -1.0] if features == 2 else [1.0, 1.0, -1.0, -1.0])
    return ends * torch.where(wide, 10 * width, width) * sign


def spread(found: Tensor, labels: Tensor) -> float:
    """Sum of squared distances to the mean of the cluster."""
    total = 0.0
    for head, label in zip(found.double(), labels, strict=True):
        for cluster in label.unique():
            members = head[label == cluster]
            total += (members - members.mean(0)).square().sum().item()
    return total


def ours(sites: list[Tensor], clusters: list[int], device: str) -> tuple[float, list[Tensor]]:
    """Seconds, and the labels of each site."""
    on_device = [site.to(device) for site in sites]
    for warm in (True, False):
        began = time.perf_counter()
        labels = [cluster_labels(x, k, BEGINNINGS) for x, k in zip(on_device, clusters, strict=True)]
        found = [label.cpu() for label in labels]  # waits for the device
        seconds = time.perf_counter() - began
        if not warm or device == "cpu":
            break
    return seconds, found


def of_scikit_learn(sites: list[Tensor], clusters: list[int]) -> tuple[float, list[Tensor]]:
    """The same by `KMeans`, one head after the other as in RPTQ's code."""
    from sklearn.cluster import KMeans

    began, found = time.perf_counter(), []
    for site, k in zip(sites, clusters, strict=True):
        settings: dict[str, Any] = {"n_clusters": k, "n_init": BEGINNINGS, "random_state": 0}
        heads = [KMeans(**settings).fit(head.numpy()).labels_ for head in site]
        found.append(torch.stack([torch.from_numpy(head).long() for head in heads]))
    return time.perf_counter() - began, found


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each machine and model."""
    lines = [
        [
            row["shape"],
            row["machine"],
            f"{row['seconds']:.2f}" if row["gpus"] else "",
            f"{row['seconds'] / row['seconds_scikit_learn']:.2f}",
            f"{row['spread'] / row['spread_scikit_learn']:.3f}",
        ]
        for row in rows
    ]
    head = ["five sites of one block of", "machine", "seconds", "of scikit-learn's on its CPU", "distances, of its"]
    return markdown(head, lines, words=2)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--shape", action="append", choices=SHAPES, help="only these")
    parser.add_argument("--docs", type=Path, metavar="FILE.md", help="put the results' table there")
    args = parser.parse_args(arguments)
    if args.docs is not None:
        page = fill(args.docs.read_text(encoding="utf-8"), f"\n{table(read_rows(args.results))}\n", "clustering")
        args.docs.write_text(page, encoding="utf-8")
        return 0
    machine = probed_apart()
    for name in args.shape or SHAPES:
        sites = [points(site, seed) for seed, site in enumerate(SHAPES[name])]
        clusters = [site[3] for site in SHAPES[name]]
        seconds, labels = ours(sites, clusters, "cuda" if machine["gpus"] else "cpu")
        theirs, other = of_scikit_learn(sites, clusters)
        row = {"shape": name, "seconds": seconds, "seconds_scikit_learn": theirs}
        row["spread"] = sum(map(spread, sites, labels))
        row["spread_scikit_learn"] = sum(map(spread, sites, other))
        with open(args.results, "a", encoding="utf-8") as sink:
            sink.write(json.dumps({**row, "command": "python benchmarks/clustering.py", **machine}) + "\n")
        print(name, row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
