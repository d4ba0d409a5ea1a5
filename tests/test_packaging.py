"""What is installed: the wheel holds callbacks/ and configs/ as packages, and both installations work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def output(*command: str | Path, cwd: Path) -> str:
    """What a command prints, run without any hint at the checkout."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the checkout stays as it is."""
    copy, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("ptql", "callbacks", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    output(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, cwd=copy)
    (found,) = out.glob("ptql-*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin/ of a fresh environment: our wheel, and this environment's packages but not its editable ptql."""
    home = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(home, with_pip=False)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)}))
    pip = (sys.executable, "-m", "pip", "--python", home / "bin/python", "install", "--no-deps", "--no-index")
    output(*pip, "--no-warn-script-location", wheel, cwd=home)
    # A path in a .pth file is searched last, and the .pth files in there (the editable install) are not read.
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin"


def test_the_wheel_holds_every_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    places = {"ptql": "ptql", "callbacks": "ptql/callbacks", "configs": "ptql/configs"}
    wanted = {
        f"{place}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, place in places.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml")
    }
    assert {"ptql/callbacks/progress.py", "ptql/configs/methods/lrquant.yaml", "ptql/configs/demo.yaml"} <= wanted
    assert wanted <= names
    others = {name for name in names - wanted if ".dist-info/" not in name}
    assert others == set()


def test_the_wheel_works_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    script = "import ptql, ptql.callbacks, ptql.configs; print(ptql.__file__, ptql.callbacks.__file__)"
    for path in output(installed / "python", "-c", script, cwd=tmp_path).split():
        assert Path(path).is_relative_to(installed.parent)
    assert "eval" in output(installed / "ptql", "--help", cwd=tmp_path)
    config = output(
        installed / "ptql", "fit", "-c", "methods/lrquant", "-c", "schemes/w2a16g64", "--print_config", cwd=tmp_path
    )
    assert "method: lrquant" in config
    assert "group_size: 64" in config


def test_the_requirements_are_those_of_the_project(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
    required = {line.removeprefix("Requires-Dist: ") for line in metadata.splitlines() if "Requires-Dist" in line}
    for name in ("torch", "lightning", "transformers", "torchmetrics", "peft", "lm-eval", "tensorboard", "safetensors"):
        assert any(line.startswith(name) for line in required), name
    (entries,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "ptql = ptql.cli:main" in entries


def test_the_editable_install_works_from_any_directory(tmp_path: Path) -> None:
    script = "import ptql, ptql.callbacks, ptql.configs; print(ptql.callbacks.__file__, ptql.__file__)"
    callbacks, library = output(sys.executable, "-c", script, cwd=tmp_path).split()
    assert Path(callbacks) == ROOT / "callbacks/__init__.py"
    assert Path(library) == ROOT / "ptql/__init__.py"
