"""Mutations of a valid configuration or command line, each decided by a seed."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

MINE = "mine.yaml"
LONG = "ä" * 5000
SCALARS: list[Any] = [
    *(-1, 0, 1, 2, 3, -(10**30), 10**30, 2**31, 2**63, -0.5, 0.5, 1.5, 1e308, -1e308, 1e-320),
    *(float("nan"), float("inf"), -float("inf"), True, False, None),
    *("", " ", "x", "null", "~", "true", "1", "-1", "1e999", "0x10", "1_000", "nan", "auto", "a b", "a,b", LONG),
    *("ünïcödé", "日本", "\u202e", "\U0001f600", "\t", "a\nb", "\x7f", "{", "[", "'", '"', "%s", "{0}", "$HOME", "!!x"),
    *("../..", "/", "/dev/null", "/dev/null/x", "/proc/x", "words.txt", ".", "~", "~nobody/x"),
    *("s3://bucket/x", "file:///x", "http://localhost:1/x", "owner/name", "os.system", "ptql", "torch.nn.Linear"),
]
CONTAINERS: list[Any] = [[], {}, [[]], [None], ["a", "b"], [1, 2], {"a": 1}, [{}], {"class_path": "x"}]
CONTAINERS += [{"class_path": None}, {"init_args": {}}, {"class_path": "torch.nn.ReLU", "init_args": {"x": 1}}]
NAMES = ["wieght", "", " ", "ü", "a.b", "__class__", "class_path", "init_args", "dict_kwargs", "self", "0"]
CLASSES = ["nope.Nope", "ptql.parts.transforms.Smoot", "torch.nn.Linear", "os.system", "builtins.int", "", ".", "ptql"]
CLASSES += ["ptql.parts.weights.Affine", "ptql.parts.transforms.Transform", "ptql.parts.objectives.Reconstruction"]
CLASSES += ["Smooth", "ptql.parts.transforms.smooth.SmoothBlock", "torch.optim.LBFGS", "lightning.pytorch.Trainer"]


def made(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": class_path, **({"init_args": init_args} if init_args else {})}


LIGHTNING = "lightning.pytorch"
SPECIAL: dict[str, list[Any]] = {
    "strategy": [
        *("ddp", "ddp_spawn", "ddp_fork", "ddp_notebook", "fsdp", "deepspeed", "deepspeed_stage_3", "dp", "horovod"),
        *("model_parallel", "single_device", "xla", "ddp_find_unused_parameters_true", "bagua", "DDP"),
        *(made(f"{LIGHTNING}.strategies.{name}") for name in ("DDPStrategy", "FSDPStrategy", "DeepSpeedStrategy")),
        *(made(f"{LIGHTNING}.strategies.{name}") for name in ("SingleDeviceStrategy", "SingleDeviceXLAStrategy")),
        *(made(f"{LIGHTNING}.strategies.DDPStrategy", x=1), made(f"{LIGHTNING}.strategies.Strategy")),
        made(f"{LIGHTNING}.strategies.DDPStrategy", process_group_backend="nope"),
        made(f"{LIGHTNING}.strategies.ModelParallelStrategy"),
    ],
    "accelerator": [
        "gpu",
        "cuda",
        "tpu",
        "hpu",
        "mps",
        "ipu",
        "CPU",
        "warp",
        made(f"{LIGHTNING}.accelerators.CPUAccelerator"),
    ],
    "devices": [2, 4, 65, 10**9, "2", "0,1", "0,", [0], [0, 1], [0, 0], [-1], [], "auto", -1, "-1", 0.5],
    "num_nodes": [2, 0, 10**9],
    "precision": [
        *(16, 32, 64, "16", "bf16", "16-true", "16-mixed", "bf16-true", "bf16-mixed", "64-true", "32-true", "8"),
        *("transformer-engine", "transformer-engine-float16"),
    ],
    "logger": [
        *(True, False, [], [True], made(f"{LIGHTNING}.loggers.CSVLogger", save_dir="logs")),
        *(made(f"{LIGHTNING}.loggers.{name}") for name in ("WandbLogger", "MLFlowLogger", "CometLogger", "Logger")),
        made(f"{LIGHTNING}.loggers.TensorBoardLogger", save_dir="/dev/null/x"),
        [
            made(f"{LIGHTNING}.loggers.CSVLogger", save_dir="logs"),
            made(f"{LIGHTNING}.loggers.CSVLogger", save_dir="l2"),
        ],
    ],
    "callbacks": [
        *([made("ptql.callbacks.BlockCheckpoint", every_seconds=s)] for s in (0, -1, "nan", 1e308, None)),
        *([made("ptql.callbacks.BlockProgress", refresh_per_second=s)] for s in (0, -1, "nan", "inf", "x")),
        *([made(f"{LIGHTNING}.callbacks.{name}")] for name in ("ModelCheckpoint", "EarlyStopping", "RichProgressBar")),
        *([made(f"{LIGHTNING}.callbacks.{name}")] for name in ("TQDMProgressBar", "LearningRateMonitor", "Timer")),
        *(
            [made(f"{LIGHTNING}.callbacks.{name}")]
            for name in ("DeviceStatsMonitor", "ModelSummary", "BatchSizeFinder")
        ),
        *([made(f"{LIGHTNING}.callbacks.{name}")] for name in ("GradientAccumulationScheduler", "ModelPruning")),
        *([made(f"{LIGHTNING}.callbacks.{name}")] for name in ("StochasticWeightAveraging", "LearningRateFinder")),
        [made(f"{LIGHTNING}.callbacks.EarlyStopping", monitor="loss/total")],
        [made(f"{LIGHTNING}.callbacks.StochasticWeightAveraging", swa_lrs=0.1)],
        made("ptql.callbacks.BlockPlots"),
        [made("torch.nn.Linear", in_features=1, out_features=1)],
    ],
    "profiler": ["simple", "advanced", "pytorch", "xla", "nope", made(f"{LIGHTNING}.profilers.SimpleProfiler")],
    "plugins": [
        *("LightningEnvironment", made(f"{LIGHTNING}.plugins.environments.SLURMEnvironment")),
        made(f"{LIGHTNING}.plugins.environments.LightningEnvironment"),
        [made(f"{LIGHTNING}.plugins.precision.MixedPrecision", precision="bf16-mixed", device="cpu")],
        [made(f"{LIGHTNING}.plugins.precision.Precision")],
    ],
    "max_time": ["00:00:00:01", "x", {"seconds": 1}, {"hours": -1}, 5],
    "max_epochs": [1, 10_001, 10**9, "1", 1.0, -1],
    "max_steps": [0, 5],
    "deterministic": ["warn", "x", True],
    "gradient_clip_algorithm": ["norm", "value", "NORM", "x"],
    "gradient_clip_val": [0.1, 0, "1"],
    "accumulate_grad_batches": [2, 3, 10**9, {"0": 1}],
    "log_every_n_steps": [1, 10**9],
    "fast_dev_run": [7, 1, -3, "yes"],
    "optimizer": [
        *(
            made(f"torch.optim.{name}")
            for name in ("AdamW", "SGD", "LBFGS", "SparseAdam", "Adafactor", "Muon", "Rprop")
        ),
        *(
            made("torch.optim.AdamW", **{k: v})
            for k, v in (("lr", -1.0), ("eps", -1.0), ("betas", [2.0, 3.0]), ("x", 1))
        ),
        *(made("torch.optim.AdamW", lr=1e308), made("torch.optim.AdamW", weight_decay=1e308), "torch.optim.AdamW"),
        made("torch.optim.AdamW", fused=True, foreach=True),
        *("torch.optim.Nope", "ptql.calibration.quant_lm.adamw", "os.system", "builtins.print"),
    ],
    "text": ["pydoc", "wikitext2", "c4", "ptb", "nope.txt", "x.jsonl", ".txt", "/dev/null", "/proc/self/mem", "/"],
    "source": [
        "nope",
        "./nope",
        "a/b/c",
        "a b/c",
        "/",
        ".",
        "",
        "/dev/null",
        "words.txt",
        "../..",
        "owner/" + "n" * 500,
    ],
    "seed_everything": [2**32, -1, 1.5, "x", True, False],
    "default_root_dir": [
        MINE,
        f"{MINE}/x",
        "RUN/deep/er",
        "/dev/null/x",
        "x" * 300,
        "a/" * 2000,
        "s3://x/y",
        "\0",
        "~nobody",
    ],
    "bits": [2, 8, 16, 9, 32],
    "group_size": [1, 7, 64, 10**9],
    "targets": [["fp", "fp_on_quantised"], ["fp", "fp"], ["nope"], "fp", [["fp"]]],
    "sites": [["qkv"], ["qkv", "qkv"], "qkv", ["nope"], [[]]],
    "lr": [1e-8, 10.0, 1e38, 3e38],
    "initial": [1e38, -50.0, "ones", "balanced"],
    "model_registry": ["x", "x/y:1"],
}
TAGS = [
    '!!python/object/apply:os.system ["touch hacked"]',
    "!!python/name:os.system",
    "!!python/object:ptql.cli.main {}",
    *(
        "!!binary x",
        "!!binary aGVsbG8=",
        "!!set {a, b}",
        "!unknown x",
        "!!float abc",
        "!!int x",
        "!!timestamp 2000-13-99",
    ),
    *(
        "!!omap [a: 1]",
        "!!null x",
        "!!bool maybe",
        "*nowhere",
        "&a [*a]",
        "&a {b: *a}",
        "!!merge x",
        "2000-01-01",
        "0o9",
    ),
    *("1:30:00", "<<: 3", "? a", ": b", "- - -", "@x", "`x`", "%x", "|\n x", ">-\n x", "{a: b: c}", "[a, {b]", "\tx"),
]
WHOLE = [
    b"",
    b"\n",
    b"3",
    b"x",
    b"[]",
    b"- a",
    b"null",
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"---\n---\n",
    b"--- {}\n--- {}\n",
]
WHOLE += [
    b"%YAML 9.9\n---\n{}",
    b"{}",
    b"{",
    b"a: b: c",
    b"? [a]: b",
    b"1: 2",
    b"null: null",
    b"true: {}",
    b"\t",
    b"#",
    b"&a [*a]",
]


@dataclass
class Case:
    """A run to try.

    Args:
        args: Of the command.
        config: What mine.yaml holds.
        said: The mutations, for a reader.
        words: One of these must be in the line that refuses it; nothing: any line will do.
    """

    args: list[str]
    config: bytes
    said: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)


def case(seed: int, base: dict[str, Any]) -> Case:
    """The mutation of this seed."""
    rng = random.Random(seed)
    config = copy.deepcopy(base)
    mutated = Case(["fit", "-c", MINE], b"")
    kind = rng.choices(("config", "text", "command"), (65, 15, 20))[0]
    for _ in range(rng.choice((1, 1, 2)) if kind == "config" else 0):
        _mutate(rng, config, mutated)
    mutated.config = yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode()
    if kind == "text":
        _mutate_text(rng, mutated)
    elif kind == "command":
        _mutate_command(rng, config, mutated)
    return mutated


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of everything inside."""
    for key, inner in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield (*path, key)
        yield from places(inner, (*path, key))


