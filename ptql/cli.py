"""The command line: `ptql fit`, `eval`, `restore`, `export`. Options are constructors' arguments; files give them too (-c)."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

from ptql.calibration.stopping import Stopped, end_with_parent
from ptql.disk import put_text
from ptql.errors import InputError, RunError, one_line
from ptql.parse_errors import check_sections, plain_message, told_as_input

CONFIGS = "ptql.configs"


def main(args: list[str] | None = None) -> int:
    """Run a command. 0: done; 2: the input was wrong, one line on stderr says how; 128 + n: stopped by signal n.

    1: something around the run broke (another process, for one); the same command goes on.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    end_with_parent()  # where this is one of several processes, started by the first
    try:
        run_command(sys.argv[1:] if args is None else args)
    except InputError as error:
        print(f"ptql: error: {one_line(error)}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"ptql: error: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return _stopped(130)
    except Stopped as stop:
        return _stopped(int(stop.code or 0))
    return 0


def _stopped(code: int) -> int:
    if code:  # of several processes, only the first one speaks
        print("ptql: stopped; the same command goes on from here", file=sys.stderr)
    return code


def run_command(args: list[str]) -> None:
    """Run a command; what `main` turns into exit codes is raised."""
    args = with_shipped_configs(args)
    if len(args) > 1 and args[0] == "export" and not args[1].startswith("-"):
        args = ["export", "--run", *args[1:]]  # `ptql export RUN --format …`
    # Imported here: a wrong -c need not wait for Lightning.
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

    from ptql.calibration.data import CalibrationData
    from ptql.calibration.quant_lm import QuantLM
    from ptql.calibration.trainer import BlockTrainer
    from ptql.callbacks import BlockCallback

    class Parser(LightningArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise InputError(plain_message(message))

    class SaveRunConfig(SaveConfigCallback, BlockCallback):
        """Writes the merged configuration to RUN/config.yaml when the run starts, learned or not."""

        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            return None

        def on_model_start(self, trainer: BlockTrainer, model: QuantLM) -> None:
            if trainer.is_global_zero:
                put_text(trainer.run_dir / "config.yaml", self.parser.dump(self.config))  # files that it named, too

    class CLI(LightningCLI):
        def init_parser(self, **kwargs: Any) -> Parser:
            kwargs.setdefault("dump_header", None)
            parser = Parser(**kwargs)
            parser.add_argument("-c", "--config", action="config", help="Configuration file; later ones win.")
            return parser

        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {name: {"model", "datamodule"} for name in ("fit", "eval", "restore", "export")}

        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            with told_as_input():
                super().parse_arguments(parser, args)
            check_sections(self.config)

        def _set_seed(self) -> None:
            with told_as_input():
                super()._set_seed()

        def instantiate_classes(self) -> None:
            with told_as_input():
                super().instantiate_classes()

        def _parse_ckpt_path(self) -> None:
            """Runs continue from their ledger, so there is no checkpoint whose settings could be merged in."""

    quieten()
    CLI(
        QuantLM,
        CalibrationData,
        trainer_class=BlockTrainer,
        trainer_defaults={
            "default_root_dir": "ptql-run",
            "devices": 1,
            "enable_model_summary": False,
            "log_every_n_steps": 10,
            "max_epochs": 20,
            "use_distributed_sampler": False,  # Lightning's own default is refused, as any value that changes nothing
        },
        seed_everything_default=2,
        save_config_callback=SaveRunConfig,
        auto_configure_optimizers=False,
        parser_kwargs={"prog": "ptql"},
        args=args,
    )


def quieten() -> None:
    """Leave out what Lightning says of itself, and its advice for trainings of another kind."""
    for chatty in ("pytorch.utilities.rank_zero", "pytorch.accelerators.cuda", "fabric.utilities.seed"):
        logging.getLogger(f"lightning.{chatty}").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="LightningCLI.s args parameter")  # main(args) is how tests call it
    warnings.filterwarnings("ignore", message=r".*module\(s\) in eval mode.*")  # on purpose
    warnings.filterwarnings("ignore", message=".*is smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated.*")  # a name of transformers 6
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # texts are tokens in memory
    warnings.filterwarnings("ignore", message="No seed found.*")
    warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match.*")  # DDP, as Lightning


def with_shipped_configs(args: list[str]) -> list[str]:
    """The arguments, with `-c methods/lrquant` made the path of the shipped file where no such file lies here."""
    found, config_next = [], False
    for arg in args:
        if config_next:
            found.append(_config_file(arg))
        elif arg.startswith("--config="):
            found.append("--config=" + _config_file(arg.removeprefix("--config=")))
        else:
            found.append(arg)
        config_next = arg in ("-c", "--config")
    return found


def _config_file(name: str) -> str:
    if _is_file(name):
        try:
            Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else f"byte {error.start} is not UTF-8"
            raise InputError(f"{name}: can't be read ({reason}); give a readable configuration file") from error
        return name
    short = name.removeprefix("configs/").removesuffix(".yaml")
    try:
        shipped = files(CONFIGS)
        if _is_file(path := str(shipped.joinpath(f"{short}.yaml"))):
            return path
        known = sorted(
            f"{folder.name}/{file.name.removesuffix('.yaml')}"
            for folder in shipped.iterdir()
            if folder.is_dir()
            for file in folder.iterdir()
            if file.name.endswith(".yaml")
        )
    except ModuleNotFoundError:
        known = []
    raise InputError(f"{name}: no such configuration file; a path, or one of the shipped: {', '.join(known)}")


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # too long for a name, or with a zero byte
        return False


if __name__ == "__main__":
    sys.exit(main())
