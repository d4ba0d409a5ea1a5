"""What a block begins with that its inputs tell: fixed grids of activations, and where clipping begins."""

from __future__ import annotations

from ptql.calibration.activations import Streams
from ptql.calibration.block_task import BlockTask
from ptql.calibration.quant_lm import QuantLM
from ptql.calibration.static_ranges import find_grids
from ptql.families import BlockLayout


def begin_on_streams(task: BlockTask, streams: Streams, layout: BlockLayout, model: QuantLM) -> None:
    """Set what the recipe finds on the quantised stream before anything of a block is learned.

    Args:
        task: Of the block.
        streams: Stand before the block.
        layout: Of the block.
        model: The recipe.
    """
    find_grids(task, streams, layout, model.activation_quantizer)
    if model.weight_quantizer.begins_on_inputs:
        task.begin_on_weights(streams.inputs(task.student, layout, task.folded_weights()))
