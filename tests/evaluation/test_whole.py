"""A model that does not fit on the device is spread, and computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ptql.checkpoint import Checkpoint
from ptql.evaluation.whole import fits, load_whole, spread
from tests.models import llama_config, random_model, save, some_ids


@pytest.fixture
def model(tmp_path: Path) -> Checkpoint:
    return Checkpoint(save(random_model(llama_config(tie_word_embeddings=False)), tmp_path / "model"))


def test_parameters_are_those_of_the_model(model: Checkpoint) -> None:
    assert model.parameters == random_model(llama_config(tie_word_embeddings=False)).num_parameters()
    assert fits(model, torch.device("cpu"))


def test_a_model_fits_where_its_weights_leave_room(model: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    needed = 4 * model.parameters
    for free, enough in ((needed, False), (2 * needed, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**12))
        assert fits(model, gpu) is enough


@torch.no_grad()
def test_layers_on_the_disk_compute_the_same(model: Checkpoint) -> None:
    whole, parted = load_whole(model, torch.device("cpu")), spread(model, {"cpu": 60_000})
    assert "disk" in set(parted.hf_device_map.values())
    torch.testing.assert_close(parted(some_ids()).logits, whole(some_ids()).logits)
