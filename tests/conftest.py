"""Fixtures that every test may use: the models and texts that do not live in the repository."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not part of the installed package
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test reaches for a hub
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is: kernels are tested on the CPU then


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The texts and models beside the checkout; PTQL_SHARED names another place."""
    path = Path(os.environ.get("PTQL_SHARED") or ROOT.parent / "shared")
    if not path.is_dir():
        pytest.skip(f"{path} is not there: set PTQL_SHARED to the directory of shared texts and models")
    return path


@pytest.fixture(scope="session")
def stories_dir(shared_dir: Path) -> Path:
    """A real 1 MB model of the Llama type, for tests that run in seconds."""
    return shared_dir / "models" / "stories260k"


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct in float32, fetched once; PTQL_SMOLLM2 names a directory already made."""
    from benchmarks.smollm2 import DownloadError, fetch

    if ready := os.environ.get("PTQL_SMOLLM2"):
        return Path(ready)
    try:
        return fetch(ROOT / "models" / "SmolLM2-135M-Instruct")
    except DownloadError as error:
        pytest.skip(f"{error}; set PTQL_SMOLLM2 to a directory already made")


@pytest.fixture(scope="module")
def one_thread(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The tests of a file, and the runs that they share, have a cache of their own, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PTQL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The test works in its own directory, with its own cache, on one thread."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PTQL_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: on several cores, nothing long begins when all else is done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
