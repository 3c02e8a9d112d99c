"""The plan of a run: which layers are compressed, at which ratio, and how many bits they may take together."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..budget import RATIO, Layer, ModelBudget, Unit
from ..methods import Method
from ..methods.reach import Reach, bits_at, reach_of
from ..models.architectures import find_layers
from ..models.linears import dense_weight
from ..runtime.configuration import CompressionConfig, DefaultRatio, DerivedRatio
from ..runtime.errors import CompressionError
from ..runtime.experts import ExpertBank
from .embeddings import embedding_bits
from .selection import left_out, select_layers, uncalled_layers
from .weight_files import bytes_beside

DECIDED_DIGITS = 6
"""Decimals of a ratio that follows from the options of the method."""

LEAST_BLOCK_BITS = {0: 8.5, 8: 5.0, 6: 3.0, 4: 0.0}
"""Stored bits per weight that the blocks must have beside embeddings of so many bits, where a size chooses these.

Dense embeddings (0) are for blocks that lose next to nothing. On a model of 135 M parameters embeddings lose about
0.0025 nats at 8 bits and 0.005 to 0.01 at 6, which the blocks win back only where they have few bits. The thresholds
are estimates: whole models were not compared.
"""

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
        unit: the unit in which the recipe says how small the model becomes.
        embeddings: bits of a value of the embeddings and the head, 0 if they stay dense.
        uncalled: reasons of layers that calibration never called, by name.
    """

    model: PreTrainedModel
    layers: list[Layer]
    method: Method
    config: CompressionConfig
    budget: ModelBudget
    unit: Unit = RATIO
    embeddings: int = 0
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
        reach = reach_of(self.method, compressed, dense, self.budget, self.unit)
        return Selection(compressed, dense, reasons, reach)

    def ratio(self) -> float:
        """Return the ratio of the recipe, that of its bits or its size, or else what the method's options lead to.

        Options that say the size of every layer say the ratio, too. Options that say how large a layer can be at most
        raise the default.
        """
        if self.unit is not RATIO:
            return DerivedRatio(self.unit.ratio(getattr(self.config, self.unit.name)))
        default = self.config.ratio
        if not isinstance(default, DefaultRatio):
            return default
        reach = self.at(default).reach
        steps = 10**DECIDED_DIGITS
        if self.method.size_is_set:
            return math.floor(reach.most * steps) / steps
        return max(float(default), math.ceil(reach.least * steps) / steps)

    def at_own_ratio(self) -> Selection:
        """Select the layers at the ratio of the recipe, or at the nearest one that a recipe could name."""
        return self.at(min(max(self.ratio(), 0.0), 1.0))

    def available_bits(self, selection: Selection, ratio: float, others: Sequence["Selector"] = ()) -> int:
        """Return the bits that the selected layers may take together at a ratio.

        Args:
            others: the same with other embeddings. What one of them can reach is within reach, too.

        Raises:
            CompressionError: if the method cannot reach the ratio, naming those that it can.
        """

        def bounds() -> tuple[float, float] | None:
            found = [self._bounds(selection), *(other._bounds(other.at_own_ratio()) for other in others)]
            ends = [pair for pair in found if pair is not None]
            return (min(least for least, _ in ends), max(most for _, most in ends)) if ends else None

        return bits_at(selection.reach, ratio, bounds)

    def _bounds(self, selection: Selection) -> tuple[float, float] | None:
        """Return the least and the greatest value that is within reach of the layers that are selected at it."""
        least, most = self._bound(selection, 0), self._bound(selection, 1)
        return None if least is None or most is None else (least, most)

    def _bound(self, selection: Selection, end: int) -> float | None:
        """Return one end of the values within reach: the least (0) or the greatest (1)."""
        for _ in range(MOST_SELECTIONS):
            bounds = selection.reach.bounds()
            if bounds is None:
                return None
            ratio = self.unit.ratio(bounds[end])
            try:
                selection = self.at(ratio)
            except CompressionError:  # no layer is left at that ratio
                return None
            if selection.reach.holds(ratio):
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
        embeddings: bits of a value of the embeddings and the head, 0 if they stay dense.
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
    embeddings: int
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
        selector = make_selector(model, self.config, self.method, self.blocks, self.embeddings)
        selector = replace(selector, uncalled=uncalled)
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
    selectors = [make_selector(model, config, method, blocks, bits) for bits in embedding_bits(config, model)]
    selector = choose_embeddings(selectors)
    ratio, selection = selector.ratio(), selector.at_own_ratio()
    available_bits = selector.available_bits(selection, ratio, [other for other in selectors if other != selector])
    if config.size is not None and selector.embeddings:
        config = replace(config, embeddings=selector.embeddings)
    return Plan(
        config=replace(config, ratio=ratio),
        method=method,
        blocks=blocks,
        expert_banks=expert_banks,
        compressed=selection.compressed,
        dense=selection.dense,
        reasons=selection.reasons,
        budget=replace(selector.budget, ratio=ratio),
        available_bits=available_bits,
        embeddings=selector.embeddings,
        warnings=left_out(model, blocks),
    )


def choose_embeddings(selectors: Sequence[Selector]) -> Selector:
    """Return the selector with the embeddings that lose least at a size.

    Every byte is for the embeddings or for the blocks. Embeddings take the most bits beside which the blocks have as
    many as `LEAST_BLOCK_BITS` says, if the method can then reach the size.

    Args:
        selectors: by falling bits of the embeddings, or only one.
    """
    if len(selectors) == 1:
        return selectors[0]
    enough = [selector for selector in selectors if _block_bits(selector) >= LEAST_BLOCK_BITS[selector.embeddings]]
    preferred = enough[0] if enough else selectors[-1]
    within_reach = [selector for selector in (preferred, *selectors) if _is_within_reach(selector)]
    return within_reach[0] if within_reach else preferred


def _block_bits(selector: Selector) -> float:
    """Return the bits per weight that the linear layers of the blocks have at the size of a recipe."""
    return selector.budget.bits_per_weight(selector.layers).value(selector.ratio())


def _is_within_reach(selector: Selector) -> bool:
    try:
        return selector.at_own_ratio().reach.holds(selector.ratio())
    except CompressionError:  # no layer is left at that ratio
        return False


def make_selector(
    model: PreTrainedModel,
    config: CompressionConfig,
    method: Method,
    blocks: dict[str, nn.Module],
    embeddings: int = 0,
) -> Selector:
    """Return what selects the layers of a model. Values count in the dtype that each layer has now.

    Args:
        embeddings: bits of a value of the embeddings and the head, 0 if they stay dense.
    """
    layers = find_layers(blocks)
    value_bits, bias_bits = {}, {}
    for layer in layers:
        module = model.get_submodule(layer.name)
        value_bits[layer.name] = dense_weight(module).dtype.itemsize * 8
        bias = module.bias
        bias_bits[layer.name] = bias.numel() * bias.itemsize * 8 if isinstance(bias, Tensor) else 0
    budget = ModelBudget(config.ratio, value_bits, bias_bits, config.accounting)
    unit = RATIO
    if config.bits is not None:
        unit = budget.bits_per_weight(layers)
    elif config.size is not None:
        unit = budget.file_bytes(layers, bytes_beside(model, layers, method, embeddings))
    return Selector(model, layers, method, config, budget, unit, embeddings)
