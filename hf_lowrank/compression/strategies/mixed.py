"""The mixed strategy surveys what each layer could become, chooses within one budget, and then fits the layers.

The survey measures the dense model. Each layer is then fitted to targets that are corrected for the layers before it.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...budget import Layer
from ...calibration import (
    BlockBatch,
    CachedTensor,
    CorrectionSums,
    DenseReference,
    TokenBatch,
    are_residual_writers,
    correction_sums,
    input_stages,
    pack_statistics,
    run_block,
    unpack_statistics,
    with_unigram_sequences,
)
from ...execution.work_folder import Record
from ...methods import Method, Statistics
from ...methods.allocation import cheapest_choices
from ...methods.mixed import Choice, MixedMethod
from ...runtime.configuration import LayerSpec
from ...runtime.layers import CompressedLinear
from ..collecting import collect_statistics
from ..fallback import BudgetShares, BuildResult, build_with_fallback
from ..kept import KeptFindings
from ..loss import LossGradients, curvature, packed_output_grams, unpacked_output_gram
from ..report import LayerReport, relative_error
from ..resume import FINAL_STAGE
from ..session import BlockVisit, Session
from ..solving import report_on, solve_layers, survey_layers
from ..walk import Stage, walk, walk_back
from .base import Passes, Strategy, statistics_input


class Mixed(Strategy):
    """Compress every layer to what loses least for its bytes, fitted to the inputs that the layers before it give."""

    methods = MixedMethod

    @staticmethod
    def adapt_tokens(method: Method, tokens: list[TokenBatch], seed: int) -> list[TokenBatch]:
        """Draw the tokens of some sequences anew, so that text unlike the calibration text is met, too."""
        return with_unigram_sequences(tokens, cast(MixedMethod, method).unigram_share, seed)

    @staticmethod
    def compress(session: Session, batches: list[BlockBatch]) -> None:
        method = cast(MixedMethod, session.method)  # which declares this strategy
        gradients = curvature(session, batches)
        measure = _Measure(session, batches, gradients)
        walk(session, measure, batches)
        gradients.keep_inputs(len(session.plan.blocks))
        survey = _Survey(session, method, gradients, measure.findings)
        walk_back(session, survey, gradients.batches)
        for batch in batches:
            batch.rewind()
            batch.track_compressed()
        fit = _Fit(session, method, batches, survey.choices, measure.findings, survey.findings)
        walk(session, fit, batches)

    @staticmethod
    def passes(method: Method) -> Passes:
        """The capture, the statistics, the passes back, the dense passes, and those up to each layer of a block."""
        return Passes(forward=6, sums=2)

    @staticmethod
    def survey_bytes(layers: list[Layer]) -> int:
        """The compact statistics of every layer stay in the work folder until they are built."""
        inputs = {(layer.block, statistics_input(layer)): layer.in_features for layer in layers}
        return sum(2 * n**2 for n in inputs.values()) + sum(layer.out_features**2 for layer in layers)


def choose(
    session: Session, choices: dict[str, list[Choice]], layers: Iterable[Layer], available_bits: int
) -> dict[str, LayerSpec | None]:
    """Return one choice per layer within the budget, or None for a layer that stays dense."""
    options = {}
    for layer in layers:
        stored = [(session.plan.budget.stored_bits(layer, choice.spec), choice.loss) for choice in choices[layer.name]]
        # The dense layer is always possible, and loses nothing.
        options[layer.name] = [*stored, (session.plan.dense_bits(layer), 0.0)]
    chosen = cheapest_choices(options, available_bits)
    specs: dict[str, LayerSpec | None] = {}
    for name, position in chosen.items():
        stays_dense = position == len(choices[name])
        specs[name] = None if stays_dense else choices[name][position].spec
    return specs


class _Measure(Stage[dict[str, Statistics]]):
    """Collect the statistics of the inputs of each layer, and keep the inputs of each block for the way back.

    Attributes:
        findings: the statistics, in their compact form.
    """

    name = "statistics"
    surveys = True

    def __init__(self, session: Session, batches: list[BlockBatch], gradients: LossGradients) -> None:
        self.session = session
        self.batches = batches
        self.gradients = gradients
        self.findings = KeptFindings(session, self.name)

    def collect(self, visit: BlockVisit) -> dict[str, Statistics]:
        self.gradients.keep_inputs(visit.index)
        return collect_statistics(self.session, visit, self.batches)

    def solve(self, visit: BlockVisit, statistics: dict[str, Statistics]) -> Iterable[tuple[Layer, BuildResult]]:
        visit.findings = Record(*pack_statistics(statistics))
        return ()

    def accept(self, visit: BlockVisit) -> None:
        self.findings.put(visit)


class _Survey(Stage[dict[str, Tensor]]):
    """Measure what each layer of the dense model could become, and what that would lose, from the last block back.

    Attributes:
        choices: what each layer could become, by name.
        findings: the Gram matrices of the output gradients, in their compact form, beside the choices.
        affordable: stored bits per weight that the layers may take on average.
    """

    name = "choices"
    surveys = True

    def __init__(
        self, session: Session, method: MixedMethod, gradients: LossGradients, measured: KeptFindings
    ) -> None:
        self.session = session
        self.method = method
        self.gradients = gradients
        self.measured = measured
        self.choices: dict[str, list[Choice]] = {}
        self.findings = KeptFindings(session, self.name)
        weights = sum(layer.out_features * layer.in_features for layer in session.plan.compressed)
        self.affordable = session.plan.available_bits / max(weights, 1)

    def collect(self, visit: BlockVisit) -> dict[str, Tensor]:
        return packed_output_grams(self.gradients.at_layers(visit))

    def solve(self, visit: BlockVisit, statistics: dict[str, Tensor]) -> Iterable[tuple[Layer, BuildResult]]:
        # The losses are those of the matrices that the layers are built with, which are rounded.
        block_statistics = _BlockStatistics(self.measured.of(visit), statistics, self.session.device)
        found = survey_layers(self.session, visit.layers, examine=partial(self._examine, block_statistics))
        visit.findings = Record(statistics, found.facts)
        return ()

    def accept(self, visit: BlockVisit) -> None:
        assert visit.findings is not None
        for name, entries in visit.findings.facts.items():
            self.choices[name] = _choices_from(entries)
        self.findings.put(visit)

    def _examine(self, statistics: "_BlockStatistics", layer: Layer) -> Record:
        value_bits = self.session.plan.budget.value_bits[layer.name]
        weight = self.session.dense_weight(layer)
        choices = self.method.choices(layer, weight, statistics.of(layer), value_bits, self.affordable)
        return Record({}, {layer.name: _choice_entries(choices)})


def _choice_entries(choices: list[Choice]) -> list[Any]:
    """Return choices as plain values: the loss of each, and the fields in which its spec differs from the last one.

    A layer may have thousands of choices, each of them like the one before it.
    """
    names = [field.name for field in fields(LayerSpec)]
    entries: list[Any] = []
    last = LayerSpec()
    for choice in choices:
        changes = {}
        for name in names:
            value = getattr(choice.spec, name)
            if value != getattr(last, name):
                changes[name] = value
        entries.append([changes, choice.loss])
        last = choice.spec
    return entries


def _choices_from(entries: list[Any]) -> list[Choice]:
    """Return the choices that `_choice_entries` was given."""
    choices = []
    spec = LayerSpec()
    for changes, loss in entries:
        spec = replace(spec, **changes)
        choices.append(Choice(spec, loss))
    return choices


class _BlockStatistics:
    """The statistics of a block, from their compact form, layer by layer.

    Args:
        measured: the statistics of the inputs.
        output_grams: the Gram matrices of the output gradients.
        device: where the statistics are used.
    """

    def __init__(self, measured: Record, output_grams: dict[str, Tensor], device: torch.device) -> None:
        self.measured = measured
        self.output_grams = output_grams
        self.device = device

    def of(self, layer: Layer) -> Statistics:
        """Return the statistics of a layer. Its matrices are in memory as long as the result is."""
        statistics = unpack_statistics(layer.name, self.measured.tensors, self.measured.facts, self.device)
        output_gram = unpacked_output_gram(layer.name, self.output_grams, self.device)
        return replace(statistics, output_gram=output_gram)


class _Fit(Stage[_BlockStatistics]):
    """Build the layers of each block in the order of the data flow, each fitted to its inputs in the compressed model.

    Args:
        choices: what each layer could become, by name.
        measured: the statistics of the inputs, of every block.
        surveyed: the Gram matrices of the output gradients, of every block.
    """

    name = FINAL_STAGE

    def __init__(
        self,
        session: Session,
        method: MixedMethod,
        batches: list[BlockBatch],
        choices: dict[str, list[Choice]],
        measured: KeptFindings,
        surveyed: KeptFindings,
    ) -> None:
        self.session = session
        self.method = method
        self.batches = batches
        self.measured = measured
        self.surveyed = surveyed
        plan = session.plan

        def bits(layer: Layer, spec: LayerSpec | None) -> int:
            return plan.dense_bits(layer) if spec is None else plan.budget.stored_bits(layer, spec)

        def spread(layers: list[Layer], available_bits: int) -> dict[str, LayerSpec | None]:
            return choose(session, choices, layers, available_bits)

        chosen = choose(session, choices, plan.compressed, plan.available_bits)
        self.shares = BudgetShares(
            plan.compressed,
            chosen,
            session.log.kept_dense,
            bits=bits,
            dense_bits=plan.dense_bits,
            spread=spread,
        )
        self._outputs: list[CachedTensor] = []

    def collect(self, visit: BlockVisit) -> _BlockStatistics:
        """Return the statistics that were kept."""
        output_grams = self.surveyed.of(visit).tensors
        return _BlockStatistics(self.measured.of(visit), output_grams, self.session.device)

    def solve(self, visit: BlockVisit, statistics: _BlockStatistics) -> Iterator[tuple[Layer, BuildResult]]:
        session, index, block, batches = self.session, visit.index, visit.block, self.batches
        dense_block = copy.deepcopy(block)
        by_local_name = {visit.local_name(layer): layer for layer in visit.layers}
        modules = {name: block.get_submodule(name) for name in by_local_name}
        writers = session.group.broadcast(lambda: _residual_writers(visit, batches[0]))
        order = session.group.broadcast(lambda: input_stages(block, index, batches[0], modules))
        last_writer = _last_writer(order, writers)
        first_names = [names[0] for names in order]
        reference = DenseReference(dense_block, index, batches, first_names, output_of=last_writer)
        for names in order:
            correction = None
            if names[0] in writers:
                correction = "output" if names[0] == last_writer else "input"
            sums = correction_sums(reference, block, index, batches, names, correction, session.group)
            layers = [by_local_name[name] for name in names]
            to_build = self._layers_to_build(layers)
            build = partial(self._build, sums, statistics)
            yield from solve_layers(session, to_build, build=build)
        self._outputs = reference.outputs

    def propagate(self, visit: BlockVisit) -> None:
        for batch, hidden in zip(self.batches, self._outputs, strict=True):
            twin = batch.compressed_twin
            assert twin is not None
            twin.hidden = run_block(visit.block, visit.index, twin)
            batch.hidden = hidden.tensor
        self._outputs = []

    def _layers_to_build(self, layers: list[Layer]) -> list[Layer]:
        """Return the layers that do not stay dense, and log why the others do."""
        to_build = []
        for layer in layers:
            if self.shares[layer.name] is None:
                reason = f"{self.method.name} finds that its bytes are best spent on the dense layer"
                self.session.log.reasons[layer.name] = reason
            else:
                to_build.append(layer)
        return to_build

    def _build(self, sums: CorrectionSums | None, block_statistics: _BlockStatistics, layer: Layer) -> BuildResult:
        """Fit a layer to its inputs in the compressed model, or in the dense one if no token reaches it."""
        session = self.session
        spec, weight, statistics = self.shares[layer.name], session.dense_weight(layer), block_statistics.of(layer)
        assert spec is not None
        target, fitted_statistics = weight, statistics
        if sums is not None:
            target, fitted_statistics = sums.target(weight), sums.statistics(statistics)

        def build(damped: Statistics) -> CompressedLinear:
            return session.compressed_layer(layer, self.method.build(target, damped, spec))

        def report(compressed: CompressedLinear) -> LayerReport:
            return report_on(session, layer, compressed, weight, statistics)

        def fitted_error(compressed: CompressedLinear) -> float:
            return relative_error(target, compressed.to_dense(target.dtype), fitted_statistics)

        return build_with_fallback(fitted_statistics, build=build, report=report, fitted_error=fitted_error)


def _last_writer(order: list[list[str]], writers: list[str]) -> str | None:
    """Return the last layer in the order of the data flow that writes to the residual stream, if any does."""
    for names in reversed(order):
        for name in reversed(names):
            if name in writers:
                return name
    return None


def _residual_writers(visit: BlockVisit, batch: BlockBatch) -> list[str]:
    """Return the two layers that write to the residual stream, by their names in the block, or none if others do."""
    writing = [layer for layer in visit.layers if layer.role in ("output", "ffn_out")]
    by_role = {layer.role: visit.local_name(layer) for layer in writing}
    if len(by_role) != 2 or len(writing) != 2:
        return []
    modules: dict[str, nn.Module] = {name: visit.block.get_submodule(name) for name in by_role.values()}
    if not are_residual_writers(visit.block, visit.index, batch, modules):
        return []
    return list(by_role.values())
