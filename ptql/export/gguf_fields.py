"""The fields of a GGUF file that say what a model is, and how it computes. Names as in llama.cpp's converter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import gguf
from gguf import GGMLQuantizationType as Ggml
from transformers import PretrainedConfig

from ptql.checkpoint import Checkpoint
from ptql.export.gguf_architectures import rope_parameters

FILE_TYPES = {
    Ggml.TQ2_0: gguf.LlamaFileType.MOSTLY_TQ2_0,
    Ggml.Q2_K: gguf.LlamaFileType.MOSTLY_Q2_K,
    Ggml.Q3_K: gguf.LlamaFileType.MOSTLY_Q3_K_S,
    Ggml.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
    Ggml.Q4_1: gguf.LlamaFileType.MOSTLY_Q4_1,
    Ggml.Q4_K: gguf.LlamaFileType.MOSTLY_Q4_K_S,
    Ggml.Q5_0: gguf.LlamaFileType.MOSTLY_Q5_0,
    Ggml.Q5_1: gguf.LlamaFileType.MOSTLY_Q5_1,
    Ggml.Q5_K: gguf.LlamaFileType.MOSTLY_Q5_K_S,
    Ggml.Q6_K: gguf.LlamaFileType.MOSTLY_Q6_K,
    Ggml.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
}
"""What a file is called by the type of most of its matrices; only shown."""


def add_general(writer: gguf.GGUFWriter, model: Checkpoint, types: Sequence[Ggml]) -> None:
    """What the model is, for people; `types` are those of its quantised matrices."""
    folder = model.directory.resolve()
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(folder.parent.name if folder.name == "model" else folder.name)
    writer.add_quantized_by("ptql")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(FILE_TYPES[Counter(types).most_common(1)[0][0]])


def add_hyperparameters(writer: gguf.GGUFWriter, model: Checkpoint) -> None:
    """The fields that say the size of the model and how it computes."""
    config, site = model.config, model.layout.attention
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(_context(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(model.num_blocks)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(site.heads)
    writer.add_head_count_kv(site.kv_heads)
    writer.add_key_length(site.head_dim)
    writer.add_value_length(site.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(site.head_dim)
    rope = rope_parameters(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _context(config: PretrainedConfig) -> int:
    """The longest window; where attention slides, what it sees, as llama.cpp lets it see all: so far both agree."""
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    window = getattr(config, "sliding_window", None) if slides else None
    return min(config.max_position_embeddings, window or config.max_position_embeddings)
