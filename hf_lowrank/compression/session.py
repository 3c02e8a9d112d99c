"""The state of one run of `compress`: its log, and the session with everything that it works with."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..budget import Layer
from ..calibration import ActivationCache, Head, TokenBatch
from ..execution.process_group import SINGLE_PROCESS, ProcessGroup
from ..execution.progress import Step
from ..execution.work_folder import Record, WorkFolder
from ..methods import Decomposition, Method
from ..models.architectures import find_blocks, separate_experts
from ..models.linears import dense_weight, is_finite
from ..models.offloading import OffloadedBlocks, is_offloaded
from ..runtime.configuration import CompressionConfig
from ..runtime.errors import NumericalError
from ..runtime.layers import CompressedLinear
from .planning import Plan, make_plan
from .report import BlockRefinement, LayerReport


@dataclass(frozen=True)
class LogPosition:
    """How far the log of a run had come when the run entered a block."""

    reports: int
    warnings: int
    kept_dense: int
    names: frozenset[str]


@dataclass
class RunLog:
    """The log of what a run has done so far.

    A work folder records the entries about a block with the block. A resumed run restores them from there.

    Attributes:
        reports: one entry per compressed layer.
        warnings: warnings so far.
        reasons: why a layer stays dense, by name.
        retried: by name, what was wrong with a layer at first, and how it was built again.
        failed: by name, what is wrong with a layer that was no better then, and that had to be used all the same.
        kept_dense: names of the layers that stay dense as no attempt gave anything of use, in order.
        neuron_orders: how the neurons of feed-forward networks were permuted, by the name of the layer that reads
            them.
        curve: SoCo's loss, ratio and phase per step.
        refinement: one entry per refined block.
        embeddings: one entry for compressed embeddings, and one for a compressed head that is not tied to them.
    """

    reports: list[LayerReport] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    retried: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    kept_dense: list[str] = field(default_factory=list)
    neuron_orders: dict[str, Tensor] = field(default_factory=dict)
    curve: dict[str, list[float]] | None = None
    refinement: list[BlockRefinement] | None = None
    embeddings: list[dict[str, Any]] = field(default_factory=list)

    def position(self) -> LogPosition:
        """Return how far the log has come."""
        names = frozenset(self.reasons | self.retried | self.failed)
        return LogPosition(len(self.reports), len(self.warnings), len(self.kept_dense), names)

    def entries_since(self, position: LogPosition) -> dict[str, Any]:
        """Return what was logged after a position, as plain JSON values."""

        def new(entries: dict[str, str]) -> dict[str, str]:
            return {name: entry for name, entry in entries.items() if name not in position.names}

        return {
            "reports": [asdict(report) for report in self.reports[position.reports :]],
            "warnings": self.warnings[position.warnings :],
            "kept_dense": self.kept_dense[position.kept_dense :],
            "reasons": new(self.reasons),
            "retried": new(self.retried),
            "failed": new(self.failed),
        }

    def restore(self, entries: dict[str, Any]) -> None:
        """Log again what `entries_since` returned when the block was finished."""
        self.reports += [LayerReport(**report) for report in entries["reports"]]
        self.warnings += entries["warnings"]
        self.kept_dense += entries["kept_dense"]
        self.reasons |= entries["reasons"]
        self.retried |= entries["retried"]
        self.failed |= entries["failed"]


@dataclass
class BlockVisit:
    """A block while it is being worked on.

    Attributes:
        index: its position among the blocks.
        name: its module name.
        block: the module.
        layers: those of its layers that are to be compressed.
        findings: the result of a survey of the block, to be recorded. None for a stage that replaces layers.
    """

    index: int
    name: str
    block: nn.Module
    layers: list[Layer]
    findings: Record | None = None

    def local_name(self, layer: Layer) -> str:
        """Return the name of a layer within the block."""
        return layer.name.removeprefix(f"{self.name}.")


@dataclass
class Session:
    """Everything that a run works with.

    Attributes:
        model: the model, which is compressed in place.
        plan: the decisions that were taken beforehand.
        log: the log of what was done so far.
        show: shows the user which block or layer is being worked on.
        device: where a block is while it is worked on. All else is where the model is.
        group: the processes that work on the run.
        offloaded: the blocks of a model that has them on disk; None if they are in memory.
        dense_copy: a copy of the dense model, if blocks are to be refined.
        tokens: the calibration batches.
        work: the folder where finished blocks are recorded; None if nowhere.
        cache: where activations wait between blocks.
        squared_gradients: (∂L/∂W)² summed over the outputs, by layer, for methods with `needs_gradients`.
        output_grams: returns the Gram matrices of the output gradients, by layer, of the block that is visited, where
            they were measured before the walk.
        waiting: where activations of all blocks wait, and what was measured of them: in memory, and in files beyond a
            limit.
        head: what the model computes after its last block, once `head_is_known` (`head_of` in loss.py).
        head_gram: Gram matrix (n, n) of the inputs of the head, where embeddings are compressed and it is known.
    """

    model: PreTrainedModel
    plan: Plan
    log: RunLog
    show: Step
    device: torch.device
    group: ProcessGroup = SINGLE_PROCESS
    offloaded: OffloadedBlocks | None = None
    dense_copy: PreTrainedModel | None = None
    tokens: list[TokenBatch] = field(default_factory=list)
    work: WorkFolder | None = None
    cache: ActivationCache = field(init=False)
    squared_gradients: dict[str, Tensor] = field(default_factory=dict)
    output_grams: Callable[["BlockVisit"], dict[str, Tensor]] = lambda visit: {}
    waiting: ActivationCache = field(init=False)
    head: Head | None = None
    head_is_known: bool = False
    head_gram: Tensor | None = None

    def __post_init__(self) -> None:
        self.cache = ActivationCache(device=self.other_device)
        self.waiting = ActivationCache(temporary=True, device=self.other_device)

    @property
    def method(self) -> Method:
        return self.plan.method

    @property
    def other_device(self) -> torch.device | None:
        """The device where blocks are computed, if the model is not there itself."""
        return None if self.device == self.model.device else self.device

    def dense_weight(self, layer: Layer) -> Tensor:
        """Return the weight of a layer that is still dense, (m, n) float64."""
        return dense_weight(self.model.get_submodule(layer.name)).double()

    def compressed_layer(self, layer: Layer, decomposition: Decomposition) -> CompressedLinear:
        """Return the layer that stores a decomposition, rounded once to the dtype of the dense weight.

        Raises:
            NumericalError: if a stored value is not finite.
        """
        dense = self.model.get_submodule(layer.name)
        assert isinstance(dense.weight, Tensor)
        bias = dense.bias if isinstance(dense.bias, Tensor) else None
        compressed = decomposition.to_layer(layer.out_features, layer.in_features, bias, dense.weight.dtype)
        compressed.to(dense.weight.device)
        for name, parameter in compressed.named_parameters():
            if not is_finite(parameter):
                raise NumericalError(f"a {name} that is not finite in {parameter.dtype}; a wider dtype may hold it")
        return compressed

    def leave_uncalled_dense(self, called: set[str]) -> None:
        """Leave the layers dense that calibration never called, in the plan and in the log."""
        self.plan = self.plan.without_uncalled(self.model, called)
        self.log.reasons = dict(self.plan.reasons)
        self.log.warnings = list(self.plan.warnings)


def open_session(
    model: PreTrainedModel,
    config: CompressionConfig,
    method: Method,
    show: Step,
    group: ProcessGroup = SINGLE_PROCESS,
    device: torch.device | None = None,
) -> Session:
    """Plan a run, and open its session. Fused experts of the model become banks of linear layers.

    Args:
        device: where a block is while it is worked on, by default where the model is.

    Raises:
        CompressionError: if the model has no blocks of linear layers, or the ratio cannot be reached.
    """
    blocks = find_blocks(model)
    device = device or model.device
    offloaded = OffloadedBlocks(model, device) if is_offloaded(model) else None
    expert_banks = separate_experts(blocks)
    if offloaded is not None:
        offloaded.separate_experts(expert_banks)
    plan = make_plan(model, config, method, blocks, expert_banks)
    log = RunLog(reasons=dict(plan.reasons), warnings=list(plan.warnings))
    # The copy is taken after the experts were separated: both models then have the same module names.
    dense_copy = copy.deepcopy(model) if config.refinement_steps else None
    return Session(model, plan, log, show, device, group, offloaded, dense_copy)