def _at(node: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        node = node[key]
    return node


def _mutate(rng: random.Random, config: dict[str, Any], case: Case) -> None:
    path = rng.choice(list(places(config)))
    special = [place for place in places(config) if place[-1] in SPECIAL]
    kind = rng.choices(("value", "special", "unknown", "delete", "class"), (35, 35, 10, 8, 12))[0]
    if kind == "special" and special:
        path = rng.choice(special)
        value = rng.choice(SPECIAL[path[-1]])
        _at(config, path[:-1])[path[-1]] = copy.deepcopy(value)
        _note(case, path, value)
    elif kind == "unknown":
        dicts = [place for place in [(), *places(config)] if isinstance(_at(config, place), dict)]
        path = (*rng.choice(dicts), rng.choice(NAMES))
        value = rng.choice(SCALARS + CONTAINERS)
        _at(config, path[:-1])[path[-1]] = value
        _note(case, path, value)
    elif kind == "delete":
        case.words += [str(key) for place in places(_at(config, path), path) for key in place]
        del _at(config, path[:-1])[path[-1]]
        _note(case, path, "deleted")
    elif kind == "class" and (classes := [place for place in places(config) if place[-1] == "class_path"]):
        path = rng.choice(classes)
        value = rng.choice(CLASSES)
        _at(config, path[:-1])["class_path"] = value
        _note(case, path, value)
    else:
        value = rng.choice(SCALARS + CONTAINERS)
        _at(config, path[:-1])[path[-1]] = copy.deepcopy(value)
        _note(case, path, value)


def _note(case: Case, path: tuple[Any, ...], value: Any) -> None:
    case.said.append(f"{'.'.join(map(str, path))} = {value!r:.200}")
    names = [str(key) for key in path if not isinstance(key, int) and str(key).strip()]
    if len(names) > 1:  # names of sections say too little
        names = [name for name in names if name not in ("trainer", "model", "data")]
    case.words += names[-2:]
    for inner in places(value):
        case.words += [str(part) for part in (inner[-1], _at(value, inner)) if len(str(part)) > 1]
    text = str(value)[:20].strip()
    case.words += [text] if len(text) > 1 else [f"{text}:", f"={text}", f"'{text}'"]
    case.words += [os.path.normpath(text)] if "/" in text else []
    case.words += ["s3fs"] if text.startswith("s3:") else []  # what fsspec misses is all that it says
    if path[-1] in ("", " ", "0") or value in (".", ""):
        case.words += ["nested key", "keys"]  # what jsonargparse says of names that can't be


def _mutate_text(rng: random.Random, case: Case) -> None:
    lines = case.config.decode().splitlines()
    kind = rng.choice(("truncated", "tag", "duplicate", "whole", "byte", "indent", "end"))
    if kind == "truncated":
        case.config = case.config[: rng.randrange(len(case.config))]
        case.said.append(f"cut after {len(case.config)} bytes")
        return
    at = rng.randrange(len(lines))
    if kind == "whole":
        case.config = rng.choice(WHOLE)
        case.said.append(f"the file is {case.config!r}")
        return
    if kind == "byte":
        content = bytearray(case.config)
        where, byte = (
            rng.randrange(len(content)),
            rng.choice([0, 9, 10, 13, 34, 39, 58, 91, 123, 125, 127, 128, 255, 45]),
        )
        content[where] = byte
        case.config = bytes(content)
        case.said.append(f"byte {where} = {byte}")
        return
    if kind == "tag":
        key = lines[at].partition(":")[0]
        lines[at] = f"{key}: {rng.choice(TAGS)}"
    elif kind == "duplicate":
        lines.insert(rng.randrange(len(lines)), lines[at])
    elif kind == "indent":
        lines[at] = rng.choice(("  ", "\t", "-", "    ", "- ", "#")) + lines[at]
    else:
        lines += [
            rng.choice(("...", "---", "--- {}", "}", "]", "trainer:", "model: {}", "data:", "fit: {}", "config: x"))
        ]
        at = -1
    case.config = ("\n".join(lines) + "\n").encode()
    case.said.append(f"{kind}: line {at}: {lines[at]!r}")


def _mutate_command(rng: random.Random, config: dict[str, Any], case: Case) -> None:
    def value() -> str:
        key = path[-1] if isinstance(path[-1], str) else ""
        given = rng.choice(SPECIAL[key] if key in SPECIAL and rng.random() < 0.6 else SCALARS + CONTAINERS)
        return given if isinstance(given, str) else json.dumps(given)

    path = rng.choice(list(places(config)))
    name = ".".join(str(key) for key in path if key != "init_args" and not isinstance(key, int))
    kind = rng.choice(("option", "option", "option", "equals", "no value", "odd", "odd"))
    if kind == "odd":
        odd = rng.choice(ODD)
        case.args = odd if odd[:1] == ["!"] else [*case.args, *odd]
        case.args = case.args[1:] if case.args[:1] == ["!"] else case.args
        case.said.append(repr(odd)[:200])
        return
    text = value()
    case.args += {"option": [f"--{name}", text], "equals": [f"--{name}={text}"]}.get(kind, [f"--{name}"])
    _note(case, path, text)
    case.words += name.split(".")[1:-1] or [name]  # a class's own settings are no options before it is known
    case.said[-1] = f"{case.args[3:]!r:.200}"


ODD: list[list[str]] = [
    *(
        ["-c"],
        ["-c", ""],
        ["-c", "."],
        ["-c", "nope"],
        ["--config"],
        ["--config="],
        ["-c", "/dev/null"],
        ["-c", "a" * 5000],
    ),
    *(
        ["-c", "methods/rtn"],
        ["-c", "methods"],
        ["-c", "configs"],
        ["--config", "schemes/w2a16"],
        ["-c", "/proc/self/mem"],
    ),
    *(["x"], [""], ["--"], ["---"], ["-"], ["--="], ["--=x"], ["--trainer"], ["--trainer", "x"], ["--trainer", "{}"]),
    *(
        ["--model"],
        ["--model", "{}"],
        ["--model", "x"],
        ["--data", "[]"],
        ["--trainer=null"],
        ["--model=null"],
        ["--data=null"],
    ),
    *(["--trainer.max_epochs"], ["--trainer.max_epochs", "--help"], ["--help"], ["-h"], ["--print_config"]),
    *(["--print_config=skip_null"], ["--print_config=x"], ["--model.transforms+=Smooth"], ["--model.transforms+", "x"]),
    *(
        ["--model.transforms.lr", "x"],
        ["--model.transforms.lr", "-1"],
        ["--model.transforms.nope", "1"],
        ["--model.transforms", "[]"],
    ),
    *(
        ["--model.transforms.help", "x"],
        ["--model.transforms.help"],
        ["--ckpt_path", "x"],
        ["--text.x", "y"],
        ["--run", "RUN"],
    ),
    *(["--trainer.callbacks+=Nope"], ["--trainer.callbacks+=EarlyStopping"], ["--trainer.callbacks.nope", "1"]),
    *(
        ["--optimizer", "AdamW"],
        ["--lr_scheduler", "StepLR"],
        ["--model.optimizer.lr", "x"],
        ["--model.optimizer", "SGD"],
    ),
    *(
        ["--trainer.logger", "CSVLogger"],
        ["--trainer.logger.save_dir", "x"],
        ["--seed_everything"],
        ["--seed_everything", "x"],
    ),
    *(["fit"], ["eval"], ["--\udcff", "x"], ["--data.text", "\udcff"], ["--trainer.default_root_dir", "\udcff"]),
    *(
        ["!"],
        ["!", ""],
        ["!", "fti"],
        ["!", "fit"],
        ["!", "eval"],
        ["!", "-c"],
        ["!", "--help"],
        ["!", "fit", "eval"],
        ["!", "validate"],
    ),
    *(
        ["!", "-c", MINE, "fit"],
        ["!", "--config", MINE],
        ["!", "eval", "-c", MINE],
        ["!", "eval", "--model.source", "nope"],
    ),
    *(
        ["!", "--fit.trainer.max_epochs", "1"],
        ["!", "fit", "--print_config", "--nope"],
        ["!", "\udcff"],
        ["!", "fit", "-c", MINE, MINE],
    ),
]
