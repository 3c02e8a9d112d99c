"""One run of `compress`: the model, the budget and the report, and what every strategy does with a block."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..budget import Layer, ModelBudget
from ..calibration import (
    ActivationCache,
    BlockBatch,
    TokenBatch,
    block_statistics,
    capture,
    compressed_input_sums,
    starts_new_block_list,
)
from ..execution.process_group import SINGLE_PROCESS, ProcessGroup
from ..execution.progress import Step
from ..execution.threads import parallel_slots
from ..execution.work_folder import Record, WorkFolder
from ..methods import Decomposition, Method, Statistics
from ..methods.allocation import check_reachable
from ..models.architectures import FeedForward, find_blocks, find_feed_forwards, find_layers, separate_experts
from ..models.linears import dense_weight, is_finite, permute_inputs, permute_outputs
from ..models.offloading import OffloadedBlocks, is_offloaded, return_memory
from ..runtime.configuration import CompressionConfig
from ..runtime.errors import CompressionError, NumericalError
from ..runtime.layers import CompressedLinear
from .fallback import BudgetShares, BuildResult, build_warnings
from .report import BlockRefinement, LayerReport, Report, layer_report, scarce_tokens
from .resume import (
    LogPosition,
    block_record,
    inputs_record,
    layer_from,
    layer_record,
    merged,
    replace_layer,
    restore_block,
    restore_inputs,
    restore_log,
)
from .selection import TIED, left_out, select_layers, uncalled_layers

T = TypeVar("T")


@dataclass
class BlockVisit:
    """A block in its turn.

    Attributes:
        index, name, block: which.
        layers: those of its layers that are to be compressed.
        found: what a survey found out about it; set by the caller, unless it is known from the work folder.
    """

    index: int
    name: str
    block: nn.Module
    layers: list[Layer]
    found: Record | None = None


class Run:
    """One run of `compress`: what is known about the model, what was done to it so far.

    Args:
        model: the dense model, which is compressed in place.
        step: told what is being done.
        group: the processes that work on it.

    Attributes:
        tokens: the calibration batches.
        banks: the fused experts, by name, that became layers of their own.
        compressed, dense: the layers to compress, and the others; `reasons` has why, by name.
        available: bits that the compressed layers may take together.
        reports: one entry per layer compressed so far.
        retried, bad: layers that came out bad, as in `Report`; `kept_dense` has the names of those that stay dense instead, in order.
        curve: SoCo's losses.
        orders: how the neurons of feed-forward networks were permuted, by the name of the layer that reads them.
        work: where finished blocks are recorded; None if nowhere.
        offloaded: the blocks, of a model that has them on disk; None if they are in memory.
        cache: where activations wait between blocks.
        original: a copy of the dense model, if blocks are to be refined; `refinement` has what that gave, block by block.
        gradients, output_grams: of the layers by name, for methods that need them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: CompressionConfig,
        method: Method,
        step: Step,
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self.model, self.config, self.method, self.step, self.group = model, config, method, step, group
        self.tokens: list[TokenBatch] = []
        self.blocks = find_blocks(model)
        self.offloaded = OffloadedBlocks(model) if is_offloaded(model) else None
        self.banks = separate_experts(self.blocks)
        if self.offloaded is not None:
            self.offloaded.separate_experts(self.banks)
        layers = find_layers(self.blocks)
        self.compressed, self.reasons = select_layers(model, layers, method, config)
        self.dense = [layer for layer in layers if layer.name in self.reasons]
        self.budget = model_budget(model, layers, config)
        self.available = check_reachable(method, self.compressed, self.dense, self.budget)
        self.warnings = left_out(model, self.blocks)
        self.reports: list[LayerReport] = []
        self.retried: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.kept_dense: list[str] = []
        self.curve: dict[str, list[float]] | None = None
        self.orders: dict[str, Tensor] = {}
        self.work: WorkFolder | None = None
        self.cache = ActivationCache()
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

    def walk(self, stage: str, batches: list[BlockBatch], surveys: bool = False) -> Iterator[BlockVisit]:
        """Every block in turn, whose layers the caller compresses; it moves the batches on to the next one.

        With a work folder, what becomes of a block is recorded under the name of the stage; what is recorded already is taken up
        as it was, and not given again. A stage that `surveys` only finds out about blocks, and is given those that it knows, too.
        """
        known = False
        done = 0
        count = sum(self.group.gather(len(batches)))
        for index, (name, block) in enumerate(self.blocks.items()):
            visit = BlockVisit(index, name, block, [layer for layer in self.compressed if layer.block == index])
            self.step(name, done, len(self.compressed))
            done += len(visit.layers)
            record = self.work.read(self.record_name(stage, index)) if self.work else None
            if self.work is not None and known and record is None:
                restore_inputs(batches, count, self.group, self.work, f"{stage}-inputs-{index:05}")
            known = record is not None
            if starts_new_block_list(batches, index):
                if self.offloaded is not None:
                    raise CompressionError(
                        f"{name} reads more than the block before it gives: {type(self.model).__name__} must be in memory as a whole"
                    )
                self.start_list(index, batches)
            if record is not None:
                self._take_up(visit, record, surveys)
                if surveys:
                    yield visit
                continue
            mark = LogPosition.of(self)
            self._fill(visit)
            yield visit
            if self.work is not None:
                self._record(self.work, stage, visit, mark, batches, count)
            if self.offloaded is not None:
                self.offloaded.unload(name)

    @staticmethod
    def record_name(stage: str, index: int) -> str:
        """The record of a block in the work folder."""
        return f"{stage}-{index:05}"

    def built_files(self) -> dict[str, Path]:
        """Where the weights of the finished blocks are, by the name of the block."""
        assert self.work is not None
        return {name: self.work.file(self.record_name("built", index)) for index, name in enumerate(self.blocks)}

    def _fill(self, visit: BlockVisit) -> None:
        """Bring a block that is on disk into memory, its neurons in the order that they were given."""
        if self.offloaded is None:
            return
        self.offloaded.load(visit.name)
        for network in find_feed_forwards(visit.block):
            if (order := self.orders.get(f"{visit.name}.{network.output}")) is not None:
                self.apply_order(visit, network, order)

    def _take_up(self, visit: BlockVisit, record: Record, surveyed: bool) -> None:
        restore_log(self, record.facts["notes"])
        if not surveyed:
            restore_block(visit.block, record, values=self.offloaded is None)
            return
        networks = {f"{visit.name}.{network.output}": network for network in find_feed_forwards(visit.block)}
        for name, order in record.facts["orders"].items():
            if name not in self.orders:
                self.orders[name] = torch.tensor(order)
                if self.offloaded is None:
                    self.apply_order(visit, networks[name], self.orders[name])
        visit.found = Record(record.tensors, record.facts["found"])

    def _record(
        self, work: WorkFolder, stage: str, visit: BlockVisit, mark: LogPosition, batches: list[BlockBatch], count: int
    ) -> None:
        notes = mark.notes_since(self)
        if visit.found is None:
            record = block_record(visit.block, notes)
        else:
            orders = {name: self.orders[name].tolist() for name in self.orders if name.startswith(f"{visit.name}.")}
            record = Record(visit.found.tensors, {"found": visit.found.facts, "notes": notes, "orders": orders})
        work.write(f"{stage}-inputs-{visit.index + 1:05}", inputs_record(batches, count, self.group, self.cache))
        work.write(self.record_name(stage, visit.index), record)
        work.discard(f"{stage}-inputs-{visit.index:05}")

    def gather(self, visit: BlockVisit, batches: list[BlockBatch]) -> dict[str, Statistics]:
        """Statistics of the block's layers; the batches move on to its dense outputs, unless the method is sequential."""
        index, block, method = visit.index, visit.block, self.method
        modules = {layer.name: self.model.get_submodule(layer.name) for layer in visit.layers}
        shifted = (
            compressed_input_sums(block, index, batches, modules, self.group)
            if method.needs_compressed_inputs
            else None
        )
        found = block_statistics(block, index, batches, modules, method.needs_gram, not method.sequential, self.group)
        statistics = {}
        for layer in visit.layers:
            known = found[layer.name]
            statistics[layer.name] = known or no_data(layer, modules[layer.name])
            if shifted is not None:
                statistics[layer.name] = shifted.extend(layer.name, statistics[layer.name])
            if layer.name in self.gradients:
                statistics[layer.name] = replace(statistics[layer.name], squared_gradients=self.gradients[layer.name])
            if layer.name in self.output_grams:
                statistics[layer.name] = replace(statistics[layer.name], output_gram=self.output_grams[layer.name])
        self.order_neurons(visit, statistics)
        if self.offloaded is None:
            return statistics
        statistics = self._shelved(statistics)
        return_memory()
        return statistics

    def _shelved(self, statistics: dict[str, Statistics]) -> dict[str, Statistics]:
        """The same with large Gram matrices in files, which are in memory only while they are used."""
        grams = {id(each.gram): each.gram for each in statistics.values() if each.gram is not None}
        waiting = {key: self.cache.put(gram).tensor for key, gram in grams.items()}
        return {name: replace(each, gram=waiting.get(id(each.gram))) for name, each in statistics.items()}

    def start_list(self, index: int, batches: list[BlockBatch]) -> None:
        """Take up the inputs of a block that does not go on from the one before it, from the model as it is by now where that is asked for.

        A decoder also reads the encoder's states: those of the compressed encoder, if the method is sequential.
        """
        follows = self.method.sequential or any(batch.compressed_twin is not None for batch in batches)
        now = batches
        if follows:
            now = capture(
                self.model, self.blocks, [batch.source for batch in batches if batch.source is not None], self.cache
            )
        for position, batch in enumerate(batches):
            if self.method.sequential:
                batches[position] = now[position]
                batches[position].hidden = batch.hidden
            elif batch.compressed_twin is not None:
                now[position].hidden = batch.compressed_twin.hidden
                batch.compressed_twin = now[position]
                batch.compressed_twin.enter_block_list(index)
            batches[position].enter_block_list(index)

    def order_neurons(self, visit: BlockVisit, statistics: dict[str, Statistics]) -> None:
        """Permute the neurons of the block's feed-forward networks once, as the method wants; the block's function is unchanged."""
        for network in find_feed_forwards(visit.block):
            output_name = f"{visit.name}.{network.output}"
            names = [f"{visit.name}.{name}" for name in network.inputs]
            if (
                output_name in self.orders
                or output_name not in statistics
                or any(self.reasons.get(name) == TIED for name in names)
            ):
                continue
            order = self.method.neuron_order(
                statistics[output_name], dense_weight(visit.block.get_submodule(network.output))
            )
            if order is not None:
                self.orders[output_name] = order
                self.apply_order(visit, network, order)
                statistics[output_name] = statistics[output_name].select(order)

    def apply_order(self, visit: BlockVisit, network: FeedForward, order: Tensor) -> None:
        """Permute the neurons of a feed-forward network of the block."""
        for model in (self.model, *([] if self.original is None else [self.original])):
            for name in network.inputs:
                doubled = torch.cat([order, order + len(order)]) if network.fused else order
                permute_outputs(model.get_submodule(f"{visit.name}.{name}"), doubled)
            permute_inputs(model.get_submodule(f"{visit.name}.{network.output}"), order)

    def weight(self, layer: Layer) -> Tensor:
        """The dense weight, (m, n) float64."""
        return dense_weight(self.model.get_submodule(layer.name)).double()

    def survey(self, layers: list[Layer], find: Callable[[Layer], Record]) -> Record:
        """What there is to know about the layers of a block; each is looked at by one of the processes."""
        named = {layer.name: layer for layer in layers}
        found = self.group.map_balanced(
            _costs(layers),
            lambda name: find(named[name]),
            lambda record: record,
            lambda name, record: record,
            self._threads(layers),
        )
        return merged(record for _, record in found)

    def build(self, layers: list[Layer], make: Callable[[Layer], BuildResult], shares: BudgetShares[Any]) -> None:
        """Put compressed layers in the place of dense ones, with their reports; each is made by one of the processes.

        Raises:
            NumericalError: if a layer can neither be made nor stay dense.
        """
        named = {layer.name: layer for layer in layers}

        def solve(name: str) -> BuildResult:
            self.step(name, len(self.reports), len(self.compressed))
            return make(named[name])

        def unpack(name: str, record: Record) -> BuildResult:
            return layer_from(record, self.model.get_submodule(name))

        for name, built in self.group.map_balanced(_costs(layers), solve, layer_record, unpack, self._threads(layers)):
            if (
                built.fault is not None
                and built.remedy is None
                and shares.keep_dense(named[name], at_any_price=built.layer is None)
            ):
                self.reasons[name] = (
                    f"{self.method.name} fails on it ({built.fault}); layers after it pay for leaving it dense"
                )
                continue
            if built.layer is None or built.report is None:
                raise NumericalError(
                    f"{name}: {self.method.name} fails ({built.fault}); leave the layer dense (modules_to_not_convert)"
                )
            if built.remedy is not None:
                self.retried[name] = f"{built.fault}; now {built.report.relative_error:.3g}, on {built.remedy}"
            elif built.fault is not None:
                self.failed[name] = f"{built.fault}, and no better when made again"
            replace_layer(self.model, name, built.layer)
            self.reports.append(built.report)
        if self.offloaded is not None:
            return_memory()

    def shares(
        self, now: dict[str, T], bits: Callable[[Layer, T], int], spread: Callable[[list[Layer], int], dict[str, T]]
    ) -> BudgetShares[T]:
        """What each layer may become; see `BudgetShares`."""
        return BudgetShares(self.compressed, now, bits, self.dense_bits, spread, self.kept_dense)

    def dense_bits(self, layer: Layer) -> int:
        """Bits of a layer that stays dense, of those that the compressed layers have together: without its bias."""
        return self.budget.dense_bits(layer) - self.budget.bias_bits[layer.name]

    def _threads(self, layers: list[Layer]) -> int:
        """How many of the layers are solved at a time."""
        largest = max((self.method.working_memory(layer) for layer in layers), default=0)
        return parallel_slots(largest) if self.model.device.type == "cpu" else 1

    def compressed_layer(self, layer: Layer, decomposition: Decomposition) -> CompressedLinear:
        """The layer that a decomposition stands for.

        Raises:
            NumericalError: if a stored value is not finite.
        """
        dense = self.model.get_submodule(layer.name)
        assert isinstance(dense.weight, Tensor)
        bias = dense.bias if isinstance(dense.bias, Tensor) else None
        made = decomposition.to_layer(layer.out_features, layer.in_features, bias, dense.weight.dtype)
        for name, parameter in made.named_parameters():
            if not is_finite(parameter):
                raise NumericalError(f"a {name} that is not finite in {parameter.dtype}; a wider dtype may hold it")
        return made

    def layer_report(
        self,
        layer: Layer,
        made: CompressedLinear,
        weight: Tensor,
        statistics: Statistics,
        spectrum: list[float] | None = None,
    ) -> LayerReport:
        """The report on a layer, made apart from the layer so that its decomposition, which is larger, is gone by then."""
        return layer_report(layer.name, made, weight, statistics, self.budget.dense_bits(layer), spectrum)

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
            retried=self.retried,
            bad=self.failed,
            warnings=self.warnings
            + scarce_tokens(self.reports, self.banks)
            + build_warnings(self.retried, self.failed, self.kept_dense),
            curve=self.curve,
            refinement=self.refinement,
        )


