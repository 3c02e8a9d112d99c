"""The plan of a run: which layers are compressed, at which ratio, and how many bits they may take together."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..budget import Layer, ModelBudget
from ..methods import Method
from ..methods.allocation import Reach, bits_at, reach_of
from ..models.architectures import find_layers
from ..models.linears import dense_weight
from ..runtime.configuration import CompressionConfig, DefaultRatio
from ..runtime.errors import CompressionError
from ..runtime.experts import ExpertBank
from .selection import left_out, select_layers, uncalled_layers

DECIDED_DIGITS = 6
"""Decimals of a ratio that follows from the options of the method."""

MOST_SELECTIONS = 8
"""How often layers are selected anew to find a ratio that the layers selected at it can reach."""


@dataclass(frozen=True)
class Selection:
    """The layers that are compressed at one ratio.

    Attributes:
        compressed, dense: the linear layers of the blocks, in order.
        reasons: why a layer stays dense, by name.
        reach: the ratios that these layers can reach.
    """

    compressed: list[Layer]
    dense: list[Layer]
    reasons: dict[str, str]
    reach: Reach


@dataclass(frozen=True)
class Selector:
    """Selects the layers to compress, which some methods do differently at every ratio.

    Attributes:
        layers: all linear layers of the blocks.
        budget: counts the bits of a layer. Its own ratio plays no part.
        uncalled: reasons of layers that calibration never called, by name.
    """

    model: PreTrainedModel
    layers: list[Layer]
    method: Method
    config: CompressionConfig
    budget: ModelBudget
    uncalled: Mapping[str, str] = field(default_factory=dict)

    def at(self, ratio: float) -> Selection:
        """Select the layers at a ratio.

        Raises:
            CompressionError: if none is left to compress, or a pattern of `modules_to_not_convert` matches none.
        """
        left_dense = self.config.modules_to_not_convert
        chosen, reasons = select_layers(self.model, self.layers, self.method, ratio, left_dense)
        for layer in chosen:
            if layer.name in self.uncalled:
                reasons[layer.name] = self.uncalled[layer.name]
        compressed = [layer for layer in self.layers if layer.name not in reasons]
        dense = [layer for layer in self.layers if layer.name in reasons]
        return Selection(compressed, dense, reasons, reach_of(self.method, compressed, dense, self.budget))

    def ratio(self) -> float:
        """Return the ratio of the recipe, or without one the ratio that the options of the method lead to.

        Options that say the size of every layer say the ratio, too. Options that say how large a layer can be at most
        raise the default.
        """
        default = self.config.ratio
        if not isinstance(default, DefaultRatio):
            return default
        reach = self.at(default).reach
        steps = 10**DECIDED_DIGITS
        if self.method.size_is_set:
            return math.floor(reach.most * steps) / steps
        return max(float(default), math.ceil(reach.least * steps) / steps)

    def available_bits(self, selection: Selection, ratio: float) -> int:
        """Return the bits that the selected layers may take together at a ratio.

        Raises:
            CompressionError: if the method cannot reach the ratio, naming those that it can.
        """
        return bits_at(selection.reach, ratio, partial(self._bounds, selection))

    def _bounds(self, selection: Selection) -> tuple[float, float] | None:
        """Return the least and the greatest ratio that is within reach of the layers that are selected at it."""
        least, most = self._bound(selection, 0), self._bound(selection, 1)
        return None if least is None or most is None else (least, most)

    def _bound(self, selection: Selection, end: int) -> float | None:
        """Return one end of the ratios within reach: the least (0) or the greatest (1)."""
        for _ in range(MOST_SELECTIONS):
            bounds = selection.reach.bounds()
            if bounds is None:
                return None
            try:
                selection = self.at(bounds[end])
            except CompressionError:  # no layer is left at that ratio
                return None
            if selection.reach.holds(bounds[end]):
                return bounds[end]
        return None


@dataclass(frozen=True)
class Plan:
    """The decisions that are taken before the first block is touched.

    Attributes:
        config: the recipe, its ratio decided on.
        method: the method that it names, with its options.
        blocks: the blocks of the model by name, in order.
        expert_banks: the fused experts that were turned into banks of linear layers, by name.
        compressed: the layers to compress, in order.
        dense: the linear layers of the blocks that stay dense.
        reasons: why a layer stays dense, by name.
        budget: counts the bits of a layer, dense and compressed.
        available_bits: the bits that the compressed layers may take together.
        warnings: warnings about the plan.
    """

    config: CompressionConfig
    method: Method
    blocks: dict[str, nn.Module]
    expert_banks: dict[str, ExpertBank]
    compressed: list[Layer]
    dense: list[Layer]
    reasons: dict[str, str]
    budget: ModelBudget
    available_bits: int
    warnings: list[str]

    @property
    def dense_blocks(self) -> list[str]:
        """The names of the blocks of which no layer is compressed."""
        indices = {layer.block for layer in self.compressed}
        return [name for index, name in enumerate(self.blocks) if index not in indices]

    def dense_bits(self, layer: Layer) -> int:
        """Return the bits of a layer that stays dense. `available_bits` does not count its bias, nor does this."""
        return self.budget.dense_bits(layer) - self.budget.bias_bits[layer.name]

    def without_uncalled(self, model: PreTrainedModel, called: set[str]) -> "Plan":
        """Return the plan with the layers that calibration never called left dense.

        Args:
            called: names of the layers that at least one calibration batch came through.

        Raises:
            CompressionError: if the other layers cannot make up for them.
        """
        uncalled = uncalled_layers(self.blocks, self.compressed, called)
        if not uncalled:
            return self
        ratio = self.budget.ratio
        selector = Selector(model, find_layers(self.blocks), self.method, self.config, self.budget, uncalled)
        selection = selector.at(ratio)
        name, reason = next(iter(uncalled.items()))
        return replace(
            self,
            compressed=selection.compressed,
            dense=selection.dense,
            reasons=selection.reasons,
            available_bits=selector.available_bits(selection, ratio),
            warnings=[*self.warnings, f"{len(uncalled)} layers stay dense, such as {name}: {reason}"],
        )


def make_plan(
    model: PreTrainedModel,
    config: CompressionConfig,
    method: Method,
    blocks: dict[str, nn.Module],
    expert_banks: dict[str, ExpertBank],
) -> Plan:
    """Decide which layers are compressed, at which ratio, and how many bits they may take together.

    Args:
        blocks: the blocks of the model, their fused experts separated into `expert_banks`.

    Raises:
        CompressionError: if no layer is left to compress, or the method cannot reach the ratio.
    """
    selector = make_selector(model, config, method, blocks)
    ratio = selector.ratio()
    selection = selector.at(ratio)
    return Plan(
        config=replace(config, ratio=ratio),
        method=method,
        blocks=blocks,
        expert_banks=expert_banks,
        compressed=selection.compressed,
        dense=selection.dense,
        reasons=selection.reasons,
        budget=replace(selector.budget, ratio=ratio),
        available_bits=selector.available_bits(selection, ratio),
        warnings=left_out(model, blocks),
    )


def make_selector(
    model: PreTrainedModel, config: CompressionConfig, method: Method, blocks: dict[str, nn.Module]
) -> Selector:
    """Return what selects the layers of a model. Values count in the dtype that each layer has now."""
    layers = find_layers(blocks)
    value_bits, bias_bits = {}, {}
    for layer in layers:
        module = model.get_submodule(layer.name)
        value_bits[layer.name] = dense_weight(module).dtype.itemsize * 8
        bias = module.bias
        bias_bits[layer.name] = bias.numel() * bias.itemsize * 8 if isinstance(bias, Tensor) else 0
    budget = ModelBudget(config.ratio, value_bits, bias_bits, config.accounting)
    return Selector(model, layers, method, config, budget)
