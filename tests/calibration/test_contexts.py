"""Each block is run with its own keyword arguments, in calibration and evaluation; what blocks share stays one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ptql.calibration.activations import Streams, move
from ptql.checkpoint import Checkpoint
from ptql.evaluation.perplexity import perplexity, token_losses, window_losses
from ptql.nn.student import weights_of
from tests.models import FAMILIES, block_calls, gemma3_config, mistral_config, random_model, save, some_ids

IDS = some_ids(samples=5, tokens=20)  # longer than the window of attention that slides


@pytest.mark.parametrize("name", FAMILIES)
def test_streams_go_from_block_to_block_with_each_ones_arguments(tmp_path: Path, name: str) -> None:
    model = random_model(FAMILIES[name])
    source = Checkpoint(save(model, tmp_path / "model"))
    streams = Streams(source.shell(), IDS, 2, torch.device("cpu"))
    for index, (hidden, _, output) in enumerate(block_calls(model, IDS)):
        torch.testing.assert_close(streams.quantised, hidden, rtol=1e-4, atol=1e-4)
        block = source.block(index)
        streams.teach(block, source.layout, ("fp",))
        torch.testing.assert_close(streams.fp, output, rtol=1e-4, atol=1e-4)
        streams.advance(streams.output(block, weights_of(block)))
        torch.testing.assert_close(streams.quantised, output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_perplexity_gives_each_block_its_own(tmp_path: Path, name: str) -> None:
    model = random_model(FAMILIES[name])
    losses = token_losses(model(IDS, use_cache=False).logits, IDS) / (5 * 19)
    found = window_losses(Checkpoint(save(model, tmp_path / "model")), IDS, torch.device("cpu"), 2)
    assert perplexity(found, IDS.shape[1]) == pytest.approx(losses.exp().item(), rel=1e-4)


def test_a_tensor_that_is_there_twice_is_moved_once() -> None:
    mask, cosines = torch.ones(2), torch.zeros(3)
    contexts = [{"mask": mask, "rope": (cosines, cosines)}, {"mask": mask, "rope": (cosines, torch.zeros(3))}]
    first, second = move(contexts, torch.device("meta"))
    assert first["mask"].is_meta
    assert first["mask"] is second["mask"]
    assert first["rope"][0] is first["rope"][1] is second["rope"][0]
    assert second["rope"][1] is not first["rope"][0]
    assert not mask.is_meta


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_a_models_masks_are_as_many_as_there_are_kinds(tmp_path: Path, name: str) -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    mistral = mistral_config(num_hidden_layers=4)
    config = mistral if name == "mistral" else gemma3_config(num_hidden_layers=4, layer_types=kinds)
    _, contexts = Checkpoint(save(random_model(config), tmp_path / "model")).shell().embed(IDS)
    masks = [context["attention_mask"] for context in contexts if context["attention_mask"] is not None]
    assert len(masks) == (4 if name == "mistral" else 2)
    assert len({id(mask) for mask in masks}) == 1
    ropes: list[tuple[Tensor, Tensor]] = [context["position_embeddings"] for context in contexts]
    assert len({id(rope[0]) for rope in ropes}) == (1 if name == "mistral" else 2)