def model_budget(model: PreTrainedModel, layers: list[Layer], config: CompressionConfig) -> ModelBudget:
    """The budget of a model at the config's ratio; values count in the dtype that each layer has now."""
    value_bits, bias_bits = {}, {}
    for layer in layers:
        module = model.get_submodule(layer.name)
        value_bits[layer.name] = dense_weight(module).dtype.itemsize * 8
        bias_bits[layer.name] = (
            module.bias.numel() * module.bias.itemsize * 8 if isinstance(module.bias, Tensor) else 0
        )
    return ModelBudget(config.ratio, value_bits, bias_bits, config.accounting)


def _costs(layers: list[Layer]) -> dict[str, float]:
    """How much work the layers are, one against the other: that of a decomposition, m n min(m, n)."""
    return {
        layer.name: layer.out_features * layer.in_features * min(layer.out_features, layer.in_features)
        for layer in layers
    }


def no_data(layer: Layer, module: nn.Module) -> Statistics:
    """What stands in for the statistics of a layer that no token reached: all inputs count alike."""
    n, device = layer.in_features, dense_weight(module).device
    ones = torch.ones(n, dtype=torch.float64, device=device)
    return Statistics(tokens=0, column_norms=ones, mean=torch.zeros_like(ones), mean_abs=ones, gram=torch.diag(ones))
