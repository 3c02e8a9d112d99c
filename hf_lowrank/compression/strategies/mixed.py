"""What each layer could become, measured in the dense model; one budget for all; then stage by stage, each on corrected targets."""

import copy
from functools import partial

import torch
from torch import Tensor, nn

from ...budget import Layer
from ...calibration import (
    BlockBatch,
    CorrectionSums,
    DenseReference,
    are_residual_writers,
    correction_sums,
    input_stages,
    run_block,
)
from ...execution.work_folder import Record
from ...methods import Statistics
from ...methods.allocation import cheapest_choices
from ...methods.base import Choice, MixedMethod
from ...runtime.configuration import LayerSpec
from ..fallback import BudgetShares, BuildResult, build_with_fallback
from ..report import relative_error
from ..run import BlockVisit, Run

STATISTICS_IN_MEMORY = 2**28
"""Bytes of Gram matrices that are kept from the survey to the building; those of other blocks are summed once more."""


def mixed_strategy(run: Run, method: MixedMethod, batches: list[BlockBatch]) -> None:
    """Compress every layer to what loses least for its bytes, fitted to the inputs that the layers before it give."""
    choices: dict[str, list[Choice]] = {}
    surveyed: dict[str, dict[str, Statistics]] = {}  # by block, as far as they fit
    room = STATISTICS_IN_MEMORY
    for visit in run.walk("choices", batches, surveys=True):
        if visit.found is None:
            statistics = run.gather(visit, batches)
            visit.found = run.survey(visit.layers, partial(_choices, run, method, statistics))
            room -= sum(layer.in_features**2 * torch.float64.itemsize for layer in visit.layers)
            if room >= 0:
                surveyed[visit.name] = statistics
        for name, each in visit.found.facts.items():
            choices[name] = [Choice(LayerSpec.from_dict(name, spec), loss) for spec, loss in each]

    def bits(layer: Layer, spec: LayerSpec | None) -> int:
        return run.dense_bits(layer) if spec is None else run.budget.stored_bits(layer, spec)

    def spread(layers: list[Layer], available: int) -> dict[str, LayerSpec | None]:
        return _choose(run, {layer.name: choices[layer.name] for layer in layers}, available)

    shares = run.shares(_choose(run, choices, run.available), bits, spread)
    for batch in batches:
        batch.rewind()
        batch.track_compressed()
    for visit in run.walk("built", batches):
        dense = copy.deepcopy(visit.block)
        known = surveyed.pop(visit.name, None) or _regathered(run, visit, batches)
        outputs = _build_block(run, method, visit, dense, batches, shares, known)
        for batch, hidden in zip(batches, outputs, strict=True):
            assert batch.compressed_twin is not None
            batch.compressed_twin.hidden = run_block(visit.block, visit.index, batch.compressed_twin)
            batch.hidden = hidden


def _regathered(run: Run, visit: BlockVisit, batches: list[BlockBatch]) -> dict[str, Statistics]:
    """The statistics of the survey once more, where they were not kept."""
    inputs = [batch.hidden for batch in batches]
    statistics = run.gather(visit, batches)
    for batch, hidden in zip(batches, inputs, strict=True):
        batch.hidden = hidden
    return statistics


def _choices(run: Run, method: MixedMethod, statistics: dict[str, Statistics], layer: Layer) -> Record:
    found = method.choices(layer, run.weight(layer), statistics[layer.name], run.budget.value_bits[layer.name])
    return Record({}, {layer.name: [[choice.spec.to_dict(), choice.loss] for choice in found]})


def _choose(run: Run, choices: dict[str, list[Choice]], available: int) -> dict[str, LayerSpec | None]:
    """One choice per layer within the budget; None for a layer that stays dense."""
    layers = {layer.name: layer for layer in run.compressed}
    options = {
        name: [(run.budget.stored_bits(layers[name], choice.spec), choice.loss) for choice in each]
        + [(run.dense_bits(layers[name]), 0.0)]
        for name, each in choices.items()
    }
    taken = cheapest_choices(options, available)
    return {name: each[taken[name]].spec if taken[name] < len(each) else None for name, each in choices.items()}


def _build_block(
    run: Run,
    method: MixedMethod,
    visit: BlockVisit,
    dense: nn.Module,
    batches: list[BlockBatch],
    shares: BudgetShares[LayerSpec | None],
    statistics: dict[str, Statistics],
) -> list[Tensor]:
    """Make the layers of a block in the order of the data's way; its outputs as it was, of which `dense` is a copy."""
    index, block = visit.index, visit.block
    local = {layer.name.removeprefix(f"{visit.name}."): layer for layer in visit.layers}
    writers = run.group.broadcast(lambda: _stream_writers(visit, batches[0]))
    order = run.group.broadcast(
        lambda: input_stages(block, index, batches[0], {name: block.get_submodule(name) for name in local})
    )
    last = next((name for names in reversed(order) for name in reversed(names) if name in writers), None)
    passes = DenseReference(dense, index, batches, [names[0] for names in order], output_of=last)
    for names in order:
        writer = None if names[0] not in writers else "output" if names[0] == last else "input"
        sums = correction_sums(passes, block, index, batches, names, writer, run.group)
        layers = [local[name] for name in names]
        left = [layer.name for layer in layers if shares[layer.name] is None]
        run.reasons |= dict.fromkeys(left, f"{method.name} finds that its bytes are best spent on the dense layer")
        make = partial(_fitted, run, method, sums, shares, statistics)
        run.build([layer for layer in layers if layer.name not in left], make, shares)
    return passes.outputs


def _fitted(
    run: Run,
    method: MixedMethod,
    sums: CorrectionSums | None,
    shares: BudgetShares[LayerSpec | None],
    statistics: dict[str, Statistics],
    layer: Layer,
) -> BuildResult:
    """A layer fitted to the inputs that the layers before it give; to those of the dense model if no token reaches it."""
    spec, weight, known = shares[layer.name], run.weight(layer), statistics[layer.name]
    assert spec is not None
    target = weight if sums is None else sums.target(weight)
    fitted = known if sums is None else sums.statistics(known)
    return build_with_fallback(
        fitted,
        lambda each: run.compressed_layer(layer, method.build(target, each, spec)),
        lambda made: run.layer_report(layer, made, weight, known),
        lambda made: relative_error(target, made.to_dense(target.dtype), fitted),
    )


def _stream_writers(visit: BlockVisit, batch: BlockBatch) -> list[str]:
    """The two layers of a block that write to the residual stream, named within it; none if the block is not made that way."""
    writing = [layer for layer in visit.layers if layer.role in ("output", "ffn_out")]
    found = {layer.role: layer.name.removeprefix(f"{visit.name}.") for layer in writing}
    modules = {name: visit.block.get_submodule(name) for name in found.values()}
    if len(found) != 2 or len(writing) != 2 or not are_residual_writers(visit.block, visit.index, batch, modules):
        return []
    return list(found.values())
