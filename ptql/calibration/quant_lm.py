"""The whole model as the command line sees it: a source and a recipe. Makes the tasks of single blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import nn

from ptql import __version__
from ptql.calibration.block_task import BlockTask
from ptql.checkpoint import Checkpoint, resolve
from ptql.engine.engine import Engine, EngineName
from ptql.errors import InputError
from ptql.formats.ptql import PackedFormat
from ptql.formats.published import Published
from ptql.nn.attention_probe import attach_probe
from ptql.nn.static_rounding import INPUTS
from ptql.nn.student import biased_linears, keep_narrow, make_student, weights_of
from ptql.parts import settings
from ptql.parts.activations import ActivationQuantizer, DynamicTokens
from ptql.parts.inputs import InputRange, SiteRange
from ptql.parts.objectives import Objective, Reconstruction
from ptql.parts.transforms import AddedBiases, BlockFacts, Transform
from ptql.parts.weights import Affine, WeightQuantizer
from ptql.parts.weights.column_clusters import cluster_counts, column_clusters
from ptql.recipe import (
    ActivationScheme,
    IntScheme,
    LayerFormat,
    LayerSchemes,
    StaticScheme,
    may_have_clusters,
    schemes_by_pattern,
)
from ptql.restoration.restored import Salience


def adamw(params: Iterable[Any]) -> torch.optim.Optimizer:
    """AdamW without weight decay, as in OmniQuant and LRQuant; parts bring their own learning rates."""
    return torch.optim.AdamW(params, weight_decay=0.0)


class QuantLM(LightningModule):
    """A causal language model to quantise, and the recipe.

    Args:
        source: Hugging Face model directory, or a hub id (owner/name).
        method: What the recipe is called in results.
        weight: Number format of the matrices in the blocks.
        activation: Number format of the activations in the blocks.
        layers: Bits of layers that differ, or their format, by pattern: {down_proj: 8}, {layers.0: {bits: 4}}. A
            pattern is a part of a layer's name, whole words between dots; later ones win.
        transforms: Rewrite each block's weights, in order, before rounding.
        weight_quantizer: Rounds the matrices.
        activation_quantizer: Rounds activations.
        objective: The loss of a block.
        optimizer: Learns the parameters of transforms and weight quantisers.
        published: File of published parameters (`omni_parameters.pth` and its like), from which each block begins;
            with --trainer.max_epochs 0 the published model is what comes out.
        engine: How a step is computed. `auto`: on a GPU by fused kernels, compiled and captured as CUDA graphs (what
            can't be captured is computed in another way, and said), on a CPU as `plain`. `eager`: the same pieces,
            neither compiled nor captured. `plain`: torch operations in float32, the reference.
        matmul: Precision of float32 matrix products on a GPU: `high` is TF32, `highest` is float32. What is folded
            and rounded is computed in float32 either way.
    """

    def __init__(
        self,
        source: str | None = None,
        method: str = "custom",
        weight: IntScheme = IntScheme(),  # noqa: B008
        activation: ActivationScheme = ActivationScheme(),  # noqa: B008
        layers: dict[str, LayerFormat] | None = None,
        transforms: list[Transform] | None = None,
        weight_quantizer: WeightQuantizer | None = None,
        activation_quantizer: ActivationQuantizer | None = None,
        objective: Objective | None = None,
        optimizer: OptimizerCallable = adamw,
        published: str | None = None,
        engine: EngineName = "auto",
        matmul: Literal["highest", "high"] = "high",
    ) -> None:
        super().__init__()
        self.matmul: Literal["highest", "high"] = matmul
        self.engine = Engine(engine)
        self.source = source
        self.method = method
        self.weight = weight
        self.activation = activation
        self.layers = dict(layers or {})
        self.layer_schemes = LayerSchemes(weight)
        """Formats of all matrices; what `layers` says comes in when the source is opened."""
        self.salience: Salience | None = None
        wanted = may_have_clusters(weight, self.layers)
        self.transforms = [
            t for t in transforms or [] if t.applies(weight, activation) or (wanted and t.site_clusters())
        ]
        self.weight_quantizer = weight_quantizer or Affine()
        self.activation_quantizer = activation_quantizer or DynamicTokens()
        if self.transforms and not self.weight_quantizer.takes_transforms:
            raise InputError(
                f"transforms: {type(self.transforms[0]).__name__} with {type(self.weight_quantizer).__name__}, whose "
                "constants are those of the weights as they are; leave the transforms out: []"
            )
        if len(watching := [type(t).__name__ for t in self.transforms if t.watches]) > 1:
            raise InputError(
                f"transforms: {', '.join(watching)}: channels are clustered once, for grids to know by which; leave one"
            )
        self.objective = objective or Reconstruction()
        self.optimizer = optimizer
        self.published = None if published is None else Published.read(Path(published))
        if self.published is not None and self.weight_quantizer.begins_on_weights:
            raise InputError(
                f"published={published}: blocks begin with its clipping, and a search would look for another; leave it "
                "or weight_quantizer.initial out"
            )

    def open(self) -> Checkpoint:
        """The source, for quantising: `InputError` if it is missing or quantised already."""
        if self.source is None:
            raise InputError("--model.source is missing: say which model; a directory or a hub id (owner/name)")
        source = Checkpoint(resolve(Path(self.source) if Path(self.source).exists() else self.source))
        if source.packed is not None:
            raise InputError(f"{self.source}: quantised by ptql already; give the original model")
        source.check_blocks()
        if self.published is not None:
            self.published.check(source.num_blocks)
        names = {
            f"{source.family.blocks}.{index}.{name}": f"{index}.{name}"
            for index in range(source.num_blocks)
            for name in source.layout.names
        }
        self.layer_schemes = schemes_by_pattern(self.weight, self.layers, names)
        self.weight_quantizer.check(self.layer_schemes)
        if self.layer_schemes.any_by_cluster and not self.site_clusters.keys() & set(INPUTS):
            raise InputError(
                "weight: clustered=true, and no transform makes clusters of what linear layers read; use "
                "-c methods/rptq, which has Permute, or --model.weight.clustered false, with a group_size perhaps"
            )
        self.take_salience(source)
        return source

    def take_salience(self, source: Checkpoint) -> None:
        """Let what a restored model brings decide which channels are salient, where something asks for that."""
        self.salience = Salience.beside(source.directory) if self.weight_quantizer.chooses_channels else None

    def identity(self) -> dict[str, Any]:
        """Every setting of the recipe that decides the result, as JSON values."""
        optimizer = self.optimizer([nn.Parameter(torch.zeros(1))])
        apart = {"layers": [list(pair) for pair in self.layers.items()]} if self.layers else {}  # in order: later win
        return {
            "ptql": __version__,
            "weight": self.weight.to_dict(),
            "activation": self.activation.to_dict(),
            **apart,
            **({} if self.salience is None else {"salience": self.salience.sha256}),
            "transforms": [settings(t) for t in self.transforms],
            "weight_quantizer": settings(self.weight_quantizer),
            "activation_quantizer": settings(self.activation_quantizer),
            "objective": settings(self.objective),
            "published": self.published and self.published.sha256,
            "engine": self.engine.name,
            "optimizer": {"class": type(optimizer).__name__, **_plain(optimizer.defaults)},
        }

    def added_biases(self, block: nn.Module, source: Checkpoint) -> AddedBiases:
        """Biases that the transforms need and a block of the source does not have."""
        added = AddedBiases()
        for transform in self.transforms:
            added |= transform.added_biases(source.layout, biased_linears(block, source.layout))
        return added

    @property
    def watches(self) -> bool:
        """Whether a transform has to know what the full-precision block shows on the quantised stream."""
        return any(transform.watches for transform in self.transforms)

    def gathered_norms(self, source: Checkpoint) -> frozenset[str]:
        """Norms that read their input in another order, as the transforms ask."""
        return frozenset().union(*(transform.gathered_norms(source.layout) for transform in self.transforms))

    def static_scheme(
        self, block: nn.Module, source: Checkpoint, activation: ActivationScheme | None = None
    ) -> StaticScheme | None:
        """What is rounded on fixed grids in `block`, one of the source; None where nothing is."""
        scheme = activation or self.activation
        return self.activation_quantizer.static_scheme(block, source.layout, scheme, self.site_clusters)

    @property
    def site_clusters(self) -> dict[str, int]:
        """Clusters of channels that transforms make at most in each row of a site."""
        found: dict[str, int] = {}
        for transform in self.transforms:
            found |= transform.site_clusters()
        return found

    def _stored_clusters(self, block: nn.Module, source: Checkpoint) -> dict[str, int]:
        """How many clusters are stored of each linear layer that has scales of clusters in any block."""
        schemes, blocks = self.layer_schemes, range(source.num_blocks)
        counts = cluster_counts(block, source.layout, self.site_clusters)
        return {name: n for name, n in counts.items() if any(schemes.of(index, name).by_cluster for index in blocks)}

    def packed_format(self, source: Checkpoint, added: AddedBiases) -> PackedFormat:
        """How the result is described in its config.json; `InputError` if it can't be."""
        block = source.empty_block(0)
        static = self.static_scheme(block, source)
        tokens = self.activation if static is None else ActivationScheme()  # rounded with a range for each
        for name in source.layout.names:
            rounding = self.activation_quantizer.for_linear(name, tokens)
            if rounding != DynamicTokens().for_linear(name, tokens):
                raise InputError(
                    f"activation_quantizer {type(self.activation_quantizer).__name__}: a packed model rounds each "
                    "token dynamically or on fixed grids, and nothing else can be stored; use DynamicTokens or "
                    "StaticClusters"
                )
        rounds_qkv = self.activation_quantizer.for_attention(self.activation) is not None
        schemes = self.layer_schemes
        return PackedFormat(
            method=self.method,
            weight=schemes.default,
            activation=tokens,
            qkv=rounds_qkv,
            blocks=source.family.blocks,
            attention=source.layout.attention.module,
            linears=source.layout.names,
            shifted_norms=tuple(sorted(added.norms)),
            added_biases=tuple(sorted(added.linears)),
            factor_rank=self.weight_quantizer.factor_rank if schemes.any_quantised else 0,
            layers={name: scheme for name, scheme in schemes.exceptions.items() if scheme != schemes.default},
            gathered_norms=tuple(sorted(self.gathered_norms(source))),
            static=static,
            clusters=self._stored_clusters(block, source),
        )

    def student(self, block: nn.Module, source: Checkpoint, activation: ActivationScheme | None = None) -> nn.Module:
        """Turn a block of the source into the quantised student, in place; `activation` in place of the recipe's."""
        added = self.added_biases(block, source)
        kernels = self.engine.kernels(next(block.parameters()).device)
        return make_student(
            block,
            source.layout,
            added,
            self.activation_quantizer,
            activation or self.activation,
            kernels,
            self.gathered_norms(source),
            self.static_scheme(block, source, activation),
        )

    def block_task(
        self,
        index: int,
        student: nn.Module,
        source: Checkpoint,
        ranges: dict[str, InputRange],
        context: dict[str, Any],
        objective: Objective | None = None,
        begin: bool = True,
        sites: Mapping[str, SiteRange] | None = None,
    ) -> BlockTask:
        """What learns block `index`, on the student's device.

        Args:
            index: Of the block, from 0.
            student: Made by `student`.
            source: Of the block.
            ranges: At the inputs of its linear layers.
            context: Its keyword arguments: mask, RoPE.
            objective: In place of the recipe's.
            begin: Let quantisers begin on the weights, if that takes nothing else; not needed where what was learned
                is at hand.
            sites: What the full-precision block showed on the quantised stream, for transforms that watch it.
        """
        facts = BlockFacts(source.layout, weights_of(student), ranges, index, source.num_blocks, sites)
        transforms, labels = [], {}
        for transform in self.transforms:
            transforms.append(transform.for_block(facts))
            facts = transforms[-1].after(facts)
            labels |= transforms[-1].labels
        schemes = {name: self.layer_schemes.of(index, name) for name in source.layout.names}
        weights, inputs = facts.weights, facts.ranges
        if self.salience is not None:
            inputs = self.salience.of(index, source, next(student.parameters()).device)
        clusters = column_clusters(student, source.layout, self.site_clusters, labels)
        quantizers = {}
        for name, scheme in schemes.items():
            if scheme.quantised:
                more = {"clusters": clusters[name]} if scheme.clustered else {}
                given = name, weights[f"{name}.weight"], scheme, inputs.get(name)
                quantizers[name] = self.weight_quantizer.for_linear(*given, **more)
        compares = objective or self.objective
        task = BlockTask(
            student,
            context,
            transforms,
            quantizers,
            compares,
            self.optimizer,
            source.dtype(),
            self.engine,
            attach_probe(student, source.layout, compares.attention),
            self.weight_quantizer.wants_moments,
        )
        device = next(student.parameters()).device
        if self.engine.kernels(device):
            keep_narrow(student)
        task = task.to(device)
        if self.published is not None:
            self.published.into(task, index)
            task.begin_here()
        elif begin and self.weight_quantizer.begins_on_weights and not self.weight_quantizer.begins_on_inputs:
            task.begin_on_weights()
        return task


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if isinstance(value, (str, int, float, bool, tuple, list))}
