"""Random mutations of a valid run, each in a process of its own: `python -m tests.fuzz 17` repeats the one of seed 17.

A case must end in a complete run (exit code 0) or in one line that names what is wrong (2), whatever was given.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import yaml

from tests.fuzz.mutations import MINE, Case, case

CLI = Path(__file__).parents[2] / "cli.py"
VALID, RUN = "valid.yaml", "RUN"
PATIENCE = 60.0  # seconds; a case that takes longer hangs
MEMORY = 12 << 30  # of a case's address space: a size that is not refused must not take the machine along
QUIET = ("--help", "-h", "--print_config", "--print_config=", "--print_config=skip_null")  # end with 0 without a run


class Fuzz:
    """A directory for cases, and the configuration that they begin from.

    Args:
        folder: Empty; holds the model, the text and the tokens' cache, too.
    """

    def __init__(self, folder: Path) -> None:
        from tests.words import save_source, save_text

        self.folder = folder
        self.source = save_source(folder / "source")
        self.text = save_text(folder / "words.txt")
        os.environ["PTQL_CACHE"] = str(folder / "cache")
        self.base = self._base()

    def _base(self) -> dict[str, Any]:
        from ptql.cli import main

        small = ("--data.length", "16", "--data.samples", "3", "--data.batch_size", "2", "--trainer.max_epochs", "1")
        places = ("--model.source", str(self.source), "--data.text", str(self.text), "--trainer.default_root_dir", RUN)
        recipe = ("-c", "methods/lrquant", "-c", "schemes/w4a4", "--trainer.accelerator", "cpu")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main(["fit", *recipe, *small, *places, "--print_config"])
        return yaml.safe_load(printed.getvalue())

    def try_seed(self, seed: int) -> str | None:
        """What is wrong with how this case ended, or None."""
        tried = case(seed, self.base)
        where = self.folder / f"case-{seed}"
        shutil.rmtree(where, ignore_errors=True)
        where.mkdir()
        (where / MINE).write_bytes(tried.config)
        (where / VALID).write_text(yaml.safe_dump(self.base))
        code, out, err, seconds = self.run(where, tried.args)
        wrong = self._judge(tried, where, code, out, err, seconds)
        if wrong is None:
            shutil.rmtree(where)
            return None
        said = "\n  ".join(tried.said)
        return (
            f"seed {seed}: {wrong}\n  {said}\n  code {code}, {seconds:.1f} s\n  out: {out[-500:]}\n  err: {err[-3000:]}"
        )

    def run(self, where: Path, args: list[str]) -> tuple[int, str, str, float]:
        """The command in a process of its own: exit code (-1: it hung), what it wrote, seconds."""
        began = time.monotonic()
        files = [where.with_name(f"{where.name}.{name}") for name in ("out", "err")]
        if (pid := os.fork()) == 0:
            self._child(where, args, files)
        code: int | None = None
        while code is None and time.monotonic() - began < PATIENCE:
            done, status = os.waitpid(pid, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if done else None
            time.sleep(0.01)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        if code is None:
            os.waitpid(pid, 0)
        written = [file.read_text(errors="replace") for file in files]
        for file in files:
            file.unlink()
        return -1 if code is None else code, written[0], written[1], time.monotonic() - began

    def _child(self, where: Path, args: list[str], files: list[Path]) -> None:
        code = 1
        try:
            os.setsid()
            os.chdir(where)
            for number, file in zip((1, 2), files, strict=True):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT, 0o666), number)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            sys.argv = [str(CLI), *args]
            sys.modules["__main__"].__spec__ = None  # so that Lightning starts further processes with cli.py
            from ptql.cli import main

            code = main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _judge(self, tried: Case, where: Path, code: int, out: str, err: str, seconds: float) -> str | None:
        left = sorted(path.name for path in where.iterdir() if path.name not in (MINE, VALID))
        if code == -1:
            return "hung"
        if "Traceback" in err + out:
            return "a traceback"
        if (where / "hacked").exists():
            return "it ran code of the configuration"
        if code == 0:
            return self._judge_run(tried, where, out, left)
        if code != 2:
            return f"exit code {code}"
        lines = err.splitlines()
        if len(lines) != 1 or not lines[0].startswith("ptql: error: ") or not err.endswith("\n"):
            return f"{len(lines)} lines on stderr"
        if len(lines[0]) > 1500:
            return f"a line of {len(lines[0])} characters"
        if tried.words and not any(word in lines[0] for word in tried.words):
            return f"none of {tried.words} is named"
        if "; " not in lines[0] and ": give " not in lines[0]:
            return "no remedy"
        if left == [RUN]:
            code, _, err, _ = self.run(where, ["fit", "-c", VALID])
            return None if code == 0 else f"the valid command can't use RUN: {err}"
        return f"left behind: {left}" if left else None

    def _judge_run(self, tried: Case, where: Path, out: str, left: list[str]) -> str | None:
        from transformers import AutoModelForCausalLM

        if "eval" in tried.args and "perplexity" in out:
            return f"left behind: {left}" if left else None
        if set(QUIET) & set(tried.args) or any(arg.endswith(".help") for arg in tried.args):
            return f"left behind: {left}" if left else None
        if (found := re.search(r"^(.*): [\d.]+ bits per quantised weight", out, re.MULTILINE)) is None:
            dry = "dry run: one batch" in out
            return None if dry and not left else f"code 0 without a run; left: {left}"
        if [path for path in where.rglob("*") if path.name.endswith((".tmp", ".ckpt")) or path.name.startswith(".dry")]:
            return "half-written files"
        model = (where / found[1]).resolve()
        with contextlib.redirect_stderr(io.StringIO()):
            _, info = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)
        return "weights are missing" if info["missing_keys"] else None


def main() -> int:
    """Try seeds: `17`, or `0:200`; 1 where one failed. `--keep DIR` keeps the directories of those."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seeds", nargs="+")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--show", action="store_true", help="Print what each case wrote.")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # before they are imported
    import torch
    import transformers  # noqa: F401  (each case would import it anew)

    import ptql.calibration.trainer  # noqa: F401

    torch.set_num_threads(1)
    failed = tried = 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        fuzz = Fuzz(options.keep or Path(scratch))
        for given in options.seeds:
            first, _, last = given.partition(":")
            for seed in range(int(first), int(last or int(first) + 1)):
                tried += 1
                wrong = fuzz.try_seed(seed)
                if options.show:
                    print(seed, case(seed, fuzz.base).said)
                if wrong is not None:
                    failed += 1
                    print(f"{wrong}\n", flush=True)
    print(f"{failed} of {tried} failed, {time.monotonic() - began:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
