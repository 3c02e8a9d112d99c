"""One run of `compress`: the model, the budget and the report, and what every strategy does with a block."""

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..allocation import check_reachable
from ..architectures import find_blocks, find_feed_forwards, find_layers
from ..budget import Layer, ModelBudget
from ..calibration import BlockBatch, TokenBatch, block_statistics, capture, shifted_sums, starts_anew
from ..linears import dense_weight, permute_inputs, permute_outputs
from ..methods import Decomposition, Method, Statistics
from ..progress import Step
from ..report import BlockRefinement, LayerReport, Report, layer_report
from ..runtime.configuration import CompressionConfig
from ..runtime.errors import NumericalError
from ..runtime.layers import CompressedLinear
from ..runtime.quantizer import swap_module
from ..selection import TIED, left_out, select_layers, uncalled_layers


class Run:
    """One run of `compress`: what is known about the model, what was done to it so far.

    Args:
        model: the dense model, which is compressed in place.
        step: told what is being done.

    Attributes:
        tokens: the calibration batches.
        compressed, dense: the layers to compress, and the others; `reasons` has why, by name.
        available: bits that the compressed layers may take together.
        reports: one entry per layer compressed so far.
        curve: SoCo's losses.
        original: a copy of the dense model, if blocks are to be refined; `refinement` has what that gave, block by block.
        gradients, output_grams: of the layers by name, for methods that need them.
    """

    def __init__(self, model: PreTrainedModel, config: CompressionConfig, method: Method, step: Step) -> None:
        self.model, self.config, self.method, self.step = model, config, method, step
        self.tokens: list[TokenBatch] = []
        self.blocks = find_blocks(model)
        layers = find_layers(self.blocks)
        self.compressed, self.reasons = select_layers(model, layers, method, config)
        self.dense = [layer for layer in layers if layer.name in self.reasons]
        self.budget = model_budget(model, layers, config)
        self.available = check_reachable(method, self.compressed, self.dense, self.budget)
        self.warnings = left_out(model, self.blocks)
        self.reports: list[LayerReport] = []
        self.curve: dict[str, list[float]] | None = None
        self.original = copy.deepcopy(model) if config.refinement_steps else None
        self.refinement: list[BlockRefinement] | None = None
        self.gradients: dict[str, Tensor] = {}
        self.output_grams: dict[str, Tensor] = {}

    def leave_uncalled_dense(self, called: set[str]) -> None:
        """Layers that calibration never calls stay as they are.

        Raises:
            CompressionError: if the others cannot make up for them.
        """
        left = uncalled_layers(self.blocks, self.compressed, called)
        if left:
            self.reasons |= left
            self.dense += [layer for layer in self.compressed if layer.name in left]
            self.compressed = [layer for layer in self.compressed if layer.name not in left]
            name, reason = next(iter(left.items()))
            self.warnings.append(f"{len(left)} layers stay dense, such as {name}: {reason}")
            self.available = check_reachable(self.method, self.compressed, self.dense, self.budget)

    def walk(self) -> Iterator[tuple[int, nn.Module, list[Layer]]]:
        """(index, block, its layers to compress) for every block."""
        done = 0
        for index, (name, block) in enumerate(self.blocks.items()):
            layers = [layer for layer in self.compressed if layer.block == index]
            self.step(name, done, len(self.compressed))
            yield index, block, layers
            done += len(layers)

    def gather(self, index: int, block: nn.Module, layers: list[Layer], batches: list[BlockBatch]) -> dict[str, Statistics]:
        """Statistics of the block's layers; the batches move on to its dense outputs, unless the method is sequential."""
        if starts_anew(batches, index):
            self.start_list(index, batches)
        modules = {layer.name: self.model.get_submodule(layer.name) for layer in layers}
        shifted = shifted_sums(block, index, batches, modules) if self.method.needs_shifted else None
        found, outputs = block_statistics(block, index, batches, modules, self.method.needs_gram)
        if not self.method.sequential:
            for batch, output in zip(batches, outputs, strict=True):
                if self.method.needs_shifted and batch.shifted is None:
                    batch.shifted = BlockBatch(batch.hidden, batch.calls)
                batch.hidden = output
        statistics = {}
        for layer in layers:
            known = found[layer.name]
            if known is None:
                self.warnings.append(f"{layer.name} saw no calibration token; it is compressed without data")
            statistics[layer.name] = known or no_data(layer, modules[layer.name])
            if shifted is not None and known is not None:
                statistics[layer.name] = shifted.extend(layer.name, known)
            if layer.name in self.gradients:
                statistics[layer.name] = replace(statistics[layer.name], squared_gradients=self.gradients[layer.name])
            if layer.name in self.output_grams:
                statistics[layer.name] = replace(statistics[layer.name], output_gram=self.output_grams[layer.name])
        self.order_neurons(index, block, statistics)
        return statistics

    def start_list(self, index: int, batches: list[BlockBatch]) -> None:
        """Take up the inputs of a block that does not go on from the one before it, from the model as it is by now where that is asked for.

        A decoder also reads the encoder's states: those of the compressed encoder, if the method is sequential.
        """
        follows = self.method.sequential or any(batch.shifted is not None for batch in batches)
        now = capture(self.model, self.blocks, self.tokens) if follows else batches
        for position, batch in enumerate(batches):
            if self.method.sequential:
                batches[position] = now[position]
                batches[position].hidden = batch.hidden
            elif batch.shifted is not None:
                now[position].hidden = batch.shifted.hidden
                batch.shifted = now[position]
                batch.shifted.enter(index)
            batches[position].enter(index)

    def order_neurons(self, index: int, block: nn.Module, statistics: dict[str, Statistics]) -> None:
        """Permute the neurons of the block's feed-forward networks as the method wants; the function of the block is unchanged."""
        block_name = list(self.blocks)[index]
        for network in find_feed_forwards(block):
            output_name = f"{block_name}.{network.output}"
            names = [f"{block_name}.{name}" for name in network.inputs]
            if output_name not in statistics or any(self.reasons.get(name) == TIED for name in names):
                continue
            output = block.get_submodule(network.output)
            order = self.method.neuron_order(statistics[output_name], dense_weight(output))
            if order is None:
                continue
            for model in (self.model, *([] if self.original is None else [self.original])):
                for name in names:
                    permute_outputs(model.get_submodule(name), torch.cat([order, order + len(order)]) if network.fused else order)
                permute_inputs(model.get_submodule(output_name), order)
            statistics[output_name] = statistics[output_name].select(order)

    def weight(self, layer: Layer) -> Tensor:
        """The dense weight, (m, n) float64."""
        return dense_weight(self.model.get_submodule(layer.name)).double()

    def swap(
        self, layer: Layer, decomposition: Decomposition, weight: Tensor, statistics: Statistics, spectrum: list[float] | None = None
    ) -> None:
        """Put the compressed layer in place and report on it.

        Raises:
            NumericalError: if a stored value is not finite.
        """
        self.step(layer.name, len(self.reports), len(self.compressed))
        dense = self.model.get_submodule(layer.name)
        assert isinstance(dense.weight, Tensor)
        bias = dense.bias if isinstance(dense.bias, Tensor) else None
        made = decomposition.to_layer(layer.out_features, layer.in_features, bias, dense.weight.dtype)
        made.replaces_conv1d = isinstance(dense, Conv1D)
        for name, parameter in made.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise NumericalError(
                    f"{layer.name}: {self.method.name} gave a {name} that is not finite in {parameter.dtype}; use a wider dtype"
                )
        made.requires_grad_(dense.weight.requires_grad)
        swap_module(self.model, layer.name, made.train(dense.training))
        self.reports.append(layer_report(layer.name, made, weight, statistics, self.budget.dense_bits(layer), spectrum))

    def report(self) -> Report:
        layers = self.compressed + self.dense
        total = sum(self.budget.dense_bits(layer) for layer in layers)
        stored = {report.name: report.stored_bits for report in self.reports}
        bits = sum(stored.get(layer.name, self.budget.dense_bits(layer)) for layer in layers)
        masks = bits - sum(
            module.stored_bits("paper") if isinstance(module, CompressedLinear) else self.budget.dense_bits(layer)
            for layer in layers
            for module in [self.model.get_submodule(layer.name)]
        )
        return Report(
            method=self.method.name,
            ratio_asked=self.config.ratio,
            ratio_stored=1 - bits / total,
            ratio_paper=1 - (bits - masks) / total,
            accounting=self.config.accounting,
            layers=self.reports,
            dense=self.reasons,
            warnings=self.warnings,
            curve=self.curve,
            refinement=self.refinement,
        )


def model_budget(model: PreTrainedModel, layers: list[Layer], config: CompressionConfig) -> ModelBudget:
    """The budget of a model at the config's ratio; values count in the dtype that each layer has now."""
    value_bits, bias_bits = {}, {}
    for layer in layers:
        module = model.get_submodule(layer.name)
        value_bits[layer.name] = dense_weight(module).dtype.itemsize * 8
        bias_bits[layer.name] = module.bias.numel() * module.bias.itemsize * 8 if isinstance(module.bias, Tensor) else 0
    return ModelBudget(config.ratio, value_bits, bias_bits, config.accounting)


def no_data(layer: Layer, module: nn.Module) -> Statistics:
    """What stands in for the statistics of a layer that no token reached: all inputs count alike."""
    n, device = layer.in_features, dense_weight(module).device
    ones = torch.ones(n, dtype=torch.float64, device=device)
    return Statistics(tokens=0, column_norms=ones, mean=torch.zeros_like(ones), mean_abs=ones, gram=torch.diag(ones))
